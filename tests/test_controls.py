"""The bag-of-words baseline, on texts whose answer is planted."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from probecache.controls import bag_of_words_auroc, cross_validated_bag_of_words_auroc, presence
from probecache.controls.presence import Presence
from probecache.errors import EmptyClassError, FitError, ShapeError
from probecache.folds import assign_folds

WORDS = [
    "the",
    "model",
    "was",
    "asked",
    "to",
    "plan",
    "a",
    "route",
    "from",
    "one",
    "town",
    "to",
    "another",
    "and",
    "back",
    "again",
]


def sentences(seed, labels, planted=None):
    """Random sentences of common words; positives end in the planted text."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, 12)) for _ in labels]
    return [f"{t} {planted}" if planted and p else t for t, p in zip(texts, labels, strict=True)]


def balanced(n):
    return [i % 2 == 0 for i in range(n)]


def test_a_planted_word_is_found():
    train, test = balanced(80), balanced(60)
    found = bag_of_words_auroc(
        sentences(0, train, "benchmark"), train, sentences(1, test, "Benchmark"), test
    )
    assert found.auroc == 1.0
    assert (found.n_positive, found.n_negative) == (30, 30)


def test_a_planted_order_of_two_common_words_is_found():
    train, test = balanced(120), balanced(80)

    def texts(seed, labels):
        tails = {True: "alpha beta", False: "beta alpha"}
        plain = sentences(seed, labels)
        return [f"{t} {tails[p]} end" for t, p in zip(plain, labels, strict=True)]

    assert bag_of_words_auroc(texts(0, train), train, texts(1, test), test).auroc > 0.99


def test_a_single_letter_answer_counts_as_a_word():
    def answers(seed, labels):
        questions = sentences(seed, labels)
        return [f"{q} ({'A' if p else 'B'})" for q, p in zip(questions, labels, strict=True)]

    train, test = balanced(80), balanced(60)
    assert bag_of_words_auroc(answers(0, train), train, answers(1, test), test).auroc > 0.99


def test_letter_balanced_pairs_are_at_chance():
    def pairs(seed, n):
        """Both answers to every question; the letter that is positive is a coin flip."""
        rng = np.random.default_rng(seed)
        texts, labels = [], []
        for question in sentences(seed, [False] * n):
            letters = ("A", "B") if rng.random() < 0.5 else ("B", "A")
            texts += [f"{question} ({letter})" for letter in letters]
            labels += [True, False]
        return texts, labels

    found = bag_of_words_auroc(*pairs(0, 150), *pairs(1, 150))
    assert 0.4 < found.auroc < 0.6
    assert found.low < 0.5 < found.high


def test_random_labels_are_at_chance():
    train, test = balanced(200), balanced(200)
    found = bag_of_words_auroc(sentences(0, train), train, sentences(1, test), test)
    assert found.low < 0.5 < found.high


@pytest.mark.parametrize("text", ["", "...!?", "   "])
def test_texts_without_words_score_an_honest_half(text):
    found = bag_of_words_auroc([text] * 6, balanced(6), ["some words", "here"] * 3, balanced(6))
    assert found.auroc == 0.5


def test_test_texts_of_unknown_words_score_an_honest_half():
    train = balanced(20)
    found = bag_of_words_auroc(sentences(0, train, "cue"), train, ["zebra", "yak"], [True, False])
    assert found.auroc == 0.5


def test_the_same_texts_give_the_same_bits():
    train, test = balanced(60), balanced(40)
    texts = sentences(0, train, "cue town"), train, sentences(1, test), test
    assert bag_of_words_auroc(*texts) == bag_of_words_auroc(*texts)


def test_unequal_classes_do_not_shift_the_answer():
    train = [i % 10 == 0 for i in range(200)]
    test = [i % 10 == 0 for i in range(100)]
    found = bag_of_words_auroc(sentences(0, train, "cue"), train, sentences(1, test, "cue"), test)
    assert found.auroc == 1.0


def test_a_class_without_texts_is_named_with_its_set():
    with pytest.raises(EmptyClassError, match="training texts of both classes"):
        bag_of_words_auroc(["a", "b"], [True, True], ["a", "b"], [True, False])
    with pytest.raises(EmptyClassError, match="test texts of both classes"):
        bag_of_words_auroc(["a", "b"], [True, False], ["a", "b"], [False, False])


def test_texts_and_labels_of_different_number_are_refused():
    with pytest.raises(ShapeError, match="3 texts and 2 labels"):
        bag_of_words_auroc(["a", "b", "c"], [True, False], ["a", "b"], [True, False])


