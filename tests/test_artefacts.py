"""Artefacts that were planted, each told by its own warning and by no other; clean data by none.

And the figures that stand beside a validation, recomputed from the scores that it wrote.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from planted import cache_of, classes, composed_texts, phi, rows_along, shipped_texts, unit
from sklearn.metrics import roc_auc_score

import probecache
from probecache.cli import main
from probecache.metrics import normal_quantile

HIDDEN, EACH = 64, 60

# A few words of every warning that a validation may give.
WARNINGS = {
    "answer letter": "The option letter at the end",
    "best of several": "was chosen as the best of",
    "chance": "reaches chance",
    "copies": "near-duplicates of one another",
    "copies of training": "near-duplicates of training",
    "few examples": "intervals are rough",
    "first token": "The first kept token drives",
    "layer 0": "The embeddings (layer 0)",
    "length": "The length of the prompts alone",
    "length differs": "The classes' prompts differ in length",
    "letters differ": "The classes' prompts end in different option letters",
    "mismatch": "Scored across a difference",
    "one side": "Nearly all scores lie on one side",
    "pairs": "The pairs disagree",
    "permutation": "than what permuted labels give",
    "random directions": "Random directions",
    "reversed": "the scores are reversed",
    "same prompts": "the very prompts that the vectors were trained on",
    "words": "A bag of words that never saw",
    "words from training": "A bag of words fitted on the training",
}


def told(result):
    """The names of a validation's warnings."""
    found = [[name for name, words in WARNINGS.items() if words in one] for one in result.warnings]
    assert all(len(names) == 1 for names in found), result.warnings
    return {names[0] for names in found}


def summary_of(result):
    return json.loads((result.path / "summary.json").read_text(encoding="utf-8"))


def baseline(result, name):
    [found] = [one for one in result.panel.baselines if one.name == name]
    return found


@dataclass
class Study:
    """A training and a validation around one axis, and what is changed of the latter.

    Attributes:
        spacing: of the classes along the axis, in standard deviations.
        texts: of the scored prompts.
        moved: [n] by how much each scored prompt is moved along the axis besides.
        labels: of the scored prompts; the rows stay those of the classes in turn.
        options: of both caches.
    """

    seed: int = 0
    spacing: float = 2.0
    texts: list[str] | None = None
    groups: list[str] | None = None
    moved: np.ndarray | float = 0.0
    labels: np.ndarray = field(default_factory=lambda: classes(EACH))

    def run(self, folder, **options):
        rng = np.random.default_rng(self.seed)
        axis = unit(rng.standard_normal(HIDDEN))
        positive = classes(EACH)
        texts = composed_texts(1000 + self.seed, len(positive))
        rows = rows_along(rng, positive, axis, self.spacing)
        training = cache_of(folder / "training", positive, {8: rows}, texts=texts)
        rows = rows_along(rng, positive, axis, self.spacing)
        rows += (np.broadcast_to(self.moved, len(positive))[:, None] * axis).astype(np.float32)
        texts = self.texts or composed_texts(2000 + self.seed, len(positive))
        scored = cache_of(
            folder / "scored", self.labels, {8: rows}, texts=texts, groups=self.groups
        )
        vectors = probecache.train(cache=training, output=folder / "run")
        return probecache.validate(vectors=vectors, cache=scored, output=folder / "v", **options)


def several_tokens(rng, positive, axis, counts, *, spacing=1.0, first=0.0, spread=0.5, layers=(8,)):
    """Rows of every token, by class as files hold them: what a prompt says stands in all of them.

    `first` is where every prompt's first token lies along the axis, the same in all.
    """
    counts = np.asarray(counts)
    said = np.where(positive, spacing / 2, -spacing / 2) + spread * rng.standard_normal(len(counts))
    along = np.repeat(said, counts)
    starts = np.cumsum(counts) - counts
    noise = rng.standard_normal((counts.sum(), len(axis)))
    if first:
        noise[starts], along[starts] = 0, first
    rows = (noise + along[:, None] * axis).astype(np.float32)
    return dict.fromkeys(layers, rows)


