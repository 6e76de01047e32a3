"""The scatter matrix of many rows: one float32 matrix [hidden, hidden], factored in place.

Guarantees: at 8192 dimensions the matrix takes 268 MB and what is beside it under 200 MB more. It
only preconditions and measures (Ledoit-Wolf); no answer is limited by its precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from probecache.errors import FitError
from probecache.fit.primal_rows import Batch, Bools, Floats, RowPasses, TrainingSets

__all__ = ["Scatter", "ledoit_wolf"]

Float32s = NDArray[np.float32]
Weigh = Callable[[Batch], NDArray[np.floating[Any]]]

_TILE = 1024
# Scatter matrices of single folds are kept for as many columns at a time as fit in here.
_FOLDS_BYTES = 160 << 20


@dataclass(eq=False)
class Scatter:
    """Sum of outer products of the centred rows, and the Cholesky factor of it plus a penalty.

    Both share one matrix: what is below the diagonal is the sum, what is above (and on) it the
    factor, the sum's diagonal is apart. So a factor for another penalty needs no pass.
    """

    hidden_size: int
    matrix: Float32s = field(init=False)
    diagonal: Float32s = field(init=False)

    def __post_init__(self) -> None:
        self.matrix = np.zeros((self.hidden_size, self.hidden_size), dtype=np.float32)
        self.diagonal = np.zeros(self.hidden_size, dtype=np.float32)

    def gather(self, rows: RowPasses, weigh: Weigh | None = None) -> None:
        """One pass; with `weigh`, every row counts as often as that says."""
        self.matrix[...] = 0
        for batch in rows.batches(np.float32):
            z = batch.rows
            if weigh is not None:
                z *= np.sqrt(weigh(batch))[:, None]
            for down, across in _tiles(0, self.hidden_size, self.hidden_size):
                self.matrix[down, across] += z[:, down].T @ z[:, across]
        self.diagonal = self.matrix.diagonal().copy()

    def gather_by_folds(self, rows: RowPasses, sets: TrainingSets, scales: Floats) -> Floats:
        """The same, and of every training set how large its within-class scatter is.

        Takes one pass for as many columns as `_FOLDS_BYTES` hold for every fold: one at 4096
        dimensions and 2 folds, 7 at 8192 and 5.

        Args:
            scales: [sets, hidden], by which each set's dimensions are divided first.

        Returns:
            Squared Frobenius norms, float64 [sets].
        """
        folds, hidden = sets.used.shape[1], self.hidden_size
        width = max(1, _FOLDS_BYTES // (4 * folds * hidden * _TILE)) * _TILE
        norms = np.zeros(len(sets.used))
        for first in range(0, hidden, width):
            last = min(first + width, hidden)
            parts = _fold_scatters(rows, folds, first, last)
            for down, across in _tiles(first, last, hidden):
                here = parts[:, _less(down, first), _less(across, first)]
                self.matrix[down, across] = here.sum(axis=0)
                twice = 1 if down == across else 2
                norms += twice * _tile_norms(here, sets, scales, down, across)
            del parts, here  # before the next ones are made: both at once would not fit
        self.diagonal = self.matrix.diagonal().copy()
        return norms

    def factor(self, penalty: Floats) -> None:
        """Factor the sum plus a diagonal matrix, penalty [hidden] > 0.

        Where float32 cannot tell the sum from a singular one, its diagonal is raised until it can.

        Raises:
            FitError: it cannot at all.
        """
        raised = 0.0
        for _ in range(8):
            self._mirror()
            with np.errstate(over="ignore"):
                np.fill_diagonal(self.matrix, self.diagonal * (1 + raised) + penalty)
            # Transposed it is in LAPACK's order, so not copied; its lower triangle is ours above.
            _, failed = lapack.spotrf(self.matrix.T, lower=1, clean=0, overwrite_a=1)
            if not failed:
                return
            raised = max(1e-6, 10 * raised)
        raise FitError(
            "expected activations whose covariance can be factored, got none in float32 even with "
            "its diagonal raised; fit with a greater strength, or with difference-of-means"
        )

    def solve(self, right: Floats) -> Floats:
        """The factored matrix's inverse times right [hidden, columns], in float32's precision."""
        # A power of two per column: gradients of converged columns are below float32's range.
        size = np.abs(right).max(axis=0, initial=0)
        unit = np.exp2(np.frexp(np.where(size > 0, size, 1))[1])
        solved, _ = lapack.spotrs(
            self.matrix.T, np.asfortranarray(right / unit, dtype=np.float32), lower=1, overwrite_b=1
        )
        return np.asarray(solved * unit, dtype=np.float64)

    def _mirror(self) -> None:
        for down, across in _tiles(0, self.hidden_size, self.hidden_size):
            if down != across:
                self.matrix[across, down] = self.matrix[down, across].T
            else:
                below = np.tril(self.matrix[down, down], -1)
                self.matrix[down, down] = below + below.T


def _tiles(first: int, last: int, hidden: int) -> list[tuple[slice, slice]]:
    """Tiles on and below the diagonal of the columns from first to last, as (rows, columns)."""
    return [
        (slice(i, min(i + _TILE, hidden)), slice(j, min(j + _TILE, hidden)))
        for j in range(first, last, _TILE)
        for i in range(j, hidden, _TILE)
    ]


def _less(cut: slice, start: int) -> slice:
    return slice(cut.start - start, cut.stop - start)


def _fold_scatters(rows: RowPasses, folds: int, first: int, last: int) -> Float32s:
    """Every fold's own scatter, columns from first to last: [folds, hidden - first, columns]."""
    hidden = rows.hidden_size
    parts = np.zeros((folds, hidden - first, last - first), dtype=np.float32)
    for batch in rows.batches(np.float32):
        for fold in np.unique(batch.folds):
            here = batch.folds == fold
            z = batch.rows if here.all() else batch.rows[here]
            for down, across in _tiles(first, last, hidden):
                parts[fold, _less(down, first), _less(across, first)] += z[:, down].T @ z[:, across]
    return parts


