"""Prompt length and answer letters, against planted cues, and the panel's baselines."""

from __future__ import annotations

import numpy as np
import pytest

from probecache.controls import (
    answer_letter_auroc,
    answer_letter_baseline,
    answer_letters,
    best_baseline,
    estimated_baseline,
    folded,
    length_auroc,
    length_baseline,
    training_words_baseline,
    words_baseline,
)
from probecache.errors import EmptyClassError, ShapeError
from probecache.metrics import AurocEstimate, auroc


def balanced(n):
    return [i % 2 == 0 for i in range(n)]


def test_shorter_prompts_are_as_good_a_cue_as_longer_ones():
    rng = np.random.default_rng(0)
    labels = np.array(balanced(80))
    lengths = rng.poisson(40, 80) + 8 * labels
    longer, shorter = length_auroc(lengths, labels), length_auroc(lengths, ~labels)
    assert longer == auroc(lengths, labels)
    assert shorter.auroc == longer.auroc
    assert (shorter.low, shorter.high) == pytest.approx((longer.low, longer.high))
    assert longer.low > 0.6


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((0.7, 0.6, 0.8), (0.7, 0.6, 0.8)),
        ((0.3, 0.2, 0.4), (0.7, 0.6, 0.8)),
        ((0.6, 0.45, 0.7), (0.6, 0.5, 0.7)),
        ((0.45, 0.3, 0.6), (0.55, 0.5, 0.7)),
        ((0.5, 0.25, 0.75), (0.5, 0.5, 0.75)),
    ],
)
def test_a_folded_interval_holds_what_the_interval_held(given, expected):
    found = folded(AurocEstimate(*given, 10, 20))
    assert (found.auroc, found.low, found.high) == pytest.approx(expected)
    assert (found.n_positive, found.n_negative) == (10, 20)
    inside = np.linspace(given[1], given[2], 101)
    images = np.maximum(inside, 1 - inside)
    assert images.min() >= found.low - 1e-12
    assert images.max() == pytest.approx(found.high)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Which is it? (A)", "A"),
        ("Which is it? [b]", "B"),
        ("(A) a test\n(B) use\n B) ", "B"),
        ("Answer: B", "B"),
        ("So the answer is c.", "C"),
        ("Which one? **C**", "C"),
        ("Which one?\nD", "D"),
        ("A", "A"),
        ("Which? (A)<|eot_id|>", "A"),
        ("Which? (2)", "2"),
        ("Is it A or B?", None),
        ("(A) a test (B) a talk", None),
        ("Pick a", None),
        ("between you and I", None),
        ("Visit the USA", None),
        ("", None),
    ],
)
def test_the_letter_is_read_off_the_end(text, letter):
    assert answer_letters([text]) == [letter]


def test_long_and_odd_texts_are_read_in_bounded_time():
    assert answer_letters(["(" * 200_000, " *" * 200_000, "<|" * 100_000]) == [None] * 3


def test_a_letter_that_follows_the_class_is_found():
    labels = balanced(60)
    texts = [f"Question {i}? ({'A' if label else 'B'})" for i, label in enumerate(labels)]
    found = answer_letter_auroc(texts, labels, range(60))
    assert found.auroc == 1.0
    assert found.low > 0.7


def test_a_letter_on_one_class_alone_is_found():
    labels = balanced(60)
    texts = [f"Question {i}" + (" (A)" if label else "?") for i, label in enumerate(labels)]
    assert answer_letter_auroc(texts, labels, range(60)).auroc == 1.0


def test_letters_that_pairs_balance_are_at_chance():
    rng = np.random.default_rng(1)
    texts, labels, groups = [], [], []
    for pair in range(100):
        letters = rng.permutation(["A", "B"])
        texts += [f"Question {pair}? ({letter})" for letter in letters]
        labels, groups = [*labels, True, False], [*groups, pair, pair]
    found = answer_letter_auroc(texts, labels, groups)
    assert 0.35 < found.auroc < 0.6
    assert found.low < 0.5


def test_texts_without_letters_have_no_letter_auroc():
    texts = [f"Question {i}?" for i in range(40)]
    assert answer_letter_auroc(texts, balanced(40), range(40)) is None
    assert answer_letter_auroc([*texts[3:], *["(A)"] * 3], balanced(40), range(40)) is None
    assert answer_letter_auroc([*texts[4:], *["(A)"] * 4], balanced(40), range(40)) is not None


def test_texts_labels_and_groups_of_different_number_are_refused():
    with pytest.raises(ShapeError, match="4 texts, 3 labels and 4 groups"):
        answer_letter_auroc(["(A)"] * 4, [True, False, True], range(4))
    with pytest.raises(EmptyClassError):
        answer_letter_auroc(["(A)"] * 4, [True] * 4, range(4))


def test_a_baseline_carries_its_figures_and_how_they_came_about():
    labels = balanced(40)
    found = length_baseline([len(str(i)) + 9 * p for i, p in enumerate(labels)], labels)
    assert (found.name, found.auroc, found.high) == ("length", 1.0, 1.0)
    assert "Number of tokens" in found.how
    texts = [f"text {i} {'cue' if label else ''}" for i, label in enumerate(labels)]
    assert words_baseline(texts, labels, range(40)).auroc > 0.9
    assert training_words_baseline(texts, labels, ["a cue", "text"], [True, False]).auroc == 1.0


def test_a_baseline_that_cannot_be_had_says_why():
    one_class = [True] * 6
    texts = ["Question? (A)"] * 6
    for found in (
        length_baseline([3] * 6, one_class),
        words_baseline(texts, one_class, range(6)),
        words_baseline(texts, balanced(6), [0] * 6),
        training_words_baseline(texts, one_class, texts, balanced(6)),
        answer_letter_baseline(texts, balanced(6), [0] * 6),
    ):
        assert (found.auroc, found.low, found.high) == (None, None, None)
        assert found.how.startswith("Not to be had: expected")
    none = answer_letter_baseline(["Question?"] * 6, balanced(6), range(6))
    assert none.auroc is None
    assert none.how == "Fewer than a tenth of the prompts end in an option letter."


def test_the_gain_is_over_the_best_baseline_that_has_a_figure():
    def one(name, value):
        estimate = AurocEstimate(value, 0.0, 1.0, 5, 5) if value else None
        return estimated_baseline(name, name, estimate, "")

    baselines = [one("length", 0.6), one("words", 0.75), one("answer-letter", None)]
    name, gain = best_baseline([*baselines, one("shuffled-labels", 0.9)], 0.7)
    assert name == "words"
    assert gain == pytest.approx(-0.05)
    assert best_baseline([one("words", None)], 0.7) == (None, None)