def study_of_tokens(folder, seed, lengths, *, texts=None, **planted):
    """Training and validation on all tokens; `lengths` draws those of classes."""
    rng = np.random.default_rng(seed)
    axis, positive = unit(rng.standard_normal(HIDDEN)), classes(EACH)
    caches = []
    for name, source in (("training", 3000), ("scored", 4000)):
        counts = lengths(rng, positive)
        words = texts[name] if texts else composed_texts(source + seed, len(positive))
        rows = several_tokens(rng, positive, axis, counts, **planted)
        caches.append(
            cache_of(
                folder / name, positive, rows, texts=words, tokens=counts.tolist(), positions="all"
            )
        )
    vectors = probecache.train(cache=caches[0], output=folder / "run")
    return probecache.validate(vectors=vectors, cache=caches[1], output=folder / "v")


# ---------------------------------------------------------------- clean data


@pytest.mark.parametrize("seed", range(6))
def test_clean_data_raise_no_warning(tmp_path, seed):
    result = Study(seed, spacing=2.5).run(tmp_path)
    assert told(result) == set()
    assert 0.8 < result.best.auroc.auroc < 1


@pytest.mark.parametrize("seed", range(4))
def test_shipped_prompts_whose_classes_have_nothing_to_do_with_their_words_raise_no_warning(
    tmp_path, seed
):
    """All tokens of real questions, as long as they are, but with classes dealt out by chance."""
    texts = shipped_texts(seed, 4 * EACH)
    halves = {"training": texts[: 2 * EACH], "scored": texts[2 * EACH :]}
    counts = iter([[len(text.split()) for text in half] for half in halves.values()])
    result = study_of_tokens(
        tmp_path, seed, lambda *_: np.array(next(counts)), texts=halves, spacing=1.5
    )
    assert told(result) == set()
    assert result.panel.first_token_share < 0.3
    assert 0.9 < result.best.auroc.auroc < 1


def test_of_several_clean_layers_only_the_choice_among_them_is_told(tmp_path):
    rng, positive = np.random.default_rng(1), classes(EACH)
    axis = unit(rng.standard_normal(HIDDEN))
    caches = [
        cache_of(
            tmp_path / name,
            positive,
            {layer: rows_along(rng, positive, axis, 2.5) for layer in (4, 8, 12)},
            texts=composed_texts(place, 2 * EACH),
        )
        for place, name in enumerate(("training", "scored"))
    ]
    vectors = probecache.train(cache=caches[0], output=tmp_path / "run")
    result = probecache.validate(vectors=vectors, cache=caches[1], output=tmp_path / "v")
    fixed = result.chosen_in_training
    assert told(result) == (set() if fixed is result.best else {"best of several"})
    for other in {4, 8, 12} - {fixed.layer}:  # without that layer, the choice is always told
        kept = [other, ({4, 8, 12} - {fixed.layer, other}).pop()]
        again = probecache.validate(
            vectors=vectors, cache=caches[1], output=tmp_path / "again", layers=kept
        )
        assert told(again) == {"best of several"}


# ---------------------------------------------------------------- artefacts, one by one


def lettered(texts, letters):
    return [f"{text} ({letter})" for text, letter in zip(texts, letters, strict=True)]


def test_a_letter_that_goes_with_the_class_is_told(tmp_path):
    letters = np.where(classes(EACH), "A", "B")
    result = Study(1, texts=lettered(composed_texts(1, 2 * EACH), letters)).run(tmp_path)
    # The letter is a word as well, so a bag of words finds it too.
    assert told(result) == {"answer letter", "words"}
    assert baseline(result, "answer-letter").auroc == 1.0


def test_a_letter_that_mostly_goes_with_the_class_is_told_where_the_probe_does_better(tmp_path):
    letters = np.where(classes(EACH), "A", "B")
    letters[::5] = np.where(classes(EACH), "B", "A")[::5]
    texts = lettered(composed_texts(2, 2 * EACH), letters)
    result = Study(2, spacing=4.0, texts=texts).run(tmp_path)
    assert "letters differ" in told(result)
    assert told(result) <= {"letters differ", "words"}
    found = baseline(result, "answer-letter")
    assert 0.7 < found.auroc < found.high < result.best.auroc.auroc


def test_letters_that_both_classes_end_in_are_not_told(tmp_path):
    letters = np.where(np.arange(2 * EACH) % 4 < 2, "A", "B")
    result = Study(1, spacing=2.5, texts=lettered(composed_texts(1, 2 * EACH), letters)).run(
        tmp_path
    )
    assert told(result) == set()
    assert baseline(result, "answer-letter").auroc < 0.6


