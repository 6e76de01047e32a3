"""Every baseline as the panel shows it: a figure, or one sentence on why there is none.

Guarantee: none of these functions raises for data that a baseline cannot be had from (one class,
one group, no words, no letters, equal lengths); the reason takes the figure's place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from numpy.typing import ArrayLike

from probecache.controls.directions import RandomControl
from probecache.controls.surface import answer_letter_auroc, length_auroc
from probecache.controls.words import bag_of_words_auroc, cross_validated_bag_of_words_auroc
from probecache.errors import FitError
from probecache.metrics import AurocEstimate

__all__ = [
    "Baseline",
    "answer_letter_baseline",
    "best_baseline",
    "estimated_baseline",
    "length_baseline",
    "random_directions_baseline",
    "training_words_baseline",
    "words_baseline",
]


@dataclass(frozen=True)
class Baseline:
    """What a score could be made of besides what it is taken for.

    Attributes:
        name: `length`, `answer-letter`, `words`, `words-from-training`, `layer-0`,
            `random-directions` or `shuffled-labels`.
        title: words for a reader.
        auroc, low, high: its AUROC with the 95% interval; for random directions their mean,
            smallest and largest. None where it cannot be had.
        how: one sentence: what was done, or why there is no figure.
    """

    name: str
    title: str
    auroc: float | None
    low: float | None
    high: float | None
    how: str


def estimated_baseline(name: str, title: str, estimate: AurocEstimate | None, how: str) -> Baseline:
    """A baseline from its estimate, or without figures where that is None."""
    if estimate is None:
        return Baseline(name, title, None, None, None, how)
    return Baseline(name, title, estimate.auroc, estimate.low, estimate.high, how)


def length_baseline(
    lengths: ArrayLike,
    is_positive: Sequence[bool],
    groups: Sequence[int] | None = None,
    unit: str = "tokens",
) -> Baseline:
    """`length_auroc` of [n] lengths in a unit."""
    return _attempt(
        "length",
        "Prompt length",
        lambda: length_auroc(lengths, is_positive, groups),
        f"Number of {unit} as the score, longer or shorter whichever does better.",
    )


def answer_letter_baseline(
    texts: Sequence[str], is_positive: Sequence[bool], groups: Sequence[Hashable]
) -> Baseline:
    """`answer_letter_auroc` of [n] texts, their classes and groups."""
    return _attempt(
        "answer-letter",
        "Answer letter",
        lambda: answer_letter_auroc(texts, is_positive, groups),
        "The option letter at the end of a prompt as the score, learnt on the other folds.",
        "Fewer than a tenth of the prompts end in an option letter.",
    )


def words_baseline(
    texts: Sequence[str], is_positive: Sequence[bool], groups: Sequence[Hashable]
) -> Baseline:
    """`cross_validated_bag_of_words_auroc` of [n] texts, their classes and groups."""
    return _attempt(
        "words",
        "Bag of words",
        lambda: cross_validated_bag_of_words_auroc(texts, is_positive, groups),
        "Logistic regression on words and word pairs, cross-validated on these prompts.",
    )


def training_words_baseline(
    train_texts: Sequence[str],
    train_is_positive: Sequence[bool],
    texts: Sequence[str],
    is_positive: Sequence[bool],
) -> Baseline:
    """`bag_of_words_auroc` from the training texts to [n] texts."""
    return _attempt(
        "words-from-training",
        "Bag of words from training",
        lambda: bag_of_words_auroc(train_texts, train_is_positive, texts, is_positive),
        "Logistic regression on words and word pairs, fitted on the training prompts.",
    )


def random_directions_baseline(control: RandomControl) -> Baseline:
    """Mean, smallest and largest folded AUROC of random directions at one layer."""
    return Baseline(
        "random-directions",
        "Random directions",
        control.mean,
        control.lowest,
        control.highest,
        f"Mean, smallest and largest AUROC of {control.aurocs.size} random directions drawn in the "
        "data's own covariance, each on whichever side of chance it is.",
    )


def best_baseline(baselines: Sequence[Baseline], auroc: float) -> tuple[str | None, float | None]:
    """The name of the baseline with the highest AUROC and what a probe gains over it.

    Shuffled labels are no rival and are left out. The gain, a difference of AUROCs, may be
    negative; both are None where no baseline has a figure.
    """
    rivals = {
        one.name: one.auroc
        for one in baselines
        if one.auroc is not None and one.name != "shuffled-labels"
    }
    if not rivals:
        return None, None
    name = max(rivals, key=lambda one: rivals[one])
    return name, auroc - rivals[name]


def _attempt(
    name: str, title: str, estimate: Callable[[], AurocEstimate | None], how: str, missing: str = ""
) -> Baseline:
    try:
        found = estimate()
    except FitError as error:
        return estimated_baseline(name, title, None, f"Not to be had: {error}.")
    return estimated_baseline(name, title, found, how if found else missing)
