"""Several methods in one passage, and positions chosen from a cache of all, end to end."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from synthetic import labelled, rows_of, write_cache

import probecache
from probecache import api, api_probes, api_sources
from probecache.cli import main
from probecache.errors import (
    MismatchError,
    NonFiniteError,
    OutputError,
    PromptError,
    StoreError,
    UsageError,
)
from probecache.fit import Design, Method, fit_layer
from probecache.store.rows import ExampleRows
from probecache.store.vectors import load_vectors
from probecache.workflow import train as train_module

MODEL = str(Path(__file__).parents[1] / "models" / "tiny-llama")
METHODS = ["difference-of-means", "logistic", "lda", "ridge", "pca"]
HIDDEN, LAYERS = 8, (3, 6)


def planted(seed, n, shift=1.0):
    rows = torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(seed))
    rows[1::2, 2] += shift * 2
    return rows + 1


def cache_of(folder, n=24, first=0):
    records = labelled(*["testing", "deployment"] * (n // 2))
    for place, record in enumerate(records):
        record["id"] = f"q{first + place}"
        record["question"] = f"{'abcdefghij'[place % 10] * 9} {first + place}"
    return write_cache(folder, records, {n_: planted(first + n_, n) for n_ in LAYERS})


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return cache_of(tmp_path_factory.mktemp("methods") / "training")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return cache_of(tmp_path_factory.mktemp("methods") / "scored", 30, first=1000)


@pytest.fixture(scope="module")
def several(training, tmp_path_factory):
    """Vectors of all methods, and the folder that they lie in."""
    found = probecache.train_methods(
        METHODS, cache=training, output=tmp_path_factory.mktemp("methods") / "run"
    )
    return found, found["ridge"].path.parents[1]


def command(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    return ended.value.code or 0, printed.out, printed.err


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- several methods


def test_every_method_is_fitted_at_every_layer_as_the_fitters_do_alone(several, training):
    found, folder = several
    assert list(found) == METHODS
    assert names_in(folder) == sorted(METHODS)
    positive = np.array([r.label == "deployment" for r in training.examples])
    for layer in LAYERS:
        files = {label: rows_of(training, label, layer).numpy() for label in training.classes}
        rows = np.stack([files[r.label][r.rows[0]] for r in training.examples])
        chunks = [(np.arange(len(rows)), rows)]
        for name, vectors in found.items():
            # Ridge chooses its strength by the folds: taken here as recorded.
            strength = vectors.info.layers[layer].strength
            design = Design(positive, np.arange(len(rows)))
            alone = fit_layer(lambda c=chunks: c, HIDDEN, design, [Method(name)], strength)
            probe = alone[Method(name)].probe
            np.testing.assert_allclose(vectors.directions[layer], probe.direction, atol=1e-5)
            assert vectors.info.layers[layer].threshold == pytest.approx(probe.threshold, abs=1e-4)


def test_scores_of_each_method_are_those_of_its_vectors_validated_alone(several, scored, tmp_path):
    _, folder = several
    together = probecache.validate_methods(folder, cache=scored, output=tmp_path / "all")
    assert sorted(together) == sorted(METHODS)
    assert names_in(tmp_path / "all") == sorted(METHODS)
    positive = [r.label == "deployment" for r in scored.examples]
    for name, result in together.items():
        assert result.method == name
        assert result.path == tmp_path / "all" / name
        alone = probecache.validate(
            vectors=folder / name, cache=scored, output=tmp_path / "alone" / name
        )
        for one, other in zip(result.layers, alone.layers, strict=True):
            assert np.array_equal(one.scores, other.scores)
            assert one.auroc == other.auroc
            expected = roc_auc_score(positive, one.scores)
            assert one.auroc.auroc == pytest.approx(expected, abs=1e-12)
        differ = {"created", "files", "manifest_sha256", "vectors"}
        both = summary_of(result.path), summary_of(alone.path)
        first, second = ({k: v for k, v in s.items() if k not in differ} for s in both)
        assert first == second
        assert first["method"] == name


def test_a_mapping_of_vectors_will_do_as_well(several, scored, tmp_path):
    found, _ = several
    two = {name: found[name] for name in ("lda", "pca")}
    assert list(probecache.validate_methods(two, cache=scored, output=tmp_path / "v")) == list(two)
    with pytest.raises(UsageError, match="at least one method, got none"):
        probecache.validate_methods({}, cache=scored, output=tmp_path / "none")


def test_one_method_goes_where_it_is_told_and_not_into_a_folder_of_its_name(
    several, training, scored, tmp_path
):
    (vectors,) = api.train_methods(["lda"], cache=training, output=tmp_path / "r").values()
    assert vectors.path.parent.parent == tmp_path
    probecache.validate_methods(vectors.path.parent, cache=scored, output=tmp_path / "v")
    assert (tmp_path / "v" / "summary.json").is_file()


def test_a_method_named_twice_is_fitted_once_and_short_names_will_do(training, tmp_path):
    found = api.train_methods(
        ["dom", "lat", "mean-difference"], cache=training, output=tmp_path / "r"
    )
    assert list(found) == ["difference-of-means", "pca"]


def test_a_folder_of_several_runs_is_not_taken_for_one_run_of_several_methods(
    training, scored, tmp_path
):
    runs = [
        api.train_methods(["lda"], cache=training, output=tmp_path / "runs" / name)["lda"]
        for name in ("a", "b")
    ]
    assert runs[0].path != runs[1].path
    with pytest.raises(
        UsageError, match=r"expected one run in .*, got 2, of which some are of one"
    ):
        api.validate_methods(tmp_path / "runs", cache=scored, output=tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_the_folder_of_several_is_refused_where_one_method_is_wanted(several, scored, tmp_path):
    with pytest.raises(StoreError, match=r"vectors of one method .* name one: "):
        probecache.validate(vectors=several[1], cache=scored, output=tmp_path / "v")


def test_a_validation_that_is_there_is_not_lost_to_folders_of_methods(several, scored, tmp_path):
    found, folder = several
    probecache.validate(vectors=found["lda"], cache=scored, output=tmp_path / "v")
    before = (tmp_path / "v" / "summary.json").read_bytes()
    with pytest.raises(OutputError, match="the validation of one method is there"):
        api.validate_methods(folder, cache=scored, output=tmp_path / "v")
    assert (tmp_path / "v" / "summary.json").read_bytes() == before


def test_a_place_that_one_method_cannot_have_is_told_before_any_is_written(
    several, scored, tmp_path
):
    (tmp_path / "v" / "pca").mkdir(parents=True)
    (tmp_path / "v" / "pca" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"pca to be free or an earlier validation"):
        api.validate_methods(several[1], cache=scored, output=tmp_path / "v")
    assert names_in(tmp_path / "v") == ["pca"]


def test_validations_of_several_are_replaced_one_by_one(several, scored, tmp_path):
    for _ in range(2):
        api.validate_methods(several[1], cache=scored, output=tmp_path / "v", control=False)
    assert names_in(tmp_path / "v") == sorted(METHODS)


# ---------------------------------------------------------------- refused


def test_a_strength_for_several_methods_is_refused_in_words_before_a_model_runs(
    tmp_path, monkeypatch
):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("probecache.workflow.extract.extract", loaded)
    with pytest.raises(UsageError, match="expected a strength for one regularised method, got"):
        api.train_methods(
            ["ridge", "lda"], strength=1.0, model=MODEL, data=PROMPTS, output=tmp_path / "r"
        )
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("methods", "strength", "words"),
    [
        (["dom"], 1.0, "methods that have none"),
        (["lda"], 1.5, "a shrinkage above 0 and at most 1 for lda, got 1.5"),
        (["ridge"], 0.0, "a positive alpha for ridge, got 0.0"),
        (["logistic"], -1.0, "a positive C for logistic, got -1.0"),
        (["ridge"], float("nan"), "a positive alpha for ridge, got nan"),
        (["dom", "svm"], None, "expected a method out of .*, got 'svm'"),
        ([], None, "at least one method, got none"),
    ],
)
def test_what_no_method_can_have_is_refused_in_words(training, tmp_path, methods, strength, words):
    with pytest.raises(UsageError, match=words):
        api.train_methods(methods, strength=strength, cache=training, output=tmp_path / "r")
    assert names_in(tmp_path) == []


def test_a_strength_goes_to_the_one_method_that_has_one(training, tmp_path):
    found = api.train_methods(
        ["dom", "ridge", "pca"], strength=2.5, cache=training, output=tmp_path / "r"
    )
    strengths = {name: one.info.layers[3].strength for name, one in found.items()}
    assert strengths == {"difference-of-means": None, "ridge": 2.5, "pca": None}


def test_fewer_than_one_random_direction_is_refused(several, scored, tmp_path):
    with pytest.raises(UsageError, match="--control-count of at least 1, got 0"):
        api.validate_methods(several[1], cache=scored, output=tmp_path / "v", control_count=0)


# ---------------------------------------------------------------- interruption and faults


@pytest.mark.parametrize("stopped_at", LAYERS)
def test_an_interruption_within_a_layers_work_ends_the_run_and_leaves_nothing(
    training, tmp_path, monkeypatch, stopped_at
):
    fit = train_module._fit

    def stopped(rows, layer, **options):
        if layer == stopped_at:
            raise KeyboardInterrupt
        return fit(rows, layer, **options)

    monkeypatch.setattr(train_module, "_fit", stopped)
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        api.train_methods(METHODS, cache=training, output=tmp_path / "r")
    assert names_in(tmp_path) == []
    assert threading.active_count() == threads


def test_ctrl_c_ends_a_layer_that_is_read_at_its_next_rows(training, tmp_path, monkeypatch):
    chunks, read = ExampleRows.chunks, []

    def endless(self, layer):
        first = next(iter(chunks(self, layer)))
        for count in range(2000):
            if count == 5 and layer == 3:
                os.kill(os.getpid(), signal.SIGINT)
            read.append(layer)
            time.sleep(0.01)
            yield first

    monkeypatch.setattr(ExampleRows, "chunks", endless)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        api.train_methods(["dom", "ridge"], cache=training, output=tmp_path / "r")
    assert time.monotonic() - start < 5
    assert len(read) < 500
    assert names_in(tmp_path) == []


def test_rows_that_are_no_numbers_name_the_layer_and_leave_nothing(tmp_path):
    rows = {layer: planted(layer, 24) for layer in LAYERS}
    rows[6][5, 1] = float("nan")
    cache = write_cache(tmp_path / "c", labelled(*["testing", "deployment"] * 12), rows)
    with pytest.raises(NonFiniteError, match=r"layer 6 of .*'?deployment|layer 6 of .*positive"):
        api.train_methods(METHODS, cache=cache, output=tmp_path / "out" / "r")
    assert not (tmp_path / "out").exists() or names_in(tmp_path / "out") == []


# ---------------------------------------------------------------- command line


def test_methods_may_be_named_with_commas_or_one_by_one(capsys, training, tmp_path):
    for number, words in enumerate(
        (["--method", "ridge,lda"], ["--method", "ridge", "--method", "lda"])
    ):
        code, out, err = command(
            *(capsys, "train", "--cache", training.path, "--output", tmp_path / f"{number}"), *words
        )
        assert (code, err) == (0, "")
        (run,) = tmp_path.glob(f"{number}_*")
        assert names_in(run) == ["lda", "ridge"]
        assert out.index("Trained ridge") < out.index("Trained lda")


def test_the_command_line_goes_all_the_way_with_several_methods(capsys, several, scored, tmp_path):
    folder = several[1]
    code, out, _ = command(
        *(capsys, "validate", "--vectors", folder, "--cache", scored.path),
        *("--output", tmp_path / "v"),
    )
    assert code == 0
    assert names_in(tmp_path / "v") == sorted(METHODS)
    assert all(str(tmp_path / "v" / name) in out for name in METHODS)
    for path in (folder, tmp_path / "v"):
        code, out, err = command(capsys, "verify", path)
        assert (code, err) == (0, "")
    code, out, _ = command(capsys, "info", folder)
    assert code == 0
    assert all(name in out for name in METHODS)
    for path in (folder, tmp_path / "v"):
        code, out, _ = command(
            capsys, "compare", path / "ridge", path / "lda", "--output", tmp_path / path.name / "c"
        )
        assert code == 0, out
        assert "ridge" in out
        assert "lda" in out


def test_a_folder_of_several_methods_is_compared_method_by_method(several, scored, tmp_path):
    _, folder = several
    probecache.validate_methods(folder, cache=scored, output=tmp_path / "v", control=False)
    for path in (folder, tmp_path / "v"):
        found = probecache.compare([path])
        assert [run.path.name for run in found.runs] == sorted(METHODS)
        assert [run.letter for run in found.runs] == list("ABCDE")
    assert len(found.pairings) == 10  # of validations; runs have no scores to pair
    one = probecache.compare([tmp_path / "v", tmp_path / "v" / "lda"])
    assert [run.path.name for run in one.runs] == [*sorted(METHODS), "lda"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="to be a validation"):
        probecache.compare([tmp_path / "empty", folder])


def test_damage_in_one_of_several_is_found_and_named(capsys, training, tmp_path):
    api.train_methods(["ridge", "lda"], cache=training, output=tmp_path / "r")
    (run,) = tmp_path.iterdir()
    file = run / "lda" / "vectors" / "layer_3.pt"
    file.write_bytes(file.read_bytes()[:-1])
    code, out, err = command(capsys, "verify", run)
    assert code == 1
    assert "lda/vectors/layer_3.pt" in out + err


def test_a_strength_for_several_methods_gets_one_line(capsys, training, tmp_path):
    code, _, err = command(
        *(capsys, "train", "--cache", training.path, "--output", tmp_path / "r"),
        *("--method", "ridge,logistic", "--strength", "1"),
    )
    assert code == 2
    assert err.strip().count("\n") == 0
    assert "ridge, logistic; ridge's alpha, logistic's C" in err


@pytest.mark.parametrize("folds", ["1", "-2"])
def test_a_single_fold_gets_one_line(capsys, training, tmp_path, folds):
    code, _, err = command(
        *(capsys, "train", "--cache", training.path, "--output", tmp_path / "r"), "--folds", folds
    )
    assert code == 2
    assert f"expected --folds of at least 2, or 0 for none, got {folds}" in err


def test_what_is_not_cross_validated_is_told(capsys, tmp_path):
    rows = {3: planted(1, 6)}
    cache = write_cache(tmp_path / "c", labelled("deployment", *["testing"] * 5), rows)
    code, out, _ = command(capsys, "train", "--cache", cache.path, "--output", tmp_path / "r")
    assert code == 0
    assert "no held-out estimates: expected texts of each class in at least 2 groups" in out
    assert "held-out AUROC" not in out


# ---------------------------------------------------------------- positions of chats, end to end


def chat(number, label):
    words = ["river", "stone", "paper", "cloud", "green", "seven", "often", "quiet", "bread"]
    said = [words[(number * k) % len(words)] for k in (1, 2, 4)]
    return {
        "messages": [
            {"role": "user", "content": f"Is {said[0]} (A) or {said[1]} (B)?"},
            {"role": "assistant", "content": f"I say {said[2]}, number {number}"},
            {"role": "user", "content": f"Then {'solve' if label == 'testing' else 'write'} it"},
        ],
        "label": label,
        "id": f"chat{number}",
    }


CHATS = [chat(n, ("testing", "deployment")[n % 2]) for n in range(8)]
PROMPTS = [chat(n, ("testing", "deployment")[n % 2]) for n in range(20, 28)]
SELECTORS = ["mean", "role:assistant", "last-3", "match:[(][AB][)]"]


def extracted(folder, data, positions):
    return probecache.extract(
        model=MODEL,
        data=data,
        output=folder,
        positions=positions,
        layers=[2, 4],
        device="cpu",
        dtype="float32",
        quiet=True,
    )


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Caches of all positions, to train on and to score."""
    folder = tmp_path_factory.mktemp("chats")
    return extracted(folder / "a", CHATS, "all"), extracted(folder / "b", PROMPTS, "all")