def longer(by):
    def lengths(rng, positive):
        return rng.integers(12, 24, len(positive)) + by * positive

    return lengths


def test_a_length_that_goes_with_the_class_is_told_where_it_explains_the_score(tmp_path):
    result = study_of_tokens(tmp_path, 1, longer(8), spacing=1.0)
    assert told(result) == {"length"}
    assert baseline(result, "length").auroc > result.best.auroc.auroc


def test_a_length_that_goes_with_the_class_is_told_where_the_probe_does_better(tmp_path):
    result = study_of_tokens(tmp_path, 2, longer(4), spacing=2.0)
    assert told(result) == {"length differs"}
    assert baseline(result, "length").high < result.best.auroc.auroc


def test_scores_that_a_giant_first_token_drives_are_told(tmp_path):
    """Long and short prompts in both classes alike: what BOS adds to a mean is noise."""
    result = study_of_tokens(
        tmp_path, 3, lambda rng, labels: rng.integers(10, 41, len(labels)), first=60.0
    )
    assert told(result) == {"first token"}
    assert result.panel.first_token_share > 0.5
    without = study_of_tokens(
        tmp_path / "without", 3, lambda rng, labels: rng.integers(10, 41, len(labels))
    )
    assert told(without) == set()
    assert without.best.auroc.auroc > result.best.auroc.auroc


def test_a_giant_first_token_and_lengths_that_go_with_the_class_are_both_told(tmp_path):
    """Nothing but BOS and length: the mean over k tokens holds a k-th of BOS."""
    result = study_of_tokens(tmp_path, 4, longer(8), first=200.0, spacing=0.0, spread=0.2)
    # BOS is most of the covariance too, so directions that know no labels do as well.
    assert told(result) == {"first token", "length", "random directions"}
    assert result.best.auroc.auroc > 0.8


def test_prompts_that_repeat_across_groups_are_told(tmp_path):
    texts = composed_texts(5, 2 * EACH)
    # The twenty last are the twenty first again, each of its own class.
    texts[-20:] = [text.upper() + "!" for text in texts[:20]]
    result = Study(5, texts=texts, spacing=2.5).run(tmp_path)
    assert told(result) == {"copies"}
    assert "40 of 120 validation prompts" in " ".join(result.warnings)


def test_prompts_that_repeat_within_a_named_group_are_not_told(tmp_path):
    texts = composed_texts(5, 2 * EACH)
    texts[-20:] = [text.upper() + "!" for text in texts[:20]]
    groups = [f"g{place % (2 * EACH - 20)}" for place in range(2 * EACH)]
    result = Study(5, texts=texts, groups=groups, spacing=2.5).run(tmp_path)
    assert told(result) == set()
    assert result.interval == "bootstrap over 100 groups"


def test_prompts_of_the_training_are_told(tmp_path):
    texts = composed_texts(6, 2 * EACH)
    texts[:12] = composed_texts(1006, 2 * EACH)[:12]
    result = Study(6, texts=texts, spacing=2.5).run(tmp_path)
    assert told(result) == {"copies of training"}
    assert "12 of 120 validation prompts" in " ".join(result.warnings)


@pytest.mark.parametrize(("at_layer_0", "expected"), [(3.0, {"layer 0"}), (0.0, set())])
def test_embeddings_that_part_the_classes_as_well_are_told(tmp_path, at_layer_0, expected):
    rng, positive = np.random.default_rng(7), classes(EACH)
    axis = unit(rng.standard_normal(HIDDEN))
    caches = [
        cache_of(
            tmp_path / name,
            positive,
            {n: rows_along(rng, positive, axis, d) for n, d in ((0, at_layer_0), (8, 2.5))},
            texts=composed_texts(70 + place, 2 * EACH),
        )
        for place, name in enumerate(("training", "scored"))
    ]
    vectors = probecache.train(cache=caches[0], output=tmp_path / "run", layers=[8])
    result = probecache.validate(vectors=vectors, cache=caches[1], output=tmp_path / "v")
    assert told(result) == expected
    found = baseline(result, "layer-0")
    cosine = at_layer_0 / np.sqrt(at_layer_0**2 + 2 * (HIDDEN - 1) / (EACH * 4 / 5))
    assert found.auroc == pytest.approx(phi(at_layer_0 * cosine / np.sqrt(2)), abs=0.1)
    assert found.low < found.auroc < found.high


