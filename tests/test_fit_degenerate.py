"""Rows that are alike, dimensions that are constant in a fold, examples that come in groups."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from synthetic import labelled, write_cache

from probecache import api
from probecache.controls import first_token_caution, length_auroc
from probecache.errors import OutputError, StoreError
from probecache.fit import Design, Method, fit_layer
from probecache.store.verify import verify


def chunks_of(rows):
    return lambda: [(np.arange(len(rows)), rows)]


@pytest.mark.parametrize("seed", range(4))
def test_dimensions_that_are_constant_in_a_training_fold_are_scaled_as_scikit_learn_does(seed):
    rng = np.random.default_rng(seed)
    rows = np.where(rng.random((60, 80)) < 0.04, rng.normal(5, 1, (60, 80)), 0.1)
    rows = rows.astype(np.float32)
    positive, folds = np.arange(60) % 2 == 0, np.arange(60) // 2 % 5
    assert any((np.ptp(rows[folds != f], axis=0) == 0).any() for f in range(5))
    design = Design(positive, np.arange(60), folds)
    fit = fit_layer(chunks_of(rows), 80, design, (Method.RIDGE,), 10.0, standardize=True)
    for fold in range(5):
        train, test = rows[folds != fold].astype(float), rows[folds == fold].astype(float)
        scaler = StandardScaler().fit(train)
        ridge = Ridge(10.0).fit(scaler.transform(train), np.where(positive[folds != fold], 1, -1))
        expected = ridge.predict(scaler.transform(test))
        norm = np.linalg.norm(ridge.coef_ / scaler.scale_)
        found = fit[Method.RIDGE].held_out[folds == fold] * norm
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", list(Method))
def test_classes_whose_rows_are_all_alike_are_told_apart_the_right_way_round(method):
    rng = np.random.default_rng(0)
    ends = rng.standard_normal((2, 64)).astype(np.float32) * 30 + 100
    positive = np.arange(60) % 2 == 0
    rows = ends[positive.astype(int)]
    design = Design(positive, np.arange(60), np.arange(60) // 2 % 5)
    fit = fit_layer(chunks_of(rows), 64, design, (method,))[method]
    apart = (ends[1] - ends[0]).astype(float)
    assert fit.probe.direction @ apart / np.linalg.norm(apart) > 0.999
    assert (fit.held_out[positive] > fit.held_out[~positive].max()).all()


def test_rates_at_few_false_alarms_are_not_said_of_few_groups(tmp_path):
    rng = np.random.default_rng(1)
    labels = ["testing", "deployment"] * 300
    records = [
        {**record, "group": f"g{place // 60}"} for place, record in enumerate(labelled(*labels))
    ]
    shift = np.where(np.arange(600) % 2 == 1, 1.0, -1.0)[:, None] * np.eye(16)[0]

    rows = torch.from_numpy((rng.standard_normal((600, 16)) + shift).astype(np.float32))
    cache = write_cache(tmp_path / "c", records, {4: rows})
    vectors = api.train(cache=cache, output=tmp_path / "run")
    found = api.validate(vectors=vectors, cache=cache, output=tmp_path / "v")
    assert found.groups_by_class == (10, 10)
    assert found.best.tpr[0.01] is None
    assert any("Only 10 negative examples" in one for one in found.warnings)


def test_the_length_of_rephrasings_counts_once_for_each_group():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(40), 10)
    lengths = np.repeat(rng.integers(10, 50, 40), 10) + rng.integers(0, 3, 400)
    positive = groups % 2 == 0
    single, grouped = length_auroc(lengths, positive), length_auroc(lengths, positive, groups)
    assert grouped.auroc == single.auroc
    assert grouped.high - grouped.low > 1.5 * (single.high - single.low)


def test_tokens_that_are_all_alike_raise_no_caution_where_lengths_differ():
    counts = np.array([1] * 20 + [13] * 60)
    even = np.mean(1.0 / counts**2) / np.mean(1.0 / counts)
    assert even > 0.5
    assert first_token_caution(even, counts) is None
    assert first_token_caution(0.9, np.full(50, 10)) is not None


def test_letters_that_give_the_training_answers_away_are_told(tmp_path):

    rng = np.random.default_rng(3)
    words = [" ".join(rng.choice([f"w{n}" for n in range(200)], 12)) for _ in range(40)]
    pairs = [
        {"question": text, "positive": "the one (A)", "negative": "the one (B)"} for text in words
    ]
    rows = torch.from_numpy(rng.standard_normal((80, 8)).astype(np.float32))
    cache = write_cache(tmp_path / "c", pairs, {3: rows})
    notes = api.train(cache=cache, output=tmp_path / "run").info.notes
    assert any("answer letter alone has AUROC 1.000" in note for note in notes)


@pytest.fixture
def several(tmp_path):

    rows = torch.from_numpy(np.random.default_rng(4).standard_normal((40, 8)).astype(np.float32))
    cache = write_cache(tmp_path / "c", labelled(*["testing", "deployment"] * 20), {3: rows})
    vectors = api.train_methods(["lda", "pca"], cache=cache, output=tmp_path / "run")
    return cache, vectors, vectors["lda"].path.parent.parent


def test_a_method_that_lost_its_manifest_is_damage_and_not_overlooked(several):
    cache, _, run = several
    assert verify(run).whole
    (run / "lda" / "run.json").unlink()
    assert [damage.file for damage in verify(run).damages] == ["lda"]
    with pytest.raises(StoreError, match=r"expected runs alone in .*, got lda beside pca"):
        api.validate_methods(run, cache=cache, output=run.parent / "v")


def test_validations_of_two_runs_do_not_mix_in_one_folder(several):
    cache, vectors, run = several
    api.validate_methods(run, cache=cache, output=run.parent / "v")
    others = api.train_methods(["dom", "lda"], cache=cache, output=run.parent / "other")
    with pytest.raises(OutputError, match="got pca there too"):
        api.validate_methods(others, cache=cache, output=run.parent / "v")
    api.validate_methods(vectors, cache=cache, output=run.parent / "v")