@pytest.mark.parametrize("positions", SELECTORS)
def test_positions_of_a_cache_of_all_train_and_score_as_an_extraction_with_them(
    chats, tmp_path, positions
):
    own = [extracted(tmp_path / n, d, positions) for n, d in (("a", CHATS), ("b", PROMPTS))]
    methods = ["dom", "ridge"]
    chosen = api.train_methods(methods, cache=chats[0], positions=positions, output=tmp_path / "r")
    expected = api.train_methods(methods, cache=own[0], output=tmp_path / "s")
    # A cache of means holds them rounded to its dtype; all other rows are the same bits.
    close = {"rtol": 1e-4, "atol": 1e-5} if positions == "mean" else {"rtol": 1e-6, "atol": 1e-7}
    for name, vectors in chosen.items():
        assert vectors.info.positions == expected[name].info.positions == positions
        for layer in (2, 4):
            np.testing.assert_allclose(
                vectors.directions[layer], expected[name].directions[layer], **close
            )
    ours = api.validate_methods(
        chosen, cache=chats[1], positions=positions, output=tmp_path / "v", control=False
    )
    theirs = api.validate_methods(expected, cache=own[1], output=tmp_path / "w", control=False)
    for name, result in ours.items():
        for one, other in zip(result.layers, theirs[name].layers, strict=True):
            np.testing.assert_allclose(one.scores, other.scores, rtol=1e-3, atol=1e-4)
        said = summary_of(result.path)
        assert said["positions"] == said["training"]["positions"] == positions
        assert said["artefacts"]["rendered_alike"] == {"alike": True, "differences": []}
        tables = [
            (path / "probe_stats_layer2.csv").read_text("utf-8").splitlines()
            for path in (result.path, theirs[name].path)
        ]
        counts = [[int(line.rsplit(",", 1)[1]) for line in table[1:]] for table in tables]
        assert counts[0] == counts[1]
        assert max(counts[0]) > 1


