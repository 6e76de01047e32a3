"""Plain sentences on what else could explain a score: figures in, a sentence or None out.

Each names its figures and what to do. The thresholds are such that data without the artefact raise
one in fewer than 2 of 100 cases (simulated in the tests): a figure must be clear of chance at the
99% level, not only at the 95% level of the interval that is shown, and large enough to matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from probecache.controls.baselines import Baseline
from probecache.controls.geometry import PairAgreement
from probecache.folds import straddles
from probecache.layers import format_layers
from probecache.metrics import AurocEstimate, normal_quantile

__all__ = [
    "baseline_cautions",
    "chance_caution",
    "copies_of_training_caution",
    "few_examples_caution",
    "first_token_caution",
    "pairs_caution",
    "permutation_caution",
    "repeated_prompts_caution",
    "reversed_caution",
]

_CHANCE = 0.5
# What 1% of chance results exceed, in the units in which the shown interval reaches 2.5%.
_ALARMS, _SHOWN = 0.01, 0.95
# An AUROC of length or letter below that is no cue that matters, however surely it is there.
_LEAST_PART = 0.6
_LEAST_TOKEN_SHARE, _TIMES_EVEN_SHARE = 0.5, 3.0
_FEWEST, _SHARE_OF_COPIES = 20, 0.02
_P_VALUE = 0.05
_LEAST_OVER_RANDOM = 0.02

# Each is completed by the figures: what the probe has to beat, and what to do where it does not.
_EXPLANATIONS = {
    "length": (
        "The length of the prompts alone parts the classes as well as the probe",
        "Score prompts of both classes that are equally long.",
    ),
    "answer-letter": (
        "The option letter at the end of the prompts alone parts the classes as well as the probe",
        "Take the letters off, or let each class end in each letter equally often.",
    ),
    "words": (
        "A bag of words that never saw the model parts the classes as well as the probe",
        "Score prompts whose classes use the same words, or claim no more than the vocabulary.",
    ),
    "words-from-training": (
        "A bag of words fitted on the training prompts carries over as well as the probe",
        "Train on pairs that differ in the concept and not in their words.",
    ),
    "layer-0": (
        "The embeddings (layer 0) part the classes as well as the probe, before any block has run",
        "Which tokens stand at the kept positions explains the score: balance or change them.",
    ),
}

# What is told even where the probe does better: no concept is in them, so they can be balanced.
_PARTS = {
    "length": (
        "The classes' prompts differ in length: length alone gives",
        "Part of the score may be length: score prompts that are equally long.",
    ),
    "answer-letter": (
        "The classes' prompts end in different option letters: the letter alone gives",
        "Part of the score may be the letter: take the letters off, or let each class end in each "
        "letter equally often.",
    ),
}


def baseline_cautions(baselines: Sequence[Baseline], auroc: float) -> list[str]:
    """What every baseline has to say on a probe of this AUROC, in the baselines' order.

    A baseline explains the score where its interval reaches the probe's AUROC and it is clear of
    chance itself; random directions do where their mean comes within 0.02 of it. Lengths and
    letters that differ without explaining the score are told too. A probe below chance parts the
    classes as well as one that is as far above it, and is compared as such.
    """
    return [words for one in baselines if (words := _baseline_caution(one, auroc))]


def _baseline_caution(baseline: Baseline, auroc: float) -> str | None:
    if baseline.auroc is None or baseline.low is None or baseline.high is None:
        return None
    figures = f"AUROC {baseline.auroc:.3f} [{baseline.low:.3f}, {baseline.high:.3f}]"
    shown = f"{auroc:.3f}" if auroc >= _CHANCE else f"{1 - auroc:.3f} turned round"
    auroc = max(auroc, 1 - auroc)
    if baseline.name == "random-directions":
        return _random_caution(baseline, auroc, shown)
    if baseline.name not in _EXPLANATIONS:
        return None
    if not _clear_of_chance(baseline.auroc, baseline.low):
        return None
    if baseline.high >= auroc:
        what, advice = _EXPLANATIONS[baseline.name]
        return f"{what}: {figures} against {shown}. {advice}"
    if baseline.name in _PARTS and baseline.auroc >= _LEAST_PART:
        what, advice = _PARTS[baseline.name]
        return f"{what} {figures}, the probe {shown}. {advice}"
    return None


def _random_caution(baseline: Baseline, auroc: float, shown: str) -> str | None:
    # Not the best of them: where a real direction dominates the spread, some come near it.
    if baseline.auroc is None or auroc - baseline.auroc > _LEAST_OVER_RANDOM:
        return None
    return (
        "Random directions in the data's own covariance do about as well as the probe: AUROC "
        f"{baseline.auroc:.3f} on average, up to {baseline.high:.3f}, against {shown}. The "
        "classes differ along the directions in which the activations vary most anyway, or hardly "
        "at all: the score is no evidence that this direction stands for the concept."
    )


def _clear_of_chance(auroc: float, low: float, tests: int = 1) -> bool:
    """Whether the lower bound, moved out to 1% for all tests together, is above chance still.

    Scaled on the logit, in which the intervals are symmetric.
    """
    if low <= 0:
        return False
    if auroc >= 1 or low >= 1:
        return low > _CHANCE
    logit, bound = (float(np.log(p / (1 - p))) for p in (auroc, low))
    stretch = normal_quantile(1 - _ALARMS / (2 * tests)) / normal_quantile((1 + _SHOWN) / 2)
    return logit - stretch * (logit - bound) > 0


def reversed_caution(layers: Mapping[int, AurocEstimate], positive_class: str) -> str | None:
    """Layers at which the positive class scores lower, beyond what so many layers give by chance.

    Args:
        layers: every scored layer's AUROC.
        positive_class: the vectors'.
    """
    reversed_ = [
        layer
        for layer, found in layers.items()
        if _clear_of_chance(1 - found.auroc, 1 - found.high, len(layers))
    ]
    if not reversed_:
        return None
    worst = min(reversed_, key=lambda layer: layers[layer].auroc)
    return (
        f"At layer {format_layers(reversed_)} the scores are reversed (AUROC down to "
        f"{layers[worst].auroc:.3f}): examples of {positive_class!r} score lower than the others. "
        "Check the positive class of the vectors and the labels of the data."
    )


def chance_caution(layer: int, found: AurocEstimate) -> str | None:
    """Whether the interval at the best layer reaches chance."""
    if not found.low <= _CHANCE <= found.high:
        return None
    return (
        f"Even at the best layer ({layer}) the interval of the AUROC, [{found.low:.3f}, "
        f"{found.high:.3f}], reaches chance (0.5): score more prompts before claiming an effect."
    )


def permutation_caution(p_value: float, layers: int) -> str | None:
    """Whether the best of several layers is no better than the best with permuted labels."""
    if p_value <= _P_VALUE:
        return None
    return (
        f"The best of {layers} layers is no better than what permuted labels give: p = "
        f"{p_value:.3f} once the choice among the layers is paid for. Do not quote its AUROC as "
        "an effect."
    )


def first_token_caution(share: float | None, counts: ArrayLike) -> str | None:
    """Whether the first kept token decides the scores.

    Tokens that are all alike and independent share the variance of their means over k tokens
    evenly: the first one accounts for E[1/k^2] / E[1/k] of it, 1/k where all k are equal.

    Args:
        share: `first_token_share`.
        counts: [n] kept tokens of each example. With fewer than 4 on average a first token may well
            account for most of the variance, and nothing is said.
    """
    tokens = np.asarray(counts, dtype=np.float64)
    if share is None or tokens.mean() < 4:
        return None
    even = float((tokens**-2).mean() / (1 / tokens).mean())
    if share <= max(_LEAST_TOKEN_SHARE, _TIMES_EVEN_SHARE * even):
        return None
    return (
        f"The first kept token drives the scores: {min(share, 1):.0%} of their variance between "
        f"prompts, where an even share would be {even:.0%}. If it is BOS or a token of the "
        "template, the mean tells little but how long a prompt is: extract again without it."
    )


def copies_of_training_caution(has_copy: ArrayLike) -> str | None:
    """Whether validation prompts stand, nearly word for word, in the training data.

    Args:
        has_copy: [n] booleans, `near_duplicates_of(training texts, validation texts)`.
    """
    copies = np.asarray(has_copy, dtype=bool)
    count = int(copies.sum())
    if count == 0 or count < _SHARE_OF_COPIES * copies.size:
        return None
    return (
        f"{count} of {copies.size} validation prompts are near-duplicates of training prompts: "
        "their scores say how well these were learnt. Leave them out, or train without them."
    )


def repeated_prompts_caution(
    clusters: ArrayLike, groups: ArrayLike, what: str = "validation"
) -> str | None:
    """Whether prompts that count as independent are nearly the same.

    Args:
        clusters: [n] `near_duplicates` of the texts.
        groups: [n] group numbers; what shares one is known to belong together.
        what: of which data, as an adjective.
    """
    spread = straddles(clusters, groups)
    count = int(spread.sum())
    if count == 0 or count < _SHARE_OF_COPIES * spread.size:
        return None
    return (
        f"{count} of {spread.size} {what} prompts are near-duplicates of one another without "
        "sharing a group: they must not be divided among folds or counted as independent. Give "
        "them one group, or leave the copies out."
    )


def pairs_caution(agreement: PairAgreement | None) -> str | None:
    """Whether the pairs' differences have no direction in common."""
    if agreement is None or agreement.cosine > agreement.chance:
        return None
    return (
        f"The pairs disagree: the mean cosine between the differences of {agreement.pairs} pairs "
        f"is {agreement.cosine:.3f}, no more than differences of random sign give (up to "
        f"{agreement.chance:.3f}). The vector stands for no shared direction: look at the pairs, "
        "the positions and the layer."
    )


def few_examples_caution(n_positive: int, n_negative: int) -> str | None:
    """Whether a class is too small for its interval and its thresholds to be trusted.

    Args:
        n_positive, n_negative: examples of each class; where they are grouped, groups.
    """
    if min(n_positive, n_negative) >= _FEWEST:
        return None
    name = "negative" if n_negative <= n_positive else "positive"
    return (
        f"Only {min(n_positive, n_negative)} {name} examples: intervals are rough "
        f"below {_FEWEST}, and rates at a few false alarms cannot be told. Score more prompts of "
        "that class."
    )