def _tile_norms(
    parts: Float32s, sets: TrainingSets, scales: Floats, down: slice, across: slice
) -> Floats:
    """What one tile adds to the squared norms of the sets' within-class scatters, [sets]."""
    norms = np.empty(len(sets.used))
    for number, used in enumerate(sets.used):
        tile = _sum_of(parts, used)
        for side in (0, 1):
            mean = sets.means[number, side]
            tile -= np.outer(sets.counts[number, side] * mean[down], mean[across])
        np.square(tile, out=tile)
        norms[number] = scales[number, down] ** -2 @ tile @ scales[number, across] ** -2
    return norms


def _sum_of(parts: Float32s, used: Bools) -> Floats:
    total = np.zeros(parts.shape[1:])
    for fold in np.flatnonzero(used):
        total += parts[fold]
    return total


def ledoit_wolf(rows: RowPasses, sets: TrainingSets, scales: Floats, norms: Floats) -> Floats:
    """The shrinkage of each training set's within-class covariance; one pass.

    With S = (1/n) sum z z' of rows less their class's mean, divided by `scales`, and m = tr S / d:
    the expected error of S over its distance from m I, (sum |z|^4 / n - |S|^2) / n over
    |S - m I|^2, in the Frobenius norm, at most 1.

    Args:
        scales: [sets, hidden].
        norms: squared norms of the sets' within-class scatters, [sets].

    Returns:
        float64 [sets], between 0 and 1.

    Source: Ledoit & Wolf 2004, J. Multivariate Analysis 88; equal to scikit-learn's `ledoit_wolf`.
    """
    sizes, hidden = sets.sizes, rows.hidden_size
    trace = (sets.within * scales**-2).sum(axis=1)
    square = norms / sizes**2
    distance = square - trace**2 / hidden
    error = (_fourth_powers(rows, sets, scales) / sizes - square) / sizes
    shrinkage = np.minimum(error, distance) / np.where(distance > 0, distance, 1)
    return np.asarray(np.clip(shrinkage, 0, 1))


def _fourth_powers(rows: RowPasses, sets: TrainingSets, scales: Floats) -> Floats:
    """Sum over each set's rows of |z|^4, z as `ledoit_wolf` has it; [sets]."""
    weights = scales**-2
    columns = np.concatenate([sets.means[:, side] * weights for side in (0, 1)]).T
    constants = np.einsum("sch,sh->cs", sets.means**2, weights)
    total = np.zeros(len(sets.used))
    for batch in rows.batches():
        both = (batch.rows @ columns).reshape(len(batch.rows), 2, -1)
        cross = both[np.arange(len(batch.rows)), batch.sides]
        np.square(batch.rows, out=batch.rows)
        lengths = batch.rows @ weights.T - 2 * cross + constants[batch.sides]
        total += (lengths**2 * sets.used.T[batch.folds]).sum(axis=0)
    return total