def test_cross_validation_finds_a_planted_word():
    labels = balanced(60)
    found = cross_validated_bag_of_words_auroc(
        sentences(0, labels, "benchmark"), labels, range(len(labels))
    )
    assert found.auroc > 0.97
    assert found.low > 0.6
    assert (found.n_positive, found.n_negative) == (30, 30)


def test_cross_validation_of_shuffled_labels_is_at_chance():
    held = 0
    for seed in range(10):
        labels = np.random.default_rng(seed).permutation(balanced(60)).tolist()
        found = cross_validated_bag_of_words_auroc(sentences(seed, labels), labels, range(60))
        held += found.low < 0.5 < found.high
    assert held >= 9


def copies(of, times=4):
    """Texts without a word in common, each several times: they are known only to who saw a copy."""
    labels = [label for label in balanced(of) for _ in range(times)]
    group = [i for i in range(of) for _ in range(times)]
    return [f"word{i} rare{i}" for i in group], labels, group


def test_copies_in_one_group_never_straddle():
    texts, labels, group = copies(20)
    leaking = cross_validated_bag_of_words_auroc(texts, labels, range(len(texts)))
    assert leaking.auroc == 1.0
    found = cross_validated_bag_of_words_auroc(texts, labels, group)
    assert found.auroc == 0.5
    assert (found.n_positive, found.n_negative) == (40, 40)


def test_the_interval_counts_groups_rather_than_copies():
    labels = balanced(40)
    texts = [
        f"{text} cue" if (i % 5 == 0) != label else text
        for i, (text, label) in enumerate(zip(sentences(3, labels), labels, strict=True))
    ]
    once = cross_validated_bag_of_words_auroc(texts, labels, range(40))
    assert 0.5 < once.auroc < 0.95
    four = cross_validated_bag_of_words_auroc(
        [t for t in texts for _ in range(4)], [p for p in labels for _ in range(4)],
        [i for i in range(40) for _ in range(4)],
    )  # fmt: skip
    assert four.high - four.low > 0.7 * (once.high - once.low)
    assert four.n_positive == 4 * once.n_positive


