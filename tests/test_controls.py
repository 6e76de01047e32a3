"""The bag-of-words baseline, on texts whose answer is planted."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from probecache.controls import bag_of_words_auroc
from probecache.errors import EmptyClassError, ShapeError

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


def test_importing_the_module_does_not_import_scikit_learn():
    code = "import sys, probecache.controls; print('sklearn' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "False", found.stderr
