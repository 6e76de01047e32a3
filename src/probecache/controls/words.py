"""Baselines that catch artefacts: what the text alone gives away, without any model.

Guarantees: deterministic; the model's activations are never looked at; scikit-learn is imported
only when a baseline is asked for. Does not claim to be the strongest text classifier: a baseline
at chance does not prove that the text holds no cue, only that its single words and word pairs,
fitted linearly on the training texts, do not carry over. Cross-validation asks the harder question:
whether they carry over to more texts of the very kind that is scored.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from probecache.errors import EmptyClassError, ShapeError
from probecache.folds import assign_folds, group_numbers
from probecache.metrics import (
    AurocEstimate,
    auroc,
    logit_interval,
    normal_quantile,
    widest_interval,
)

__all__ = ["bag_of_words_auroc", "cross_validated_bag_of_words_auroc"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.intp]

# The usual pattern drops one-letter words, but "(A)" and "(B)" are what answer pairs differ in.
WORD = r"(?u)\b\w+\b"
SEED = 0
LEVEL = 0.95
# Below this a variance is the rounding of zero.
NO_VARIANCE = 1e-15


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
    scores = _bag_of_words_scores(train_texts, np.asarray(train_is_positive, bool), test_texts)
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
    fewer where a class has fewer groups or a fold would lack a class. The AUROC is the share of
    won pairs among the pairs of one fold, so that no score is compared with another regression's:
    the folds' AUROCs, weighted by their numbers of pairs. Its interval takes groups, not texts, as
    what was sampled, and is widened because the regressions share training texts. No unbiased
    variance exists for that: with random labels, 96 to 99 of 100 intervals held 0.5 for 40 to 200
    groups, and 92 for 12.

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

    Source: averaging rather than pooling, Airola et al. 2011, Comput. Stat. Data Anal. 55:1828;
    interval by the influence of each text, LeDell et al. 2015, Electron. J. Stat. 9:1583, summed
    over groups as in Obuchowski 1997, Biometrics 53:567, and widened by Nadeau & Bengio 2003, Mach.
    Learn. 52:239.
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
    held_out = [np.flatnonzero(fold_of == fold) for fold in range(fold_of.max() + 1)]
    scores = np.empty(len(texts))
    for test in held_out:
        train = np.setdiff1d(np.arange(len(texts)), test).tolist()
        scores[test] = _bag_of_words_scores(
            [texts[i] for i in train], positive[train], [texts[i] for i in test.tolist()]
        )
    return _auroc_within(held_out, scores, positive, members)


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


def _bag_of_words_scores(
    train_texts: Sequence[str], train_is_positive: Bools, test_texts: Sequence[str]
) -> Floats:
    """Decision values [n_test], all zero where the training texts hold no words."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    # Not TF-IDF: it plays down words that many texts share, and a cue that gives a class away is
    # in half of them (planted word: AUROC 0.93 by TF-IDF, 1.00 by presence).
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=WORD, binary=True)
    try:
        train = words.fit_transform(train_texts)
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        return np.zeros(len(test_texts))
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    model.fit(train, train_is_positive)
    return np.asarray(model.decision_function(words.transform(test_texts)), dtype=np.float64)


def _groups_of(chosen: Bools, members: Ints) -> int:
    return int(np.unique(members[chosen]).size)


# Why within folds: every fold has a regression of its own, with its scale and an intercept that
# leans against the class that the fold has more of (it was trained on less of it). Pooled decision
# values carry that into the ranking and press the AUROC below the truth; standardising each fold
# undoes it only where all folds mix the classes alike. A comparison within a fold meets neither.
# The balanced weights leave little of the lean: 0.715 pooled against 0.717 for groups of 1 to 11.
def _auroc_within(
    held_out: Sequence[Ints], scores: Floats, positive: Bools, members: Ints
) -> AurocEstimate:
    """AUROC over the pairs that share a fold, groups being what was sampled."""
    wins, pairs = np.zeros(scores.size), np.zeros(scores.size)
    for test in held_out:
        above, below = test[positive[test]], test[~positive[test]]
        wins[above], pairs[above] = _won(scores[above], scores[below]), below.size
        wins[below], pairs[below] = _won(-scores[below], -scores[above]), above.size
    total = pairs[positive].sum()
    area = float(wins[positive].sum() / total)
    influence = np.bincount(members, weights=(wins - area * pairs) / total)
    variance = float(influence @ influence) * influence.size / (influence.size - 1)
    # The regressions share training texts and so err together. Without Nadeau and Bengio's factor,
    # 83 to 90 of 100 intervals at nominal 95% held 0.5 when the labels were random.
    variance *= 1 + len(held_out) / (len(held_out) - 1)
    z = normal_quantile((1 + LEVEL) / 2)
    if variance > NO_VARIANCE and 0 < area < 1:
        low, high = logit_interval(area, variance, z)
    else:
        fewest = min(_groups_of(positive, members), _groups_of(~positive, members))
        low, high = widest_interval(area, fewest, z, LEVEL)
    n_positive = int(positive.sum())
    return AurocEstimate(area, low, high, n_positive, positive.size - n_positive, LEVEL)


def _won(ours: Floats, theirs: Floats) -> Floats:
    """How many of theirs each of ours beats, a tie counting 1/2."""
    ordered = np.sort(theirs)
    beaten, met = (np.searchsorted(ordered, ours, side) for side in ("left", "right"))
    return np.asarray((beaten + met) / 2, dtype=np.float64)
