"""Many rows in passes: centred batches of one size, and the sums that every method starts from.

Guarantees: the memory of a pass does not depend on how the rows come (one by one, or all in one
chunk); sums are float64 about a centre near the mean, so a huge mean that all rows share costs no
digits. NaN and Inf are refused in the first pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probecache.errors import EmptyClassError, NonFiniteError, ShapeError

__all__ = [
    "Batch",
    "Moments",
    "RowPasses",
    "TrainingSets",
    "gather_moments",
    "training_sets",
]

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Chunks = Callable[[], Iterable[tuple[NDArray[Any], NDArray[Any]]]]

# Products of a batch and a few columns reach full speed from here on; at most 4096 rows.
_BATCH_BYTES = 48 << 20


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one batch: centred [m, hidden], whose example, fold and side (1 positive) [m].

    `rows` is a buffer: the next batch overwrites it, and the reader of a batch may.
    """

    rows: NDArray[Any]
    owners: Ints
    folds: Ints
    sides: Ints


@dataclass(frozen=True, eq=False)
class RowPasses:
    """The rows of one layer, read again with every pass.

    Attributes:
        chunks: gives (examples [m], rows [m, hidden]) in the same order at every call.
        hidden_size: width of the rows.
        sides, folds: of each example, int [examples]; side 1 is the positive class.
        centre: float64 [hidden], taken off every row.
    """

    chunks: Chunks
    hidden_size: int
    sides: Ints
    folds: Ints
    centre: Floats

    def batches(self, dtype: type[np.floating[Any]] = np.float64) -> Iterator[Batch]:
        """One pass over the rows, in `dtype`."""
        row_bytes = np.dtype(dtype).itemsize * self.hidden_size
        most = max(1, min(4096, _BATCH_BYTES // row_bytes))
        rows = np.empty((most, self.hidden_size), dtype=dtype)
        owners = np.empty(most, dtype=np.intp)
        filled = 0
        for some, chunk in self.chunks():
            self._check(chunk)
            taken = 0
            while taken < len(chunk):
                count = min(most - filled, len(chunk) - taken)
                here, there = slice(filled, filled + count), slice(taken, taken + count)
                # Subtracted in float64 even for float32 batches: only the result is rounded.
                np.subtract(chunk[there], self.centre, out=rows[here], casting="same_kind")
                owners[here] = some[there]
                filled, taken = filled + count, taken + count
                if filled == most:
                    yield self._batch(rows, owners)
                    filled = 0
        if filled:
            yield self._batch(rows[:filled], owners[:filled])

    def _batch(self, rows: NDArray[Any], owners: Ints) -> Batch:
        owners = owners.copy()
        return Batch(rows, owners, self.folds[owners], self.sides[owners])

    def _check(self, chunk: NDArray[Any]) -> None:
        if chunk.ndim != 2 or chunk.shape[1] != self.hidden_size:
            raise ShapeError(
                f"expected rows of width {self.hidden_size}, got {list(chunk.shape)}; were both "
                "classes read from the same model?"
            )


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums about the rows' common mean, by fold and side (0 negative, 1 positive).

    Attributes:
        counts: float64 [folds, 2].
        sums: float64 [folds, 2, hidden] of the centred rows.
        squares: float64 [folds, 2, hidden] of their squares.
        norms: float32 [rows], of the rows as they are, in order.
    """

    counts: Floats
    sums: Floats
    squares: Floats
    norms: NDArray[np.float32]


def gather_moments(rows: RowPasses) -> tuple[RowPasses, Moments]:
    """One pass: the rows with their mean as the centre, and the sums about it.

    Raises:
        ShapeError: rows of another width.
        NonFiniteError: names the side and the row, counted from 0 within its side.
        EmptyClassError: a side has no rows.
    """
    folds = int(rows.folds.max(initial=0)) + 1
    rows = _centred(rows, _first_mean(rows))
    counts = np.zeros((folds, 2))
    sums, squares = (np.zeros((folds, 2, rows.hidden_size)) for _ in range(2))
    norms = [np.empty(0, dtype=np.float32)]
    for batch in rows.batches():
        _require_finite(batch, counts.sum(axis=0))
        norms.append(_norms(batch.rows, rows.centre))
        for fold, side in np.unique(np.stack([batch.folds, batch.sides], axis=1), axis=0):
            here = (batch.folds == fold) & (batch.sides == side)
            part = batch.rows if here.all() else batch.rows[here]
            counts[fold, side] += len(part)
            sums[fold, side] += part.sum(axis=0)
            squares[fold, side] += np.einsum("mh,mh->h", part, part)
    _require_both_sides(counts.sum(axis=0))
    shift = sums.sum(axis=(0, 1)) / counts.sum()
    squares += counts[..., None] * shift**2 - 2 * shift * sums
    sums -= counts[..., None] * shift
    moments = Moments(counts, sums, squares, np.concatenate(norms))
    return _centred(rows, rows.centre + shift), moments


def _centred(rows: RowPasses, centre: Floats) -> RowPasses:
    return RowPasses(rows.chunks, rows.hidden_size, rows.sides, rows.folds, centre)


def _first_mean(rows: RowPasses) -> Floats:
    """The mean of the first rows: far nearer to that of all than 0 is."""
    for batch in rows.batches():
        mean = batch.rows.mean(axis=0) + rows.centre
        return mean if np.isfinite(mean).all() else rows.centre
    return rows.centre


def _norms(centred: Floats, centre: Floats) -> NDArray[np.float32]:
    """Norms of the rows before they were centred, without another copy of them."""
    squares = np.einsum("mh,mh->m", centred, centred) + 2 * (centred @ centre) + centre @ centre
    return np.asarray(np.sqrt(np.maximum(squares, 0)), dtype=np.float32)


def _require_finite(batch: Batch, seen: Floats) -> None:
    if np.isfinite(batch.rows.sum()):
        return
    bad = ~np.isfinite(batch.rows).all(axis=1)
    if not bad.any():
        return
    row = int(np.flatnonzero(bad)[0])
    side = int(batch.sides[row])
    number = int(seen[side]) + int((batch.sides[:row] == side).sum())
    raise NonFiniteError(
        f"expected finite activations, got NaN or Inf in row {number} of the "
        f"{'positive' if side else 'negative'} class; extract in bfloat16 or float32"
    )


def _require_both_sides(counts: Floats) -> None:
    for side, name in ((1, "positive"), (0, "negative")):
        if not counts[side]:
            raise EmptyClassError(f"expected rows of the {name} class, got none")


@dataclass(frozen=True, eq=False)
class TrainingSets:
    """What is fitted on: all rows, all without a fold, all without two folds.

    Attributes:
        used: bool [sets, folds], which folds are in which set; the first set is everything.
        without: int [folds, folds], the set without folds f and g; without f alone where f = g.
            Empty where there are no folds.
        counts: float64 [sets, 2], rows of each side.
        means: float64 [sets, 2, hidden], of each side's centred rows.
        spreads: float64 [sets, hidden], variances of the dimensions (divided by the rows).
        within: float64 [sets, hidden], the same about the means of each row's own side.
    """

    used: Bools
    without: Ints
    counts: Floats
    means: Floats
    spreads: Floats
    within: Floats

    @property
    def sizes(self) -> Floats:
        """Rows of each set, float64 [sets]."""
        return np.asarray(self.counts.sum(axis=1))

    @property
    def centres(self) -> Floats:
        """Means of all rows of each set, about the common mean; float64 [hidden, sets]."""
        weighted = (self.counts[..., None] * self.means).sum(axis=1)
        return np.asarray((weighted / self.sizes[:, None]).T)


def training_sets(moments: Moments, *, folded: bool) -> TrainingSets:
    """The sets to be fitted on, with what the moments say of each.

    Raises:
        EmptyClassError: without some folds a side has no rows.
    """
    count = len(moments.counts)
    used, without = _leave_out(count) if folded else (np.ones((1, count), bool), np.empty((0, 0)))
    counts = np.einsum("sf,fc->sc", used, moments.counts)
    if not counts.all():
        raise EmptyClassError(
            "expected both classes in what any two folds leave, got a class without rows; use "
            "more folds, or add texts"
        )
    means = np.einsum("sf,fch->sch", used, moments.sums) / counts[..., None]
    squares = np.einsum("sf,fch->sh", used, moments.squares)
    sizes = counts.sum(axis=1)[:, None]
    centres = (counts[..., None] * means).sum(axis=1) / sizes
    within = squares - (counts[..., None] * means**2).sum(axis=1)
    return TrainingSets(
        used=used,
        without=without.astype(np.intp),
        counts=counts,
        means=means,
        spreads=np.maximum(squares / sizes - centres**2, 0),
        within=np.maximum(within / sizes, 0),
    )


def _leave_out(folds: int) -> tuple[Bools, Ints]:
    used = [np.ones(folds, dtype=bool)]
    without = np.empty((folds, folds), dtype=np.intp)
    left_out = [(fold, fold) for fold in range(folds)]
    # Of three folds and more: two folds without each other leave nothing to fit on.
    left_out += list(combinations(range(folds), 2)) if folds > 2 else []
    for first, second in left_out:
        without[first, second] = without[second, first] = len(used)
        used.append(~np.isin(np.arange(folds), (first, second)))
    if folds == 2:
        without[0, 1] = without[1, 0] = -1
    return np.array(used), without
