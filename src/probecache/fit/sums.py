"""Sums over a layer's rows, one chunk at a time: means and standard deviations without any folds.

Guarantee: float64 throughout; squares are taken about the mean, because residual streams have one
that is large beside what varies. Memory is a row or two per fold and one number per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probecache.errors import (
    EmptyClassError,
    FitError,
    NoDirectionError,
    NonFiniteError,
    ShapeError,
)
from probecache.fit.design import Chunks, Design, FoldSet
from probecache.probe import Probe

__all__ = ["FoldSums", "gather_sums", "row_folds", "wide_pieces"]

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
    squares: Floats | None = field(init=False, default=None)
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

    def take_squares(self, chunks: Chunks, folds: NDArray[np.intp]) -> None:
        """In another passage, what `deviations` needs: squares about the mean, per fold."""
        self.squares, centre = np.zeros((self.n_folds, self.hidden_size)), self.mean
        for owners, rows in chunks():
            for piece, wide in wide_pieces(rows, self.hidden_size):
                belongs = np.arange(self.n_folds)[:, None] == folds[owners[piece]]
                self.squares += belongs.astype(np.float64) @ (wide - centre) ** 2

    def deviations(self, left_out: FoldSet = ()) -> Floats:
        """Standard deviation of each dimension, [hidden], over the rows without some folds.

        A dimension that varies by no more than rounding gets 1, as in scikit-learn.
        """
        if self.squares is None:
            raise FitError("expected squares of the rows, got none; call take_squares first")
        kept = ~np.isin(np.arange(self.n_folds), left_out)
        count, total = self.counts[kept].sum(), self.sums[kept].sum(axis=(0, 1))
        mean, rounding = total / count, np.finfo(np.float64).eps * count
        second = self.squares[kept].sum(axis=0) / count
        variance = second - (mean - self.mean) ** 2
        # What is left of two equal terms is their rounding, not its own.
        constant = variance <= rounding * second + (rounding * mean) ** 2
        return np.sqrt(np.where(constant, 1.0, variance))

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

    def probe(self, scale: Floats | None = None) -> Probe:
        """The difference of means of all rows.

        Args:
            scale: [hidden], by which rows are divided before it is taken; folded back.

        Raises:
            EmptyClassError: a side got no rows.
            NoDirectionError: both means are equal.
        """
        negative, positive = self.class_means()
        raw = positive - negative
        if scale is not None:
            raw = raw / scale**2
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


def gather_sums(chunks: Chunks, hidden_size: int, design: Design) -> FoldSums:
    """One passage over the rows.

    Raises:
        ShapeError, NonFiniteError: as `FoldSums.update`.
        EmptyClassError, NoDirectionError: as `FoldSums.probe`.
    """
    found = FoldSums(hidden_size, max(design.n_folds, 1))
    folds = row_folds(design)
    for owners, rows in chunks():
        found.update(rows, design.is_positive[owners], folds[owners])
    found.probe()
    if not found.counts.all():  # examples without rows
        for left_out in design.fold_sets:
            found.class_means(left_out)
    return found


def row_folds(design: Design) -> NDArray[np.intp]:
    """Each example's fold; 0 where there are none."""
    return design.folds if design.folds is not None else np.zeros_like(design.groups)


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
