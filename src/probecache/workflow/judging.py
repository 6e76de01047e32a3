"""What scores say of each layer and of all layers together.

Guarantee: an AUROC's interval counts groups where examples are clustered, and examples otherwise; a
layer that was chosen pays for the choice with a permutation test over all that were looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from probecache.metrics import (
    AurocDifference,
    AurocEstimate,
    Calibration,
    PermutationTest,
    Platt,
    TprEstimate,
    accuracy_at,
    auroc,
    calibration,
    grouped_differences,
    grouped_interval,
    negatives_needed,
    paired_difference,
    permutation_test,
    tpr_at_fpr,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from probecache.controls import RandomControl
    from probecache.store.vectors import LayerRecord

__all__ = ["Category", "Judged", "LayerResult", "by_category", "judge"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
# A threshold that leaves less than this share on one side has not carried over.
_ONE_SIDE = 0.05
_RATES = (0.01, 0.05)
# Of the interval of a rate: many at the layer that is quoted, enough to look at elsewhere.
_RESAMPLES, _FEW_RESAMPLES = 2000, 400


@dataclass(frozen=True)
class LayerResult:
    """One layer's outcome. Scores are those of examples, in data order.

    Attributes:
        auroc: with DeLong's interval, or a bootstrap's over groups.
        trained: what training said of the layer.
        below_best: how far the AUROC lies below the best layer's; None at the best.
        tpr: true positive rate by false positive rate; None where negatives are too few to say.
        calibration: of the probabilities fixed in training; None without.
        random: AUROCs of random directions, folded to 0.5 or more.
    """

    layer: int
    auroc: AurocEstimate
    threshold: float
    accuracy: float
    scores: Floats
    is_positive: Bools
    trained: LayerRecord
    below_best: AurocDifference | None
    tpr: Mapping[float, TprEstimate | None]
    calibration: Calibration | None
    random: RandomControl | None

    @property
    def one_sided(self) -> bool:
        """Whether nearly all examples of both classes lie on one side of the threshold."""
        above = self.scores > self.threshold
        shares = [float(np.mean(above[side])) for side in (self.is_positive, ~self.is_positive)]
        return max(shares) < _ONE_SIDE or min(shares) > 1 - _ONE_SIDE


@dataclass(frozen=True)
class Category:
    """The best layer on the examples of one category; no AUROC where a class is missing."""

    name: str
    n_positive: int
    n_negative: int
    auroc: AurocEstimate | None
    accuracy: float
    mean_score: float


@dataclass(frozen=True)
class Judged:
    """What the scores say, layer by layer and of all layers together."""

    layers: tuple[LayerResult, ...]
    best: LayerResult
    chosen_in_training: LayerResult | None
    permutation: PermutationTest
    interval: str
    groups_by_class: tuple[int, int]


def judge(
    scores: Mapping[int, Floats],
    positive: Bools,
    groups: NDArray[np.intp],
    trained: Mapping[int, LayerRecord],
    random: Mapping[int, RandomControl | None],
    chosen: int | None = None,
) -> Judged:
    """Judge every layer.

    Args:
        scores: by layer, [examples].
        positive: bool [examples].
        groups: [examples], what the data say belongs together.
        trained: what training said of each layer.
        random: what random directions reach, where that was asked for.
        chosen: the layer that training chose, if it did.
    """
    layers = list(scores)
    matrix = np.stack([scores[layer] for layer in layers])
    clusters = len(np.unique(groups))
    clustered = clusters < len(groups)
    areas = _areas(matrix, positive, groups)
    test = permutation_test(matrix, positive, groups)
    best = int(np.argmax([area.auroc for area in areas]))
    below = _below_best(matrix, best, positive, groups if clustered else None)
    results = tuple(
        LayerResult(
            layer=layer,
            auroc=areas[place],
            threshold=trained[layer].threshold,
            accuracy=accuracy_at(matrix[place], positive, trained[layer].threshold),
            scores=matrix[place],
            is_positive=positive,
            trained=trained[layer],
            below_best=below[place],
            tpr={
                rate: _tpr(
                    matrix[place],
                    positive,
                    rate,
                    groups if clustered else None,
                    _RESAMPLES if place == best else _FEW_RESAMPLES,
                )
                for rate in _RATES
            },
            calibration=_calibration(matrix[place], positive, trained[layer]),
            random=random.get(layer),
        )
        for place, layer in enumerate(layers)
    )
    interval = f"bootstrap over {clusters} groups" if clustered else "DeLong"
    fixed = next((result for result in results if result.layer == chosen), None)
    independent = tuple(len(np.unique(groups[side])) for side in (positive, ~positive))
    return Judged(results, results[best], fixed, test, interval, (independent[0], independent[1]))


def _areas(matrix: Floats, positive: Bools, groups: NDArray[np.intp]) -> list[AurocEstimate]:
    """The AUROC of each row of scores; intervals count groups where some hold several examples."""
    if len(np.unique(groups)) < len(groups):
        return grouped_interval(matrix, positive, groups)
    return [auroc(scores, positive) for scores in matrix]


def _below_best(
    matrix: Floats, best: int, positive: Bools, groups: NDArray[np.intp] | None
) -> list[AurocDifference | None]:
    """How far each layer lies below the best one, in pairs; None for the best itself."""
    if groups is not None:
        found = [_turned(one) for one in grouped_differences(matrix, best, positive, groups)]
    else:
        found = [paired_difference(matrix[best], scores, positive) for scores in matrix]
    return [None if place == best else one for place, one in enumerate(found)]


def _turned(one: AurocDifference) -> AurocDifference:
    return AurocDifference(-one.difference, -one.high, -one.low, one.p_value, one.level)


def _tpr(
    scores: Floats, positive: Bools, rate: float, groups: NDArray[np.intp] | None, count: int
) -> TprEstimate | None:
    """None where there are too few negatives to say; of a group, one counts."""
    negatives = int((~positive).sum()) if groups is None else len(np.unique(groups[~positive]))
    if negatives < negatives_needed(rate):
        return None
    return tpr_at_fpr(scores, positive, rate, groups=groups, count=count)


def _calibration(scores: Floats, positive: Bools, trained: LayerRecord) -> Calibration | None:
    if trained.calibration is None:
        return None
    platt = Platt(trained.calibration.slope, trained.calibration.intercept)
    return calibration(platt.probability(scores), positive)


def by_category(
    best: LayerResult, names: Sequence[str | None], groups: NDArray[np.intp]
) -> tuple[Category, ...]:
    """The best layer by category; none where the data name none.

    Args:
        best: its result.
        names: each example's category, in data order.
        groups: [examples], what the data say belongs together.
    """
    if not any(names):
        return ()
    found = []
    for name in dict.fromkeys(names):
        here = np.array([one == name for one in names])
        scores, positive = best.scores[here], best.is_positive[here]
        both = 0 < positive.sum() < len(positive)
        found.append(
            Category(
                name="(none)" if name is None else name,
                n_positive=int(positive.sum()),
                n_negative=int((~positive).sum()),
                auroc=_areas(scores[None], positive, groups[here])[0] if both else None,
                accuracy=float(np.mean((scores > best.threshold) == positive)),
                mean_score=float(scores.mean()),
            )
        )
    return tuple(found)
