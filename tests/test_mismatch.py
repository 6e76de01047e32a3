"""A cache is never reused, extended or scored across a difference that nobody allowed.

One thing at a time is changed in a real model, its tokenizer, the data or the options; what cannot
be changed here (another release of a library, another convention) is changed in the manifest. Each
is refused under its own name, and nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from families import FAMILIES, RECORDS, Family, build, full_model
from safetensors.torch import load_file, save_file
from synthetic import labelled, write_cache
from transformers import AutoTokenizer

import probecache
from probecache.content import config_content
from probecache.errors import Interrupted, MismatchError, ModelError
from probecache.identity import EXTENDING, SCORING

# Matrices larger than the samples that are taken of them: 512 KB and more.
LARGE = Family(
    "large",
    "LlamaConfig",
    FAMILIES["llama"].settings
    | {"hidden_size": 128, "intermediate_size": 1024, "head_dim": 32, "num_hidden_layers": 3},
)
ENGINES = ["resident", "stream"]
TESTED = "model.layers.0.mlp.up_proj.weight"
TASK = {"data": RECORDS, "layers": [1], "positions": "last", "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build(LARGE, tmp_path_factory.mktemp("model"), chat=True)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(full_model(LARGE, model), peft.LoraConfig(**options))
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder


def extracted(model, output, **options):
    return probecache.extract(model=str(model), output=output, quiet=True, **{**TASK, **options})


def planned(model, output, **options):
    return probecache.plan_extraction(model=str(model), output=output, **{**TASK, **options})


def content_of(folder):
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def place_of(file, tensor):
    """Where a tensor's bytes lie in a safetensors file: [start, stop)."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        start, stop = json.loads(opened.read(length))[tensor]["data_offsets"]
    return 8 + length + start, 8 + length + stop


def change_one_weight(folder, tensor=TESTED):
    """Change one byte of a matrix, in the file, between two of the eight samples of 4 KB."""
    file = folder / "model.safetensors"
    start, stop = place_of(file, tensor)
    size = stop - start
    assert size >= 1 << 19
    step = (size - 4096) // 7
    place = 3 * step + 4096 + (step - 4096) // 2
    assert all(not number * step <= place < number * step + 4096 for number in range(8))
    with file.open("r+b") as opened:
        opened.seek(start + place)
        before = opened.read(1)
        opened.seek(start + place)
        opened.write(bytes([before[0] ^ 1]))


def edit(path, change):
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def change_template(folder, more="{# other #}"):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = more + tokenizer.chat_template
    tokenizer.save_pretrained(folder)


def change_vocabulary(folder):
    """Swap two tokens that no prompt has."""
    path = folder / "tokenizer.json"

    def swap(settings):
        vocabulary = settings["model"]["vocab"]
        one, other = list(vocabulary)[-1], list(vocabulary)[-2]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    edit(path, swap)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]}


class Change(NamedTuple):
    """One thing that differs.

    Attributes:
        model: changes a copy of the model's folder.
        options: of the second extraction.
        manifest: changes the identity that is written in the first cache.
    """

    model: Any = None
    options: dict[str, Any] | None = None
    manifest: dict[str, Any] | None = None


