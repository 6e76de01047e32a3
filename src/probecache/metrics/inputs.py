"""What a metric accepts: finite scores, boolean labels of both classes, a group for each example.

Guarantees: scores come back as float64, labels as booleans, groups numbered from 0 without gaps;
everything else is refused with what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probecache.errors import EmptyClassError, FitError, ShapeError
from probecache.folds import group_numbers

__all__ = [
    "Bools",
    "Floats",
    "Ints",
    "checked_count",
    "checked_groups",
    "checked_level",
    "checked_pair",
    "checked_rows",
    "checked_scores",
]

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


def checked_scores(scores: ArrayLike, is_positive: ArrayLike) -> tuple[Floats, Bools]:
    """Scores [n] and labels [n] of one scorer.

    Raises:
        ShapeError: the two are not one-dimensional of one length.
        EmptyClassError: a class has no scores.
        FitError: a score is NaN or Inf, or labels are not booleans.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(is_positive)
    if values.ndim != 1 or values.shape != labels.shape:
        raise ShapeError(
            "expected one label for each score, got "
            f"scores of shape {values.shape} and labels of shape {labels.shape}; "
            "pass two lists of one length"
        )
    positive = _checked_labels(labels)
    _refuse_non_finite(values)
    return values, positive


def checked_rows(scores: ArrayLike, is_positive: ArrayLike) -> tuple[Floats, Bools]:
    """Scores [k, n] of k scorers of the same n examples, and labels [n].

    Raises:
        ShapeError: scores are not k rows of as many as there are labels, k at least 1.
        EmptyClassError, FitError: as `checked_scores`.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(is_positive)
    if values.ndim != 2 or not len(values) or labels.ndim != 1 or values.shape[1] != labels.size:
        raise ShapeError(
            "expected a row of scores for each scorer, each with one score for each label, got "
            f"scores of shape {values.shape} and labels of shape {labels.shape}; "
            "stack the scorers' lists, scores[None] for a single one"
        )
    positive = _checked_labels(labels)
    _refuse_non_finite(values)
    return values, positive


def checked_pair(
    first: ArrayLike, second: ArrayLike, is_positive: ArrayLike
) -> tuple[Floats, Bools]:
    """Scores [2, n] of two scorers of the same n examples, and labels [n].

    Raises:
        ShapeError, EmptyClassError, FitError: as `checked_scores`, for either.
    """
    one, positive = checked_scores(first, is_positive)
    other, _ = checked_scores(second, is_positive)
    return np.stack([one, other]), positive


def checked_groups(groups: Sequence[Hashable] | ArrayLike, count: int) -> Ints:
    """Groups as numbers [n] from 0 without gaps, whatever they are named.

    Raises:
        ShapeError: not one group for each of the `count` examples.
    """
    names = groups.tolist() if isinstance(groups, np.ndarray) else groups
    numbers = group_numbers(names)  # type: ignore[arg-type]
    if numbers.size != count:
        raise ShapeError(
            f"expected one group for each example, got {numbers.size} groups and {count} examples; "
            "pass lists of one length"
        )
    return numbers


def checked_level(level: float) -> float:
    """A confidence level, two-sided.

    Raises:
        FitError: outside (0, 1).
    """
    if not 0 < level < 1:
        raise FitError(f"expected a confidence level between 0 and 1, got {level}; try 0.95")
    return level


def checked_count(count: int, what: str, least: int = 1) -> int:
    """How many resamples or permutations.

    Raises:
        FitError: fewer than the least.
    """
    if count < least:
        raise FitError(f"expected at least {least} {what}, got {count}; try 2000")
    return count


def _checked_labels(labels: NDArray[np.generic]) -> Bools:
    # An empty list has dtype float64, and is an empty class rather than a wrong type.
    if labels.size and labels.dtype != np.bool_:
        raise FitError(
            f"expected labels to be booleans, got {labels.dtype}; pass labels == positive class"
        )
    positive = labels.astype(np.bool_)
    n_positive = int(positive.sum())
    if n_positive in (0, positive.size):
        raise EmptyClassError(
            "expected scores of both classes, got "
            f"{n_positive} positive and {positive.size - n_positive} negative; "
            "check the positive class and the data's labels"
        )
    return positive


def _refuse_non_finite(values: Floats) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if bad.size:
        first = tuple(bad[0].tolist())
        scorer = f" of scorer {first[0]}" if values.ndim == 2 else ""
        raise FitError(
            f"expected finite scores, got {len(bad)} that are NaN or Inf, the first "
            f"({values[first]}) at row {first[-1]}{scorer}; look for NaN in the activations"
        )