def test_embeddings_that_are_all_the_same_part_nothing(tmp_path):
    """As where all prompts end in one token of the chat template."""
    rng, positive = np.random.default_rng(19), classes(EACH)
    axis = unit(rng.standard_normal(HIDDEN))
    same = np.ones((2 * EACH, HIDDEN), dtype=np.float32)
    caches = [
        cache_of(
            tmp_path / name,
            positive,
            {0: same, 8: rows_along(rng, positive, axis, 2.5)},
            texts=composed_texts(190 + place, 2 * EACH),
        )
        for place, name in enumerate(("training", "scored"))
    ]
    vectors = probecache.train(cache=caches[0], output=tmp_path / "run")
    assert vectors.info.layers_without_direction == [0]
    result = probecache.validate(vectors=vectors, cache=caches[1], output=tmp_path / "v")
    assert told(result) == set()
    assert baseline(result, "layer-0").auroc is None
    assert baseline(result, "layer-0").how.startswith("Not to be had: expected the classes' means")


def test_a_reversed_sign_is_told(tmp_path):
    result = Study(8, labels=~classes(EACH)).run(tmp_path)
    assert told(result) == {"reversed"}
    assert result.best.auroc.high < 0.5


def test_a_layer_whose_sign_is_reversed_is_told_beside_one_that_is_right(tmp_path):
    rng, positive = np.random.default_rng(18), classes(EACH)
    axis = unit(rng.standard_normal(HIDDEN))
    caches = [
        cache_of(
            tmp_path / name,
            positive,
            {n: rows_along(rng, positive, axis, d) for n, d in ((4, 2.5), (8, at_layer_8))},
            texts=composed_texts(180 + place, 2 * EACH),
        )
        for place, (name, at_layer_8) in enumerate((("training", 2.5), ("scored", -2.5)))
    ]
    vectors = probecache.train(cache=caches[0], output=tmp_path / "run")
    result = probecache.validate(vectors=vectors, cache=caches[1], output=tmp_path / "v")
    # Training may have chosen that layer too: then nothing was chosen on these prompts.
    assert told(result) - {"best of several"} == {"reversed"}
    assert any("At layer 8 the scores are reversed" in one for one in result.warnings)


def test_scores_at_chance_are_told(tmp_path):
    rng = np.random.default_rng(9)
    result = Study(9, labels=rng.permutation(classes(EACH))).run(tmp_path)
    # One finding in three sentences: interval, permuted labels, and directions without labels.
    assert {"chance", "permutation"} <= told(result)
    assert told(result) <= {"chance", "permutation", "random directions"}


# ---------------------------------------------------------------- the letters that made 0.99


@pytest.fixture(scope="module")
def anecdote(tmp_path_factory):
    """Vectors that hold a letter's direction beside the concept's; prompts without a letter and
    the same prompts with "(A)" or "(B)" appended by class."""
    folder = tmp_path_factory.mktemp("anecdote")
    rng, positive = np.random.default_rng(10), classes(EACH)
    concept, letter = np.linalg.qr(rng.standard_normal((HIDDEN, 2)))[0].T
    axis = unit(concept + letter)
    training = cache_of(
        folder / "training",
        positive,
        {8: rows_along(rng, positive, axis, 4.0)},
        texts=composed_texts(11, 2 * EACH),
    )
    plain = rows_along(rng, positive, concept, 1.2)
    pushed = np.where(positive, 2.0, -2.0)[:, None] * letter
    texts = composed_texts(12, 2 * EACH)
    caches = {
        "without": cache_of(folder / "without", positive, {8: plain}, texts=texts),
        "with": cache_of(
            folder / "with",
            positive,
            {8: plain + pushed.astype(np.float32)},
            texts=lettered(texts, np.where(positive, "A", "B")),
        ),
    }
    return folder, training, caches