CHANGES = {
    "weights": Change(model=change_one_weight),
    "config": Change(
        model=lambda folder: edit(
            folder / "config.json",
            lambda config: config["rope_parameters"].update(rope_theta=500.0),
        )
    ),
    "dtype": Change(options={"dtype": "bfloat16"}),
    "adapter": Change(options={"adapter": "the adapter"}),
    "tokenizer": Change(model=change_vocabulary),
    "chat_template": Change(model=change_template),
    "system_prompt": Change(options={"system_prompt": "Be brief."}),
    "data": Change(options={"data": [{**RECORDS[0], "id": "another"}, *RECORDS[1:]]}),
    "token_ids": Change(options={"data": [{**RECORDS[0], "text": "another"}, *RECORDS[1:]]}),
    "positions": Change(options={"positions": "mean"}),
    "special_tokens_kept": Change(options={"keep_special_tokens": True}),
    "attention": Change(
        model=lambda folder: edit(
            folder / "config.json", lambda config: config.update(attn_implementation="eager")
        )
    ),
    "quantization": Change(manifest={"quantization": json.dumps(FP8)}),
    "template_date": Change(manifest={"template_date": "2026-01-31"}),
    "versions": Change(manifest={"versions": {"torch": "2.0", "transformers": "5.0"}}),
    "layer_convention": Change(manifest={"layer_convention": "layer L = before block L"}),
    "architecture": Change(manifest={"architecture": "mistral"}),
    "num_hidden_layers": Change(manifest={"num_hidden_layers": 4}),
    "hidden_size": Change(manifest={"hidden_size": 64}),
}
CANNOT = {"hidden_size", "num_hidden_layers", "dtype", "data", "token_ids", "positions"}
CANNOT |= {"layer_convention"}


def test_every_field_of_the_identity_is_changed_here():
    assert set(CHANGES) == set(EXTENDING)


def other_model(change, model, tmp_path):
    if change.model is None:
        return model
    copy = shutil.copytree(model, tmp_path / "other")
    change.model(copy)
    return copy


def rewritten(cache, change):
    """The cache as if its identity had been another."""
    if change.manifest:
        path = cache.path / "layer_info.json"
        edit(path, lambda info: info["identity"].update(change.manifest))
    return probecache.open_cache(cache.path)


def options_of(change, adapter):
    options = dict(change.options or {})
    return options | ({"adapter": str(adapter)} if "adapter" in options else {})


# A changed block plays no part in the layers below it.
WAYS = [
    pytest.param(name, layers, id=f"{name}-{way}")
    for name in CHANGES
    for way, layers in {"reused": [1], "deeper": [2], "shallower": [0]}.items()
    if (name, way) != ("weights", "shallower")
]


@pytest.mark.parametrize(("name", "layers"), WAYS)
def test_a_cache_is_neither_reused_nor_extended(model, adapter, tmp_path, name, layers):
    change = CHANGES[name]
    cache = rewritten(extracted(model, tmp_path / "cache"), change)
    other, options = other_model(change, model, tmp_path), options_of(change, adapter)
    before = content_of(cache.path)
    with pytest.raises(MismatchError, match=rf"\b{name}: expected .*, got .*; ask for") as caught:
        extracted(other, cache.path, layers=layers, **options)
    assert "\n" not in str(caught.value)
    assert (f"{name} cannot be allowed: " in str(caught.value)) == (name in CANNOT)
    if name != "weights":  # of which a plan looks at nothing but names and shapes
        with pytest.raises(MismatchError, match=rf"\b{name}: expected .*, got .*; ask for"):
            planned(other, cache.path, layers=layers, **options)
    assert content_of(cache.path) == before

    task = {"layers": layers, "allow_mismatch": [name], **options}
    # Another system prompt makes other tokens, and those are never allowed.
    cannot = "token_ids" if name == "system_prompt" else name
    if cannot in CANNOT:
        with pytest.raises(MismatchError, match=f"{cannot} cannot be allowed: "):
            extracted(other, cache.path, **task)
        assert content_of(cache.path) == before
        return
    assert planned(other, cache.path, **task).cached_layers == (1,)
    grown = extracted(other, cache.path, **task)
    if layers == [1]:
        assert content_of(cache.path) == before
        return
    assert grown.layers == tuple(sorted({1, *layers}))
    assert [line.split(":")[0] for line in grown.info.origin.allowed_mismatch] == [name]
    if name != "weights":
        assert getattr(grown.identity, name) == getattr(cache.identity, name)


