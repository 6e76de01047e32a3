"""Each artefact, planted, raises its own caution; clean data raise none."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from probecache.controls import (
    Baseline,
    PairAgreement,
    RandomControl,
    answer_letter_baseline,
    baseline_cautions,
    chance_caution,
    copies_of_training_caution,
    few_examples_caution,
    first_token_caution,
    first_token_share,
    length_baseline,
    pair_agreement,
    pairs_caution,
    permutation_caution,
    random_auroc,
    random_directions_baseline,
    repeated_prompts_caution,
    reversed_caution,
    words_baseline,
)
from probecache.duplicates import near_duplicates, near_duplicates_of
from probecache.metrics import AurocEstimate, auroc

VOCABULARY = np.array([f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrstvz"])
SHARES = 1 / np.arange(1, 201) / (1 / np.arange(1, 201)).sum()


class Fixture:
    """Prompts of two classes, their token scores and rows; artefacts are planted on request."""

    def __init__(self, seed, n=80, effect=2.0, letters=None, longer=0, bos=0.0, copies=0):
        rng = np.random.default_rng(seed)
        self.positive = rng.permutation(np.arange(n) % 2 == 0)
        lengths = rng.integers(12, 30, n) + longer * self.positive
        texts = [" ".join(rng.choice(VOCABULARY, k, p=SHARES)) for k in lengths]
        if letters:
            ends = np.where(rng.random(n) < letters, self.positive, ~self.positive)
            texts = [f"{t} ({'A' if end else 'B'})" for t, end in zip(texts, ends, strict=True)]
        self.texts, self.lengths = texts, lengths
        self.train_texts = [" ".join(rng.choice(VOCABULARY, 20, p=SHARES)) for _ in range(n)]
        self.train_texts[:copies] = [text.upper() + " 7" for text in texts[:copies]]
        self.texts += [text + " again" for text in texts[:copies]]
        scores = [rng.standard_normal(k) * 2 for k in lengths]
        for one, label in zip(scores, self.positive, strict=True):
            one += effect / 2 * (1 if label else -1) + rng.standard_normal()
            one[0] += bos
        self.token_scores = np.concatenate(scores)
        self.scores = np.array([one.mean() for one in scores])
        self.rows = rng.standard_normal((n, 60)).astype(np.float32)
        self.rows[:, 5] = self.scores / self.scores.std()

    def cautions(self):
        """Every caution on the fixture, by the name of what raised it."""
        n, found = self.positive.size, auroc(self.scores, self.positive)
        texts = self.texts[:n]
        copies = near_duplicates_of(self.train_texts, texts)
        repeated = near_duplicates(self.texts)
        share = first_token_share(self.token_scores, self.lengths)

        def chunks():
            return [(np.arange(n), self.rows)]

        baselines = [
            length_baseline(self.lengths, self.positive),
            answer_letter_baseline(texts, self.positive, range(n)),
            words_baseline(texts, self.positive, range(n)),
        ]
        every = {one.name: baseline_cautions([one], found.auroc) for one in baselines}
        sentences = {name: words[0] for name, words in every.items() if words}
        single = {
            "copies": copies_of_training_caution(copies),
            "repeated": repeated_prompts_caution(repeated, range(len(self.texts))),
            "first token": first_token_caution(share, float(self.lengths.mean())),
            "reversed": reversed_caution({3: found}, "deployment"),
            "chance": chance_caution(3, found),
            "few": few_examples_caution(found.n_positive, found.n_negative),
        }
        return sentences | {name: words for name, words in single.items() if words}


def test_clean_data_raise_nothing():
    """In 500 other cases lengths gave 1.4 in 100 false alarms and nothing else gave any."""
    raised = Counter(name for seed in range(100) for name in Fixture(seed).cautions())
    assert raised["length"] <= 3
    assert set(raised) <= {"length"}


@pytest.mark.parametrize("n", [40, 400])
@pytest.mark.parametrize("auroc_of_probe", [0.6, 0.75, 0.95])
def test_baselines_at_chance_explain_nothing(n, auroc_of_probe):
    """However weak the probe and however many the prompts."""
    rng = np.random.default_rng(n)
    labels = np.arange(n) % 2 == 0
    alarms = 0
    for _ in range(1000):
        found = length_baseline(rng.integers(10, 40, n), labels)
        alarms += len(baseline_cautions([found], auroc_of_probe))
    assert alarms <= 22


def test_reversed_layers_are_no_chance_finding_among_many():
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 2 == 0
    alarms = 0
    for _ in range(150):
        layers = {layer: auroc(rng.standard_normal(100), labels) for layer in range(20)}
        alarms += reversed_caution(layers, "deployment") is not None
    assert alarms <= 6


PLANTED = {
    "answer-letter": (
        {"letters": 0.97},
        "The option letter at the end of the prompts alone",
        {"words"},
    ),
    "length": ({"longer": 20}, "The length of the prompts alone", {"words"}),
    "first token": ({"bos": 200.0}, "The first kept token drives the scores: ", {"chance"}),
    "copies": ({"copies": 16}, "of 80 validation prompts are near-duplicates", {"repeated"}),
    "reversed": ({"effect": -2.0}, "At layer 3 the scores are reversed", set()),
    "chance": ({"effect": 0.0}, "Even at the best layer (3)", set()),
    "few": ({"n": 30}, "Only 15 negative examples", set()),
}


@pytest.mark.parametrize("artefact", PLANTED)
def test_a_planted_artefact_raises_its_own_caution(artefact):
    """And no others, but for what the artefact brings with it."""
    planted, words, companions = PLANTED[artefact]
    found = Fixture(1, **planted).cautions()
    assert words in found[artefact]
    assert set(found) <= {artefact, *companions}


def test_lengths_that_differ_without_explaining_the_score_are_told():
    found = Fixture(3, effect=5.0, longer=6, n=200).cautions()
    assert found["length"].startswith("The classes' prompts differ in length: length alone gives")


def test_a_word_that_gives_the_class_away_is_told():
    fixture = Fixture(4)
    labels = fixture.positive
    texts = [f"{t} exam" if p else t for t, p in zip(fixture.texts, labels, strict=True)]
    found = words_baseline(texts, labels, range(80))
    (words,) = baseline_cautions([found], 0.97)
    assert words.startswith("A bag of words that never saw the model")
    assert f"AUROC {found.auroc:.3f}" in words
    assert "against 0.970" in words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("words-from-training", "fitted on the training prompts carries over"),
        ("layer-0", "The embeddings (layer 0)"),
    ],
)
def test_other_baselines_have_words_of_their_own(name, words):
    strong = Baseline(name, name, 0.9, 0.84, 0.95, "")
    assert words in baseline_cautions([strong], 0.92)[0]
    assert baseline_cautions([strong], 0.96) == []
    assert baseline_cautions([Baseline(name, name, 0.6, 0.45, 0.95, "")], 0.92) == []
    assert baseline_cautions([Baseline(name, name, None, None, None, "")], 0.5) == []


def test_random_directions_that_do_as_well_are_told():
    control = RandomControl(np.array([0.55, 0.71, 0.83]))
    (words,) = baseline_cautions([random_directions_baseline(control)], 0.71)
    assert "AUROC 0.697 on average, up to 0.830, against 0.710" in words
    assert baseline_cautions([random_directions_baseline(control)], 0.75) == []


def test_random_directions_tell_a_dominating_direction_from_a_hidden_one():
    rng = np.random.default_rng(6)
    labels = np.arange(100) % 2 == 0
    for dominates in (True, False):
        rows = rng.standard_normal((100, 50)).astype(np.float32)
        rows[:, 7] = np.where(labels, 3, -3) + rng.standard_normal(100)
        rows[:, 7 if dominates else 8] *= 50
        control = random_auroc(lambda rows=rows: [(np.arange(100), rows)], labels)
        probe = auroc(rows[:, 7], labels).auroc
        assert probe > 0.99
        words = baseline_cautions([random_directions_baseline(control)], probe)
        assert bool(words) == dominates


@pytest.mark.parametrize("shared", [True, False])
def test_pairs_that_share_no_direction_are_told(shared):
    alarms = 0
    labels, groups = np.arange(100) % 2 == 0, np.arange(100) // 2
    for seed in range(100):
        rows = np.random.default_rng(seed).standard_normal((100, 200)).astype(np.float32)
        rows[:, 0] += np.where(labels, 2, -2) * shared
        found = pair_agreement(lambda rows=rows: [(np.arange(100), rows)], labels, groups)
        alarms += pairs_caution(found) is not None
    assert alarms <= 1 if shared else alarms >= 88


def test_the_pairs_caution_names_its_figures():
    words = pairs_caution(PairAgreement(0.001, 40, 0.004))
    assert "of 40 pairs is 0.001" in words
    assert "(up to 0.004)" in words
    assert pairs_caution(None) is None
    assert pairs_caution(PairAgreement(0.01, 40, 0.004)) is None


def test_a_choice_among_layers_that_permutation_explains_is_told():
    assert "The best of 9 layers" in permutation_caution(0.21, 9)
    assert "p = 0.210" in permutation_caution(0.21, 9)
    assert permutation_caution(0.05, 9) is None


def test_copies_within_a_group_are_no_caution():
    assert repeated_prompts_caution([0, 0, 1, 2], [5, 5, 6, 7]) is None
    words = repeated_prompts_caution([0, 0, 1, 2], [5, 6, 7, 8], "training")
    assert words.startswith("2 of 4 training prompts")


def test_single_copies_among_many_prompts_are_no_caution():
    assert copies_of_training_caution([True] + [False] * 99) is None
    assert copies_of_training_caution([True] * 2 + [False] * 98) is not None
    assert copies_of_training_caution([]) is None
    assert repeated_prompts_caution([], []) is None


def test_first_tokens_of_short_examples_are_no_caution():
    assert first_token_caution(0.95, 2.0) is None
    assert first_token_caution(0.7, 4.0) is None
    assert first_token_caution(None, 30.0) is None
    words = first_token_caution(1.3, 20.0)
    assert "100% of their variance" in words
    assert "an even share would be 5%" in words


def test_every_caution_is_one_line_that_ends_in_a_full_stop():
    found = {}
    for planted, *_ in PLANTED.values():
        found |= Fixture(2, **planted).cautions()
    assert set(found) >= set(PLANTED)
    for words in found.values():
        assert words.endswith(".")
        assert "\n" not in words


def test_small_classes_are_told_by_the_smaller():
    assert few_examples_caution(20, 20) is None
    assert few_examples_caution(300, 19).startswith("Only 19 negative examples")
    assert few_examples_caution(4, 300).startswith("Only 4 positive examples")


def test_a_perfect_baseline_of_a_handful_is_not_clear_of_chance():
    perfect = auroc([1.0, 2.0, 3.0, 4.0], [False, False, True, True])
    assert perfect.auroc == 1.0
    found = Baseline("length", "", perfect.auroc, perfect.low, perfect.high, "")
    assert baseline_cautions([found], 1.0) == []
    assert chance_caution(1, AurocEstimate(0.6, 0.5, 0.7, 9, 9)) is not None
