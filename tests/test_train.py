"""Runs trained from planted caches: compared with means over files that plain torch reads."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from synthetic import labelled, rows_of, train, write_cache

from probecache.errors import (
    EmptyClassError,
    FitError,
    LayerNotCachedError,
    NonFiniteError,
    OutputError,
    UsageError,
)
from probecache.store import reader
from probecache.store.vectors import load_vectors

HIDDEN = 16
RECORDS = labelled("testing", "deployment", "deployment", "testing", "deployment", "testing")
LAYERS = (0, 7, 12)


def planted(layer, count=6, hidden=HIDDEN, dtype="float32"):
    made = torch.Generator().manual_seed(layer)
    return (torch.randn(count, hidden, generator=made) * 3 + 1).to(getattr(torch, dtype))


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "cache", RECORDS, {layer: planted(layer) for layer in LAYERS})


def loaded(folder, layer):
    """A saved vector as anyone reads it who has torch alone."""
    return torch.load(folder / f"layer_{layer}.pt", weights_only=True)


def manifest_of(folder):
    return json.loads((folder / "vectors.json").read_text(encoding="utf-8"))


def means_of(cache, positive, others, layer):
    """Means in float64 of one class and of all rows of the others."""
    rest = torch.cat([rows_of(cache, label, layer) for label in others])
    return rows_of(cache, positive, layer).double().mean(0), rest.double().mean(0)


def assert_vectors_are(run, layer, mean_positive, mean_negative):
    raw = mean_positive - mean_negative
    unit = raw / raw.norm()
    midpoint = (mean_positive + mean_negative) / 2
    torch.testing.assert_close(loaded(run / "vectors", layer).double(), raw, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        loaded(run / "normalized_vectors", layer).double(), unit, rtol=1e-6, atol=1e-7
    )
    for name, direction in (("vectors", raw), ("normalized_vectors", unit)):
        record = manifest_of(run / name)["layers"][str(layer)]
        assert record["raw_norm"] == pytest.approx(raw.norm().item(), rel=1e-9)
        assert record["threshold"] == pytest.approx((midpoint @ direction).item(), rel=1e-6)


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_vectors_equal_means_over_the_files_that_plain_torch_reads(tmp_path, dtype):
    activations = {layer: planted(layer, dtype=dtype) for layer in LAYERS}
    cache = write_cache(tmp_path / "cache", RECORDS, activations)
    run = train(cache, tmp_path / "run").path.parent
    for layer in LAYERS:
        assert_vectors_are(run, layer, *means_of(cache, "deployment", ["testing"], layer))


def test_every_token_of_a_cache_of_all_positions_counts_once(tmp_path):
    tokens = [2, 5, 1, 3, 1, 4]
    cache = write_cache(
        tmp_path / "cache", RECORDS, {7: planted(7, sum(tokens))}, tokens=tokens, positions="all"
    )
    run = train(cache, tmp_path / "run").path.parent
    assert_vectors_are(run, 7, *means_of(cache, "deployment", ["testing"], 7))
    record = manifest_of(run / "vectors")["layers"]["7"]
    assert (record["n_positive"], record["n_negative"]) == (5 + 1 + 1, 2 + 3 + 4)


def test_a_cache_read_in_many_chunks_gives_the_same_vectors(cache, tmp_path, monkeypatch):
    whole = train(cache, tmp_path / "whole").path.parent
    monkeypatch.setattr(reader, "_CHUNK_BYTES", 4 * HIDDEN)
    assert len(list(cache.chunks("testing", 7))) == 3
    chunked = train(cache, tmp_path / "chunked").path.parent
    for layer in LAYERS:
        one, other = (loaded(run / "vectors", layer) for run in (whole, chunked))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_higher_score_means_deployment_unless_another_class_is_named(cache, tmp_path):
    usual = train(cache, tmp_path / "usual")
    assert usual.info.positive_class == "deployment"
    assert usual.info.negative_class == "testing"
    other = train(cache, tmp_path / "other", positive_class="testing")
    assert other.info.positive_class == "testing"
    assert other.info.negative_class == "deployment"
    for layer in LAYERS:
        deployed, tested = (
            rows_of(cache, label, layer) @ usual[layer] for label in ("deployment", "testing")
        )
        assert deployed.mean() > usual.info.layers[layer].threshold > tested.mean()
        assert torch.equal(other[layer], -usual[layer])
        assert other.info.layers[layer].threshold == -usual.info.layers[layer].threshold


@pytest.mark.parametrize("positive", ["testing", "deployment", "chat/day"])
def test_of_three_classes_one_stands_against_all_rows_of_the_others(tmp_path, positive):
    labels = ["testing", "deployment", "chat/day", "chat/day", "testing", "chat/day", "chat/day"]
    cache = write_cache(tmp_path / "cache", labelled(*labels), {7: planted(7, 7)})
    others = [label for label in ("testing", "deployment", "chat/day") if label != positive]
    vectors = train(cache, tmp_path / "run", positive_class=positive)
    assert_vectors_are(vectors.path.parent, 7, *means_of(cache, positive, others, 7))
    assert vectors.info.negative_class == " + ".join(others)
    assert vectors.info.layers[7].n_positive == labels.count(positive)
    assert vectors.info.layers[7].n_negative == 7 - labels.count(positive)


# ---------------------------------------------------------------- the files


def test_a_run_holds_these_files_and_no_others(cache, tmp_path):
    run = train(cache, tmp_path / "out" / "run").path.parent
    assert re.fullmatch(r"run_\d{8}_\d{6}", run.name)
    assert run.parent == tmp_path / "out"
    names = {"vectors.json", *(f"layer_{layer}.pt" for layer in LAYERS)}
    expected = {f"{kind}/{name}" for kind in ("vectors", "normalized_vectors") for name in names}
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert found == expected | {"run.json"}
    assert list(run.parent.iterdir()) == [run]


def test_vectors_are_float32_and_of_unit_norm_in_the_normalised_folder(cache, tmp_path):
    run = train(cache, tmp_path / "run").path.parent
    for layer in LAYERS:
        raw, unit = (loaded(run / name, layer) for name in ("vectors", "normalized_vectors"))
        assert raw.dtype == unit.dtype == torch.float32
        assert raw.shape == unit.shape == (HIDDEN,)
        assert unit.double().norm().item() == pytest.approx(1, abs=1e-6)
        assert raw.double().norm().item() != pytest.approx(1, abs=0.1)
        torch.testing.assert_close(raw / raw.norm(), unit, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["vectors", "normalized_vectors"])
def test_each_folder_says_what_its_vectors_mean_and_where_they_come_from(cache, tmp_path, name):
    run = train(cache, tmp_path / "run").path.parent
    manifest = manifest_of(run / name)
    layer_info = (cache.path / "layer_info.json").read_bytes()
    assert manifest["format"] == "probecache-vectors"
    assert manifest["method"] == "difference-of-means"
    assert manifest["normalized"] == (name == "normalized_vectors")
    assert (manifest["positive_class"], manifest["negative_class"]) == ("deployment", "testing")
    assert "residual stream after L blocks" in manifest["layer_convention"]
    assert manifest["hidden_size"] == HIDDEN
    assert manifest["layers_without_direction"] == []
    assert manifest["source_cache"] == str(cache.path)
    assert manifest["source_cache_sha256"] == hashlib.sha256(layer_info).hexdigest()
    assert manifest["identity"] == json.loads(layer_info)["identity"]
    assert list(manifest["layers"]) == ["0", "7", "12"]


@pytest.mark.parametrize("name", ["vectors", "normalized_vectors"])
def test_each_layer_is_recorded_with_its_norms_rows_and_file(cache, tmp_path, name):
    run = train(cache, tmp_path / "run").path.parent
    for layer in LAYERS:
        record = manifest_of(run / name)["layers"][str(layer)]
        content = (run / name / f"layer_{layer}.pt").read_bytes()
        assert record["file"]["sha256"] == hashlib.sha256(content).hexdigest()
        assert record["file"]["bytes"] == len(content)
        both = torch.cat([rows_of(cache, label, layer) for label in cache.classes])
        norms = both.double().norm(dim=1).numpy()
        assert record["typical_norm"] == pytest.approx(np.median(norms), rel=1e-9)
        assert (record["n_positive"], record["n_negative"]) == (3, 3)


def test_the_runs_own_file_says_the_same_of_the_whole(cache, tmp_path):
    run = train(cache, tmp_path / "run", source="(not kept)").path.parent
    whole = json.loads((run / "run.json").read_text(encoding="utf-8"))
    manifest = manifest_of(run / "normalized_vectors")
    assert whole.pop("format") == "probecache-run"
    assert whole["source_cache"] == "(not kept)"
    whole.pop("manifest_sha256")
    for name, record in whole.pop("files").items():
        content = (run / name).read_bytes()
        assert record == {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert whole == {name: manifest[name] for name in whole}
    assert {"method", "positive_class", "layers", "identity", "source_cache_sha256"} <= set(whole)


def test_the_same_cache_gives_the_same_bytes(cache, tmp_path):
    one, two = (train(cache, tmp_path / name).path.parent for name in ("one", "two"))
    for path in (p for p in one.rglob("*") if p.is_file()):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path.name


def test_what_is_returned_are_the_runs_normalised_vectors(cache, tmp_path):
    vectors = train(cache, tmp_path / "run", layers=[12, 0])
    assert vectors.path.name == "normalized_vectors"
    assert vectors.layers == (0, 12)
    for layer in vectors.layers:
        assert torch.equal(vectors[layer], loaded(vectors.path, layer))


@pytest.mark.parametrize("name", ["vectors", "normalized_vectors"])
def test_a_copied_folder_still_loads_and_means_the_same(cache, tmp_path, name):
    run = train(cache, tmp_path / "run").path.parent
    kept = {layer: loaded(run / name, layer) for layer in LAYERS}
    copy = shutil.copytree(run / name, tmp_path / "elsewhere" / "under another name")
    shutil.rmtree(run)
    shutil.rmtree(cache.path)
    found = load_vectors(copy)
    assert found.layers == LAYERS
    assert found.info.positive_class == "deployment"
    assert found.info.normalized == (name == "normalized_vectors")
    assert all(torch.equal(found[layer], kept[layer]) for layer in LAYERS)


# ---------------------------------------------------------------- what it refuses


@pytest.fixture
def empty(tmp_path):
    """A folder that must still be empty after a run that failed."""
    folder = tmp_path / "runs"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def test_a_class_that_the_cache_lacks_is_refused_with_those_it_has(cache, empty):
    with pytest.raises(EmptyClassError) as caught:
        train(cache, empty / "run", positive_class="deploy")
    message = str(caught.value)
    assert "positive class 'deploy'" in message
    assert str(cache.path) in message
    assert "the classes testing, deployment" in message
    assert "--positive-class" in message


def test_a_layer_that_is_not_cached_is_refused_with_those_that_are(cache, empty):
    with pytest.raises(LayerNotCachedError, match=r"Layer 9 not found .* are 0, 7, 12"):
        train(cache, empty / "run", layers=[7, 9])


def test_no_layers_are_refused(cache, empty):
    with pytest.raises(UsageError, match="at least one layer"):
        train(cache, empty / "run", layers=[])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("place", "side", "row"), [(4, "positive", 2), (3, "negative", 1)])
def test_a_number_that_is_none_stops_the_run_and_names_layer_cache_and_row(
    tmp_path, empty, bad, place, side, row
):
    broken = planted(12)
    broken[place, 5] = bad
    cache = write_cache(tmp_path / "cache", RECORDS, {7: planted(7), 12: broken})
    with pytest.raises(NonFiniteError) as caught:
        train(cache, empty / "run")
    message = str(caught.value)
    assert f"layer 12 of {cache.path}" in message
    assert f"NaN or Inf in row {row} of the {side} class" in message
    train(cache, tmp_path / "without", layers=[7])


def without_direction(layer):
    """Rows whose classes have exactly the same mean."""
    return planted(layer)[:1].repeat(6, 1)


def test_a_layer_without_direction_is_left_out_and_recorded(tmp_path):
    activations = {0: without_direction(0), 7: planted(7)}
    cache = write_cache(tmp_path / "cache", RECORDS, activations)
    run = train(cache, tmp_path / "run").path.parent
    for name in ("vectors", "normalized_vectors"):
        assert manifest_of(run / name)["layers_without_direction"] == [0]
        assert not (run / name / "layer_0.pt").exists()
    assert load_vectors(run).layers == (7,)


@pytest.mark.parametrize("layers", [[0], [0, 7]])
def test_a_layer_without_direction_is_refused_where_it_was_asked_for(tmp_path, empty, layers):
    activations = {0: without_direction(0), 7: planted(7)}
    cache = write_cache(tmp_path / "cache", RECORDS, activations)
    with pytest.raises(FitError, match=r"layer 0 of .*means to differ"):
        train(cache, empty / "run", layers=layers)


def test_a_cache_without_any_direction_is_refused(tmp_path, empty):
    cache = write_cache(tmp_path / "c", RECORDS, {n: without_direction(n) for n in (0, 7)})
    with pytest.raises(FitError, match=r"layer 7 of .*means to differ"):
        train(cache, empty / "run")


def test_a_run_that_is_interrupted_leaves_nothing(cache, empty, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("probecache.store.vectors.flush_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(cache, empty / "run")


def test_a_place_that_cannot_be_written_is_refused(cache, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="another --output"):
        train(cache, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_runs_that_end_in_one_second_get_a_name_each(cache, tmp_path):
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda _: train(cache, tmp_path / "run").path.parent, range(4)))
    assert len(set(runs)) == 4
    assert sorted(runs) == sorted(tmp_path.glob("run_*"))
