"""Folds for cross-validation that never split a group.

Guarantees: deterministic for a seed; every fold holds both classes, and so does what is left of
it. NumPy alone: scikit-learn's folds cost a second of import, which is most of a training.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probecache.errors import EmptyClassError, FitError, ShapeError

__all__ = ["assign_folds", "group_numbers", "joined_groups", "straddles"]

Bools = NDArray[np.bool_]
Ints = NDArray[np.intp]


def group_numbers(names: Sequence[Hashable]) -> Ints:
    """Groups as numbers from 0 in order of appearance: names of several types cannot be sorted."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.intp)


def joined_groups(first: Sequence[int] | Ints, second: Sequence[int] | Ints) -> Ints:
    """The finest grouping that keeps together what either keeps together.

    Args:
        first, second: [n] group numbers of the same examples.

    Raises:
        ShapeError: not of one length.
    """
    if len(first) != len(second):
        raise ShapeError(f"expected groupings of one length, got {len(first)} and {len(second)}")
    parents: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        while (parent := parents.setdefault(node, node)) != node:
            parents[node] = parents[parent]  # halve the way for the next one
            node = parents[node]
        return node

    for a, b in zip(first, second, strict=True):
        parents[root(("first", int(a)))] = root(("second", int(b)))
    return group_numbers([root(("first", int(a))) for a in first])


def straddles(clusters: ArrayLike, groups: ArrayLike) -> Bools:
    """Which examples share their cluster with an example of another group; bool [n]."""
    kinds = np.unique(np.asarray(clusters), return_inverse=True)[1]
    members = np.unique(np.asarray(groups), return_inverse=True)[1]
    both = np.unique(np.stack([kinds, members], axis=1), axis=0)
    found: Bools = np.bincount(both[:, 0])[kinds] > 1
    return found


def assign_folds(
    is_positive: Sequence[bool] | Bools, groups: Sequence[int] | Ints, most: int = 5, seed: int = 0
) -> Ints:
    """Give every example a fold, groups whole, classes shared out evenly.

    Groups are dealt out from the largest to the smallest, equal ones in shuffled order, each to the
    fold in which it leaves the shares of the classes most even.

    Args:
        is_positive: [n] booleans.
        groups: [n] group numbers.
        most: folds at most; fewer where a class has fewer groups or a fold would lack a class.
        seed: of the shuffling.

    Returns:
        int [n], folds numbered from 0.

    Raises:
        EmptyClassError: a class has fewer than two groups, or groups are so unequal that even two
            folds cannot both hold, and leave, both classes.
        FitError: fewer than two folds.
    """
    positive, members = np.asarray(is_positive, dtype=np.bool_), np.asarray(groups, dtype=np.intp)
    if most < 2:
        raise FitError(f"expected at least 2 folds, got {most}; try 5")
    fewest = [int(np.unique(members[side]).size) for side in (positive, ~positive)]
    if min(fewest) < 2:
        raise EmptyClassError(
            "expected texts of each class in at least 2 groups, to train on one and score the "
            f"other, got {fewest[0]} positive and {fewest[1]} negative; add texts, or divide the "
            "groups more finely"
        )
    _, members = np.unique(members, return_inverse=True)
    counts = [np.bincount(members, weights=side) for side in (~positive, positive)]
    sizes = np.stack(counts, axis=1).astype(np.float64)
    for count in range(min(most, *fewest), 1, -1):
        fold_of_group = _deal(sizes, count, seed)
        held = np.zeros((count, 2))
        np.add.at(held, fold_of_group, sizes)
        if (held > 0).all() and (sizes.sum(axis=0) - held > 0).all():
            return np.asarray(fold_of_group[members], dtype=np.intp)
    raise EmptyClassError(
        f"expected groups that leave both classes in each of 2 folds, got {len(sizes)} of very "
        "unequal make-up; add texts, or divide the groups more finely"
    )


def _deal(sizes: NDArray[np.float64], count: int, seed: int) -> Ints:
    """A fold for every group; `sizes` [groups, 2] are its examples of each class."""
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    shares = sizes / sizes.sum(axis=0)
    order = shuffled[np.argsort(-shares[shuffled].sum(axis=1), kind="stable")]
    held = np.zeros((count, 2))
    folds = np.empty(len(sizes), dtype=np.intp)
    for group in order.tolist():
        # How uneven the folds would be, if it went to each of them: only its own fold changes.
        grown = (held + shares[group]) ** 2 - held**2
        fold = int(np.lexsort((held.sum(axis=1), grown.sum(axis=1)))[0])
        folds[group], held[fold] = fold, held[fold] + shares[group]
    return folds
