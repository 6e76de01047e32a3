"""One layer, any of the methods: rows in, a `MethodFit` per method out.

Guarantee: the difference of means streams, whatever the number of rows. The others share one Gram
matrix of the rows (see gram.py), which serves every strength and every fold.
"""

from __future__ import annotations

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
from probecache.fit.means import fit_means, gather_sums

__all__ = ["Design", "Method", "MethodFit", "fit_layer", "parse_methods"]


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
    found: dict[Method, MethodFit] = {}
    if Method.DIFFERENCE_OF_MEANS in methods and not standardize:
        found[Method.DIFFERENCE_OF_MEANS] = fit_means(chunks, sums, design)
    rest = [m for m in methods if m not in found]
    if rest:
        raise FitError(f"expected the difference of means, got {', '.join(strengths)}")
    return {method: found[method] for method in methods}
