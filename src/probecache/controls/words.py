"""Baselines that catch artefacts: what the text alone gives away, without any model.

Guarantees: deterministic; the model's activations are never looked at. Which words and word pairs
are present is what counts, not TF-IDF: that plays down words that many texts share, and a cue that
gives a class away is in half of them (planted word: AUROC 0.93 by TF-IDF, 1.00 by presence). Does
not claim to be the strongest text classifier: a baseline at chance does not prove that the text
holds no cue, only that its single words and word pairs, fitted linearly on the training texts, do
not carry over. Cross-validation asks the harder question: whether they carry over to more texts of
the very kind that is scored.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from probecache.controls.presence import Presence
from probecache.errors import EmptyClassError, ShapeError
from probecache.folds import assign_folds, group_numbers
from probecache.metrics import AurocEstimate, auroc, auroc_within_folds

__all__ = ["bag_of_words_auroc", "cross_validated_bag_of_words_auroc"]

SEED = 0


def bag_of_words_auroc(
    train_texts: Sequence[str],
    train_is_positive: Sequence[bool],
    test_texts: Sequence[str],
    test_is_positive: Sequence[bool],
) -> AurocEstimate:
    """AUROC of a logistic regression on words and word pairs, fitted on one set, scored on another.

    A probe that a bag of words equals has shown nothing about the model: the classes could be
    told apart by vocabulary before any layer was computed. Read a probe's AUROC beside this one
    and believe only what it adds.

    Texts are lowercased and split into words (single letters kept); what counts is which 1- and
    2-grams are present. The regression is L2-regularised and weighs the classes equally. Without
    a single word to learn from, every score is the same and the AUROC is an honest 0.5.

    Args:
        train_texts: [n_train] texts, as the model saw them or as the question reads.
        train_is_positive: [n_train] booleans, True for the class that a higher score means.
        test_texts: [n_test] texts; keep both members of a pair out of the training texts.
        test_is_positive: [n_test] booleans.

    Returns:
        The AUROC on the test texts, its interval and the test sample sizes.

    Raises:
        ShapeError: texts and labels differ in number.
        EmptyClassError: a class has no texts, in either set.
    """
    _check("training", train_texts, train_is_positive)
    _check("test", test_texts, test_is_positive)
    words = Presence.of([*train_texts, *test_texts])
    train, test = np.split(np.arange(words.size), [len(train_texts)])
    (scores,) = words.scores([(train, np.asarray(train_is_positive, bool), test)])
    return auroc(scores, np.asarray(test_is_positive, bool))


def cross_validated_bag_of_words_auroc(
    texts: Sequence[str],
    is_positive: Sequence[bool],
    groups: Sequence[Hashable],
    folds: int = 5,
) -> AurocEstimate:
    """AUROC of the same regression when it is trained on the very kind of texts that it scores.

    `bag_of_words_auroc` asks what carries over from the training texts, which a cue that only the
    scored texts hold escapes. Here each text is scored by a regression fitted on the other folds'
    texts, so every word that parts the classes counts. A probe fitted on other data need not reach
    this AUROC, but where it is high the classes differ in vocabulary, and the probe's success is
    open to that explanation.

    Folds are stratified by class and never split a group; they are shuffled with a fixed seed, and
    fewer where a class has fewer groups or a fold would lack a class. The AUROC and its interval
    are `auroc_within_folds`: no score is compared with another regression's (the balanced weights
    leave little to press a pooled one down: 0.715 against 0.717 for groups of 1 to 11).

    An AUROC below 0.5 is no cue turned round. Where words are balanced by design, what the fold at
    hand has more of the others have less of, and any regression on them is misled.

    Args:
        texts: [n] texts, as the model saw them or as the question reads.
        is_positive: [n] booleans, True for the class that a higher score means.
        groups: [n] names of what must stay together: pairs, rephrasings, copies of one question.
        folds: how many at most, 2 or more.

    Returns:
        The AUROC, its interval and the sample sizes, counted in texts.

    Raises:
        ShapeError: texts, labels and groups differ in number.
        EmptyClassError: a class has texts in fewer than two groups, or its groups are so unequal
            that even two folds cannot both hold both classes.
        FitError: fewer than two folds.
    """
    _check("scored", texts, is_positive)
    positive = np.asarray(is_positive, bool)
    if len(groups) != len(texts):
        raise ShapeError(
            f"expected one group for each text, got {len(texts)} texts and {len(groups)} groups; "
            "pass lists of one length"
        )
    members = group_numbers(groups)
    fold_of = assign_folds(positive, members, folds, SEED)
    # Words that only the left-out fold holds get no weight, so one look at all texts will do.
    sides = [(fold_of != fold, fold_of == fold) for fold in range(fold_of.max() + 1)]
    fits = [(np.flatnonzero(train), positive[train], np.flatnonzero(test)) for train, test in sides]
    scores = np.empty(len(texts))
    for (_, test), found in zip(sides, Presence.of(texts).scores(fits), strict=True):
        scores[test] = found
    return auroc_within_folds(scores, positive, fold_of, members)


def _check(name: str, texts: Sequence[str], is_positive: Sequence[bool]) -> None:
    if len(texts) != len(is_positive):
        raise ShapeError(
            f"expected one label for each {name} text, got {len(texts)} texts and "
            f"{len(is_positive)} labels; pass two lists of one length"
        )
    n_positive = sum(map(bool, is_positive))
    if n_positive in (0, len(texts)):
        raise EmptyClassError(
            f"expected {name} texts of both classes, got {n_positive} positive and "
            f"{len(texts) - n_positive} negative; check the positive class and the labels"
        )
