"""A whole extraction: positions, added layers, bad numbers, the plan's bytes, memory.

Rows are compared with plain Hugging Face forwards of prompts that are rendered here by hand.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from families import (
    BLOCKS,
    FAMILIES,
    RECORDS,
    build,
    full_model,
    plain_layers,
    relative_difference,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import probecache
from probecache.engine import ResidentEngine
from probecache.errors import (
    Interrupted,
    MismatchError,
    ModelError,
    NonFiniteError,
    OutputError,
    ProbecacheError,
    StoreError,
)
from probecache.models import ModelSource
from probecache.progress import Progress
from probecache.reading import WeightReader
from probecache.store.journal import PassageRecord, find_unfinished
from probecache.store.writer import CacheWriter
from probecache.workflow.execution import choose_execution
from probecache.workflow.resume import KeptSnapshots
from probecache.workflow.running import Run

LAYERS = tuple(range(BLOCKS + 1))
PAIRS = [
    {"question": "Is this a test?", "positive": "Yes", "negative": "No, it is real"},
    {"question": "Who reads this?", "positive": "A grader, I think", "negative": "A user"},
    {"question": "Where do you run, and for whom?", "positive": "In a lab", "negative": "At work"},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build(FAMILIES["llama"], tmp_path_factory.mktemp("llama"), chat=True)


@pytest.fixture(scope="module")
def plain(llama):
    """Residuals of a text that is rendered already: [tokens, hidden] per layer, and its ids."""
    model, tokenizer = full_model(FAMILIES["llama"], llama), AutoTokenizer.from_pretrained(llama)

    def layers_of(rendered):
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return plain_layers(FAMILIES["llama"], model, ids), ids

    return layers_of


def extracted(folder, output, data=RECORDS, **options):
    settings = {"layers": "all", "batch_tokens": 200, "quiet": True, "device": "cpu"}
    return probecache.extract(
        model=str(folder), data=data, output=output, **{**settings, **options}
    )


# Every engine with either way of cutting prompts into steps.
WAYS = [
    pytest.param({"engine": engine, "share_prefixes": shared}, id=f"{engine} {words}")
    for engine, (shared, words) in product(
        ["resident", "stream"], [(True, "shared"), (False, "padded")]
    )
]
# What a cache must hold for the next blocks to go on from it.
WHOLE = {"positions": "all", "keep_special_tokens": True}


def tensors_of(cache):
    return {str(p.relative_to(cache.path)): p.read_bytes() for p in cache.path.rglob("*.pt")}


def rows_of(cache, example, layer):
    return cache[example.label, layer][slice(*example.rows)]


def content_of(folder):
    """Every file below a folder, with its bytes and when it was last written."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------- positions


def rendered_pair(example):
    return f"<s><user>{example.question}\n<assistant>", example.answer


@pytest.mark.parametrize("positions", ["last", "mean", "all", "answer"])
def test_rows_of_pairs_are_slices_of_a_plain_forward(llama, plain, tmp_path, positions):
    cache = extracted(llama, tmp_path / "cache", PAIRS, positions=positions)
    assert len(cache.examples) == 2 * len(PAIRS)
    for example in cache.examples:
        prompt, answer = rendered_pair(example)
        layers, ids = plain(prompt + answer)
        before = len(plain(prompt)[1])
        question = slice(len("<s>x<user>") - 3, len("<s>x<user>") - 3 + len(example.question))
        assert len(plain("<s><user>")[1]) == question.start  # BOS, then a token for each letter
        for layer in LAYERS:
            rows = layers[layer]
            content = torch.cat([rows[question], rows[before:]])
            expected = {
                "last": rows[-1:],
                "answer": rows[before:],
                "all": content,
                "mean": content.double().mean(0, keepdim=True),
            }[positions]
            assert relative_difference(rows_of(cache, example, layer), expected) < 1e-5
        assert example.input_tokens == len(ids)


@pytest.mark.parametrize("positions", ["last", "mean", "all"])
def test_rows_of_labelled_prompts_are_slices_of_a_plain_forward(llama, plain, tmp_path, positions):
    cache = extracted(llama, tmp_path / "cache", RECORDS[:3], positions=positions)
    for example in cache.examples:
        rendered = f"<s><user>{example.question}\n"
        layers, ids = plain(rendered)
        start = len(plain("<s><user>")[1])
        stop = len(plain(f"<s><user>{example.question}")[1])
        for layer in LAYERS:
            rows = layers[layer][start:stop]
            expected = {
                "last": layers[layer][-1:],
                "all": rows,
                "mean": rows.double().mean(0, keepdim=True),
            }[positions]
            assert relative_difference(rows_of(cache, example, layer), expected) < 1e-5
        if positions == "all":
            kept = cache.tokens(example.label)[slice(*example.rows)]
            assert kept.tolist() == ids[start:stop]


def test_many_small_batches_give_the_rows_of_one_large_batch(llama, tmp_path):
    small = extracted(llama, tmp_path / "small", positions="all", batch_tokens=1)
    large = extracted(llama, tmp_path / "large", positions="all", batch_tokens=100_000)
    for label in small.classes:
        for layer in LAYERS:
            assert relative_difference(small[label, layer], large[label, layer]) < 1e-5


