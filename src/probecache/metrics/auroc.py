"""How well scores separate two classes: ROC curve, AUROC with its interval, accuracy.

Guarantees: numpy only, float64 throughout, ties counted exactly (1/2 each), O(n log n), and an
interval that never has zero width. Swapping the classes gives exactly 1 - AUROC and the mirrored
interval. Does not guarantee the nominal coverage when a class has fewer than about ten scores, nor
after choosing the best of several layers: the interval belongs to one layer fixed in advance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probecache.errors import EmptyClassError, FitError, ShapeError

__all__ = [
    "AurocEstimate",
    "accuracy_at",
    "auroc",
    "logit_interval",
    "normal_quantile",
    "roc_curve",
    "widest_interval",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class AurocEstimate:
    """An AUROC, its confidence interval and the sample sizes behind it.

    `auroc` is the probability that a random positive scores above a random negative, a tie
    counting 1/2; `low <= auroc <= high` is its two-sided interval at confidence `level`.
    """

    auroc: float
    low: float
    high: float
    n_positive: int
    n_negative: int
    level: float = 0.95


def roc_curve(scores: ArrayLike, is_positive: ArrayLike) -> tuple[Floats, Floats]:
    """Trace false positive rate against true positive rate as the threshold falls.

    Tied scores cross the threshold together, so a tie between classes is a slanted segment and
    the area under the polyline equals the AUROC.

    Args:
        scores: [n], any real dtype, finite, in any unit.
        is_positive: [n] booleans, True for the class that a higher score means.

    Returns:
        (fpr, tpr), each [1 + number of distinct scores], from (0, 0) to (1, 1).

    Raises:
        ShapeError, EmptyClassError, FitError: as `auroc`.
    """
    values, positive = _checked(scores, is_positive)
    order = np.argsort(-values, kind="stable")
    last_of_tie = np.append(np.diff(values[order]) != 0, True)
    hits = np.cumsum(positive[order])[last_of_tie]
    alarms = np.flatnonzero(last_of_tie) + 1 - hits
    fpr = np.concatenate([[0.0], alarms / alarms[-1]])
    tpr = np.concatenate([[0.0], hits / hits[-1]])
    return fpr, tpr


def auroc(scores: ArrayLike, is_positive: ArrayLike, level: float = 0.95) -> AurocEstimate:
    """Estimate the AUROC by mid-ranks, with DeLong's interval on the logit scale.

    With placement values V10 (share of negatives below each positive, ties 1/2) and V01 (share
    of positives above each negative), AUROC = mean V10 and its variance is
    var(V10) / n_positive + var(V01) / n_negative. The interval is symmetric in logit(AUROC),
    so it stays inside [0, 1] and covers well near 1.

    Where that variance is zero or unknown (perfect separation, all scores tied, one score in a
    class) the interval comes from the largest variance that any pair of distributions with this
    AUROC can have, AUROC (1 - AUROC) / k with k the smaller class: Wilson's interval for k
    trials, widened at an AUROC of exactly 0 or 1 to the Clopper-Pearson bound.

    Args:
        scores: [n], any real dtype, finite, in any unit.
        is_positive: [n] booleans, True for the class that a higher score means.
        level: two-sided confidence, in (0, 1).

    Raises:
        ShapeError: the two are not one-dimensional of one length.
        EmptyClassError: a class has no scores.
        FitError: a score is NaN or Inf, labels are not booleans, or level is outside (0, 1).

    Source: DeLong et al. 1988, Biometrics 44:837; ranks: Sun & Xu 2014, IEEE SPL 21:1389;
    logit scale: Pepe 2003, section 5.2; largest variance: Birnbaum & Klose 1957, Ann. Math.
    Stat. 28:933.
    """
    if not 0 < level < 1:
        raise FitError(f"expected a confidence level between 0 and 1, got {level}; try 0.95")
    values, positive = _checked(scores, is_positive)
    wins, losses = _wins_and_losses(values, positive)
    n_positive, n_negative = wins.size, losses.size
    area = _area(float(wins.sum()), n_positive * n_negative)
    variance = _delong_variance(wins / n_negative, 1 - losses / n_positive)
    z = normal_quantile((1 + level) / 2)
    if variance > 0:
        low, high = logit_interval(area, variance, z)
    else:
        low, high = widest_interval(area, min(n_positive, n_negative), z, level)
    return AurocEstimate(area, low, high, n_positive, n_negative, level)


def accuracy_at(scores: ArrayLike, is_positive: ArrayLike, threshold: float) -> float:
    """Share of scores on their own side of a threshold fixed beforehand.

    A score strictly above the threshold is called positive, one on it negative. With unequal
    classes, compare with the share of the larger class, not with 1/2.

    Args:
        scores: [n], finite, in the threshold's unit.
        is_positive: [n] booleans.
        threshold: finite.

    Raises:
        ShapeError, EmptyClassError, FitError: as `auroc`; FitError for a NaN or Inf threshold.
    """
    if not math.isfinite(threshold):
        raise FitError(f"expected a finite threshold, got {threshold}; train the vectors again")
    values, positive = _checked(scores, is_positive)
    return float(np.mean((values > threshold) == positive))


def _checked(scores: ArrayLike, is_positive: ArrayLike) -> tuple[Floats, Bools]:
    values = np.asarray(scores, dtype=np.float64)
    positive = np.asarray(is_positive)
    if values.ndim != 1 or values.shape != positive.shape:
        raise ShapeError(
            "expected one label for each score, got "
            f"scores of shape {values.shape} and labels of shape {positive.shape}; "
            "pass two lists of one length"
        )
    # An empty list has dtype float64, and is an empty class rather than a wrong type.
    if positive.size and positive.dtype != np.bool_:
        raise FitError(
            f"expected labels to be booleans, got {positive.dtype}; pass labels == positive class"
        )
    positive = positive.astype(np.bool_)
    _refuse_empty(positive)
    _refuse_non_finite(values)
    return values, positive


def _refuse_empty(positive: Bools) -> None:
    n_positive = int(positive.sum())
    if n_positive in (0, positive.size):
        raise EmptyClassError(
            "expected scores of both classes, got "
            f"{n_positive} positive and {positive.size - n_positive} negative; "
            "check the positive class and the data's labels"
        )


def _refuse_non_finite(values: Floats) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise FitError(
            f"expected finite scores, got {bad.size} that are NaN or Inf, the first "
            f"({values[bad[0]]}) at row {bad[0]}; look for NaN in the activations"
        )


def _midranks(values: Floats) -> Floats:
    """Rank from 1, tied values sharing the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    midranks: Floats = (ends - (counts - 1) / 2)[inverse]
    return midranks


