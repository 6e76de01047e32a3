"""AUROCs of several scorers of the same examples: their covariance, and the difference of two.

Guarantees: NumPy only, float64, O(k n log n) for k scorers of n examples, ties counted exactly.
Swapped labels give exactly the negative difference and the mirrored interval. Assumes that examples
are independent: where they come in groups use `grouped_difference`. Does not pay for having
picked one of the two because it was best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from probecache.metrics.auroc import NO_VARIANCE, normal_quantile, widest_interval
from probecache.metrics.inputs import Floats, checked_level, checked_pair, checked_rows
from probecache.metrics.ranks import area_of_wins, wins_and_losses
from probecache.metrics.student import NORMAL_FROM, t_quantile, t_two_sided

__all__ = ["AurocDifference", "delong_covariance", "difference_estimate", "paired_difference"]


@dataclass(frozen=True)
class AurocDifference:
    """AUROC of the first scorer minus that of the second, with its interval.

    `low <= difference <= high`, within [-1, 1], at two-sided confidence `level`; `p_value` is
    two-sided, for no difference.
    """

    difference: float
    low: float
    high: float
    p_value: float
    level: float = 0.95


def delong_covariance(scores: ArrayLike, is_positive: ArrayLike) -> tuple[Floats, Floats]:
    """AUROCs of k scorers of the same n examples, and how they vary together.

    With placement values V10 [k, n_positive] (share of negatives below each positive, ties 1/2)
    and V01 [k, n_negative] (share of positives above each negative), the covariance is
    cov(V10) / n_positive + cov(V01) / n_negative. With one example in a class it is unknown, NaN.

    Args:
        scores: [k, n], any real dtype, finite; a row for each scorer, in any unit.
        is_positive: [n] booleans, True for the class that a higher score means.

    Returns:
        (aurocs [k], covariance [k, k]), float64. Swapped labels give exactly 1 - aurocs.

    Raises:
        ShapeError: scores are not rows of as many as there are labels.
        EmptyClassError: a class has no scores.
        FitError: a score is NaN or Inf, or labels are not booleans.

    Source: DeLong et al. 1988, Biometrics 44:837; ranks: Sun & Xu 2014, IEEE SPL 21:1389.
    """
    rows, positive = checked_rows(scores, is_positive)
    wins, losses = wins_and_losses(rows, positive)
    n_positive, n_negative = wins.shape[1], losses.shape[1]
    pairs = n_positive * n_negative
    areas = np.array([area_of_wins(float(won), pairs) for won in wins.sum(axis=1)])
    return areas, _covariance(wins / n_negative) + _covariance(losses / n_positive)


def paired_difference(
    first: ArrayLike, second: ArrayLike, is_positive: ArrayLike, level: float = 0.95
) -> AurocDifference:
    """DeLong's test of two scorers of the same examples, and the interval of their difference.

    The interval is the normal one, cut to [-1, 1]. Where the variance is zero or unknown (the two
    win and lose alike everywhere, as when both separate perfectly or the scores are the same)
    see `difference_estimate`, with the smaller class for the number of trials: it never has zero
    width.

    Args:
        first, second: [n], finite, each in a unit of its own.
        is_positive: [n] booleans, True for the class that a higher score means.
        level: two-sided confidence, in (0, 1).

    Raises:
        ShapeError, EmptyClassError, FitError: as `auroc`.

    Source: as `delong_covariance`.
    """
    rows, positive = checked_pair(first, second, is_positive)
    wins, losses = wins_and_losses(rows, positive)
    n_positive, n_negative = wins.shape[1], losses.shape[1]
    # Half numbers are subtracted, so the difference is exact and so is a variance of zero.
    gained, lost = wins[0] - wins[1], losses[0] - losses[1]
    difference = float(gained.sum()) / (n_positive * n_negative)
    variance = float(
        _covariance(gained[None] / n_negative)[0, 0] + _covariance(lost[None] / n_positive)[0, 0]
    )
    return difference_estimate(difference, variance, min(n_positive, n_negative), level)


def difference_estimate(
    difference: float,
    variance: float,
    trials: int,
    level: float = 0.95,
    freedom: int = NORMAL_FROM,
) -> AurocDifference:
    """Interval and p-value of a difference by Student's t, or bounds of them without a variance.

    Without one, count the difference as the mean of `trials` independent comparisons, each -1, 0
    or 1. If it is zero, none of them was seen to differ, and the share that does is at most
    1 - ((1 - level) / 2)^(1 / trials), the Clopper-Pearson bound: the interval reaches as far to
    either side, and the p-value is 1. Else it is `widest_interval` of (1 + difference) / 2, whose
    test (of a sign, at a difference of exactly -1 or 1) gives the p-value.

    Args:
        difference: of two AUROCs, in [-1, 1].
        variance: of the difference; zero or NaN where unknown.
        trials: independent examples, or groups, of the class that has fewer.
        level: two-sided confidence.
        freedom: degrees of freedom of the variance; the normal distribution without.

    Raises:
        FitError: level is outside (0, 1).
    """
    share = (1 + checked_level(level)) / 2
    if variance > NO_VARIANCE:
        error = math.sqrt(variance)
        reach = t_quantile(share, freedom) * error
        low, high = difference - reach, difference + reach
        p_value = t_two_sided(difference / error, freedom)
    elif difference == 0:
        high = 1 - ((1 - level) / 2) ** (1 / trials)
        low, p_value = -high, 1.0
    else:
        bounds = widest_interval((1 + difference) / 2, trials, normal_quantile(share), level)
        low, high = (2 * x - 1 for x in bounds)
        p_value = math.erfc(abs(difference) * math.sqrt(trials / 2))
        if abs(difference) == 1:
            p_value = max(p_value, 2.0 ** (1 - trials))
    low, high = max(-1.0, min(low, difference)), min(1.0, max(high, difference))
    return AurocDifference(difference, low, high, p_value, level)


def _covariance(placements: Floats) -> Floats:
    """Covariance [k, k] of the means of placements [k, n], NaN for a single example."""
    n = placements.shape[1]
    if n < 2:
        return np.full((len(placements), len(placements)), np.nan)
    centred = placements - placements.mean(axis=1, keepdims=True)
    return np.asarray(centred @ centred.T / (n - 1) / n, dtype=np.float64)