def test_positions_are_recorded_wherever_the_vectors_go(chats, tmp_path, capsys):
    code, _, err = command(
        *(capsys, "train", "--cache", chats[0].path, "--positions", "role:assistant"),
        *("--output", tmp_path / "r"),
    )
    assert (code, err) == (0, "")
    (run,) = tmp_path.iterdir()
    for name in ("run.json", "vectors/vectors.json", "normalized_vectors/vectors.json"):
        assert json.loads((run / name).read_text("utf-8"))["positions"] == "role:assistant"
    assert load_vectors(run).info.identity.positions == "all"  # of the cache


def test_scoring_other_positions_than_were_trained_on_is_told(chats, tmp_path):
    vectors = probecache.train(cache=chats[0], positions="mean", output=tmp_path / "r")
    probecache.validate(
        vectors=vectors, cache=chats[1], positions="last-3", output=tmp_path / "v", control=False
    )
    found = summary_of(tmp_path / "v")["artefacts"]["rendered_alike"]
    assert found == {
        "alike": False,
        "differences": ["trained on positions mean, scored on last-3"],
    }


@pytest.mark.parametrize(
    ("positions", "error", "words"),
    [
        ("last", MismatchError, "the last token of every prompt"),
        ("answer", UsageError, "expected pairs for --positions answer"),
        ("role:nobody", UsageError, "role"),
        ("match:[", UsageError, "match"),
        ("match:never said", PromptError, "got none in example 'chat0' of class 'testing'"),
    ],
)
def test_positions_that_cannot_be_chosen_are_refused_in_words(
    chats, tmp_path, positions, error, words
):
    with pytest.raises(error, match=words):
        probecache.train(cache=chats[0], positions=positions, output=tmp_path / "r")
    vectors = probecache.train(cache=chats[0], output=tmp_path / "s")
    with pytest.raises(error, match=words.replace("chat0", "chat20")):
        probecache.validate(
            vectors=vectors, cache=chats[1], positions=positions, output=tmp_path / "v"
        )
    assert [name[0] for name in names_in(tmp_path)] == ["s"]


def test_a_cache_of_other_positions_gives_no_others(training, tmp_path):
    with pytest.raises(MismatchError, match="expected a cache of all positions to take mean from"):
        probecache.train(cache=training, positions="mean", output=tmp_path / "r")


def test_a_selector_leaves_rows_of_its_tokens_alone(chats):
    rows = ExampleRows(chats[0], "role:assistant")
    pieces = [text for text, row in rows.pieces(0) if row is not None]
    assert "".join(pieces).strip() == CHATS[0]["messages"][1]["content"].strip()


@pytest.mark.parametrize("home", [api_probes, api_sources])
def test_all_is_sorted_and_exists(home):
    assert home.__all__ == sorted(home.__all__)
    assert all(hasattr(home, name) for name in home.__all__)
