"""The difference of means: rows in, one chunk at a time, a frozen `Probe` out.

Guarantee: sums are kept in float64 whatever the rows' dtype, because a mean of many rows in
bfloat16 loses the direction; memory is one row per fold and class and one number per row. NaN and
Inf are refused. Held-out scores cost a second passage over the rows and one direction per fold
left out, and each two of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from probecache.fit.design import Chunks, Design, FoldSet, MethodFit, held_out_and_inner
from probecache.fit.sums import FoldSums, wide_pieces
from probecache.probe import Probe

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["MeanDifferenceFitter", "fit_difference_of_means", "fit_means"]

Floats = NDArray[np.float64]


@dataclass
class MeanDifferenceFitter:
    """Gathers what the difference of means needs; `finish` gives the probe."""

    hidden_size: int
    _sums: FoldSums = field(init=False)

    def __post_init__(self) -> None:
        self._sums = FoldSums(self.hidden_size)

    def update(self, rows: NDArray[Any], *, positive: bool) -> None:
        """Take rows [n, hidden] of one side.

        Raises:
            ShapeError: another width.
            NonFiniteError: names the side and the row, counted from 0 over all updates.
        """
        count = len(rows)
        self._sums.update(rows, np.full(count, positive), np.zeros(count, dtype=np.intp))

    def finish(self) -> Probe:
        """The probe of everything taken so far.

        Raises:
            EmptyClassError: a side got no rows.
            NoDirectionError: both means are equal.
        """
        return self._sums.probe()


def fit_difference_of_means(positive: ArrayLike, negative: ArrayLike) -> Probe:
    """Fit the direction from the negative class's mean to the positive class's.

    With means m+ and m-, the direction is (m+ - m-) / |m+ - m-| and the threshold the projection of
    their midpoint. Classes weigh equally whatever their sizes. Optimal for Gaussian classes with
    one isotropic covariance; a baseline otherwise.

    Args:
        positive: rows of the positive class at one layer, [n_pos, hidden], any float dtype, in the
            residual stream's own units. A torch tensor on the CPU will do.
        negative: the same for the other class, [n_neg, hidden].

    Returns:
        A probe with a float32 unit direction. Means are accumulated in float64.

    Raises:
        ShapeError: widths differ.
        EmptyClassError: a class has no rows.
        NonFiniteError: names the class and the first bad row.
        NoDirectionError: the means are equal.

    Source: mass-mean probe, Marks & Tegmark 2023, arXiv:2310.06824.
    """
    sides = {True: _as_array(positive), False: _as_array(negative)}
    fitter = MeanDifferenceFitter(hidden_size=sides[True].shape[-1])
    for side, rows in sides.items():
        fitter.update(rows, positive=side)
    return fitter.finish()


def fit_means(
    chunks: Chunks, sums: FoldSums, design: Design, *, standardize: bool = False
) -> MethodFit:
    """The difference of means from the rows' sums; with folds in another passage.

    Args:
        chunks: the rows, for the held-out scores.
        sums: of the same rows; with squares where they are standardised.
        design: folds of the examples.
        standardize: divide each dimension by its standard deviation, and fold that back.

    Raises:
        EmptyClassError, NoDirectionError: as `FoldSums.probe`.
    """
    probe = sums.probe(sums.deviations() if standardize else None)
    if design.folds is None:
        return MethodFit(probe)
    found = [_direction(sums, folds, standardize) for folds in design.fold_sets]
    units, thresholds = (np.array(part) for part in zip(*found, strict=True))
    scores = _example_scores(chunks, units, thresholds, len(design.folds))
    by_set = dict(zip(design.fold_sets, scores, strict=True))
    return MethodFit(probe, *held_out_and_inner(design, by_set))


def _direction(sums: FoldSums, left_out: FoldSet, standardize: bool) -> tuple[Floats, float]:
    """Unit direction [hidden] and threshold; equal means give a direction of 0."""
    negative, positive = sums.class_means(left_out)
    raw = positive - negative
    if standardize:
        raw /= sums.deviations(left_out) ** 2
    unit = raw / (np.linalg.norm(raw) or 1.0)
    return unit, float(unit @ (positive + negative)) / 2


def _example_scores(chunks: Chunks, units: Floats, thresholds: Floats, n_examples: int) -> Floats:
    """Projections minus thresholds, averaged over each example's rows: [sets, n_examples]."""
    totals, counts = np.zeros((n_examples, len(units))), np.zeros(n_examples)
    for owners, rows in chunks():
        for piece, wide in wide_pieces(rows, units.shape[1]):
            # An example's rows mostly follow one another: added up in runs, then per example.
            own = owners[piece]
            starts = np.flatnonzero(np.diff(own, prepend=-1))
            runs = np.add.reduceat(wide @ units.T, starts, axis=0)
            np.add.at(totals, own[starts], runs)
            counts += np.bincount(own, minlength=n_examples)
    with np.errstate(invalid="ignore"):
        return np.asarray((totals / counts[:, None] - thresholds).T)


def _as_array(rows: Any) -> NDArray[Any]:
    # NumPy has no bfloat16, which most caches are kept in; float32 holds its numbers exactly.
    if str(getattr(rows, "dtype", "")) == "torch.bfloat16":
        rows = rows.float()
    return np.asarray(rows)
