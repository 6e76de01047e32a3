"""Is the best of many scorers better than the best of them would be by chance?

Guarantees: NumPy only, deterministic for a seed, all scorers under the same permutations, ties of
scores by mid-ranks and of maxima counted against the finding. Assumes that under the null the
labels are exchangeable as `groups` says, and nothing else: not that scorers are independent.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from probecache.metrics.inputs import (
    Bools,
    Floats,
    Ints,
    checked_count,
    checked_groups,
    checked_rows,
)
from probecache.metrics.ranks import areas_of_wins, midranks

__all__ = ["PermutationTest", "permutation_test"]

# Labels permuted at once: 2^22 of them are 32 MiB as float64.
LABELS_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class PermutationTest:
    """The largest AUROC of several scorers, and how large it is under permuted labels.

    `observed` is the largest AUROC and `best` the row that has it (the first of equals); `maxima`
    [count] the largest under each permutation; `p_value` the one-sided (1 + #(maxima >= observed))
    / (1 + count), which is never below 1 / (1 + count).
    """

    p_value: float
    observed: float
    best: int
    maxima: Floats

    @property
    def null_median(self) -> float:
        """What the best scorer reaches by chance: the median of the maxima."""
        return float(np.median(self.maxima))

    @property
    def null_95(self) -> float:
        """What the best scorer exceeds by chance one time in twenty."""
        return float(np.quantile(self.maxima, 0.95))


def permutation_test(
    scores: ArrayLike,
    is_positive: ArrayLike,
    groups: Sequence[Hashable] | ArrayLike,
    count: int = 2000,
    seed: int = 0,
) -> PermutationTest:
    """Test the best of k scorers by the largest AUROC under permuted labels (max-statistic).

    The largest of k AUROCs is above 1/2 by chance, and the more so the more scorers there are and
    the less they have in common. Permuting the labels for all scorers together keeps what they have
    in common, so the p-value pays for the search as much as the search was worth.

    Labels move only as far as the groups allow. Within a group that holds both classes they are
    permuted: the members of a pair swap, or not. Groups that hold one class are exchanged whole
    among each other, single examples being groups of one: copies keep a label in common. Where
    such groups differ in size, the number of positives varies over the permutations.

    Cost: O(k n log n + count n (k + log n)), memory bounded. With few groups there are few
    different permutations and no small p-value: two pairs have four.

    Args:
        scores: [k, n], finite; a row for each scorer, high for the positive class, in any unit.
        is_positive: [n] booleans.
        groups: [n] numbers or names; `range(n)` where all examples are independent.
        count: permutations.
        seed: of the permutations.

    Raises:
        ShapeError: scores are not rows of as many as there are labels and groups.
        EmptyClassError: a class has no scores.
        FitError: a score is NaN or Inf, labels are not booleans, or count is below 1.

    Source: max-statistic, Westfall & Young 1993; Nichols & Holmes 2002, Hum. Brain Mapp. 15:1;
    the 1 + in the p-value, Phipson & Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9:39; exchange
    within groups and of whole ones, Winkler et al. 2015, NeuroImage 123:253.
    """
    rows, positive = checked_rows(scores, is_positive)
    members = checked_groups(groups, positive.size)
    checked_count(count, "permutations")
    ranks = midranks(rows).T
    areas = _areas(positive[None].astype(np.float64), ranks)[0]
    best = int(np.argmax(areas))
    chunks = _permuted(positive, members, count, np.random.default_rng(seed))
    maxima = np.concatenate([_areas(labels, ranks).max(axis=1) for labels in chunks])
    p_value = (1 + int((maxima >= areas[best]).sum())) / (1 + count)
    return PermutationTest(p_value, float(areas[best]), best, maxima)


def _areas(labels: Floats, ranks: Floats) -> Floats:
    """AUROCs [m, k] of labels [m, n] of 0 and 1 and ranks [n, k].

    Sums of ranks are whole or half numbers and so exact: equal sums compare as equal.
    """
    n_positive = labels.sum(axis=1, keepdims=True)
    wins = labels @ ranks - n_positive * (n_positive + 1) / 2
    return areas_of_wins(wins, n_positive * (len(ranks) - n_positive))


def _permuted(
    positive: Bools, members: Ints, count: int, rng: np.random.Generator
) -> Iterator[Floats]:
    """Permuted labels, [m, n] of 0 and 1 at a time, `count` in all."""
    sizes, held = np.bincount(members), np.bincount(members, weights=positive)
    mixed = (held > 0) & (held < sizes)
    inside = np.flatnonzero(mixed[members])
    inside = inside[np.argsort(members[inside], kind="stable")]
    whole, outside = np.flatnonzero(~mixed), np.flatnonzero(~mixed[members])
    place = np.searchsorted(whole, members[outside])
    step = max(1, LABELS_AT_ONCE // positive.size)
    for start in range(0, count, step):
        m = min(step, count - start)
        labels = np.empty((m, positive.size))
        labels[:, inside] = _shuffled(positive[inside], members[inside], m, rng)
        labels[:, outside] = _shuffled(held[whole] > 0, np.zeros_like(whole), m, rng)[:, place]
        yield labels


def _shuffled(labels: Bools, blocks: Ints, m: int, rng: np.random.Generator) -> Floats:
    """Labels [m, n], shuffled m times within their blocks; `blocks` [n] ascend."""
    order = np.argsort(blocks + rng.random((m, labels.size)), axis=1)
    return np.asarray(labels[order], dtype=np.float64)
