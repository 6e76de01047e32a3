"""Scores as probabilities, and whether probabilities mean what they say.

Guarantees: NumPy only, float64, deterministic; every slope and intercept is finite, on scores that
separate the classes as well. Does not make a probability right for data with another share of
positives than what it was fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from probecache.errors import FitError
from probecache.metrics.inputs import Bools, Floats, checked_scores
from probecache.metrics.logistic import bias_reduced_line, likeliest_line, sigmoid

__all__ = ["Bin", "Calibration", "Platt", "calibration", "fit_platt"]

# Probabilities nearer to 0 or 1 have no finite logit in practice: 1e-12 is a logit of 27.6.
NEAREST = 1e-12


@dataclass(frozen=True)
class Platt:
    """The line that turns a score into the logit of a probability.

    `slope` is per unit of the score, `intercept` a logit.
    """

    slope: float
    intercept: float

    def probability(self, scores: ArrayLike) -> Floats:
        """Probability of the positive class for scores of any shape."""
        return sigmoid(self.slope * np.asarray(scores, dtype=np.float64) + self.intercept)


@dataclass(frozen=True)
class Bin:
    """The `n` examples whose probability is in (low, high], 0 itself in the first bin.

    `predicted` is their mean probability, `observed` the share of positives among them.
    """

    low: float
    high: float
    n: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Calibration:
    """How far probabilities are from what happens.

    `brier` is the mean squared error; `ece` the expected calibration error, the bins' distances of
    predicted from observed weighted by n; `slope` and `intercept` the line from the predicted logit
    to the likely one: 1 and 0 where calibrated, a slope below 1 where too sure, an intercept below
    0 where too high. `bins` holds those that have examples.
    """

    brier: float
    ece: float
    slope: float
    intercept: float
    bins: tuple[Bin, ...]


def fit_platt(scores: ArrayLike, is_positive: ArrayLike) -> Platt:
    """Fit probabilities to scores: a logistic regression on Platt's smoothed targets.

    The targets are (n_positive + 1) / (n_positive + 2) and 1 / (n_negative + 2) in place of 1 and
    0, what a uniform prior expects of another example, so that the slope is finite where the scores
    separate the classes. Scores that are all alike give slope 0. Fit on held-out scores: those of
    the examples that a probe was trained on are too good.

    Args:
        scores: [n], finite, in any unit.
        is_positive: [n] booleans.

    Returns:
        Slope and intercept, found by Newton's method with halved steps. Swapped labels turn the
        sign of both.

    Raises:
        ShapeError, EmptyClassError, FitError: as `auroc`.

    Source: Platt 1999, Advances in Large Margin Classifiers, 61-74; Newton rather than
    Levenberg-Marquardt, Lin et al. 2007, Mach. Learn. 68:267.
    """
    values, positive = checked_scores(scores, is_positive)
    n_positive = int(positive.sum())
    n_negative = positive.size - n_positive
    high, low = (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2)
    return Platt(*likeliest_line(values, np.where(positive, high, low)))


def calibration(probabilities: ArrayLike, is_positive: ArrayLike, bins: int = 10) -> Calibration:
    """Measure the calibration of probabilities on labels that they were not fitted on.

    Slope and intercept are Cox's logistic recalibration on the logit, fitted with Firth's bias
    reduction, which keeps them finite where the probabilities separate the classes, without the
    pull to the middle that smoothed targets have. Probabilities nearer than 1e-12 to 0 or 1 are
    taken as that near for the logit; all of one probability gives slope 0.

    Args:
        probabilities: [n] of the positive class, in [0, 1].
        is_positive: [n] booleans.
        bins: of equal width over [0, 1].

    Raises:
        ShapeError, EmptyClassError: as `auroc`.
        FitError: as `auroc`; a probability is outside [0, 1], or bins is below 1.

    Source: Cox 1958, Biometrika 45:562; Brier 1950, Mon. Weather Rev. 78:1; expected calibration
    error, Naeini et al. 2015, AAAI.
    """
    values, positive = checked_scores(probabilities, is_positive)
    outside = np.flatnonzero((values < 0) | (values > 1))
    if outside.size:
        raise FitError(
            f"expected probabilities between 0 and 1, got {values[outside[0]]} at row "
            f"{outside[0]}; turn scores into probabilities with fit_platt first"
        )
    if bins < 1:
        raise FitError(f"expected at least 1 bin, got {bins}; try 10")
    happened = positive.astype(np.float64)
    found = _bins(values, positive, bins)
    inside = np.clip(values, NEAREST, 1 - NEAREST)
    slope, intercept = bias_reduced_line(np.log(inside) - np.log1p(-inside), happened)
    ece = sum(b.n * abs(b.predicted - b.observed) for b in found) / values.size
    return Calibration(float(np.mean((values - happened) ** 2)), ece, slope, intercept, found)


def _bins(values: Floats, positive: Bools, count: int) -> tuple[Bin, ...]:
    edges = np.linspace(0, 1, count + 1)
    place = np.maximum(np.searchsorted(edges, values, "left") - 1, 0)
    sizes = np.bincount(place, minlength=count)
    predicted = np.bincount(place, weights=values, minlength=count)
    observed = np.bincount(place, weights=positive, minlength=count)
    return tuple(
        Bin(
            float(edges[i]),
            float(edges[i + 1]),
            int(sizes[i]),
            float(predicted[i] / sizes[i]),
            float(observed[i] / sizes[i]),
        )
        for i in np.flatnonzero(sizes).tolist()
    )