@pytest.mark.parametrize("name", sorted(set(CHANGES) & set(SCORING)))
def test_vectors_score_no_cache_that_differs(model, adapter, tmp_path, name):
    change = CHANGES[name]
    vectors = probecache.train(cache=extracted(model, tmp_path / "cache"), output=tmp_path / "run")
    other = other_model(change, model, tmp_path)
    scored = extracted(other, tmp_path / "scored", **options_of(change, adapter))
    scored = rewritten(scored, change)
    before = sorted(tmp_path.iterdir())
    task = {"cache": scored, "vectors": vectors, "output": tmp_path / "validation"}
    with pytest.raises(MismatchError) as caught:
        probecache.validate(**task)
    assert f"{name}: expected " in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
    if name == "hidden_size":
        with pytest.raises(MismatchError, match="hidden_size cannot be allowed"):
            probecache.validate(**task, allow_mismatch=[name])
        return
    assert f"--allow-mismatch {name}" in str(caught.value)
    result = probecache.validate(**task, allow_mismatch=[name])
    assert any(f"Scored across a difference in {name}: " in line for line in result.warnings)


@pytest.mark.parametrize(
    "name", ["weights", "config", "chat_template", "attention", "tokenizer", "adapter"]
)
def test_vectors_score_no_model_that_differs(model, adapter, tmp_path, name):
    change = CHANGES[name]
    vectors = probecache.train(cache=extracted(model, tmp_path / "cache"), output=tmp_path / "run")
    other = other_model(change, model, tmp_path)
    before = sorted(tmp_path.iterdir())
    task = {"model": str(other), "data": RECORDS, "vectors": vectors, "positions": "last"}
    task |= {"output": tmp_path / "validation", "quiet": True, "device": "cpu"}
    task |= options_of(change, adapter)
    with pytest.raises(MismatchError, match=f"{name}: expected "):
        probecache.validate(**task)
    assert sorted(tmp_path.iterdir()) == before
    assert probecache.validate(**task, allow_mismatch=[name]).path == tmp_path / "validation"


def test_one_cache_may_train_and_another_be_scored(model, tmp_path):
    trained = extracted(model, tmp_path / "cache", positions="last")
    scored = extracted(model, tmp_path / "other", positions="all", data=RECORDS[1:])
    vectors = probecache.train(cache=trained, output=tmp_path / "run")
    result = probecache.validate(cache=scored, vectors=vectors, output=tmp_path / "validation")
    assert not any("difference" in warning for warning in result.warnings)
    assert vectors.info.identity == trained.identity


