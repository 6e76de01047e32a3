"""One layer, any of the methods: rows in, a `MethodFit` per method out.

Guarantee: the difference of means streams, whatever the number of rows. The others share one Gram
matrix of the rows (see gram.py), which serves every strength and every fold.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping

from probecache.errors import FitError
from probecache.fit.design import (
    Chunks,
    Design,
    Method,
    MethodFit,
    parse_methods,
    parse_strengths,
)
from probecache.fit.dual import fit_dual
from probecache.fit.gram import MOST_ROWS, hold_rows, may_be_held
from probecache.fit.means import fit_means
from probecache.fit.problem import Problem
from probecache.fit.sums import FoldSums, gather_sums, row_folds

__all__ = ["Design", "Method", "MethodFit", "fit_layer", "parse_methods", "parse_strengths"]


def fit_layer(
    chunks: Chunks,
    hidden_size: int,
    design: Design,
    methods: Iterable[Method],
    strength: float | Mapping[Method, float] | None = None,
    *,
    standardize: bool = False,
) -> dict[Method, MethodFit]:
    """Fit the methods at one layer.

    Rows are what is fitted: an example of many rows weighs as many. Each is scored by the mean over
    its rows.

    Args:
        chunks: gives an iterable of (owners int [m], rows [m, hidden]) each time it is called,
            always the same; `owners` are places in the design.
        hidden_size: width of the rows.
        design: classes, groups and folds of the examples.
        methods: which to fit.
        strength: of the regularisation, in scikit-learn's units: ridge's alpha, logistic's C, LDA's
            shrinkage. By method where several have one. None chooses: ridge by the squared error
            of left-out folds (groups where there are no folds), logistic from ridge's choice, LDA
            by Ledoit and Wolf's formula.
        standardize: divide each dimension by its standard deviation over the rows that are fitted
            on, and fold that back: directions and thresholds are always of activations.

    Returns:
        By method, in the order given.

    Raises:
        ShapeError: rows of another width.
        EmptyClassError: a class has no rows, or none are left without a fold.
        NonFiniteError: NaN or Inf; names the class and the row.
        NoDirectionError: the classes' means are equal.
        UsageError: a strength that a method cannot have.
    """
    methods = tuple(methods)
    strengths = parse_strengths(methods, strength)
    sums = gather_sums(chunks, hidden_size, design)
    if standardize:
        sums.take_squares(chunks, row_folds(design))
    found: dict[Method, MethodFit] = {}
    if Method.DIFFERENCE_OF_MEANS in methods:
        means = fit_means(chunks, sums, design, standardize=standardize)
        found[Method.DIFFERENCE_OF_MEANS] = means
    rest = {m: s for m, s in strengths.items() if m not in found}
    if rest and may_be_held(sums.n_rows, hidden_size):
        problem = Problem.of(hold_rows(chunks, sums), design, sums if standardize else None)
        found |= fit_dual(problem, design, sums, rest)
    elif rest:
        found |= _fit_by_passages(chunks, sums, design, rest, standardize=standardize)
    return {method: found[method] for method in methods}


def _fit_by_passages(
    chunks: Chunks,
    sums: FoldSums,
    design: Design,
    strengths: Mapping[Method, float | None],
    *,
    standardize: bool,
) -> dict[Method, MethodFit]:
    """Too many rows for a Gram matrix."""
    if importlib.util.find_spec("probecache.fit.primal") is None:
        raise FitError(
            f"expected at most {MOST_ROWS} rows of the width {sums.hidden_size} for "
            f"{', '.join(strengths)}, got {sums.n_rows}; take the difference of means, or fewer "
            "positions"
        )
    primal = importlib.import_module("probecache.fit.primal")
    return dict(
        primal.fit_many_rows(
            chunks, sums.hidden_size, design, tuple(strengths), strengths, standardize=standardize
        )
    )
