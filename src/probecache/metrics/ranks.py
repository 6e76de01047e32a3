"""Ranks of many scorers at once, and the AUROC as a count of won comparisons.

Guarantees: ties share the mean of their ranks, so every count is a whole or half number and exact
in float64; O(k n log n) for k scorers of n examples.
"""

from __future__ import annotations

import numpy as np

from probecache.metrics.inputs import Bools, Floats

__all__ = ["area_of_wins", "areas_of_wins", "midranks", "wins_and_losses"]


def midranks(values: Floats) -> Floats:
    """Rank from 1 along the last axis, tied values sharing the mean of their ranks.

    Args:
        values: [..., n], finite.
    """
    order = np.argsort(values, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=-1)
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, _ranks_of_sorted(ordered), axis=-1)
    return ranks


def _ranks_of_sorted(ordered: Floats) -> Floats:
    n = ordered.shape[-1]
    starts = np.ones(ordered.shape, dtype=np.bool_)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    ends = np.ones(ordered.shape, dtype=np.bool_)
    ends[..., :-1] = starts[..., 1:]
    places = np.arange(1, n + 1)
    first = np.maximum.accumulate(np.where(starts, places, 0), axis=-1)
    last = np.where(ends, places, n + 1)[..., ::-1]
    last = np.minimum.accumulate(last, axis=-1)[..., ::-1]
    return np.asarray((first + last) / 2, dtype=np.float64)


def wins_and_losses(values: Floats, positive: Bools) -> tuple[Floats, Floats]:
    """Negatives below each positive, and positives below each negative; a tie counts 1/2.

    Args:
        values: [..., n], finite.
        positive: [n].

    Returns:
        (wins [..., n_positive], losses [..., n_negative]).
    """
    ranks = midranks(values)
    wins = ranks[..., positive] - midranks(values[..., positive])
    losses = ranks[..., ~positive] - midranks(values[..., ~positive])
    return wins, losses


def area_of_wins(wins: float, pairs: float) -> float:
    """AUROC from the Mann-Whitney count, such that swapped classes give exactly 1 - AUROC.

    Only the larger of the two areas is rounded from the quotient; the smaller is 1 minus it, a
    subtraction that floating point does exactly.
    """
    larger = 1 - min(wins, pairs - wins) / pairs
    return larger if 2 * wins >= pairs else 1 - larger


def areas_of_wins(wins: Floats, pairs: Floats) -> Floats:
    """`area_of_wins` for arrays of any shape."""
    larger = 1 - np.minimum(wins, pairs - wins) / pairs
    areas: Floats = np.where(2 * wins >= pairs, larger, 1 - larger)
    return areas