def test_what_was_allowed_goes_into_what_is_trained_and_is_told(model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    change_one_weight(other)
    cache = extracted(model, tmp_path / "cache")
    grown = extracted(other, cache.path, layers=[2], allow_mismatch="weights")
    [line] = grown.info.origin.allowed_mismatch
    assert line.startswith("weights: expected {1: content ")
    vectors = probecache.train(cache=grown, output=tmp_path / "run")
    assert vectors.info.allowed_mismatch == [line]
    from probecache.store.describe import describe

    for path in (grown.path, vectors.path):
        assert any(words.startswith("made across") and line in words for words in describe(path))
    # Each layer's weights are those that made it: neither model is now that of the whole cache.
    for folder in (model, other):
        with pytest.raises(MismatchError, match="weights: expected"):
            extracted(folder, grown.path, layers=[1, 2])


# ---------------------------------------------------------------- weights, by content


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("positions", ["last", "all"])
def test_one_byte_in_a_cached_block_is_found_when_the_block_is_read(
    model, tmp_path, engine, positions
):
    """Also where the added layer lies below the cached one."""
    options = {"positions": positions, "engine": engine}
    cache = extracted(model, tmp_path / "cache", layers=[3], **options)
    other = shutil.copytree(model, tmp_path / "other")
    change_one_weight(other)
    before = content_of(cache.path)
    with pytest.raises(MismatchError, match=r"weights: expected \{1: content .*got \{1: content"):
        extracted(other, cache.path, layers=[1], **options)
    assert content_of(cache.path) == before


def test_a_layer_below_the_changed_block_may_still_be_added(model, tmp_path):
    cache = extracted(model, tmp_path / "cache", layers=[1])
    other = shutil.copytree(model, tmp_path / "other")
    change_one_weight(other, "model.layers.2.mlp.up_proj.weight")
    assert extracted(other, cache.path, layers=[0, 2]).layers == (0, 1, 2)
    with pytest.raises(MismatchError, match="weights"):
        extracted(other, extracted(model, tmp_path / "deep", layers=[3]).path, layers=[3])


WHOLE = {"positions": "all", "keep_special_tokens": True, "chat_template": False}


@pytest.mark.parametrize("engine", ENGINES)
def test_going_on_from_a_cached_layer_gives_the_names_of_one_run(model, tmp_path, engine):
    once = extracted(model, tmp_path / "once", layers=[1, 3], **WHOLE)
    options = {"engine": engine, **WHOLE}
    extracted(model, tmp_path / "grown", layers=[1], **options)
    grown = extracted(model, tmp_path / "grown", layers=[3], **options)
    assert grown.identity.weights == once.identity.weights
    assert sorted(grown.identity.weights) == [0, 1, 2, 3]


@pytest.mark.parametrize("way", ["moved", "renamed", "sharded", "hub"])
def test_the_same_weights_elsewhere_are_the_same(model, tmp_path, way):
    cache = extracted(model, tmp_path / "cache")
    other = tmp_path / ("model renamed" if way == "renamed" else "x/y/model")
    if way == "sharded":
        build(LARGE, other, chat=True, shard="300KB")
        assert len(list(other.glob("*.safetensors"))) > 3
    elif way == "hub":
        blobs, other = tmp_path / "blobs", tmp_path / "snapshots" / ("a" * 40)
        shutil.copytree(model, blobs)
        other.mkdir(parents=True)
        for file in blobs.iterdir():
            (other / file.name).symlink_to(file)
    else:
        shutil.copytree(model, other)
    before = content_of(cache.path)
    again = extracted(other, cache.path)
    assert content_of(cache.path) == before
    assert extracted(other, tmp_path / "own").identity.weights == again.identity.weights
    assert extracted(other, cache.path, layers=[2]).layers == (1, 2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cached", [1, 3])
def test_layers_that_are_found_are_checked_although_others_are_run(model, tmp_path, engine, cached):
    """Beside a run that goes on from them, or that ends below them."""
    options = {"engine": engine, **WHOLE}
    cache = extracted(model, tmp_path / "cache", layers=[cached], **options)
    other = shutil.copytree(model, tmp_path / "other")
    change_one_weight(other, f"model.layers.{cached - 1}.mlp.up_proj.weight")
    before = content_of(cache.path)
    with pytest.raises(MismatchError, match="weights: expected"):
        extracted(other, cache.path, layers=[2, cached], **options)
    assert content_of(cache.path) == before
    assert extracted(model, cache.path, layers=[2, cached], **options).layers == (
        *sorted({2, cached}),
    )


def test_a_streamed_run_does_not_go_on_with_other_weights_than_it_was_stopped_with(
    model, tmp_path, monkeypatch
):
    from probecache.models import ModelSource

    folder = shutil.copytree(model, tmp_path / "model")
    options = {"layers": [1, 2, 3], "positions": "all", "engine": "stream"}
    build_block = ModelSource.build_block

    def stopped(self, index, weights):
        if index == 2:
            raise KeyboardInterrupt
        return build_block(self, index, weights)

    with monkeypatch.context() as patched:
        patched.setattr(ModelSource, "build_block", stopped)
        # Of three layers two were computed; a part of the second may still be on its way.
        with pytest.raises(Interrupted, match=r"stopped with ([345]\d|6[0-6])\.\d% of the rows"):
            extracted(folder, tmp_path / "cache", **options)
    change_one_weight(folder)
    with pytest.raises(MismatchError, match=r"weights: expected \{1: content .*got \{1: content"):
        extracted(folder, tmp_path / "cache", **options)
    assert not (tmp_path / "cache" / "layer_info.json").exists()
    change_one_weight(folder)  # back again
    assert extracted(folder, tmp_path / "cache", **options).layers == (1, 2, 3)


def test_a_config_that_differs_is_shown_setting_by_setting(model, tmp_path):
    cache = extracted(model, tmp_path / "cache")
    other = other_model(CHANGES["config"], model, tmp_path)
    with pytest.raises(MismatchError) as caught:
        extracted(other, cache.path, layers=[2])
    assert (
        "config: expected {rope_parameters.rope_theta: 10000.0}, "
        "got {rope_parameters.rope_theta: 500.0} (model"
    ) in str(caught.value)


class Config:
    """What transformers makes of a config.json."""

    def __init__(self, **settings):
        self._settings = settings

    def to_dict(self):
        return self._settings


def test_every_setting_that_computes_is_kept_by_its_name(tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 40
    config = Config(
        hidden_act="silu",
        use_cache=True,
        hidden_size=8,
        cap=None,
        bias=False,
        eps=1e-05,
        vast=float("inf"),
        kinds=kinds,
        some=[1, 2],
        rope={},
        text_config={"use_cache": False, "heads": {0: 2}, "_name": "x"},
    )
    found = config_content(config)
    assert found == {
        "bias": False,
        "cap": None,
        "eps": 1e-05,
        "hidden_act": "silu",
        "kinds": hashlib.sha256(json.dumps(kinds).encode()).hexdigest(),
        "rope": "{}",
        "some": "[1, 2]",
        "text_config.heads.0": 2,
        "vast": "Infinity",
    }
    cache = write_cache(tmp_path / "c", labelled("a", "b"), {1: torch.zeros(2, 4)}, config=found)
    read = probecache.open_cache(cache.path).identity.config
    assert read == found
    assert [type(value) for value in read.values()] == [type(value) for value in found.values()]


def test_a_config_that_computes_the_same_is_the_same(model, tmp_path):
    cache = extracted(model, tmp_path / "cache")
    other = shutil.copytree(model, tmp_path / "other")
    said = {"transformers_version": "5.0.0", "use_cache": False, "architectures": None}
    edit(other / "config.json", lambda config: config.update(said))
    assert extracted(other, cache.path, layers=[2]).layers == (1, 2)


def test_a_model_is_scored_on_special_tokens_where_the_vectors_were_trained_on_them(
    model, tmp_path
):
    cache = extracted(model, tmp_path / "cache", positions="all", keep_special_tokens=True)
    vectors = probecache.train(cache=cache, output=tmp_path / "run")
    task = {"vectors": vectors, "data": RECORDS, "output": tmp_path / "validation"}
    found = probecache.validate(model=str(model), quiet=True, device="cpu", **task)
    expected = probecache.validate(cache=cache, **{**task, "output": tmp_path / "cached"})
    assert found.best.scores.tolist() == expected.best.scores.tolist()


# ---------------------------------------------------------------- nothing is read for it alone


def bytes_of(cache, monkeypatch, folder, **options):
    """Bytes of weights that an extraction reads, apart from samples."""
    from probecache.reading import WeightReader

    read, count = [], WeightReader._count

    def counted(self, stored):
        read.append(stored.size)
        count(self, stored)

    with monkeypatch.context() as patched:
        patched.setattr(WeightReader, "_count", counted)
        extracted(folder, cache, **options)
    return sum(read)


@pytest.fixture
def memo(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("probecache.memo._TICK_NS", 0)  # the files here are just made
    return tmp_path / "home" / "probecache" / "weights.json"


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_are_read_once_and_not_again_for_nothing(
    model, tmp_path, monkeypatch, memo, engine
):
    needed = probecache.plan_extraction(model=str(model), data=RECORDS, layers=[2]).weight_bytes
    options = {"layers": [2], "engine": engine}
    assert bytes_of(tmp_path / "cache", monkeypatch, model, **options) == needed
    assert memo.stat().st_size < 20_000
    assert bytes_of(tmp_path / "cache", monkeypatch, model, **options) == 0
    memo.unlink()
    norm = load_file(model / "model.safetensors")["model.norm.weight"].nbytes
    assert bytes_of(tmp_path / "cache", monkeypatch, model, **options) == needed - norm
    assert bytes_of(tmp_path / "cache", monkeypatch, model, **options) == 0


def test_a_moved_folder_is_not_read_again(model, tmp_path, monkeypatch, memo):
    folder = shutil.copytree(model, tmp_path / "model")
    extracted(folder, tmp_path / "cache")
    moved = folder.rename(tmp_path / "moved")
    assert bytes_of(tmp_path / "cache", monkeypatch, moved) == 0


def test_a_file_that_was_just_written_is_not_remembered(model, tmp_path, monkeypatch, memo):
    """Whoever writes to it again within one tick of the clock leaves its times as they are."""
    monkeypatch.setattr("probecache.memo._TICK_NS", 60 * 10**9)
    folder = shutil.copytree(model, tmp_path / "model")
    extracted(folder, tmp_path / "cache")
    assert not memo.exists()
    assert bytes_of(tmp_path / "cache", monkeypatch, folder) > 0


def test_a_file_that_was_changed_in_place_is_read_again(model, tmp_path, memo):
    folder = shutil.copytree(model, tmp_path / "model")
    cache = extracted(folder, tmp_path / "cache")
    change_one_weight(folder)
    with pytest.raises(MismatchError, match="weights: expected"):
        extracted(folder, cache.path)


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"x": 1}', b"\xff\xfe"])
def test_a_damaged_memo_counts_as_none(model, tmp_path, memo, damage):
    cache = extracted(model, tmp_path / "cache")
    memo.write_bytes(damage)
    assert extracted(model, cache.path).layers == (1,)
    assert json.loads(memo.read_bytes())


def test_no_place_for_a_memo_is_no_error(model, tmp_path, memo):
    memo.parent.parent.write_text("a file where the folder would be")
    assert extracted(model, tmp_path / "cache").layers == (1,)
    assert extracted(model, tmp_path / "cache").layers == (1,)


def test_weights_that_change_while_they_are_read_are_refused(model, tmp_path):
    from probecache.models import ModelOptions, open_model

    folder = shutil.copytree(model, tmp_path / "model")
    source = open_model(ModelOptions(str(folder), device="cpu"))
    source.load(1)
    change_one_weight(folder)
    with pytest.raises(ModelError, match="as it was read before, got other content"):
        source.load(1)


def test_the_names_are_the_hashes_that_the_page_says(model, tmp_path):
    """Worked out here from the files alone."""
    import hashlib

    tensors = load_file(model / "model.safetensors")
    running, expected = "", {}
    for layer in range(3):
        prefix = f"model.layers.{layer - 1}." if layer else "model.embed_tokens."
        own = sorted(name for name in tensors if name.startswith(prefix))
        content = [
            [
                name.split(".")[-4:],
                "F32",
                list(tensors[name].shape),
                hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest(),
            ]
            for name in own
        ]
        running = hashlib.sha256(json.dumps([running, content]).encode()).hexdigest()
        expected[layer] = running
    assert extracted(model, tmp_path / "cache", layers=[2]).identity.weights == expected


def test_a_checkpoint_of_another_dtype_is_another(model, tmp_path):
    cache = extracted(model, tmp_path / "cache")
    other = shutil.copytree(model, tmp_path / "other")
    halves = {n: t.to(torch.float64) for n, t in load_file(other / "model.safetensors").items()}
    save_file(halves, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="weights: expected"):
        extracted(other, cache.path)