def _wins_and_losses(values: Floats, positive: Bools) -> tuple[Floats, Floats]:
    """Negatives below each positive, and positives below each negative; whole and half numbers."""
    ranks = _midranks(values)
    wins = ranks[positive] - _midranks(values[positive])
    losses = ranks[~positive] - _midranks(values[~positive])
    return wins, losses


def _area(wins: float, pairs: int) -> float:
    """AUROC from the Mann-Whitney count, such that swapped classes give exactly 1 - AUROC.

    Only the larger of the two areas is rounded from the quotient; the smaller is 1 minus it, a
    subtraction that floating point does exactly.
    """
    larger = 1 - min(wins, pairs - wins) / pairs
    return larger if 2 * wins >= pairs else 1 - larger


def _delong_variance(v10: Floats, v01: Floats) -> float:
    """DeLong's variance, 0 where a class is too small to estimate its part."""
    if min(v10.size, v01.size) < 2:
        return 0.0
    return float(v10.var(ddof=1) / v10.size + v01.var(ddof=1) / v01.size)


def logit_interval(area: float, variance: float, z: float) -> tuple[float, float]:
    """Interval of `z` standard errors around an AUROC, symmetric in its logit."""
    odds = area / (1 - area)
    # Beyond e^500 the bound is 0 or 1 in float64 whatever the exponent, and exp would overflow.
    spread = math.exp(min(500.0, z * math.sqrt(variance) / (area * (1 - area))))
    low, high = odds / (odds + spread), odds * spread / (1 + odds * spread)
    return max(0.0, min(low, area)), min(1.0, max(high, area))


def widest_interval(area: float, trials: int, z: float, level: float) -> tuple[float, float]:
    """Wilson's interval for `trials`, no narrower than Clopper-Pearson's at 0 and 1."""
    centre = (area + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(area * (1 - area) / trials + (z / (2 * trials)) ** 2)
    half /= 1 + z * z / trials
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    exact = ((1 - level) / 2) ** (1 / trials)
    if area == 1:
        return min(low, exact), 1.0
    if area == 0:
        return 0.0, max(high, 1 - exact)
    return low, high


def normal_quantile(p: float) -> float:
    """The standard normal's value below which a share `p` lies."""
    from statistics import NormalDist  # 10 ms to import, wanted only here

    return NormalDist().inv_cdf(p)
