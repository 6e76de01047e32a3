"""What the activations look like, apart from any score: outlier dimensions, pairs, first tokens.

Guarantees: float64 sums; memory is a chunk and, for pairs, at most 2,000 rows. None of these
figures tells whether a probe is right; each names a way in which it can be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probecache.controls.streams import Chunks, example_means
from probecache.errors import ShapeError

__all__ = [
    "PairAgreement",
    "first_token_share",
    "outlier_dimensions",
    "pair_agreement",
    "pair_cosine",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

# More pairs say nothing more about a mean, and have to be held: 128 MB at a width of 8192.
MOST_PAIRS = 2000
_SIGNS = 200
SEED = 0


def outlier_dimensions(
    chunks: Chunks, hidden_size: int, most: int = 3
) -> tuple[tuple[int, ...], float]:
    """The dimensions that hold most of the squared norm, and their share of it.

    Residual streams have a few coordinates that are a hundred times larger than the others in every
    text. A distance or a direction that is not centred and scaled is about those. Where `most` of
    hidden_size dimensions hold most of the norm, standardise, or compare with whitened methods.

    Args:
        chunks: gives the layer's rows with the example that each is of.
        hidden_size: width of the rows.
        most: how many dimensions to name.

    Returns:
        The dimensions, largest first, and the share, 0 to 1, of the mean squared norm of the
        examples' mean rows that lies in them (0 where all rows are zero).

    Source: Timkey & van Schijndel 2021, EMNLP (rogue dimensions); Sun et al. 2024,
    arXiv:2402.17762 (massive activations).
    """
    squares = np.zeros(hidden_size)
    for _, means in example_means(chunks):
        squares += np.einsum("nh,nh->h", means, means)
    largest = np.argsort(-squares, kind="stable")[:most]
    total = float(squares.sum())
    share = float(squares[largest].sum()) / total if total > 0 else 0.0
    return tuple(largest.tolist()), share


@dataclass(frozen=True)
class PairAgreement:
    """How far the differences of pairs point one way.

    Attributes:
        cosine: mean cosine between the differences of two pairs, over all twos of pairs.
        pairs: how many pairs were looked at.
        chance: the value that this mean exceeds in 5 of 100 cases where every difference is as
            likely to point the other way.
    """

    cosine: float
    pairs: int
    chance: float


def pair_agreement(
    chunks: Chunks, is_positive: ArrayLike, groups: ArrayLike
) -> PairAgreement | None:
    """Mean cosine between the differences (positive minus negative) of pairs.

    A direction that stands for the concept is shared by the pairs. Noise makes even good pairs look
    different in thousands of dimensions, so cosines of 0.05 are common; what counts is `chance`.

    With unit differences u_1 .. u_m the mean over all i < j is (|sum u|^2 - m) / (m (m - 1)). Of a
    group with several examples of a class, their mean is taken. Of more than 2,000 groups, 2,000
    spread evenly are looked at.

    Args:
        chunks: gives the layer's rows with the example that each is of.
        is_positive: [n] booleans, one per example.
        groups: [n] group numbers; a group with both classes is a pair.

    Returns:
        None where fewer than two pairs differ at all.

    Raises:
        ShapeError: labels and groups differ in number.
    """
    units = _unit_differences(chunks, is_positive, groups)
    if len(units) < 2:
        return None
    signs = np.random.default_rng(SEED).choice([-1.0, 1.0], (_SIGNS, len(units)))
    cosines = _mean_cosines(np.concatenate([np.ones((1, len(units))), signs]) @ units, len(units))
    return PairAgreement(float(cosines[0]), len(units), float(np.quantile(cosines[1:], 0.95)))


def pair_cosine(chunks: Chunks, is_positive: ArrayLike, groups: ArrayLike) -> float | None:
    """The cosine of `pair_agreement` alone."""
    units = _unit_differences(chunks, is_positive, groups)
    if len(units) < 2:
        return None
    return float(_mean_cosines(units.sum(axis=0)[None], len(units))[0])


def _mean_cosines(sums: Floats, pairs: int) -> Floats:
    """Mean over all twos of unit vectors of their cosine, from [k, hidden] sums of the vectors."""
    return np.asarray((np.einsum("kh,kh->k", sums, sums) - pairs) / (pairs * (pairs - 1)))


def _unit_differences(chunks: Chunks, is_positive: ArrayLike, groups: ArrayLike) -> Floats:
    """The pairs' differences, [pairs that differ, hidden], of unit norm."""
    positive, members = np.asarray(is_positive, bool), np.asarray(groups)
    if positive.shape != members.shape:
        raise ShapeError(
            f"expected one group for each label, got {positive.size} labels and {members.size} "
            "groups; pass lists of one length"
        )
    place, weights = _pairs(positive, members)
    count = int(place.max(initial=-1)) + 1
    differences: Floats = np.zeros((0, 0))
    for owners, means in example_means(chunks):
        if not differences.size:
            differences = np.zeros((count, means.shape[1]))
        used = place[owners] >= 0
        parts = weights[owners[used], None] * means[used]
        _add(differences, place[owners[used]], parts)
    norms = np.linalg.norm(differences, axis=1)
    return np.asarray(differences[norms > 0] / norms[norms > 0, None])