# ---------------------------------------------------------------- numbers that are none


@pytest.fixture
def overflowing(llama, tmp_path):
    """The model with an infinite weight in its third block, so layers 3 and 4 are not finite."""
    folder = shutil.copytree(llama, tmp_path / "overflowing")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_activations_that_overflow_stop_the_run_and_leave_nothing(overflowing, tmp_path):
    with pytest.raises(NonFiniteError, match=r"at layer 3, first on row \d of"):
        extracted(overflowing, tmp_path / "here" / "cache")
    assert not (tmp_path / "here").exists() or not any((tmp_path / "here").iterdir())


def test_layers_before_the_overflow_are_extracted(overflowing, llama, tmp_path):
    cache = extracted(overflowing, tmp_path / "cache", layers=[1, 2])
    sound = extracted(llama, tmp_path / "sound", layers=[1, 2])
    assert torch.equal(cache["testing", 2], sound["testing", 2])
    assert cache.info.non_finite == {}


def test_overflows_are_kept_and_counted_when_they_are_allowed(overflowing, tmp_path):
    cache = extracted(overflowing, tmp_path / "cache", allow_nonfinite=True, positions="all")
    rows = sum(cache[label, 3].shape[0] for label in cache.classes)
    assert cache.info.non_finite == {3: rows, 4: rows}
    for label in cache.classes:
        assert torch.isfinite(cache[label, 2]).all()
        assert not torch.isfinite(cache[label, 3]).all(dim=1).any()


def test_the_named_row_is_the_one_that_overflows(llama, tmp_path):
    # One letter's embedding is infinite; only the record that holds that letter may be named.
    folder = shutil.copytree(llama, tmp_path / "folder")
    letter = AutoTokenizer.from_pretrained(folder)("Z", add_special_tokens=False)["input_ids"][0]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][letter, 5] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    data = [{"text": text, "type": "a"} for text in ("one", "a longer one", "a Z in it", "four")]
    data.append({"text": "of another class", "type": "b"})
    with pytest.raises(NonFiniteError, match=r"at layer 0, first on row 3 of"):
        extracted(folder, tmp_path / "cache", data)


# ---------------------------------------------------------------- adding layers


@pytest.mark.parametrize("positions", ["last", "all"])
def test_layers_added_later_are_those_of_one_run_and_leave_the_others_alone(
    llama, tmp_path, positions
):
    once = extracted(llama, tmp_path / "once", layers=[1, 2, 3], positions=positions)
    first = extracted(llama, tmp_path / "grown", layers=[1, 3], positions=positions)
    before = content_of(first.path)
    grown = extracted(llama, tmp_path / "grown", layers=[2], positions=positions)
    after = content_of(grown.path)
    assert grown.layers == (1, 2, 3)
    for name, content in before.items():
        assert name == "layer_info.json" or after[name] == content
    for name, (content, _) in content_of(once.path).items():
        assert name == "layer_info.json" or after[name][0] == content
    assert set(after) == set(content_of(once.path))
    assert {n: r.sha256 for n, r in grown.info.files.items()} == {
        n: r.sha256 for n, r in once.info.files.items()
    }


