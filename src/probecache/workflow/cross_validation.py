"""Which examples are held out together while training, and what their held-out scores say.

Guarantee: examples of one group (the two sides of a pair among them) and near-duplicates of one
another share a fold, so nothing is scored by a probe that was fitted on its like; a layer is chosen
for each fold from the others alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from probecache.duplicates import near_duplicates
from probecache.errors import EmptyClassError
from probecache.folds import assign_folds, group_numbers, joined_groups, straddles
from probecache.metrics import auroc_within_folds, fit_platt
from probecache.store.vectors import CrossValidationRecord, Estimate, PlattRecord

if TYPE_CHECKING:
    from probecache.fit import MethodFit
    from probecache.metrics import AurocEstimate
    from probecache.store.layout import ExampleRecord

__all__ = [
    "Split",
    "layer_estimate",
    "nested_estimate",
    "platt_of",
    "split_examples",
    "texts_of",
]

Bools = NDArray[np.bool_]
Ints = NDArray[np.intp]
# Each two of the folds are a fit more: beyond this the layer is not chosen anew for each fold.
_MOST_NESTED = 20
# Of fewer folds, leaving out both of two leaves nothing, and a layer cannot be chosen for a third.
_FEWEST_NESTED = 3


@dataclass(frozen=True)
class Split:
    """How examples are held out.

    Attributes:
        is_positive: bool [n].
        pairs: int [n], the groups that the data name.
        groups: int [n], what is never divided: the same, joined with near-duplicates if `together`.
        folds: int [n], or None where there is no cross-validation.
        near_duplicates: examples with a near-duplicate in another of the data's groups.
        together: whether these are kept together.
        why_not: why there are no folds, in words.
    """

    is_positive: Bools
    pairs: Ints
    groups: Ints
    folds: Ints | None
    near_duplicates: int = 0
    together: bool = True
    why_not: str | None = None

    @property
    def nested(self) -> bool:
        """Whether each two folds are left out, too, so that a layer can be chosen for each fold."""
        return (
            self.folds is not None and _FEWEST_NESTED <= int(self.folds.max()) + 1 <= _MOST_NESTED
        )


def texts_of(examples: Sequence[ExampleRecord]) -> list[str]:
    """What a reader would compare two examples by: the text and the answer."""
    return [" ".join(filter(None, (record.question, record.answer))) for record in examples]


def split_examples(examples: Sequence[ExampleRecord], is_positive: Bools, folds: int) -> Split:
    """Groups and folds of a cache's examples.

    Where nearly all texts are near-duplicates of one another, as those of one short template are,
    keeping them together would leave too little to hold out, fewer than three folds of what the
    data's own groups would divide further: then these decide alone, and the split says so.

    Args:
        examples: in data order.
        is_positive: bool [n].
        folds: how many at most; 0 for none.
    """
    pairs = group_numbers([record.group for record in examples])
    if not folds:
        return Split(is_positive, pairs, pairs, None, why_not="it was not asked for")
    # The question alone: the answers "(A)" and "(B)" do not make two prompts of one.
    alike = near_duplicates([record.question for record in examples])
    joined, many = joined_groups(pairs, alike), int(straddles(alike, pairs).sum())
    try:
        own = assign_folds(is_positive, pairs, folds)
    except EmptyClassError as error:
        return Split(is_positive, pairs, joined, None, many, why_not=str(error))
    try:
        found = assign_folds(is_positive, joined, folds)
    except EmptyClassError:
        found = None
    if found is None or found.max() + 1 < min(int(own.max()) + 1, _FEWEST_NESTED):
        return Split(is_positive, pairs, pairs, own, many, together=False)
    return Split(is_positive, pairs, joined, found, many)


def layer_estimate(fit: MethodFit, split: Split) -> Estimate | None:
    """The AUROC of a layer's held-out scores."""
    if split.folds is None or fit.held_out is None:
        return None
    return _estimate(auroc_within_folds(fit.held_out, split.is_positive, split.folds, split.groups))


def nested_estimate(fits: Mapping[int, MethodFit], split: Split) -> CrossValidationRecord | None:
    """What a layer that is chosen by held-out scores is worth on examples without a part in it.

    For each fold, every layer's probes are fitted without that fold and one other in turn; the
    layer that scores the others best scores the fold.

    Source: Cawley & Talbot 2010, J. Mach. Learn. Res. 11:2079.
    """
    if split.folds is None:
        return None
    folds = int(split.folds.max()) + 1
    chosen: list[int] = []
    if split.nested:
        chosen = [max(fits, key=lambda n: _inner_auroc(fits[n], split, f)) for f in range(folds)]
    return CrossValidationRecord(
        folds=folds,
        groups=len(np.unique(split.groups)),
        near_duplicates=split.near_duplicates,
        near_duplicates_together=split.together,
        best_layer=max(fits, key=lambda n: _outer_auroc(fits[n], split)),
        nested=_nested(fits, split, chosen) if chosen else None,
        layer_by_fold=chosen,
    )


def _nested(fits: Mapping[int, MethodFit], split: Split, chosen: Sequence[int]) -> Estimate:
    """The AUROC where each fold is scored at the layer chosen for it."""
    assert split.folds is not None
    scores = np.empty(len(split.is_positive))
    for fold, layer in enumerate(chosen):
        held_out = fits[layer].held_out
        assert held_out is not None
        scores[split.folds == fold] = held_out[split.folds == fold]
    return _estimate(auroc_within_folds(scores, split.is_positive, split.folds, split.groups))


def platt_of(fit: MethodFit, split: Split) -> PlattRecord | None:
    """Calibration of unit-norm scores by held-out ones."""
    if split.folds is None or fit.held_out is None:
        return None
    # Each fold's scores count from its own probe's threshold, and such thresholds may lie far
    # apart: scores are compared within folds, from the middle between their classes.
    middles = np.array([_middle(fit.held_out, split, f) for f in range(int(split.folds.max()) + 1)])
    platt = fit_platt(fit.held_out - middles[split.folds], split.is_positive)
    # Below 0 a higher score would mean the other class, which no vector's score does.
    slope = max(platt.slope, 0.0)
    middle = fit.probe.threshold + float(np.median(middles))
    return PlattRecord(slope=slope, intercept=platt.intercept - slope * middle)


def _middle(scores: NDArray[np.float64], split: Split, fold: int) -> float:
    here = split.folds == fold
    means = [scores[here & side].mean() for side in (split.is_positive, ~split.is_positive)]
    return float(sum(means)) / 2


def _inner_auroc(fit: MethodFit, split: Split, fold: int) -> float:
    assert fit.inner is not None
    assert split.folds is not None
    others = split.folds != fold
    return _mean_auroc(fit.inner[fold][others], split, others)


def _outer_auroc(fit: MethodFit, split: Split) -> float:
    assert fit.held_out is not None
    return _mean_auroc(fit.held_out, split, np.ones(len(split.is_positive), dtype=np.bool_))


def _mean_auroc(scores: NDArray[np.float64], split: Split, which: Bools) -> float:
    assert split.folds is not None
    _, folds = np.unique(split.folds[which], return_inverse=True)
    return auroc_within_folds(scores, split.is_positive[which], folds, split.groups[which]).auroc


def _estimate(found: AurocEstimate) -> Estimate:
    return Estimate(auroc=found.auroc, low=found.low, high=found.high)
