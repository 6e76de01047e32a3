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

from probecache.errors import EmptyClassError, NoDirectionError, NonFiniteError, ShapeError
from probecache.fit.design import Chunks, Design, FoldSet, MethodFit, held_out_and_inner
from probecache.probe import Probe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike

__all__ = [
    "FoldSums",
    "MeanDifferenceFitter",
    "fit_difference_of_means",
    "fit_means",
    "gather_sums",
    "wide_pieces",
]

Floats = NDArray[np.float64]
# float64 copies of a chunk's rows are made piece by piece.
_PIECE_BYTES = 32 * 2**20
_SIDES = {True: "positive", False: "negative"}


@dataclass
class FoldSums:
    """Sums of rows per fold and class: all that differences of means need, whatever is left out."""

    hidden_size: int
    n_folds: int = 1
    sums: Floats = field(init=False)
    counts: NDArray[np.int64] = field(init=False)
    _norms: list[Floats] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = np.zeros((self.n_folds, 2, self.hidden_size))
        self.counts = np.zeros((self.n_folds, 2), dtype=np.int64)
        self._norms = []

    def update(
        self, rows: NDArray[Any], is_positive: NDArray[np.bool_], folds: NDArray[np.intp]
    ) -> None:
        """Take rows [m, hidden], the class of each, [m], and its fold, [m].

        Raises:
            ShapeError: another width.
            NonFiniteError: names the side and the row, counted from 0 over all updates.
        """
        for piece, wide in wide_pieces(rows, self.hidden_size):
            sides = is_positive[piece].astype(np.intp)
            norms = np.sqrt(np.einsum("nh,nh->n", wide, wide))
            self._require_finite(norms, sides)
            # One product adds every row where it belongs; the sums are the BLAS's, in float64.
            cells = folds[piece] * 2 + sides
            belongs = np.arange(self.n_folds * 2)[:, None] == cells
            self.sums += (belongs.astype(np.float64) @ wide).reshape(self.sums.shape)
            self.counts += np.bincount(cells, minlength=self.counts.size).reshape(-1, 2)
            self._norms.append(norms)

    def _require_finite(self, norms: Floats, sides: NDArray[np.intp]) -> None:
        bad = np.flatnonzero(~np.isfinite(norms))
        if len(bad):
            side = int(sides[bad[0]])
            row = int(self.counts[:, side].sum() + (sides[: bad[0]] == side).sum())
            raise NonFiniteError(
                f"expected finite activations, got NaN or Inf in row {row} of the "
                f"{_SIDES[bool(side)]} class; extract in bfloat16 or float32"
            )

    @property
    def n_rows(self) -> int:
        """Rows taken so far."""
        return int(self.counts.sum())

    @property
    def typical_norm(self) -> float:
        """Median norm of the rows taken so far."""
        return float(np.median(np.concatenate(self._norms)))

    @property
    def mean(self) -> Floats:
        """Mean of all rows, [hidden]."""
        return np.asarray(self.sums.sum(axis=(0, 1)) / self.n_rows)

    def class_means(self, left_out: FoldSet = ()) -> tuple[Floats, Floats]:
        """Means of the negative and the positive rows, [hidden] each, without some folds.

        Raises:
            EmptyClassError: a side has no rows.
        """
        kept = ~np.isin(np.arange(self.n_folds), left_out)
        counts = self.counts[kept].sum(axis=0)
        for side in (True, False):
            if not counts[int(side)]:
                without = f" without the folds {list(left_out)}" if left_out else ""
                raise EmptyClassError(
                    f"expected rows of the {_SIDES[side]} class{without}, got none"
                )
        means = self.sums[kept].sum(axis=0) / counts[:, None]
        return means[0], means[1]

    def probe(self) -> Probe:
        """The difference of means of all rows.

        Raises:
            EmptyClassError: a side got no rows.
            NoDirectionError: both means are equal.
        """
        negative, positive = self.class_means()
        raw = positive - negative
        norm = float(np.linalg.norm(raw))
        if not norm > 0:
            raise NoDirectionError(
                "expected the classes' means to differ, got equal ones, so there is no direction; "
                "at layer 0 the last token of both classes may be the same: use a deeper layer"
            )
        unit = raw / norm
        return Probe(
            direction=unit.astype(np.float32),
            raw_norm=norm,
            threshold=float(unit @ (positive + negative)) / 2,
            typical_norm=self.typical_norm,
            n_positive=int(self.counts[:, 1].sum()),
            n_negative=int(self.counts[:, 0].sum()),
        )


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


def gather_sums(chunks: Chunks, hidden_size: int, design: Design) -> FoldSums:
    """One passage over the rows; refuses as `FoldSums.update` and `FoldSums.probe` do."""
    found = FoldSums(hidden_size, max(design.n_folds, 1))
    folds = design.folds if design.folds is not None else np.zeros_like(design.groups)
    for owners, rows in chunks():
        found.update(rows, design.is_positive[owners], folds[owners])
    return found


def fit_means(chunks: Chunks, sums: FoldSums, design: Design) -> MethodFit:
    """The difference of means from the rows' sums; with folds in another passage.

    Raises:
        EmptyClassError, NoDirectionError: as `FoldSums.probe`.
    """
    probe = sums.probe()
    if design.folds is None:
        return MethodFit(probe)
    directions, thresholds = _directions(sums, design.fold_sets)
    scores = _example_scores(chunks, directions, thresholds, len(design.folds))
    by_set = dict(zip(design.fold_sets, scores, strict=True))
    return MethodFit(probe, *held_out_and_inner(design, by_set))


def _directions(sums: FoldSums, left_out: tuple[FoldSet, ...]) -> tuple[Floats, Floats]:
    """Unit directions [sets, hidden] and thresholds [sets]; equal means give a direction of 0."""
    means = np.array([sums.class_means(folds) for folds in left_out])
    raw = means[:, 1] - means[:, 0]
    norms = np.linalg.norm(raw, axis=1, keepdims=True)
    units = raw / np.where(norms > 0, norms, 1)
    return units, np.einsum("sh,sh->s", units, means.sum(axis=1)) / 2


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


def wide_pieces(rows: NDArray[Any], hidden_size: int) -> Iterator[tuple[slice, Floats]]:
    """Rows as float64, a piece at a time, with the place of each piece.

    Raises:
        ShapeError: another width.
    """
    if rows.ndim != 2 or rows.shape[1] != hidden_size:
        raise ShapeError(
            f"expected rows of width {hidden_size}, got {list(rows.shape)}; were both "
            "classes read from the same model?"
        )
    step = max(_PIECE_BYTES // (8 * max(hidden_size, 1)), 1)
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        yield piece, np.asarray(rows[piece], dtype=np.float64)


def _as_array(rows: Any) -> NDArray[Any]:
    # NumPy has no bfloat16, which most caches are kept in; float32 holds its numbers exactly.
    if str(getattr(rows, "dtype", "")) == "torch.bfloat16":
        rows = rows.float()
    return np.asarray(rows)
