"""Baselines from the surface of a prompt: how long it is, and the option letter that it ends in.

Guarantees: the model's activations are never looked at. A letter is read off the end of the text
alone, so options that are listed before it do not count.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probecache.errors import ShapeError
from probecache.folds import assign_folds, group_numbers
from probecache.metrics import AurocEstimate, auroc, auroc_within_folds, grouped_interval

__all__ = ["answer_letter_auroc", "answer_letters", "folded", "length_auroc"]

Floats = NDArray[np.float64]

# Marks of chat templates, full stops and emphasis behind the letter do not hide it.
_BEHIND = r"(?:<\|[^<>|]{1,40}\|>|</s>|<eos>|<end_of_turn>|[\s.*_`\"'])*"
_BRACKETED = r"[(\[{]\s?(?P<bracketed>[A-Za-z1-9])\s?[)\]}]"
_HALF = r"(?:^|[\s*_`\"'])(?P<half>[A-Za-z])\s?[)\]]"
_NAMED = r"(?i:answer|option|choice)(?i:\s+is)?\s*:?[\s*_`\"']*(?P<named>[A-Za-z1-9])"
# Not I, which ends sentences, nor small letters, which are articles.
_BARE = r"(?:^|[\s*_`\"':])(?P<bare>[A-HJ-L])"
_LETTER = re.compile(rf"(?:{_BRACKETED}|{_NAMED}|{_HALF}|{_BARE}){_BEHIND}\Z")
# A letter stands at the very end; reading no further keeps the time bounded.
_END = 200
_FEWEST_SHARE = 0.1
SEED = 0


def folded(estimate: AurocEstimate) -> AurocEstimate:
    """The estimate on whichever side of chance it is, as max(AUROC, 1 - AUROC).

    The interval holds the folded values of all AUROCs in the given one, so one that reaches chance
    starts at exactly 0.5. Folding is optimistic: without any effect the folded AUROC is above 0.5
    by 0.8 standard errors on average, so compare its interval, and not itself, with chance.
    """
    area, low, high = estimate.auroc, estimate.low, estimate.high
    if area < 0.5:
        area, low, high = 1 - area, 1 - high, 1 - low
    return replace(estimate, auroc=area, low=max(low, 0.5), high=max(high, 1 - low))


def length_auroc(
    lengths: ArrayLike, is_positive: ArrayLike, groups: ArrayLike | None = None
) -> AurocEstimate:
    """What the length of the prompts alone gives: the AUROC of "longer", or of "shorter".

    Whichever of the two parts the classes better is taken (`folded`, which is optimistic), because
    a probe may have learnt either.

    Args:
        lengths: [n] numbers of tokens, words or characters.
        is_positive: [n] booleans.
        groups: [n], what was sampled together; without, all prompts are independent.

    Raises:
        ShapeError, EmptyClassError, FitError: as `probecache.metrics.auroc`.
    """
    if groups is None or len(np.unique(groups)) == len(np.asarray(groups)):
        return folded(auroc(lengths, is_positive))
    values = np.asarray(lengths, dtype=np.float64)[None]
    return folded(grouped_interval(values, is_positive, groups)[0])


def answer_letters(texts: Sequence[str]) -> list[str | None]:
    """The option letter that each text ends in, as a capital, or None.

    Read as one: "(A)", "[b]", "A)", "Answer: B", "the answer is c", "**C**" and a capital up to L
    (without I) that stands alone; also a digit in brackets or behind "Answer:". Text such as "plan
    B" at the very end is read as a letter too: an appended answer that is overlooked costs more.
    """
    found = [_LETTER.search(text.rstrip()[-_END:]) for text in texts]
    return [match[match.lastgroup or 0].upper() if match else None for match in found]


def answer_letter_auroc(
    texts: Sequence[str],
    is_positive: Sequence[bool],
    groups: Sequence[Hashable],
    folds: int = 5,
) -> AurocEstimate | None:
    """What the letter at the end of the prompts alone gives, cross-validated.

    Each text is scored by the smoothed log odds of its letter (none being one of them) in the other
    folds. Folds keep groups whole; the AUROC is the one within folds. Letters that pairs balance
    give 0.5 or a little less, as what one fold has more of the others have less of.

    Args:
        texts: [n] texts as the model saw them, with the answer that was appended.
        is_positive: [n] booleans.
        groups: [n] names of what must stay together.
        folds: how many at most.

    Returns:
        None where fewer than a tenth of the texts end in a letter.

    Raises:
        ShapeError: texts, labels and groups differ in number.
        EmptyClassError: a class has texts in fewer than two groups, or groups are too unequal.
    """
    if not len(texts) == len(is_positive) == len(groups):
        raise ShapeError(
            f"expected one label and one group for each text, got {len(texts)} texts, "
            f"{len(is_positive)} labels and {len(groups)} groups; pass lists of one length"
        )
    letters = answer_letters(texts)
    if sum(letter is not None for letter in letters) < max(1, _FEWEST_SHARE * len(texts)):
        return None
    positive, members = np.asarray(is_positive, bool), group_numbers(groups)
    fold_of, kinds = assign_folds(positive, members, folds, SEED), group_numbers(letters)
    scores = np.empty(positive.size)
    for fold in range(fold_of.max() + 1):
        test = fold_of == fold
        scores[test] = _log_odds(kinds[~test], positive[~test], int(kinds.max()) + 1)[kinds[test]]
    return auroc_within_folds(scores, positive, fold_of, members)


def _log_odds(kinds: NDArray[np.intp], positive: NDArray[np.bool_], count: int) -> Floats:
    """Of the positive class for each kind, as if each class had been seen once more with it."""
    sides = [np.bincount(kinds[side], minlength=count) + 1 for side in (positive, ~positive)]
    odds: Floats = np.log(sides[0] / sides[1]) - np.log(positive.sum() / (~positive).sum())
    return odds