def test_the_auroc_is_that_of_each_fold_weighted_by_its_pairs():
    """Against the baseline for one training and one test set."""
    labels = [i % 3 == 0 for i in range(50)]
    texts, groups = sentences(5, labels), [i // 2 for i in range(50)]
    won = pairs = 0
    fold_of = assign_folds(labels, groups, 4)
    for fold in range(4):
        train, test = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
        pick = [[values[i] for i in rows] for rows in (train, test) for values in (texts, labels)]
        fold = bag_of_words_auroc(*pick)
        won += fold.auroc * fold.n_positive * fold.n_negative
        pairs += fold.n_positive * fold.n_negative
    found = cross_validated_bag_of_words_auroc(texts, labels, groups, folds=4)
    assert found.auroc == pytest.approx(won / pairs)


def test_equal_texts_in_unequal_groups_score_an_honest_half():
    labels = [label for i in range(12) for label in [i % 2 == 0] * (1 + 3 * i)]
    groups = [i for i in range(12) for _ in range(1 + 3 * i)]
    found = cross_validated_bag_of_words_auroc(["same words"] * len(labels), labels, groups)
    assert found.auroc == 0.5


def test_folds_are_fewer_where_a_class_has_fewer_groups():
    labels = [i < 2 for i in range(30)]
    texts = ["a plain cue" if label else "a plain text" for label in labels]
    found = cross_validated_bag_of_words_auroc(texts, labels, range(30))
    assert found.auroc == 1.0
    assert (found.n_positive, found.n_negative) == (2, 28)
    # Two groups of a class say little, however many the other has.
    assert found.low < 0.5


def test_groups_may_be_named_by_anything_that_can_be_a_key():
    labels = balanced(24)
    texts = sentences(0, labels, "cue")
    named = [("pair", i // 2) if i % 4 < 2 else f"pair {i // 2}" for i in range(24)]
    numbered = [i // 2 for i in range(24)]
    assert cross_validated_bag_of_words_auroc(
        texts, labels, named
    ) == cross_validated_bag_of_words_auroc(texts, labels, numbered)


def test_swapped_classes_mirror_the_cross_validated_estimate():
    labels = balanced(40)
    texts = sentences(8, labels)
    found = cross_validated_bag_of_words_auroc(texts, labels, range(40))
    swapped = cross_validated_bag_of_words_auroc(texts, [not p for p in labels], range(40))
    assert swapped.auroc == pytest.approx(found.auroc)
    assert (swapped.low, swapped.high) == pytest.approx((found.low, found.high))


def test_a_class_of_one_group_cannot_be_cross_validated():
    labels = balanced(10)
    with pytest.raises(EmptyClassError, match="got 1 positive and 5 negative"):
        cross_validated_bag_of_words_auroc(
            ["a"] * 10, labels, ["one" if p else i for i, p in enumerate(labels)]
        )
    with pytest.raises(EmptyClassError, match="10 positive and 0 negative"):
        cross_validated_bag_of_words_auroc(["a"] * 10, [True] * 10, range(10))


def test_groups_too_unequal_for_two_folds_of_both_classes_are_refused():
    labels = [True] * 10 + [True, False] + [False] * 10
    groups = [0] * 10 + [1, 1] + [2] * 10
    with pytest.raises(EmptyClassError, match="got 3 of very unequal make-up"):
        cross_validated_bag_of_words_auroc(["a"] * 22, labels, groups)


def test_fewer_than_two_folds_and_missing_groups_are_refused():
    with pytest.raises(FitError, match="at least 2 folds, got 1"):
        cross_validated_bag_of_words_auroc(["a"] * 8, balanced(8), range(8), folds=1)
    with pytest.raises(ShapeError, match="8 texts and 7 groups"):
        cross_validated_bag_of_words_auroc(["a"] * 8, balanced(8), range(7))
    with pytest.raises(ShapeError, match="8 texts and 6 labels"):
        cross_validated_bag_of_words_auroc(["a"] * 8, balanced(6), range(8))


def by_scikit_learn(train, labels, test):
    vectorizer = CountVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", binary=True)
    features = vectorizer.fit_transform(train)
    model = LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=10_000)
    return model.fit(features, labels).decision_function(vectorizer.transform(test))


@pytest.mark.parametrize("most_dense", [0, 1000], ids=["sparse", "dense"])
@pytest.mark.parametrize("share", [0.5, 0.1], ids=["even", "uneven"])
def test_decision_values_are_those_of_scikit_learn(monkeypatch, most_dense, share):
    monkeypatch.setattr(presence, "MOST_DENSE", most_dense)
    rng = np.random.default_rng(0)
    labels = rng.random(150) < share
    texts = [f"{text} rare{i} (A)" for i, text in enumerate(sentences(0, labels, "cue, of sorts"))]
    texts[140:] = ["", "rare3", *texts[:4], *(f"{text} again" for text in texts[4:8])]
    train, test = np.arange(100), np.arange(100, 150)
    (found,) = Presence.of(texts).scores([(train, labels[:100], test)])
    expected = by_scikit_learn(texts[:100], labels[:100], texts[100:])
    assert expected.std() > 0.5
    # What remains is the tolerance at which scikit-learn's solver stops.
    tolerance = 1e-6 if most_dense else 5e-2
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_the_features_that_two_texts_share_are_counted():
    texts = [*sentences(4, [True] * 70, "rare pair"), "", "one of a kind"]
    words = Presence.of(texts)
    vectorizer = CountVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", binary=True)
    features = vectorizer.fit_transform(texts)
    np.testing.assert_array_equal(words._kernel(), (features @ features.T).toarray())
    sparse = words._sparse()
    np.testing.assert_allclose((sparse @ sparse.T).toarray(), words._kernel(), rtol=1e-12)


def test_equal_texts_tie_exactly():
    labels = balanced(101)
    texts = sentences(2, labels, "cue")
    words = Presence.of([*texts, *[texts[0]] * 37])
    train, test = np.arange(101), np.arange(101, 138)
    (scores,) = words.scores([(train, np.array(labels), test)])
    assert np.unique(scores).size == 1


def test_texts_of_any_length_are_read_from_both_ends(monkeypatch):
    monkeypatch.setattr(presence, "_MOST_WORDS", 0)
    labels = balanced(40)
    middle = " word" * 500
    for where in ("cue {}", "{} cue"):
        texts = [where.format(middle) if label else middle for label in labels]
        assert cross_validated_bag_of_words_auroc(texts, labels, range(40)).auroc == 1.0


@pytest.mark.parametrize("most_dense", [0, 1000], ids=["sparse", "dense"])
@pytest.mark.parametrize("text", ["", "?!", "same words"])
def test_texts_that_say_nothing_neither_warn_nor_fail(monkeypatch, recwarn, most_dense, text):
    monkeypatch.setattr(presence, "MOST_DENSE", most_dense)
    found = cross_validated_bag_of_words_auroc([text] * 30, balanced(30), range(30))
    assert found.auroc == 0.5
    assert not list(recwarn)


def test_a_few_hundred_texts_are_fitted_without_scikit_learn():
    code = (
        "import sys; from probecache.controls import cross_validated_bag_of_words_auroc as words;"
        "words([f'text {i}' for i in range(400)], [True, False] * 200, range(400));"
        "print('sklearn' in sys.modules or 'scipy' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "False", found.stderr
