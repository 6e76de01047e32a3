"""The artefact panel: each figure against plain inputs, each artefact by its own fixture."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from synthetic import rows_of, train, validate, write_cache

from probecache.store.reader import open_cache
from probecache.store.rows import ExampleRows
from probecache.store.vectors import load_vectors
from probecache.unrecorded import unrecorded
from probecache.workflow import panel as module
from probecache.workflow.panel import make_panel
from probecache.workflow.scoring import score_layer

HIDDEN = 12
SYLLABLES = [f"{a}{b}" for a in "bdfgklmnprstvz" for b in ("ap", "eno", "iri", "ot", "umba")]
NAMES = (
    *("length", "answer-letter", "words", "words-from-training", "layer-0"),
    *("random-directions", "shuffled-labels"),
)


def text(seed, words=12):
    return " ".join(np.random.default_rng(seed).choice(SYLLABLES, words))


def pairs(first, count=30, answers=("yes", "no"), **more):
    return [
        {"question": text(first + n), "positive": answers[0], "negative": answers[1], **more}
        for n in range(count)
    ]


def labelled(first, count=60, question=text):
    return [
        {"question": question(first + n), "type": ("testing", "deployment")[n % 2], "id": f"q{n}"}
        for n in range(count)
    ]


def planted(seed, count, shift=2.0, hidden=HIDDEN):
    rows = torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed))
    rows[1::2, 0] += shift
    return rows


def written(folder, records, seed, layers=(0, 6), tokens=None, **more):
    count = sum(tokens) if tokens else len(records) * (2 if "positive" in records[0] else 1)
    rows = {n: planted(seed + n, count, 0.0 if n == 0 else 2.0) for n in layers}
    return write_cache(folder, records, rows, tokens=tokens, **more)


@pytest.fixture
def made(tmp_path):
    """Make a training cache and one to score; returns the validation and what it was made from."""

    def make(training, scored, *, layers=(0, 6), options=None, **more):
        first = written(tmp_path / "training", training, 100, layers)
        cache = written(tmp_path / "scored", scored, 200, layers, **more)
        vectors = train(first, tmp_path / "run", layers=[6])
        found = validate(cache, vectors, tmp_path / "v", **(options or {}))
        return found, cache, vectors

    return make


def baseline(found, name):
    return {one.name: one for one in found.panel.baselines}[name]


def said(found):
    return " ".join(found.warnings)


def means_of(cache, layer):
    """Mean row of each example in data order, float64, as plain torch reads them."""
    files = {label: rows_of(cache, label, layer).double().numpy() for label in cache.classes}
    return np.stack([files[r.label][slice(*r.rows)].mean(axis=0) for r in cache.examples])


# ---------------------------------------------------------------- figures


def test_every_baseline_is_there_in_this_order_and_the_record_is_plain_json(made, tmp_path):
    found, _, _ = made(pairs(0), labelled(1000))
    assert tuple(one.name for one in found.panel.baselines) == NAMES
    record = found.panel.record()
    assert json.loads(json.dumps(record)) == record
    saved = json.loads((tmp_path / "v" / "summary.json").read_text("utf-8"))["artefacts"]
    assert saved == record
    assert all(one["title"] and one["how"].endswith(".") for one in record["baselines"])
    for one in found.panel.baselines:
        if one.auroc is not None:
            assert one.low <= one.auroc <= one.high
    balance = {"positive": 30, "negative": 30, "share_positive": 0.5}
    assert record["class_balance"] == balance


def test_the_gain_is_over_the_best_that_is_no_shuffle(made):
    found, _, _ = made(pairs(0), labelled(1000))
    rivals = {
        one.name: one.auroc
        for one in found.panel.baselines
        if one.auroc is not None and one.name != "shuffled-labels"
    }
    best = max(rivals, key=rivals.__getitem__)
    assert found.panel.best_baseline == best
    assert found.panel.gain == pytest.approx(found.best.auroc.auroc - rivals[best], abs=1e-12)


def test_length_is_the_number_of_tokens_that_the_model_was_fed(made):
    tokens = list(np.random.default_rng(0).integers(1, 9, 60))
    found, cache, _ = made(
        labelled(0, 20), labelled(1000), tokens=[int(t) for t in tokens], positions="all"
    )
    positive = [r.label == "deployment" for r in cache.examples]
    area = roc_auc_score(positive, [r.input_tokens for r in cache.examples])
    assert baseline(found, "length").auroc == pytest.approx(max(area, 1 - area), abs=1e-12)
    assert "tokens" in baseline(found, "length").how


def test_layer_0_is_a_cross_validated_probe_on_the_embeddings(made):
    found, cache, _ = made(pairs(0), labelled(1000))
    from probecache.folds import assign_folds

    rows, positive = means_of(cache, 0), np.arange(60) % 2 == 1
    folds = assign_folds(positive, np.arange(60))
    won = 0.0
    for fold in range(5):
        kept, here = folds != fold, folds == fold
        direction = rows[kept & positive].mean(axis=0) - rows[kept & ~positive].mean(axis=0)
        won += roc_auc_score(positive[here], rows[here] @ direction) / 5  # folds of equal size
    assert baseline(found, "layer-0").auroc == pytest.approx(won, abs=1e-9)
    assert [result.layer for result in found.layers] == [6]


def test_shuffled_labels_give_the_median_of_the_best_layer(made):
    found, _, _ = made(pairs(0), labelled(1000))
    rng = np.random.default_rng(1)
    positive = found.best.is_positive
    ranks = rankdata(found.best.scores)
    areas = []
    for _ in range(2000):
        mixed = rng.permutation(positive)
        areas.append((ranks[mixed].sum() - 30 * 31 / 2) / 900)
    shuffled = baseline(found, "shuffled-labels")
    assert shuffled.auroc == pytest.approx(np.median(areas), abs=0.02)
    assert shuffled.low == pytest.approx(np.quantile(areas, 0.025), abs=0.03)
    assert shuffled.high == pytest.approx(np.quantile(areas, 0.975), abs=0.03)


def test_outlier_dimensions_are_those_of_the_largest_mean_squares(tmp_path):
    first = written(tmp_path / "t", pairs(0), 100)
    rows = planted(7, 60)
    rows[:, 9] += 50
    rows[:, 4] -= 20
    cache = write_cache(tmp_path / "c", labelled(1000), {6: rows})
    panel = validate(cache, train(first, tmp_path / "r", layers=[6]), tmp_path / "v").panel
    squares = (rows.double().numpy() ** 2).sum(axis=0)
    assert panel.outlier_dimensions[:2] == (9, 4)
    share = squares[list(panel.outlier_dimensions)].sum() / squares.sum()
    assert panel.outlier_share == pytest.approx(share, abs=1e-9)
    assert panel.record()["outlier_dimensions"]["dimensions"][0] == 9


def test_pairs_agree_as_the_mean_cosine_of_their_differences_says(made):
    found, cache, _ = made(pairs(0), pairs(1000))
    rows = means_of(cache, 6)
    deployed = np.array([r.label == "deployment" for r in cache.examples])
    differences = rows[deployed] - rows[~deployed]
    units = differences / np.linalg.norm(differences, axis=1, keepdims=True)
    expected = (units @ units.T)[~np.eye(30, dtype=bool)].mean()
    assert found.panel.record()["pair_agreement"] == pytest.approx(expected, abs=1e-6)


def test_what_does_not_apply_is_none(made):
    found, _, _ = made(labelled(0, 40), labelled(1000))
    record = found.panel.record()
    assert record["pair_agreement"] is None
    assert record["first_token_share"] is None
    assert baseline(found, "answer-letter").auroc is None


# ---------------------------------------------------------------- what cannot be had


def test_a_baseline_that_cannot_be_had_says_why(made, tmp_path):
    options = {"control_count": 0}
    found, _, _ = made(pairs(0), labelled(1000), layers=(6,), options=options)
    for name, why in (
        ("layer-0", "layer 0 is not cached; extract it too"),
        ("random-directions", "add --control"),
    ):
        one = baseline(found, name)
        assert (one.auroc, one.low, one.high) == (None, None, None)
        assert why in one.how


def test_too_few_groups_for_a_cross_validated_baseline_are_told(made):
    scored = labelled(1000, 6)
    scored[0]["type"], scored[1]["type"] = "deployment", "testing"
    for record in scored[1:]:
        record["type"] = "testing"
    found, _, _ = made(pairs(0), scored)
    for name in ("layer-0", "words"):
        assert baseline(found, name).auroc is None
        assert baseline(found, name).how.startswith("Not to be had: expected texts of each class")


def test_training_prompts_that_are_not_at_hand_are_told(tmp_path):
    first = written(tmp_path / "training", pairs(0), 100)
    cache = written(tmp_path / "scored", labelled(1000), 200)
    vectors = train(first, tmp_path / "run", layers=[6])

    def words():
        found = validate(cache, vectors, tmp_path / "v")
        return baseline(found, "words-from-training")

    assert words().auroc is not None
    moved = shutil.move(first.path, tmp_path / "elsewhere")
    assert "the cache that the vectors came from is not at hand" in words().how
    # A cache of other numbers in its place is not taken for it.
    written(tmp_path / "training", pairs(500), 300)
    assert words().auroc is None
    shutil.rmtree(tmp_path / "training")
    shutil.move(moved, first.path)
    assert words().auroc is not None


# ---------------------------------------------------------------- fixtures that are flagged


def test_a_clean_validation_raises_no_warning(made):
    found, _, _ = made(pairs(0, 60), labelled(1000, 120))
    assert found.warnings == ()


def test_an_appended_letter_is_flagged(made):
    letters = [
        {**one, "question": f"{one['question']} ({'BA'[one['type'] == 'testing']})"}
        for one in labelled(1000, 120)
    ]
    found, _, _ = made(pairs(0, 60), letters)
    assert baseline(found, "answer-letter").auroc == 1
    assert "The option letter at the end of the prompts alone parts the classes" in said(found)


def test_prompts_that_were_trained_on_are_flagged(made):
    training, scored = labelled(0, 120), labelled(1000, 120)
    for place in range(0, 120, 4):
        scored[place]["question"] = training[place]["question"] + "!"
    found, _, _ = made(training, scored)
    assert "30 of 120 validation prompts are near-duplicates of training prompts" in said(found)


def test_prompts_that_are_repeated_are_flagged(made):
    scored = labelled(1000, 120)
    for place in range(0, 40, 2):
        scored[place + 40]["question"] = scored[place]["question"] + "."
    found, _, _ = made(pairs(0, 60), scored)
    assert "near-duplicates of one another" in said(found)


def test_a_first_token_that_drives_the_scores_is_flagged(tmp_path):
    first = written(tmp_path / "t", pairs(0, 60), 100, (6,))
    count, each = 120, 6
    rows = 0.3 * torch.randn(count * each, HIDDEN, generator=torch.Generator().manual_seed(3))
    huge = torch.randn(count, generator=torch.Generator().manual_seed(4)) * 20
    huge[1::2] += 20
    rows[::each, 0] += huge
    cache = write_cache(
        tmp_path / "c", labelled(1000, count), {6: rows}, tokens=[each] * count, positions="all"
    )
    found = validate(cache, train(first, tmp_path / "r"), tmp_path / "v")
    assert found.panel.first_token_share > 0.9
    assert "The first kept token drives the scores" in said(found)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("system_prompt", "the system prompt differs"),
        ("chat_template", "the chat template differs"),
        ("template_date", "the date in the chat template differs"),
    ],
)
def test_a_difference_in_rendering_is_told(tmp_path, field, words):
    first = written(tmp_path / "t", labelled(0), 100)
    cache = written(tmp_path / "c", labelled(1000), 200, **{field: "3" * 64})
    vectors = train(first, tmp_path / "r", layers=[6])
    options = {"allow_mismatch": [field]}
    panel = validate(cache, vectors, tmp_path / "v", **options).panel
    alike = panel.record()["rendered_alike"]
    assert alike == {"alike": False, "differences": [words]}


@pytest.mark.parametrize("imported", ["both", "scored"])
def test_what_an_import_does_not_tell_is_not_taken_for_alike_or_different(tmp_path, imported):
    note = {"chat_template": unrecorded("ab" * 32), "system_prompt": unrecorded("ab" * 32)}
    first = written(tmp_path / "t", labelled(0), 100, **(note if imported == "both" else {}))
    cache = written(tmp_path / "c", labelled(1000), 200, **note)
    vectors = train(first, tmp_path / "r", layers=[6])
    allowed = [] if imported == "both" else list(note)
    panel = validate(cache, vectors, tmp_path / "v", allow_mismatch=allowed).panel
    assert panel.record()["rendered_alike"] == {"alike": None, "differences": []}


@pytest.mark.parametrize("answered", ["training", "scored"])
def test_an_answer_on_one_side_alone_is_told(made, answered):
    data = {True: pairs, False: labelled}
    found, _, _ = made(data[answered == "training"](0), data[answered == "scored"](1000))
    (difference,) = found.panel.differences
    sides = {"training": ("training", "the scored"), "scored": ("the scored", "training")}
    there, not_there = sides[answered]
    expected = f"an answer is appended to {there} prompts and not to {not_there} prompts"
    assert difference == expected


def test_a_panel_can_be_made_again_from_what_lies_there(made, tmp_path):
    found, cache, _ = made(pairs(0), labelled(1000))
    vectors = load_vectors(next(tmp_path.glob("run_*")))
    groups = np.arange(60)
    rows, layer = ExampleRows(open_cache(cache.path)), found.best.layer
    at_best = score_layer(rows, layer, vectors.directions[layer])
    again = make_panel(rows, vectors, found.best, found.permutation, groups, at_best, control=True)
    assert again.record() == found.panel.record()


def test_all_is_sorted_and_exists():
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