def command(capsys, *words):
    """What a command prints."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert not ended.value.code
    return capsys.readouterr().out


def test_letters_appended_by_class_make_099_of_07_and_the_panel_says_so(anecdote, tmp_path, capsys):
    _, training, caches = anecdote
    command(capsys, "train", "--cache", training.path, "--output", tmp_path / "run")
    [run] = tmp_path.glob("run_*")
    printed, summaries = {}, {}
    for name, cache in caches.items():
        words = ("validate", "--vectors", run / "normalized_vectors", "--cache", cache.path)
        printed[name] = command(capsys, *words, "--output", tmp_path / name)
        summaries[name] = json.loads((tmp_path / name / "summary.json").read_text("utf-8"))
    areas = {name: summary["layers"][0]["auroc"] for name, summary in summaries.items()}
    assert areas["with"] > 0.98
    assert 0.6 < areas["without"] < 0.8

    panel = summaries["with"]["artefacts"]
    assert panel["best_baseline"] in ("answer-letter", "words")
    assert panel["gain"] <= 0
    assert any(WARNINGS["answer letter"] in one for one in summaries["with"]["warnings"])
    assert "Note: The option letter at the end of the prompts alone parts" in printed["with"]
    assert "Take the letters off" in printed["with"]
    assert " ".join(["Answer letter", "1.000"]) in " ".join(printed["with"].split())

    assert summaries["without"]["warnings"] == []
    assert "Note:" not in printed["without"]
    assert "Fewer than a tenth of the prompts end in an option letter" in printed["without"]


# ---------------------------------------------------------------- figures beside the AUROC


def table_of(result, layer=8):
    """Columns of what a validation wrote of each prompt, as plain Python reads them."""
    path = result.path / f"probe_stats_layer{layer}.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    positive = np.array([row["type"] == "deployment" for row in rows])
    column = "score" if "score" in rows[0] else "mean_score"
    return positive, np.array([float(row[column]) for row in rows])


def wins_of(positive, scores):
    """[positives, negatives]: 1 where the positive one scores higher, 1/2 where they tie."""
    above, below = scores[positive][:, None], scores[~positive][None]
    return (above > below) + 0.5 * (above == below)


def test_the_interval_is_delongs_on_the_written_scores(tmp_path):
    result = Study(13).run(tmp_path)
    wins = wins_of(*table_of(result))
    area = wins.mean()
    variance = sum(wins.mean(axis).var(ddof=1) / wins.shape[1 - axis] for axis in (0, 1))
    logit = np.log(area / (1 - area))
    half = normal_quantile(0.975) * np.sqrt(variance) / (area * (1 - area))
    expected = 1 / (1 + np.exp(-np.array([logit, logit - half, logit + half])))
    [row] = summary_of(result)["layers"]
    found = [row[name] for name in ("auroc", "auroc_low", "auroc_high")]
    assert found == pytest.approx(expected.tolist(), abs=1e-10)
    assert result.interval == summary_of(result)["interval"] == "DeLong"


def test_clustered_data_get_an_interval_that_counts_groups(tmp_path):
    """Each prompt four times in a group: no more is known than of each prompt once."""
    rng, spacing, axis = np.random.default_rng(14), 1.5, np.eye(HIDDEN)[0]
    positive, source = classes(40), np.repeat(np.arange(80), 4)
    rows, texts = rows_along(rng, positive, axis, spacing), composed_texts(14, 80)
    training = cache_of(
        tmp_path / "training", positive, {8: rows_along(rng, positive, axis, spacing)}
    )
    vectors = probecache.train(cache=training, output=tmp_path / "run")
    once = cache_of(tmp_path / "once", positive, {8: rows}, texts=texts)
    copied = cache_of(
        tmp_path / "copied",
        positive[source],
        {8: rows[source]},
        texts=[texts[place] for place in source],
        groups=[f"g{place}" for place in source],
    )
    single, grouped = (
        probecache.validate(vectors=vectors, cache=cache, output=tmp_path / f"v{place}")
        for place, cache in enumerate((once, copied))
    )
    assert grouped.interval == summary_of(grouped)["interval"] == "bootstrap over 80 groups"
    one, other = single.best.auroc, grouped.best.auroc
    assert other.auroc == pytest.approx(one.auroc, abs=1e-12)
    assert other.high - other.low == pytest.approx(one.high - one.low, rel=0.12)
    assert "copies" not in told(grouped)


@pytest.mark.parametrize("groups", [None, [f"g{place // 2}" for place in range(2 * EACH)]])
def test_other_layers_are_said_to_lie_as_far_below_the_best_as_their_aurocs_do(tmp_path, groups):
    rng, positive = np.random.default_rng(20), classes(EACH)
    axis = unit(rng.standard_normal(HIDDEN))
    caches = [
        cache_of(
            tmp_path / name,
            positive,
            {n: rows_along(rng, positive, axis, d) for n, d in ((4, 1.0), (8, 2.5), (12, 2.4))},
            texts=composed_texts(200 + place, 2 * EACH),
            groups=groups,
        )
        for place, name in enumerate(("training", "scored"))
    ]
    vectors = probecache.train(cache=caches[0], output=tmp_path / "run")
    result = probecache.validate(vectors=vectors, cache=caches[1], output=tmp_path / "v")
    rows = {row["layer"]: row for row in summary_of(result)["layers"]}
    best = rows.pop(result.best.layer)
    assert best["below_best"] is None
    for row in rows.values():
        below = row["below_best"]
        assert below["difference"] == pytest.approx(best["auroc"] - row["auroc"], abs=1e-12)
        assert below["low"] < below["difference"] < below["high"]
    assert rows[4]["below_best"]["low"] > 0
    assert rows[4]["below_best"]["p_value"] < 0.01


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Vectors of four layers; caches of 300 positives and 300 or 299 negatives."""
    folder = tmp_path_factory.mktemp("many")
    rng, axis, layers = np.random.default_rng(15), np.eye(8)[0], (2, 4, 6, 8)
    training = cache_of(
        folder / "training",
        classes(200),
        {layer: rows_along(rng, classes(200), axis, 2.0) for layer in layers},
    )
    vectors = probecache.train(cache=training, output=folder / "run")
    positive, texts = classes(300), composed_texts(15, 600)
    rows = {layer: rows_along(rng, positive, axis, 2.0) for layer in layers}
    return vectors, {
        300 - left_out: cache_of(
            folder / f"without_{left_out}",
            positive[left_out:],
            {layer: values[left_out:] for layer, values in rows.items()},
            texts=texts[left_out:],
        )
        for left_out in (0, 1)
    }


