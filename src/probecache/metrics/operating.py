"""True positive rate at a false positive rate that can be afforded.

Guarantees: NumPy only, deterministic for a seed, refused where the negatives are too few to know
the false positive rate, an interval that counts the uncertainty of the threshold too and never has
zero width. Does not promise the false positive rate on other data: the threshold is an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from probecache.errors import FitError
from probecache.metrics.auroc import normal_quantile, widest_interval
from probecache.metrics.inputs import (
    Bools,
    Floats,
    Ints,
    checked_count,
    checked_groups,
    checked_level,
    checked_scores,
)
from probecache.metrics.resampling import group_weights

__all__ = ["TprEstimate", "negatives_needed", "tpr_at_fpr"]

# A share times a count, such as 0.07 * 100, can miss the whole number that it is.
ROUNDING = 1e-9


@dataclass(frozen=True)
class TprEstimate:
    """The share of positives above the threshold that `fpr` allows, and its interval.

    `low <= tpr <= high` is two-sided at confidence `level`; `threshold` is in the scores' unit, and
    a score strictly above it is called positive.
    """

    fpr: float
    tpr: float
    low: float
    high: float
    threshold: float
    n_positive: int
    n_negative: int
    level: float = 0.95


def negatives_needed(fpr: float) -> int:
    """How many negatives it takes to know a false positive rate: 3 / fpr, 300 for 1 %.

    With fewer, even none above a threshold does not show at 95 % that its rate is below `fpr`.

    Raises:
        FitError: fpr is outside (0, 1).

    Source: the rule of three, Hanley & Lippman-Hand 1983, JAMA 249:1743.
    """
    if not 0 < fpr < 1:
        raise FitError(f"expected a false positive rate between 0 and 1, got {fpr}; try 0.01")
    return math.ceil(3 / fpr - ROUNDING)


def tpr_at_fpr(
    scores: ArrayLike,
    is_positive: ArrayLike,
    fpr: float,
    level: float = 0.95,
    groups: Sequence[Hashable] | ArrayLike | None = None,
    count: int = 2000,
    seed: int = 0,
) -> TprEstimate:
    """True positive rate at the smallest threshold that keeps the false positive rate.

    The threshold is the smallest that leaves a share of at most `fpr` of the negatives strictly
    above it: it is a negative's own score, and tied negatives fall on one side together.

    The interval counts that the threshold is an estimate too. How many negatives lie above the
    true threshold is binomial (n_negative, fpr): it is drawn, the threshold taken between the two
    negatives that this leaves it between (beyond the last: any rate down to 0), and the rate drawn
    from Jeffreys' distribution for the positives above; the interval holds the middle `level` of
    the draws. With `groups`, whole groups of both classes are resampled and the threshold found
    anew in each; that interval is no narrower than Wilson's for as many trials as positive groups.

    The low end is low, even for scores that separate the classes, where no negative at all may lie
    above the true threshold: at 95 % with fewer than 3.7 / fpr negatives, 369 for 1 %. On binormal
    scores it covered 95 to 98 of 100 at nominal 95, with groups 94 to 97; an interval for a
    threshold taken as known covered fewer than 70.

    Args:
        scores: [n], finite, in any unit.
        is_positive: [n] booleans, True for the class that a higher score means.
        fpr: false positive rate, in (0, 1).
        level: two-sided confidence, in (0, 1).
        groups: [n] what was sampled together; without, all examples are independent.
        count, seed: of the draws.

    Raises:
        ShapeError, EmptyClassError, FitError: as `auroc`; FitError for fewer negatives than
            `negatives_needed`, or fpr outside (0, 1).

    Source: order statistics and the quantile, David & Nagaraja 2003, section 7.1; Jeffreys'
    interval, Brown et al. 2001, Stat. Sci. 16:101.
    """
    values, positive = checked_scores(scores, is_positive)
    checked_level(level)
    checked_count(count, "resamples", 2)
    above, below = values[positive], np.sort(values[~positive])[::-1]
    _refuse_few(below.size, fpr)
    allowed = math.floor(fpr * below.size + ROUNDING)
    threshold = float(below[allowed])
    tpr = float(np.mean(above > threshold))
    low, high = 1.0, 0.0
    rng = np.random.default_rng(seed)
    if groups is None:
        rates = _drawn_rates(np.sort(above), below, fpr, count, rng)
    else:
        members = checked_groups(groups, values.size)
        rates = _resampled_rates(values, positive, members, fpr, count, rng)
        low, high = _wilson(tpr, positive, members, level)
    reached = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2]).tolist()
    low, high = min(low, tpr, reached[0]), max(high, tpr, reached[1])
    return TprEstimate(fpr, tpr, low, high, threshold, above.size, below.size, level)


def _refuse_few(n_negative: int, fpr: float) -> None:
    needed = negatives_needed(fpr)
    if n_negative < needed:
        raise FitError(
            f"expected at least {needed} negatives for a false positive rate of {fpr:.3g}, got "
            f"{n_negative}; add negatives, or ask for a rate of {3 / max(n_negative, 1):.2g}"
        )


def _wilson(tpr: float, positive: Bools, members: Ints, level: float) -> tuple[float, float]:
    trials = int(np.unique(members[positive]).size)
    return widest_interval(tpr, trials, normal_quantile((1 + level) / 2), level)


def _drawn_rates(
    above: Floats, below: Floats, fpr: float, count: int, rng: np.random.Generator
) -> Floats:
    """True positive rates [count] that the scores allow; `above` ascends, `below` descends."""
    # Hits with the threshold on each negative in turn; before the first, above all that was seen.
    hits = np.append(0, above.size - np.searchsorted(above, below, "right"))
    passed = rng.binomial(below.size, fpr, count)
    low, high = hits[passed], hits[np.minimum(passed + 1, below.size)]
    hit = low + (high - low) * rng.random(count)
    return np.asarray(rng.beta(hit + 0.5, above.size - hit + 0.5), dtype=np.float64)


def _resampled_rates(
    values: Floats,
    positive: Bools,
    members: Ints,
    fpr: float,
    count: int,
    rng: np.random.Generator,
) -> Floats:
    """True positive rates over resamples of whole groups of both classes."""
    upwards = np.argsort(values, kind="stable")
    above, below = upwards[positive[upwards]], upwards[~positive[upwards]][::-1]
    rates = []
    for weights in group_weights(positive, members, count, rng):
        passed, missed = np.cumsum(weights[below], axis=0), np.cumsum(weights[above], axis=0)
        # On average as many negatives lie above this one as above the true threshold.
        places = (passed < fpr * passed[-1] - ROUNDING).sum(axis=0)
        below_them = np.searchsorted(values[above], values[below][places], "right")
        missed = np.vstack([np.zeros_like(missed[:1]), missed])
        rates.append(1 - missed[below_them, np.arange(places.size)] / missed[-1])
    return np.concatenate(rates)
