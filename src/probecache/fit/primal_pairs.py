"""The principal direction of pair differences, for many rows and several training sets at once.

The differences of a group's class means are kept where they fit in memory; else they are made
again in every pass. Either way the direction is found by products with them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from probecache.fit.primal_rows import Batch, Floats, Ints, RowPasses, TrainingSets

__all__ = ["pair_directions"]

_DIFFERENCES_BYTES = 192 << 20
_TOLERANCE, _MOST_STEPS = 1e-10, 500

Product = Callable[[Floats], Floats]


def pair_directions(
    rows: RowPasses, sets: TrainingSets, groups: Ints, scales: Floats
) -> tuple[Floats, Floats]:
    """First principal direction, uncentred, of the differences of the classes within groups.

    A difference is the mean of a group's positive rows minus that of its negative rows. Where no
    group has both, all pairs of a positive and a negative row are taken: the sum of both classes'
    covariances and d d', d the difference of their means. The sign is that of d.

    Args:
        groups: int [examples].
        scales: [sets, hidden], by which dimensions are divided first; folded back afterwards.

    Returns:
        Directions [hidden, sets] in activation units (unit length after division), and the root
        mean square of the differences' projections on them, [sets].

    Source: Zou et al. 2023, arXiv:2310.01405 (LAT); the iteration is Knyazev 2001, SIAM J. Sci.
    Comput. 23, for one vector.
    """
    pairs = _Pairs.of(rows, sets, groups)
    square, counts = _mean_square(rows, sets, pairs)

    def product(vectors: Floats) -> Floats:
        return square(vectors / scales.T) / scales.T / counts

    apart = (sets.means[:, 1] - sets.means[:, 0]).T
    vectors, eigenvalues = _leading(product, apart / scales.T)
    directions = vectors / scales.T
    signs = np.where(np.einsum("hs,hs->s", directions, apart) < 0, -1.0, 1.0)
    return directions * signs, np.sqrt(eigenvalues)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Groups that hold both classes.

    `number` int [examples], -1 outside of pairs; `share` float64 [examples], what each row of an
    example counts in its pair's difference; `used` bool [pairs, sets].
    """

    number: Ints
    share: Floats
    used: Floats

    @classmethod
    def of(cls, rows: RowPasses, sets: TrainingSets, groups: Ints) -> _Pairs | None:
        """The pairs among examples with rows; None where there are none. One pass."""
        counts = np.zeros(len(groups))
        for batch in rows.batches():
            counts += np.bincount(batch.owners, minlength=len(groups))
        _, number = np.unique(groups, return_inverse=True)
        per_side = np.zeros((int(number.max()) + 1, 2))
        np.add.at(per_side, (number, rows.sides), counts)
        paired = per_side.all(axis=1)
        if not paired.any():
            return None
        compact = np.where(paired, np.cumsum(paired) - 1, -1)[number]
        inside = compact >= 0
        share = (2 * rows.sides - 1) / np.where(inside, per_side[number, rows.sides], np.inf)
        folds = np.zeros(int(paired.sum()), dtype=np.intp)
        folds[compact[inside]] = rows.folds[inside]
        return cls(compact, share, sets.used.T[folds].astype(np.float64))


def _mean_square(
    rows: RowPasses, sets: TrainingSets, pairs: _Pairs | None
) -> tuple[Product, Floats]:
    """Products with the sum of differences' squares, and by what they are to be divided."""
    if pairs is None or not pairs.used.any(axis=0).all():
        return lambda vectors: _all_pairs(rows, sets, vectors), np.ones(len(sets.used))
    if pairs.used.shape[0] * rows.hidden_size * 8 > _DIFFERENCES_BYTES:
        return lambda vectors: _again(rows, pairs, vectors), pairs.used.sum(axis=0)
    kept = _differences(rows, pairs)
    return lambda v: kept.T @ (pairs.used * (kept @ v)), pairs.used.sum(axis=0)


def _differences(rows: RowPasses, pairs: _Pairs) -> Floats:
    """Differences of class means of every pair, float64 [pairs, hidden]; one pass."""
    total = np.zeros((pairs.used.shape[0], rows.hidden_size))
    for batch in rows.batches():
        for number, some in _runs(batch, pairs):
            total[number] += some
    return total