def test_the_true_positive_rate_at_1_percent_is_counted_with_300_negatives(many, tmp_path):
    vectors, caches = many
    result = probecache.validate(vectors=vectors, cache=caches[300], output=tmp_path / "v")
    for row in summary_of(result)["layers"]:
        positive, scores = table_of(result, row["layer"])
        for name, allowed in (("tpr_at_1", 3), ("tpr_at_5", 15)):
            threshold = np.sort(scores[~positive])[-allowed - 1]
            assert row[name]["tpr"] == pytest.approx(np.mean(scores[positive] > threshold))
            assert 0 < row[name]["low"] < row[name]["tpr"] < row[name]["high"] < 1


def test_the_true_positive_rate_at_1_percent_is_refused_of_299_negatives(many, tmp_path, capsys):
    vectors, caches = many
    words = ("validate", "--vectors", vectors.path, "--cache", caches[299].path)
    printed = command(capsys, *words, "--layers", "8", "--output", tmp_path / "v")
    [row] = json.loads((tmp_path / "v" / "summary.json").read_text("utf-8"))["layers"]
    assert row["tpr_at_1"] is None
    assert row["tpr_at_5"] is not None
    assert "TPR at 1% FPR: not said of 299 negatives; it takes 300" in printed
    assert "TPR at 5% FPR: 0." in printed


def test_probabilities_of_well_specified_data_are_calibrated(many, tmp_path):
    """Normal classes of one variance have probabilities that are logistic in the score.

    Smoothed targets keep the line a little too flat (by 4 % at 200 examples of a class).
    """
    vectors, caches = many
    result = probecache.validate(vectors=vectors, cache=caches[300], output=tmp_path / "v")
    summary = summary_of(result)
    rows = summary["layers"]
    assert np.mean([row["calibration_slope"] for row in rows]) == pytest.approx(1.04, abs=0.15)
    assert np.mean([row["calibration_intercept"] for row in rows]) == pytest.approx(0, abs=0.2)
    assert max(row["ece"] for row in rows) < 0.08
    for row in rows:
        positive, scores = table_of(result, row["layer"])
        platt = vectors.info.layers[row["layer"]].calibration
        probability = 1 / (1 + np.exp(-platt.slope * scores - platt.intercept))
        assert row["brier"] == pytest.approx(np.mean((probability - positive) ** 2), abs=1e-12)
    assert sum(one["n"] for one in summary["calibration_bins"]) == 600


def highest_window(scores, width):
    starts = range(max(1, len(scores) - width + 1))
    return max(np.mean(scores[start : start + width]) for start in starts)