def _add(differences: Floats, places: Ints, parts: Floats) -> None:
    """Add rows at their places. np.add.at takes ten times as long; it is for places met twice."""
    if len(np.unique(places)) == len(places):
        differences[places] += parts
    else:
        np.add.at(differences, places, parts)


def _pairs(positive: NDArray[np.bool_], members: NDArray[np.generic]) -> tuple[Ints, Floats]:
    """Each example's pair (-1 for none) and its signed weight in the pair's difference."""
    _, numbers = np.unique(members, return_inverse=True)
    count = int(numbers.max(initial=-1)) + 1
    held = np.stack([np.bincount(numbers[side], minlength=count) for side in (~positive, positive)])
    paired = np.flatnonzero((held > 0).all(axis=0))
    if paired.size > MOST_PAIRS:
        paired = paired[np.linspace(0, paired.size - 1, MOST_PAIRS).astype(np.intp)]
    place = np.full(count, -1, dtype=np.intp)
    place[paired] = np.arange(paired.size)
    weights = np.where(positive, 1.0, -1.0) / held[positive.astype(np.intp), numbers]
    return place[numbers], weights


def first_token_share(scores: ArrayLike, counts: ArrayLike) -> float | None:
    """Share of the variance of the examples' mean scores that their first kept tokens account for.

    An example's mean score is first / k + rest / k, so its variance between examples is the sum of
    the two parts' covariances with it; this is the first part's, divided by the variance. Of tokens
    that vary alike and independently it is 1 / k. Near 1 although k is large, the score is that of
    the first token: of BOS, whose activations are huge and the same in every prompt, so that the
    mean tells how long a prompt is and nothing else. Above 1 the rest works against it.

    It means something where examples keep several tokens: with one each it would always be 1.

    Args:
        scores: [tokens] of every kept token, examples one after the other.
        counts: [n] kept tokens of each example, 1 or more.

    Returns:
        None where no example keeps a second token, or the mean scores do not vary.

    Raises:
        ShapeError: the counts do not add up to the scores.
    """
    values, many = np.asarray(scores, dtype=np.float64), np.asarray(counts, dtype=np.intp)
    if values.ndim != 1 or int(many.sum()) != values.size or (many < 1).any():
        raise ShapeError(
            f"expected counts of 1 or more that add up to the scores, got {many.sum()} for "
            f"scores of shape {values.shape}; pass all kept tokens, example by example"
        )
    if many.size == 0 or many.max() == 1:
        return None
    starts = np.cumsum(many) - many
    means = np.add.reduceat(values, starts) / many
    off = means - means.mean()
    variance = float(off @ off)
    if variance <= 1e-20 * float(values @ values):
        return None
    return float((values[starts] / many) @ off) / variance
