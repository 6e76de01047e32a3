"""PCA of pair differences: the direction along which the members of pairs differ most.

The first principal direction, about zero and not about their mean, of the differences between the
two classes' members of each group (their means, where a group has several of a class). Where no
group holds both classes it is that of all pairs of the two classes, whose second moment is S+ + S-
+ (m+ - m-)(m+ - m-)' with the classes' covariances S. The sign is that of the difference of means,
the threshold the midpoint of the projected class means.

Source: linear artificial tomography, Zou et al. 2023, arXiv:2310.01405.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from probecache.fit.design import FoldSet
from probecache.fit.positive import principal
from probecache.fit.problem import DualFit, Problem

__all__ = ["fit_pca"]

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


def fit_pca(problem: Problem, left_out: FoldSet) -> DualFit:
    """The first principal direction of pair differences, as long as their root mean square."""
    kept = problem.kept(left_out)
    signs, groups = problem.signs[kept], problem.groups[kept]
    gram = problem.kept_gram(left_out)
    both = np.intersect1d(groups[signs > 0], groups[signs < 0])
    weights = _pair_weights(signs, groups, both) if len(both) else _all_pair_weights(signs)
    direction = principal(weights @ gram @ weights.T) @ weights
    towards = (signs > 0) / (signs > 0).sum() - (signs < 0) / (signs < 0).sum()
    if towards @ gram @ direction < 0:
        direction = -direction
    found = np.zeros(len(problem.signs))
    found[kept] = direction
    return DualFit(found, -problem.class_midpoint(left_out, found))


def _pair_weights(signs: Floats, groups: Ints, both: Ints) -> Floats:
    """[pairs, n]: what each row counts in its group's difference, over the root of their number."""
    place = np.searchsorted(both, groups)
    place[place == len(both)] = 0
    members = np.flatnonzero(both[place] == groups)
    weights = np.zeros((len(both), len(signs)))
    for side in (1.0, -1.0):
        rows = members[signs[members] == side]
        counts = np.bincount(place[rows], minlength=len(both))
        weights[place[rows], rows] = side / counts[place[rows]]
    return np.asarray(weights / np.sqrt(len(both)))


def _all_pair_weights(signs: Floats) -> Floats:
    """[n + 1, n]: rows minus their class's mean over the root of its size, and the difference."""
    n, weights = len(signs), np.zeros((len(signs) + 1, len(signs)))
    for side in (1.0, -1.0):
        members = signs == side
        count = members.sum()
        weights[:n][np.ix_(members, members)] = (np.eye(count) - 1 / count) / np.sqrt(count)
        weights[n] += side * members / count
    return weights