AGGREGATES = {
    "mean": np.mean,
    "max": np.max,
    "last": lambda scores: scores[-1],
    "top-5": lambda scores: np.mean(sorted(scores)[-5:]),
    "rolling-8": lambda scores: highest_window(scores, 8),
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Vectors, and a cache of all tokens with the rows of each prompt."""
    folder = tmp_path_factory.mktemp("tokens")
    rng, axis, positive = np.random.default_rng(16), np.eye(16)[2], classes(25)
    counts = rng.integers(3, 20, len(positive))
    # All testing prompts come first in a cache's files, as the first prompt is one.
    labels = np.sort(positive)
    rows = several_tokens(rng, labels, axis, counts, spacing=1.0)
    training = cache_of(
        folder / "training",
        labels,
        several_tokens(rng, labels, axis, counts, spacing=1.0),
        tokens=counts.tolist(),
        positions="all",
    )
    cache = cache_of(
        folder / "scored",
        labels,
        rows,
        texts=composed_texts(16, 50),
        tokens=counts.tolist(),
        positions="all",
        categories=["odd" if place % 2 else "even" for place in range(40)] + ["late"] * 10,
    )
    vectors = probecache.train(cache=training, output=folder / "run")
    return vectors, cache, labels, np.split(rows[8], np.cumsum(counts)[:-1])


@pytest.mark.parametrize("name", AGGREGATES)
def test_what_is_made_of_a_prompts_tokens_is_what_its_name_says(tokens, tmp_path, name):
    vectors, cache, labels, prompts = tokens
    result = probecache.validate(
        vectors=vectors, cache=cache, output=tmp_path / "v", aggregate=name
    )
    direction = vectors.directions[8].astype(np.float64)
    expected = np.array([AGGREGATES[name](rows.astype(np.float64) @ direction) for rows in prompts])
    np.testing.assert_allclose(result.best.scores, expected, rtol=1e-9, atol=1e-12)
    assert result.best.auroc.auroc == pytest.approx(roc_auc_score(labels, expected), abs=1e-12)
    assert result.aggregate == summary_of(result)["aggregate"] == name


def test_the_table_of_categories_is_that_of_each_category_alone(tokens, tmp_path):
    vectors, cache, labels, _ = tokens
    result = probecache.validate(vectors=vectors, cache=cache, output=tmp_path / "v")
    found = {row["category"]: row for row in summary_of(result)["categories"]}
    assert list(found) == ["even", "odd", "late"]
    scores, threshold = result.best.scores, vectors.info.layers[8].threshold
    for name, here in (
        ("even", np.arange(0, 40, 2)),
        ("odd", np.arange(1, 40, 2)),
        ("late", np.arange(40, 50)),
    ):
        row, positive = found[name], labels[here]
        assert (row["n_positive"], row["n_negative"]) == (positive.sum(), (~positive).sum())
        assert row["accuracy"] == np.mean((scores[here] > threshold) == positive)
        assert row["mean_score"] == pytest.approx(scores[here].mean())
        if name == "late":  # one class only
            assert row["auroc"] is row["auroc_low"] is row["auroc_high"] is None
        else:
            assert row["auroc"] == pytest.approx(roc_auc_score(positive, scores[here]), abs=1e-12)
            assert row["auroc_low"] < row["auroc"] < row["auroc_high"]


@pytest.mark.parametrize("count", [1, 7])
def test_as_many_random_directions_are_scored_as_are_asked_for(tmp_path, count):
    result = Study(17).run(tmp_path, control_count=count)
    assert result.best.random.aurocs.shape == (count,)
    [row] = summary_of(result)["layers"]
    assert row["random_mean"] == pytest.approx(result.best.random.aurocs.mean())
    assert row["random_high"] == result.best.random.aurocs.max()
    assert f"of {count} random" in baseline(result, "random-directions").how


def test_without_control_the_panel_says_what_is_missing(tmp_path):
    result = Study(17).run(tmp_path, control=False)
    [row] = summary_of(result)["layers"]
    assert row["random_mean"] is row["random_high"] is None
    assert baseline(result, "random-directions").auroc is None
    assert "add --control" in baseline(result, "random-directions").how
    # Nor is there a layer 0 in this cache.
    assert baseline(result, "layer-0").auroc is None
    assert "layer 0 is not cached" in baseline(result, "layer-0").how