def _runs(batch: Batch, pairs: _Pairs) -> list[tuple[int, Floats]]:
    number = pairs.number[batch.owners]
    # Rows of an example follow one another: one product per run instead of a sum per row.
    cuts = np.flatnonzero(np.diff(number, prepend=-2))
    ends = [*cuts[1:].tolist(), len(number)]
    share = pairs.share[batch.owners]
    return [
        (int(number[i]), share[i:j] @ batch.rows[i:j])
        for i, j in zip(cuts.tolist(), ends, strict=True)
        if number[i] >= 0
    ]


def _again(rows: RowPasses, pairs: _Pairs, vectors: Floats) -> Floats:
    """Products with differences that are not kept; two passes."""
    projections = np.zeros_like(pairs.used)
    for batch in rows.batches():
        inside = pairs.number[batch.owners] >= 0
        owners = batch.owners[inside]
        part = (batch.rows @ vectors)[inside] * pairs.share[owners, None]
        np.add.at(projections, pairs.number[owners], part)
    projections *= pairs.used
    total = np.zeros_like(vectors)
    for batch in rows.batches():
        # Outside of pairs the share is 0, and whichever projection is picked counts for nothing.
        weights = pairs.share[batch.owners, None] * projections[pairs.number[batch.owners]]
        total += batch.rows.T @ weights
    return total


def _all_pairs(rows: RowPasses, sets: TrainingSets, vectors: Floats) -> Floats:
    """Products with the mean square of differences of all pairs; one pass."""
    used, inverse = sets.used.T.astype(np.float64), 1 / sets.counts.T
    total = np.zeros_like(vectors)
    for batch in rows.batches():
        weights = used[batch.folds] * inverse[batch.sides]
        total += batch.rows.T @ (weights * (batch.rows @ vectors))
    negative, positive = sets.means[:, 0].T, sets.means[:, 1].T
    for mean in (negative, positive):
        total -= mean * np.einsum("hs,hs->s", mean, vectors)
    apart = positive - negative
    total += apart * np.einsum("hs,hs->s", apart, vectors)
    return total


def _leading(product: Product, start: Floats) -> tuple[Floats, Floats]:
    """Leading eigenvectors [hidden, columns] of each column's matrix, and the eigenvalues.

    The best vector in the span of the last, its residual and the last move, until the residual is
    1e-10 of the eigenvalue; where the two greatest hardly differ, what is found is near both.
    """
    x, move, moved = start.copy(), np.zeros_like(start), np.zeros_like(start)
    random = np.random.default_rng(0)
    x[:, ~x.any(axis=0)] = random.normal(size=(len(x), 1))
    x /= np.linalg.norm(x, axis=0)
    ax = product(x)
    for _ in range(_MOST_STEPS):
        values = np.einsum("hc,hc->c", x, ax)
        residual = ax - values * x
        if (np.linalg.norm(residual, axis=0) <= _TOLERANCE * values).all():
            break
        residual /= np.maximum(np.linalg.norm(residual, axis=0), np.finfo(np.float64).tiny)
        further = product(residual)
        for column in range(x.shape[1]):
            basis = np.stack([x[:, column], residual[:, column], move[:, column]], axis=1)
            images = np.stack([ax[:, column], further[:, column], moved[:, column]], axis=1)
            x[:, column], ax[:, column], move[:, column], moved[:, column] = _best(basis, images)
    return x, np.maximum(np.einsum("hc,hc->c", x, ax), 0)


def _best(basis: Floats, images: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """The vector of the basis' span with the greatest quotient, its image, and the move to it."""
    lengths = np.linalg.norm(basis, axis=0)
    keep = lengths > 0
    basis, images = basis[:, keep] / lengths[keep], images[:, keep] / lengths[keep]
    overlap, vectors = np.linalg.eigh(basis.T @ basis)
    sound = overlap > 1e-12
    change = vectors[:, sound] / np.sqrt(overlap[sound])
    mixed = change.T @ (basis.T @ images) @ change
    weights = change @ np.linalg.eigh((mixed + mixed.T) / 2)[1][:, -1]
    rest = weights.copy()
    rest[0] = 0
    x, ax = basis @ weights, images @ weights
    size = np.linalg.norm(x)
    return x / size, ax / size, basis @ rest, images @ rest