def test_the_same_command_again_does_nothing(llama, tmp_path):
    cache = extracted(llama, tmp_path / "cache", layers=[1, 2])
    before = content_of(cache.path)
    assert extracted(llama, tmp_path / "cache", layers=[2]).layers == (1, 2)
    assert extracted(llama, tmp_path / "cache", layers=[1, 2]).layers == (1, 2)
    assert content_of(cache.path) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": RECORDS[:-1]}, "data"),
        ({"data": [{**RECORDS[0], "text": "other"}, *RECORDS[1:]]}, "token_ids"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"positions": "mean"}, "positions"),
        ({"chat_template": False}, "chat_template"),
        ({"system_prompt": "Be brief."}, "system_prompt"),
        ({"keep_special_tokens": True}, "special_tokens_kept"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("layers", [[1], [2]])
def test_a_cache_takes_no_layers_of_another_run(llama, tmp_path, change, named, layers):
    cache = extracted(llama, tmp_path / "cache", layers=[1])
    before = content_of(cache.path)
    with pytest.raises(MismatchError, match=rf"\b{named}: expected"):
        extracted(llama, tmp_path / "cache", layers=layers, **change)
    assert content_of(cache.path) == before


@pytest.mark.parametrize("layers", [[1], [3]])
def test_a_cache_takes_no_layers_of_another_model(llama, tmp_path, layers):
    cache = extracted(llama, tmp_path / "cache", layers=[1])
    other = build(FAMILIES["llama"], tmp_path / "other", chat=True, seed=1)
    before = content_of(cache.path)
    with pytest.raises(MismatchError, match="weights: expected"):
        extracted(other, tmp_path / "cache", layers=layers)
    assert content_of(cache.path) == before


def test_a_cache_takes_layers_from_a_moved_copy_of_its_model(llama, tmp_path):
    extracted(llama, tmp_path / "cache", layers=[1])
    moved = shutil.copytree(llama, tmp_path / "moved")
    assert extracted(moved, tmp_path / "cache", layers=[2]).layers == (1, 2)


def test_a_failed_addition_leaves_the_cache_as_it_was(overflowing, tmp_path):
    cache = extracted(overflowing, tmp_path / "cache", layers=[1, 2])
    before = content_of(cache.path)
    with pytest.raises(NonFiniteError):
        extracted(overflowing, tmp_path / "cache", layers=[0, 3])
    assert content_of(cache.path) == before
    assert probecache.open_cache(cache.path).layers == (1, 2)


def test_what_is_no_cache_is_never_written_into(llama, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(OutputError):
        extracted(llama, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_what_can_be_refused_is_refused_before_a_weight_is_read(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "probecache.models.ModelSource._load", lambda *_: pytest.fail("weights were read")
    )
    cases = [
        {"layers": [BLOCKS + 1]},
        {"data": [{"question": "no answers"}]},
        {"data": [{"text": "x" * 500, "type": "a"}, {"text": "y", "type": "b"}]},
        {"positions": "answer"},
    ]
    for case in cases:
        with pytest.raises(ProbecacheError):
            extracted(llama, tmp_path / "cache", **case)
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------- adding layers: where it starts


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = build(FAMILIES["llama"], tmp_path_factory.mktemp("sharded"), chat=True, shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > BLOCKS
    return folder


@pytest.fixture
def reads(monkeypatch):
    """The names of the weights that are read, each as often as it is."""
    names, count = [], WeightReader._count

    def counted(self, stored):
        names.append(stored.name)
        count(self, stored)

    monkeypatch.setattr(WeightReader, "_count", counted)
    return names


def blocks_in(names):
    """How often every tensor of every block was read: {block: {times}}."""
    found = {}
    for name in names:
        if ".layers." in name:
            found.setdefault(int(name.split(".layers.")[1].split(".")[0]), []).append(name)
    return {block: {own.count(name) for name in own} for block, own in sorted(found.items())}


ONCE = {1}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("cached", "added", "blocks"),
    [
        ([2], [4], [2, 3]),
        ([1], [2, 3, 4], [1, 2, 3]),
        ([1, 3], [2, 4], [1, 3]),
        ([0], [1, 3], [0, 1, 2]),
        ([3], [1, 4], [0, 3]),
    ],
)
def test_added_layers_go_on_from_cached_ones_and_are_those_of_one_run(
    sharded, tmp_path, reads, way, cached, added, blocks
):
    once = extracted(sharded, tmp_path / "once", layers=sorted(cached + added), **WHOLE, **way)
    extracted(sharded, tmp_path / "grown", layers=cached, **WHOLE, **way)
    reads.clear()
    grown = extracted(sharded, tmp_path / "grown", layers=added, **WHOLE, **way)
    assert blocks_in(reads) == dict.fromkeys(blocks, ONCE)
    assert tensors_of(grown) == tensors_of(once)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_goes_on_bit_for_bit_too(llama, tmp_path, way, dtype):
    options = {"dtype": dtype, **WHOLE, **way}
    once = extracted(llama, tmp_path / "once", layers=[2, 4], **options)
    extracted(llama, tmp_path / "grown", layers=[2], **options)
    assert tensors_of(extracted(llama, tmp_path / "grown", layers=[4], **options)) == tensors_of(
        once
    )


@pytest.mark.parametrize("engine", ["resident", "stream"])
def test_weights_of_lower_blocks_need_not_be_there(sharded, tmp_path, monkeypatch, engine):
    folder = shutil.copytree(sharded, tmp_path / "model")
    once = extracted(folder, tmp_path / "once", layers=[2, 4], engine=engine, **WHOLE)
    cache = extracted(folder, tmp_path / "grown", layers=[2], engine=engine, **WHOLE)
    # Samples are looked for in all blocks below; here they are believed.
    prints = dict(once.identity.weight_samples)
    monkeypatch.setattr(ModelSource, "weight_samples", lambda *_: prints)
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    lower = (".layers.0.", ".layers.1.")
    needed = {file for name, file in shards.items() if not any(word in name for word in lower)}
    gone = set(shards.values()) - needed
    assert len(gone) >= 2
    for file in gone:
        (folder / file).unlink()
    grown = extracted(folder, tmp_path / "grown", layers=[4], engine=engine, **WHOLE)
    assert tensors_of(grown) == tensors_of(once)
    assert cache.layers == (2,)


NOT_WHOLE = {
    "last": {"positions": "last"},
    "mean": {"positions": "mean", "keep_special_tokens": True},
    "answers": {"positions": "answer", "data": PAIRS},
    "template tokens left out": {"positions": "all"},
}


@pytest.mark.parametrize("engine", ["resident", "stream"])
@pytest.mark.parametrize("options", NOT_WHOLE.values(), ids=NOT_WHOLE)
def test_rows_that_are_not_all_tokens_start_nothing(sharded, tmp_path, reads, engine, options):
    once = extracted(sharded, tmp_path / "once", layers=[2, 3], engine=engine, **options)
    extracted(sharded, tmp_path / "grown", layers=[2], engine=engine, **options)
    reads.clear()
    grown = extracted(sharded, tmp_path / "grown", layers=[3], engine=engine, **options)
    assert blocks_in(reads) == {0: ONCE, 1: ONCE, 2: ONCE}
    assert tensors_of(grown) == tensors_of(once)


@pytest.mark.parametrize("engine", ["resident", "stream"])
def test_rows_that_are_not_finite_start_nothing(overflowing, tmp_path, reads, engine):
    options = {"allow_nonfinite": True, "engine": engine, **WHOLE}
    once = extracted(overflowing, tmp_path / "once", layers=[3, 4], **options)
    extracted(overflowing, tmp_path / "grown", layers=[3], **options)
    reads.clear()
    grown = extracted(overflowing, tmp_path / "grown", layers=[4], **options)
    assert set(blocks_in(reads)) == {0, 1, 2, 3}
    assert grown.info.non_finite == once.info.non_finite != {}


def test_blocks_that_share_keys_start_from_the_tokens(tmp_path, reads):
    """The last two blocks of this Gemma 4 take keys and values from the first two."""
    folder = build(FAMILIES["gemma4"], tmp_path / "model")
    options = {"chat_template": False, **WHOLE}
    once = extracted(folder, tmp_path / "once", layers=[1, 2, 4], **options)
    extracted(folder, tmp_path / "grown", layers=[1], **options)
    extracted(folder, tmp_path / "grown", layers=[2], **options)
    reads.clear()
    grown = extracted(folder, tmp_path / "grown", layers=[4], **options)
    assert set(blocks_in(reads)) == {0, 1, 2, 3}
    assert tensors_of(grown) == tensors_of(once)


def test_one_model_is_gone_before_the_next_is_loaded(llama, tmp_path, monkeypatch):
    """Memory is planned for the largest passage, not for all of them."""
    alive, load = [], Run.load

    def watched(self):
        assert [model for model in alive if model() is not None] == []
        loaded = load(self)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(Run, "load", watched)
    extracted(llama, tmp_path / "cache", layers=[1, 3], **WHOLE)
    extracted(llama, tmp_path / "cache", layers=[2, 4], **WHOLE)
    assert len(alive) == 3


def test_the_plan_of_an_addition_reads_only_what_runs(sharded, tmp_path, reads):
    options = {"model": str(sharded), "data": RECORDS, "output": tmp_path / "cache", **WHOLE}
    whole = probecache.plan_extraction(layers=[4], **options)
    extracted(sharded, tmp_path / "cache", layers=[1, 3], **WHOLE)
    planned = probecache.plan_extraction(layers=[2, 4], **options)
    assert [(p.start, p.layers) for p in planned.passages] == [(1, (2,)), (3, (4,))]
    assert planned.weight_bytes < whole.weight_bytes
    reads.clear()
    extracted(sharded, tmp_path / "cache", layers=[2, 4], engine="stream", **WHOLE)
    tensors = {n: t for f in sharded.glob("*.safetensors") for n, t in load_file(f).items()}
    assert planned.weight_bytes == sum(tensors[name].nbytes for name in reads)


# ---------------------------------------------------------------- streaming


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_hidden_states_are_planned_for_all_tokens_where_prefixes_are_not_shared(
    tmp_path, monkeypatch, name
):
    folder = build(FAMILIES[name], tmp_path / "model")
    monkeypatch.setattr("probecache.workflow.prepare.choose_execution", on_disk)
    options = {"model": str(folder), "data": RECORDS + RECORDS, "chat_template": False}
    shared, padded = (
        probecache.plan_extraction(engine="stream", share_prefixes=share, **options)
        for share in (True, False)
    )
    row = shared.hidden_size * 4
    assert padded.spill_bytes == padded.tokens * row
    fewer = shared.distinct_prefix_tokens if name == "llama" else shared.tokens
    assert shared.spill_bytes == fewer * row


@pytest.mark.parametrize("positions", ["last", "mean", "all"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "padded"])
def test_a_streamed_cache_is_the_resident_one_byte_for_byte(llama, tmp_path, positions, shared):
    options = {"positions": positions, "share_prefixes": shared, "batch_tokens": 50}
    resident = extracted(llama, tmp_path / "resident", engine="resident", **options)
    streamed = extracted(llama, tmp_path / "streamed", engine="stream", **options)
    assert tensors_of(streamed) == tensors_of(resident)
    assert streamed.identity == resident.identity


@pytest.mark.parametrize("layers", ["all", [2], [0]])
def test_streaming_reads_every_needed_weight_once(sharded, tmp_path, reads, layers):
    cache = extracted(sharded, tmp_path / "cache", layers=layers, engine="stream")
    blocks = range(max(cache.layers[-1], 1))  # without a block there is no model to hook
    assert blocks_in(reads) == dict.fromkeys(blocks, ONCE)
    outside = [name for name in reads if ".layers." not in name]
    assert sorted(outside) == ["model.embed_tokens.weight", "model.norm.weight"]


def test_hidden_states_on_disk_give_the_same_rows_and_leave_no_file(llama, tmp_path, monkeypatch):
    memory = extracted(llama, tmp_path / "memory", engine="stream")
    monkeypatch.setattr("probecache.workflow.prepare.choose_execution", on_disk)
    disk = extracted(llama, tmp_path / "disk", engine="stream")
    assert tensors_of(disk) == tensors_of(memory)
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "disk"}


def on_disk(*arguments, **options):
    return replace(choose_execution(*arguments, **options), hidden_on_disk=True)


def test_a_disk_without_room_for_hidden_states_is_refused_before_a_weight_is_read(
    llama, tmp_path, monkeypatch
):
    planned = probecache.plan_extraction(model=str(llama), data=RECORDS, output=tmp_path / "cache")
    monkeypatch.setattr("probecache.workflow.prepare.choose_execution", on_disk)
    monkeypatch.setattr(
        "probecache.workflow.prepare.free_bytes", lambda _: planned.bytes_total + 100
    )
    monkeypatch.setattr(ModelSource, "_load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(OutputError, match="not enough disk"):
        extracted(llama, tmp_path / "cache", engine="stream")


def test_a_weight_file_that_is_gone_meanwhile_is_told_as_such(sharded, tmp_path, monkeypatch):
    """And not as a fault of the architecture, or of sharing prefixes."""
    folder = shutil.copytree(sharded, tmp_path / "model")
    read = ModelSource.read_block

    def late(self, index):
        if index == 2:
            for file in folder.glob("*.safetensors"):
                file.unlink()
        return read(self, index)

    monkeypatch.setattr(ModelSource, "read_block", late)
    with pytest.raises((OSError, ModelError)) as caught:
        extracted(folder, tmp_path / "here" / "cache", engine="stream")
    assert ".safetensors" in str(caught.value)
    assert "architecture" not in str(caught.value)
    assert find_unfinished(tmp_path / "here" / "cache").share() > 0


# ---------------------------------------------------------------- rows on their way to disk


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("positions", ["last", "all"])
def test_every_row_is_written_once(llama, tmp_path, monkeypatch, way, positions):
    written, write = [], CacheWriter.write

    def counted(self, layer, examples, rows):
        written.extend((layer, index) for index in examples)
        write(self, layer, examples, rows)

    monkeypatch.setattr(CacheWriter, "write", counted)
    extracted(llama, tmp_path / "cache", positions=positions, batch_tokens=40, **way)
    assert sorted(written) == sorted(product(LAYERS, range(len(RECORDS))))


PATIENCE = 20.0  # seconds after which something waits that should not


@pytest.mark.parametrize("engine", ["resident", "stream"])
def test_computing_does_not_wait_for_writing(llama, tmp_path, monkeypatch, engine):
    """No row is written before everything is computed; whoever waited for that would hang."""
    computed, update, write = threading.Event(), Progress.update, CacheWriter.write

    def seen(self, units):
        update(self, units)
        if self._done == self.total:
            computed.set()

    def late(self, *arguments):
        assert computed.wait(PATIENCE)
        write(self, *arguments)

    monkeypatch.setattr(Progress, "update", seen)
    monkeypatch.setattr(CacheWriter, "write", late)
    assert extracted(llama, tmp_path / "cache", engine=engine, batch_tokens=30).layers == LAYERS


def test_writing_does_not_wait_for_computing(llama, tmp_path, monkeypatch):
    """The last step runs only when rows of the first are on disk; whoever waited would hang."""
    written, write, attempt = threading.Event(), CacheWriter.write, ResidentEngine._attempt
    steps, all_but_one = [], len(RECORDS) - 1

    def seen(self, *arguments):
        write(self, *arguments)
        written.set()

    def late(self, feed, *arguments):
        steps.append(feed.prompts)
        # The preflight has a step for each of its two texts, and no writer yet.
        if len(steps) > 2 + all_but_one:
            assert written.wait(PATIENCE)
        return attempt(self, feed, *arguments)

    monkeypatch.setattr(CacheWriter, "write", seen)
    monkeypatch.setattr(ResidentEngine, "_attempt", late)
    options = {"share_prefixes": False, "batch_tokens": 1, "engine": "resident"}
    assert extracted(llama, tmp_path / "cache", **options).layers == LAYERS
    assert len(steps) == 2 + len(RECORDS)


def threads():
    return {thread for thread in threading.enumerate() if thread.is_alive()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", [28, 5])
def test_errors_of_the_disk_are_told_and_cost_no_rows(llama, tmp_path, monkeypatch, way, number):
    write, calls, before = CacheWriter.write, [], threads()

    def full(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(number, "the disk says no")
        write(self, *arguments)

    monkeypatch.setattr(CacheWriter, "write", full)
    with pytest.raises((OutputError, OSError), match="the disk says no"):
        extracted(llama, tmp_path / "here" / "cache", batch_tokens=30, **way)
    assert len(calls) == 3
    assert threads() <= before
    monkeypatch.undo()
    same_as_without_a_break(llama, tmp_path / "here" / "cache", batch_tokens=30, **way)


def same_as_without_a_break(model, output, **options):
    """Finish what is unfinished; the result must be what a run without any break gives."""
    with pytest.raises(StoreError, match="has not finished"):
        probecache.open_cache(output)
    extracted(model, output, **options)
    extracted(model, output.with_name("whole"), **options)
    found, whole = content_of(output), content_of(output.with_name("whole"))
    assert {n: c for n, (c, _) in found.items()} == {n: c for n, (c, _) in whole.items()}
    assert {path.name for path in output.parent.iterdir()} == {output.name, "whole"}


def interrupt_at_step(number, monkeypatch):
    """Ctrl-C, while the rows of the step before are on their way to the writer."""
    update, calls = Progress.update, []

    def interrupted(self, units):
        calls.append(units)
        update(self, units)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "update", interrupted)


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_run_says_how_to_go_on_and_leaves_no_threads(
    llama, tmp_path, monkeypatch, way
):
    output, before = tmp_path / "here" / "cache", threads()
    interrupt_at_step(3, monkeypatch)
    with pytest.raises(Interrupted, match=r"% of the rows on disk .* same command again|no.* kept"):
        extracted(llama, output, batch_tokens=30, **way)
    assert threads() <= before
    monkeypatch.undo()
    if output.exists():
        same_as_without_a_break(llama, output, batch_tokens=30, **way)


def test_what_is_done_is_not_computed_again(llama, tmp_path, monkeypatch):
    output, steps, attempt = tmp_path / "cache", [], ResidentEngine._attempt
    options = {"share_prefixes": False, "batch_tokens": 1, "engine": "resident"}

    def seen(self, feed, *arguments):
        steps.append(feed.prompts)
        return attempt(self, feed, *arguments)

    interrupt_at_step(5, monkeypatch)
    with pytest.raises(Interrupted):
        extracted(llama, output, **options)
    monkeypatch.undo()
    done = find_unfinished(output).done()
    left = {n for n in range(len(RECORDS)) if not all(flags[n] for flags in done.values())}
    assert 0 < len(left) < len(RECORDS)
    monkeypatch.setattr(ResidentEngine, "_attempt", seen)
    extracted(llama, output, **options)
    assert {n for prompts in steps[2:] for n in prompts} == left  # two are the preflight's


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "padded"])
def test_a_streamed_run_goes_on_behind_the_last_block_that_was_kept(
    llama, tmp_path, monkeypatch, shared
):
    options = {"engine": "stream", "share_prefixes": shared, "batch_tokens": 30, "layers": [2, 4]}
    monkeypatch.setattr("probecache.workflow.resume._SNAPSHOT_S", 0.0)
    place, read, seen = KeptSnapshots.place, ModelSource.read_block, []

    def late(self, layer):
        if layer == 3:
            raise KeyboardInterrupt
        return place(self, layer)

    monkeypatch.setattr(KeptSnapshots, "place", late)
    with pytest.raises(Interrupted):
        extracted(llama, tmp_path / "cache", **options)
    unfinished = find_unfinished(tmp_path / "cache")
    kept = unfinished.progress.passages[0].snapshot
    assert kept in (1, 2)
    assert len([*unfinished.folder.glob("hidden_*")]) <= 2
    monkeypatch.setattr(KeptSnapshots, "place", place)
    monkeypatch.setattr(
        ModelSource, "read_block", lambda self, index: (seen.append(index), read(self, index))[1]
    )
    extracted(llama, tmp_path / "cache", **options)
    assert seen == [*range(kept, BLOCKS)]
    monkeypatch.undo()
    whole = extracted(llama, tmp_path / "whole", **options)
    found = {n: c for n, (c, _) in content_of(tmp_path / "cache").items()}
    assert found == {n: c for n, (c, _) in content_of(whole.path).items()}


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_addition_leaves_the_cache_as_it_was(llama, tmp_path, monkeypatch, way):
    options = {"batch_tokens": 30, **WHOLE, **way}
    cache = extracted(llama, tmp_path / "cache", layers=[2], **options)
    before = content_of(cache.path)
    interrupt_at_step(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        extracted(llama, tmp_path / "cache", layers=[1, 4], **options)
    monkeypatch.undo()
    found = content_of(cache.path)
    assert {n: found[n] for n in before} == before
    assert all(name.startswith("unfinished/") for name in found.keys() - before.keys())
    assert probecache.open_cache(cache.path).layers == (2,)
    added = extracted(llama, tmp_path / "cache", layers=[1, 4], **options)
    other = extracted(llama, tmp_path / "other", layers=[2], **options)
    other = extracted(llama, tmp_path / "other", layers=[1, 4], **options)
    assert added.layers == (1, 2, 4)
    whole = content_of(other.path)
    assert {n: c for n, (c, _) in content_of(cache.path).items()} == {
        n: c for n, (c, _) in whole.items()
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": [2]}, "layers 0-4 of the unfinished"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"positions": "last"}, "positions"),
        ({"system_prompt": "Be brief."}, "system_prompt"),
    ],
)
def test_another_run_does_not_go_on_with_what_is_unfinished(
    llama, tmp_path, monkeypatch, change, named
):
    options = {"batch_tokens": 30, "engine": "resident", **WHOLE}
    interrupt_at_step(4, monkeypatch)
    with pytest.raises(Interrupted):
        extracted(llama, tmp_path / "cache", **options)
    monkeypatch.undo()
    before = content_of(tmp_path / "cache")
    settings = {"data": RECORDS, "quiet": True, "device": "cpu", **options, **change}
    for begin in (probecache.extract, probecache.plan_extraction):
        with pytest.raises(MismatchError, match=named) as refused:
            begin(model=str(llama), output=tmp_path / "cache", **settings)
        assert "unfinished" in str(refused.value)
        assert "--allow-mismatch" not in str(refused.value), "a layer's rows are of one run"
    assert content_of(tmp_path / "cache") == before


def test_hidden_states_are_kept_as_often_as_the_disk_is_quick_and_has_room(tmp_path, monkeypatch):
    now, free = [0.0], [10**9]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("probecache.workflow.resume.free_bytes", lambda _: free[0])
    record = PassageRecord(why_padded="", mixed=True, computed_tokens=1000, batches="")
    source = SimpleNamespace(hidden_size=50, dtype=torch.float32)
    run = SimpleNamespace(source=source, passage=SimpleNamespace(start=0), record=lambda: record)
    unfinished = SimpleNamespace(progress=SimpleNamespace(passages={}))
    writer = SimpleNamespace(unfinished=unfinished, folder=tmp_path, record=lambda: None)
    kept = KeptSnapshots(writer, run, lambda layer: None)

    def first_at(times):
        for now[0] in times:
            if kept.place(1) is not None:
                return now[0]
        return None

    assert first_at(range(100)) == 5, "every five seconds at most"
    kept.saved(1, seconds=0.1)
    assert first_at(range(5, 100)) == 10
    kept.saved(2, seconds=4)
    assert first_at(range(10, 100)) == 46, "a tenth of the time at most"
    free[0] = 2 * 1000 * 50 * 4
    assert first_at(range(50, 100)) is None, "what is only for going on leaves room for rows"


def test_options_that_only_say_how_to_run_may_change_on_the_way(llama, tmp_path, monkeypatch):
    interrupt_at_step(4, monkeypatch)
    with pytest.raises(Interrupted):
        extracted(llama, tmp_path / "cache", batch_tokens=30, engine="resident", **WHOLE)
    monkeypatch.undo()
    resumed = extracted(llama, tmp_path / "cache", batch_tokens=20, engine="stream", **WHOLE)
    whole = extracted(llama, tmp_path / "whole", **WHOLE)
    for label, layer in product(whole.classes, whole.layers):
        assert relative_difference(resumed[label, layer], whole[label, layer]) < 1e-5


# ---------------------------------------------------------------- the plan


THREE_CLASSES = [
    {"text": f"number {number}", "type": ["testing", "deployment", "neither of both"][number % 3]}
    for number in range(7)
]


@pytest.mark.parametrize("data", [RECORDS, PAIRS, THREE_CLASSES], ids=["two", "pairs", "three"])
@pytest.mark.parametrize("positions", ["last", "mean", "all"])
@pytest.mark.parametrize(("dtype", "layers"), [("float32", "all"), ("bfloat16", [2])])
def test_the_planned_bytes_are_those_on_disk(llama, tmp_path, data, positions, dtype, layers):
    options = {"positions": positions, "dtype": dtype, "layers": layers}
    planned = probecache.plan_extraction(
        model=str(llama), data=data, output=tmp_path / "cache", device="cpu", **options
    )
    cache = extracted(llama, tmp_path / "cache", data, **options)
    sizes = {name: len(content) for name, (content, _) in content_of(cache.path).items()}
    assert planned.bytes_total == sum(sizes.values())
    for layer in cache.layers:
        of_layer = [size for name, size in sizes.items() if name.startswith(f"layer_{layer}/")]
        assert planned.bytes_per_layer == sum(of_layer)
    assert planned.rows_per_layer == sum(len(cache[label, 2]) for label in cache.classes)


def test_the_plan_of_an_addition_counts_the_new_layers_alone(llama, tmp_path):
    extracted(llama, tmp_path / "cache", layers=[1])
    planned = probecache.plan_extraction(
        model=str(llama), data=RECORDS, output=tmp_path / "cache", layers=[1, 2, 3]
    )
    assert planned.cached_layers == (1,)
    assert planned.layers == (2, 3)
    cache = extracted(llama, tmp_path / "cache", layers=[1, 2, 3])
    sizes = {name: len(content) for name, (content, _) in content_of(cache.path).items()}
    new = [size for name, size in sizes.items() if name.startswith(("layer_2/", "layer_3/"))]
    assert planned.bytes_total == sum(new)


def test_the_plan_of_an_addition_counts_what_the_manifest_grows_by(llama, tmp_path):
    def total():
        return sum(len(content) for content, _ in content_of(tmp_path / "cache").values())

    labels = [f"{'a long label ' * 3}{number}" for number in range(8)]
    data = [{"text": label, "type": label} for label in labels]
    extracted(llama, tmp_path / "cache", data, layers=[0])
    before = total()
    planned = probecache.plan_extraction(
        model=str(llama), data=data, output=tmp_path / "cache", layers="all"
    )
    extracted(llama, tmp_path / "cache", data, layers="all")
    assert planned.bytes_total == total() - before
    assert planned.bytes_total > planned.bytes_per_layer * BLOCKS  # the manifest grew too


def test_a_plan_writes_nothing(llama, tmp_path):
    probecache.plan_extraction(model=str(llama), data=RECORDS, output=tmp_path / "a" / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_a_weight_is_read(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("probecache.workflow.prepare.free_bytes", lambda _: 1000)
    monkeypatch.setattr(
        "probecache.models.ModelSource._load", lambda *_: pytest.fail("weights were read")
    )
    with pytest.raises(OutputError, match="not enough disk"):
        extracted(llama, tmp_path / "cache")


# ---------------------------------------------------------------- dtype and memory


def test_without_a_dtype_the_rows_have_the_checkpoints_own(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "half")
    halves = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for declared in ("bfloat16", None):
        (folder / "config.json").write_text(json.dumps({**config, "dtype": declared}))
        cache = extracted(folder, tmp_path / str(declared), layers=[1])
        assert cache["testing", 1].dtype == torch.bfloat16


def test_a_checkpoint_of_a_dtype_that_no_row_can_have_needs_one_named(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float64"}))
    with pytest.raises(ModelError, match="--dtype"):
        extracted(folder, tmp_path / "cache", layers=[1])
    assert extracted(folder, tmp_path / "cache", layers=[1], dtype="float32").layers == (1,)


_PEAK = """
import resource, sys
import probecache
folder, output, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = [
    {"text": f"{number} " + "many words " * 10, "type": ("testing", "deployment")[number % 2]}
    for number in range(60 * times)
]
cache = probecache.extract(
    model=folder, data=data, output=output, positions="all", quiet=True, device="cpu"
)
size = sum(path.stat().st_size for path in cache.path.rglob("*.pt"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory in Linux's unit")
def test_memory_does_not_grow_with_the_data_set(tmp_path):
    family = FAMILIES["llama"]
    wide = {**family.settings, "hidden_size": 256, "num_hidden_layers": 2}
    folder = build(type(family)("wide", family.kind, wide), tmp_path / "wide")
    peak, size = {}, {}
    for times in (1, 20):
        arguments = [str(folder), str(tmp_path / str(times)), str(times)]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(_PEAK), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        peak[times], size[times] = map(int, done.stdout.split())
    assert size[20] - size[1] > 200 << 20
    assert peak[20] - peak[1] < (size[20] - size[1]) / 4


_BOUNDED = """
import sys
import probecache
from probecache.memory import peak_bytes, resident_bytes

tiny, folder, output, engine, most = sys.argv[1:]
data = [
    {"text": f"{number} " + "many words " * 10, "type": ("testing", "deployment")[number % 2]}
    for number in range(20)
]
options = {"data": data, "quiet": True, "device": "cpu", "engine": engine, "positions": "last"}
probecache.extract(model=tiny, output=output + "_tiny", **options)  # loads all that is imported
before = resident_bytes()
memory = before + int(most) if int(most) else None
probecache.extract(model=folder, output=output, memory=memory, **options)
print(peak_bytes() - before)
"""


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A model of 12 blocks of 17 MB each, and its bytes."""
    family = FAMILIES["llama"]
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
    settings = {**family.settings, **sizes, "num_key_value_heads": 4, "num_hidden_layers": 12}
    folder = tmp_path_factory.mktemp("larger") / "model"
    build(type(family)("larger", family.kind, settings), folder)
    return folder, sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def started(tiny, folder, output, engine, most=0):
    """A run in a process of its own, which prints the most bytes it took beside its packages."""
    return subprocess.Popen(
        [sys.executable, "-c", _BOUNDED, *map(str, (tiny, folder, output, engine, most))],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory")
def test_a_run_that_is_given_little_memory_takes_little(llama, larger, tmp_path):
    folder, weights = larger
    runs = [
        started(llama, folder, tmp_path / "resident", "resident"),
        started(llama, folder, tmp_path / "streamed", "auto", 90 * 10**6),
    ]
    resident, streamed = (int(run.communicate()[0]) for run in runs)
    caches = [probecache.open_cache(tmp_path / name) for name in ("resident", "streamed")]
    assert [cache.info.execution["engine"] for cache in caches] == ["resident", "stream"]
    assert resident > weights > 190e6
    # Not 90 MB: of tensors this small the C library keeps some memory when they are gone.
    assert streamed < 0.6 * resident
