"""Caches and runs: read back by plain torch, refused when unfinished, damaged or forged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import (
    EXECUTION,
    IDENTITY,
    TIMING,
    blueprint_of,
    labelled,
    rows_of,
    write_cache,
    writer_of,
)

from probecache.errors import LayerNotCachedError, OutputError, StoreError, UsageError
from probecache.fit import fit_difference_of_means
from probecache.store.describe import describe
from probecache.store.layout import class_prefixes
from probecache.store.place import finish_complete
from probecache.store.reader import open_cache
from probecache.store.seal import encode_json
from probecache.store.tensorfile import file_bytes
from probecache.store.vectors import TrainedLayer, TrainedRun, load_vectors, save_run
from probecache.store.verify import verify
from probecache.store.writer import require_free_layers

HIDDEN = 6
RECORDS = labelled("testing", "deployment", "deployment", "testing", "deployment")
IS_TESTING = torch.tensor([True, False, False, True, False])
METHOD = "difference-of-means"
DTYPES = ["float32", "float16", "bfloat16"]
TOKENS = [2, 3, 1, 2, 1]
SPANS = np.arange(36).reshape(9, 4)  # of no text; that shows where they are used


def rows(seed=0, count=5, hidden=HIDDEN, dtype="float32"):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, hidden, generator=made).to(getattr(torch, dtype))


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "cache", RECORDS, {10: rows(10), 20: rows(20)})


@pytest.fixture
def token_cache(tmp_path):
    return write_cache(
        tmp_path / "cache", RECORDS, {10: rows(1, 9)}, tokens=TOKENS, positions="all", spans=SPANS
    )


# ---------------------------------------------------------------- written and read back


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch_reads_the_rows_that_were_written(tmp_path, dtype):
    written = {layer: rows(layer, dtype=dtype) for layer in (0, 20)}
    cache = write_cache(tmp_path / "cache", RECORDS, written)
    for layer in written:
        folder = tmp_path / "cache" / f"layer_{layer}"
        for prefix, mine in (("test", IS_TESTING), ("deploy", ~IS_TESTING)):
            for mmap in (False, True):
                found = torch.load(
                    folder / f"{prefix}_activations.pt", weights_only=True, mmap=mmap
                )
                assert found.dtype == getattr(torch, dtype)
                assert torch.equal(found, written[layer][mine])
        assert torch.equal(cache["testing", layer], written[layer][IS_TESTING])
        assert torch.equal(cache["deploy", layer], written[layer][~IS_TESTING])
        (start, chunk), *_ = cache.chunks("testing", layer)
        assert start == 0
        assert torch.equal(torch.from_numpy(chunk), written[layer][IS_TESTING].float())


def test_rows_may_come_in_any_order(tmp_path):
    values, tokens = rows(3, 9), [2, 3, 1, 2, 1]
    ends = np.cumsum(tokens)
    blueprint = blueprint_of(RECORDS, [7], HIDDEN, positions="all", tokens=tokens)
    with writer_of(tmp_path / "c", blueprint) as writer:
        for batch in ([4, 0], [3], [2, 1]):
            pieces = [values[ends[i] - tokens[i] : ends[i]] for i in batch]
            writer.write(7, batch, torch.cat(pieces))
        writer.write_tokens(np.arange(9))
        identity = IDENTITY.__class__(
            **{**IDENTITY.__dict__, "hidden_size": HIDDEN, "positions": "all"}
        )
        writer.commit(identity, TIMING, EXECUTION)
    ordered = write_cache(tmp_path / "d", RECORDS, {7: values}, tokens=tokens, positions="all")
    for label in ("testing", "deployment"):
        assert torch.equal(open_cache(tmp_path / "c")[label, 7], rows_of(ordered, label, 7))


def test_kept_token_ids_are_those_of_the_class(token_cache):
    saved = torch.load(token_cache.path / "tokens.pt", weights_only=True)
    assert saved.dtype == torch.int32
    assert saved.tolist() == list(range(9))
    assert token_cache.tokens("testing").tolist() == [0, 1, 2, 3]
    assert token_cache.tokens("deploy").tolist() == [4, 5, 6, 7, 8]


def test_every_entry_of_the_metadata_says_where_its_rows_are(token_cache):
    entries = json.loads((token_cache.path / "metadata.json").read_text())
    assert [entry["idx"] for entry in entries] == [0, 1, 2, 3, 4]
    assert [entry["class"] for entry in entries] == [record["type"] for record in RECORDS]
    assert [entry["rows"] for entry in entries] == [[0, 2], [0, 3], [3, 4], [2, 4], [4, 5]]
    assert [entry["n_tokens"] for entry in entries] == [2, 3, 1, 2, 1]
    assert entries[0]["question"] == "question 0"


def test_the_metadata_are_readable_json_in_the_same_bytes_as_pythons():
    odd = "".join(map(chr, range(1, 0x300))) + '"\\/\u2028\ufeff\uffff🙂'
    records = [
        {"question": odd, "type": "x", "id": "é", "category": odd, "group": "g"},
        {"question": "plain", "type": "y"},
    ]
    entries = [
        {"idx": 0, "id": "é", "group": "g", "class": "x", "question": odd, "category": odd},
        {"idx": 1, "id": "1", "group": "1", "class": "y", "question": "plain"},
    ]
    for entry in entries:
        entry |= {"rows": [0, 1], "n_tokens": 1, "input_tokens": 3}
    assert blueprint_of(records, [0], 2).metadata == encode_json(entries)


def test_the_manifest_says_what_the_guide_reads(cache):
    info = json.loads((cache.path / "layer_info.json").read_text())
    assert info["layers"] == [10, 20]
    assert info["num_examples"] == 5
    assert "0 = embeddings" in info["layer_convention"]
    for name, record in info["files"].items():
        content = (cache.path / name).read_bytes()
        assert record["sha256"] == hashlib.sha256(content).hexdigest()
        assert record["bytes"] == len(content)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writing_through_a_tensor_never_changes_the_file(tmp_path, dtype):
    cache = write_cache(tmp_path / "cache", RECORDS, {10: rows(dtype=dtype)})
    before = rows_of(cache, "testing", 10)
    tensor = cache["testing", 10]
    tensor.fill_(7)
    assert (tensor == 7).all()
    assert torch.equal(rows_of(cache, "testing", 10), before)
    assert torch.equal(cache["testing", 10], before)


def test_equal_data_give_equal_bytes_under_any_name(tmp_path):
    for name in ("a", "another_name"):
        write_cache(tmp_path / name, RECORDS, {10: rows()}, tokens=[1] * 5, positions="all")
    for path in [*sorted((tmp_path / "a").rglob("*.pt")), tmp_path / "a" / "metadata.json"]:
        twin = tmp_path / "another_name" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == twin.read_bytes()


@pytest.mark.parametrize("spans", [None, SPANS])
def test_the_blueprint_knows_every_byte_before_anything_is_written(tmp_path, spans):
    options = {"tokens": TOKENS, "positions": "all"}
    cache = write_cache(tmp_path / "c", RECORDS, {3: rows(0, 9)}, spans=spans, **options)
    blueprint = blueprint_of(RECORDS, [3], HIDDEN, tells_spans=spans is not None, **options)
    written = sum(path.stat().st_size for path in cache.path.rglob("*") if path.is_file())
    assert blueprint.total_bytes(cache.identity) == written


def test_spans_are_read_class_by_class_as_plain_torch_reads_them(token_cache):
    plain = torch.load(token_cache.path / "spans.pt", weights_only=True)
    assert (plain.dtype, plain.tolist()) == (torch.int32, SPANS.tolist())
    assert token_cache.spans("testing").tolist() == SPANS[:4].tolist()
    assert token_cache.spans("deploy").tolist() == SPANS[4:].tolist()
    with pytest.raises(UsageError, match="expected one of the classes"):
        token_cache.spans("third")


def test_a_cache_of_one_row_per_example_has_no_spans(cache):
    assert cache.spans("testing") is None
    assert not (cache.path / "spans.pt").exists()


@pytest.mark.parametrize("spans", [None, SPANS])
def test_layers_that_are_added_leave_tokens_and_spans_as_they_are(tmp_path, spans):
    options = {"tokens": TOKENS, "positions": "all", "spans": spans}
    cache = write_cache(tmp_path / "c", RECORDS, {10: rows(1, 9)}, **options)
    before = {path.name: path.read_bytes() for path in cache.path.glob("*.pt")}
    grown = write_cache(tmp_path / "c", RECORDS, {20: rows(2, 9)}, add_to=cache, **options)
    assert grown.layers == (10, 20)
    assert {path.name: path.read_bytes() for path in grown.path.glob("*.pt")} == before
    assert len(before) == (1 if spans is None else 2)
    assert verify(grown.path).whole


def test_entries_of_an_earlier_version_stay_when_layers_are_added(tmp_path):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    records = [{"messages": turns, "type": label, "id": label} for label in ("a", "b")]
    short = [{"question": "one", "type": label, "id": label} for label in ("a", "b")]
    cache = write_cache(tmp_path / "c", short, {10: rows(1, 2)})
    before = (cache.path / "metadata.json").read_bytes()
    grown = write_cache(tmp_path / "c", records, {20: rows(2, 2)}, add_to=cache)
    assert (cache.path / "metadata.json").read_bytes() == before
    assert verify(grown.path).whole
    assert grown.examples[0].messages is None


def test_messages_are_told_where_the_question_does_not_tell_them(tmp_path):
    turns = [{"role": "system", "content": "Be"}, {"role": "user", "content": "Who?"}]
    records = [
        {"messages": turns, "type": "a"},
        {"messages": turns[1:], "type": "b"},
        {"text": "Who?", "type": "b"},
    ]
    cache = write_cache(tmp_path / "c", records, {10: rows(1, 3)})
    entries = json.loads((cache.path / "metadata.json").read_text())
    assert [entry.get("messages") for entry in entries] == [turns, None, None]
    expected = [("system", "Be"), ("user", "Who?")]
    found = [[(t.role, t.content) for t in e.conversation.turns] for e in cache.examples]
    assert found == [expected, expected[1:], expected[1:]]


@pytest.mark.parametrize("dtype", [*DTYPES, "int32"])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (1000, 64)])
def test_a_tensor_file_is_as_large_as_foretold(tmp_path, dtype, shape):
    import io

    buffer = io.BytesIO()
    torch.save(torch.zeros(shape, dtype=getattr(torch, dtype)), buffer)
    assert file_bytes(shape, dtype) == len(buffer.getvalue())


# ---------------------------------------------------------------- what it does not hold


def test_a_layer_that_is_not_cached_is_refused_with_those_that_are_and_a_command(cache):
    with pytest.raises(LayerNotCachedError) as caught:
        cache["testing", 22]
    assert str(caught.value) == (
        f"Layer 22 not found in cache {cache.path}: cached layers are 10, 20; add it with: "
        "probecache extract --model org/planted --data planted.json --layers 22 "
        f"--output {cache.path} --dtype float32 --positions last"
    )


def test_a_layer_that_the_model_lacks_is_refused_with_the_range(cache):
    with pytest.raises(LayerNotCachedError, match=r"Layer 25 not found .* has layers 0 to 24;"):
        cache["testing", 25]


def test_the_command_that_adds_a_layer_names_every_option_the_cache_was_made_with(tmp_path):
    cache = write_cache(
        tmp_path / "cache",
        RECORDS,
        {10: rows()},
        revision="main",
        system_prompt="Be kind.",
        chat_template=None,
        special_tokens_kept=True,
    )
    with pytest.raises(LayerNotCachedError) as caught:
        cache.require_layer(3)
    assert str(caught.value).endswith(
        "--system-prompt 'Be kind.' --no-chat-template --keep-special-tokens"
    )
    assert "--model org/planted --revision main --data planted.json --layers 3" in str(caught.value)


def test_an_unknown_class_is_refused_with_those_that_are(cache):
    with pytest.raises(UsageError, match="testing, deployment, got 'neither'"):
        cache["neither", 10]


# ---------------------------------------------------------------- names of classes

HOSTILE = [
    "../x",
    "..",
    "/etc/passwd",
    "A",
    "a",
    "測試",
    "試",
    "",
    " ",
    "a/b",
    "a_b",
    "con\x00",
    "-",
]
HOSTILE += ["x" * 300, "test", "testing", "deploy", "deployment", "tokens", "a\nb", "."]


@given(st.lists(st.text(max_size=8) | st.sampled_from(HOSTILE), unique=True, max_size=12))
def test_prefixes_are_safe_and_differ_even_where_case_does_not_count(labels):
    prefixes = class_prefixes(tuple(labels))
    assert list(prefixes) == labels
    assert len({prefix.casefold() for prefix in prefixes.values()}) == len(labels)
    for prefix in prefixes.values():
        assert prefix
        assert len(prefix) <= 64
        assert set(prefix) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
        )


def test_classes_of_hostile_names_stay_in_the_folder_and_apart(tmp_path):
    may_be = {label.casefold(): label for label in HOSTILE if label.strip()}  # of one data set
    labels = [*may_be.values()]
    assert len(labels) > 15
    values = rows(0, len(labels))
    cache = write_cache(tmp_path / "in" / "cache", labelled(*labels), {10: values})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["cache"]
    assert len(list((cache.path / "layer_10").glob("*.pt"))) == len(labels)
    for place, label in enumerate(labels):
        assert torch.equal(cache[label, 10], values[place : place + 1]), label


# ---------------------------------------------------------------- unfinished or cut


def test_a_folder_without_manifest_is_refused_as_unfinished(cache):
    (cache.path / "layer_info.json").unlink()
    with pytest.raises(StoreError, match="not a cache"):
        open_cache(cache.path)
    with pytest.raises(StoreError, match="nothing there"):
        open_cache(cache.path / "none")


@pytest.mark.parametrize("name", ["layer_10/test_activations.pt", "tokens.pt"])
def test_a_file_that_was_cut_or_is_missing_is_refused_by_name(token_cache, name):
    path = token_cache.path / name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(StoreError, match=f"{name} to have .* the file was cut"):
        open_cache(token_cache.path)
    path.unlink()
    with pytest.raises(StoreError, match=f"expected the file .*{name}, got: No such file"):
        open_cache(token_cache.path)


def test_a_missing_metadata_file_is_refused(cache):
    (cache.path / "metadata.json").unlink()
    with pytest.raises(StoreError, match=r"metadata\.json, got: No such file"):
        _ = open_cache(cache.path).examples


# ---------------------------------------------------------------- forged manifests

FILE = "layer_10/test_activations.pt"
FORGERIES = {
    "another shape": lambda m: m["files"][FILE].update(shape=[3, HIDDEN]),
    "a shape of other rank": lambda m: m["files"][FILE].update(shape=[2 * HIDDEN]),
    "another dtype": lambda m: m["files"][FILE].update(dtype="bfloat16"),
    "a dtype that is none": lambda m: m["files"]["tokens.pt"].update(dtype="object"),
    "tokens of a negative shape": lambda m: m["files"]["tokens.pt"].update(shape=[-1]),
    "tokens of a shape that wraps": lambda m: m["files"]["tokens.pt"].update(shape=[2**40, 2**40]),
    "tokens of another number": lambda m: m["files"]["tokens.pt"].update(shape=[8]),
    "tokens of a float dtype": lambda m: m["files"]["tokens.pt"].update(dtype="float32"),
    "no tokens": lambda m: m["files"].pop("tokens.pt"),
    "spans of another number": lambda m: m["files"]["spans.pt"].update(shape=[8, 4]),
    "spans of another width": lambda m: m["files"]["spans.pt"].update(shape=[9, 3]),
    "spans of one row of numbers": lambda m: m["files"]["spans.pt"].update(shape=[36]),
    "spans of a float dtype": lambda m: m["files"]["spans.pt"].update(dtype="float32"),
    "spans at an offset within a number": lambda m: m["files"]["spans.pt"].update(offset=701),
    "positions that are no expression": lambda m: m.update(positions="match:("),
    "positions that are none": lambda m: m.update(positions=None),
    "an offset beyond the file": lambda m: m["files"][FILE].update(offset=10**6),
    "a negative offset": lambda m: m["files"][FILE].update(offset=-8),
    "an offset beyond 64 bits": lambda m: m["files"][FILE].update(offset=2**70),
    "another size": lambda m: m["files"][FILE].update(bytes=10**15),
    "no hash": lambda m: m["files"][FILE].update(sha256=""),
    "a file outside": lambda m: m["files"].update({"../../etc/passwd": m["files"][FILE]}),
    "an absolute file": lambda m: m["files"].update({"/etc/passwd": m["files"][FILE]}),
    "a file too many": lambda m: m["files"].update({"layer_11/x.pt": m["files"][FILE]}),
    "a layer too many": lambda m: m["layers"].append(11),
    "a layer twice": lambda m: m["layers"].append(10),
    "a layer below none": lambda m: m.update(layers=[-1]),
    "a layer that is text": lambda m: m.update(layers=["../10"]),
    "more layers than the model has": lambda m: m["identity"].update(num_hidden_layers=9),
    "a prefix that leads outside": lambda m: m["classes"]["testing"].update(prefix="../x"),
    "an empty prefix": lambda m: m["classes"]["testing"].update(prefix=""),
    "a prefix of two classes": lambda m: m["classes"]["testing"].update(prefix="deploy"),
    "rows below none": lambda m: m["classes"]["testing"].update(rows=-1),
    "rows beyond the file": lambda m: m["classes"]["testing"].update(rows=10**30),
    "no classes": lambda m: m.update(classes={}),
    "another width": lambda m: m.update(hidden_size=HIDDEN + 1),
    "no width": lambda m: m.update(hidden_size=0),
    "a width that is text": lambda m: m.update(hidden_size="wide"),
    "an unknown dtype": lambda m: m.update(dtype="float8"),
    "unknown positions": lambda m: m.update(positions="everywhere"),
    "positions of one row": lambda m: m.update(positions="last"),
    "another format": lambda m: m.update(format="other"),
    "a later version": lambda m: m.update(format_version=2),
    "a field too many": lambda m: m.update(surprise=1),
    "an identity that is none": lambda m: m.update(identity="me"),
    "an identity without weights": lambda m: m["identity"].pop("weights"),
    "files that are a list": lambda m: m.update(files=[]),
    "no examples": lambda m: m.update(num_examples=0),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_manifest_is_refused(token_cache, forgery):
    path = token_cache.path / "layer_info.json"
    manifest = json.loads(path.read_text())
    FORGERIES[forgery](manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="expected"):
        open_cache(token_cache.path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"layers": ' + b"9" * 5000 + b"}"],
)
def test_a_manifest_that_is_no_json_object_is_refused(cache, content):
    (cache.path / "layer_info.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"layer_info\.json"):
        open_cache(cache.path)


ENTRY_FORGERIES = {
    "rows beyond the class": lambda e: e[0].update(rows=[0, 100]),
    "rows of another example": lambda e: e[3].update(rows=[0, 2]),
    "rows backwards": lambda e: e[0].update(rows=[2, 0]),
    "negative rows": lambda e: e[0].update(rows=[-2, 0]),
    "a number out of order": lambda e: e[0].update(idx=3),
    "a number beyond all": lambda e: e[0].update(idx=10**12),
    "another class": lambda e: e[2].update({"class": "testing"}),
    "an unknown class": lambda e: e[2].update({"class": "third"}),
    "an example less": lambda e: e.pop(),
    "no tokens": lambda e: e[0].update(n_tokens=0),
    "messages that are none": lambda e: e[0].update(messages=[]),
    "messages that are text": lambda e: e[0].update(messages="hello"),
    "a message without a role": lambda e: e[0].update(messages=[{"content": "x"}]),
    "a message of numbers": lambda e: e[0].update(messages=[{"role": 1, "content": 2}]),
    "a message with a field too many": lambda e: e[0].update(
        messages=[{"role": "user", "content": "x", "name": "y"}]
    ),
    "a question that is none": lambda e: e[0].update(question=None),
    "a field too many": lambda e: e[0].update(surprise=1),
    "no entries": lambda e: e.clear(),
}


@pytest.mark.parametrize("forgery", ENTRY_FORGERIES)
def test_forged_metadata_are_refused(token_cache, forgery):
    path = token_cache.path / "metadata.json"
    entries = json.loads(path.read_text())
    ENTRY_FORGERIES[forgery](entries)
    path.write_text(json.dumps(entries))
    with pytest.raises(StoreError, match=r"metadata\.json"):
        _ = open_cache(token_cache.path).examples


# ---------------------------------------------------------------- failing and being killed


def test_a_disk_that_fills_up_midway_is_told_and_keeps_what_was_written(tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def pwrite(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match=r"room for [\d,]+ bytes .* disk or quota is full"):
        write_cache(tmp_path / "cache", RECORDS, {10: rows()})
    monkeypatch.undo()
    with pytest.raises(StoreError, match="has not finished"):
        open_cache(tmp_path / "cache")
    with writer_of(tmp_path / "cache", blueprint_of(RECORDS, [10], HIDDEN)) as writer:
        assert writer.done([10]).tolist() == [True, True, True, True, False]
    resumed = write_cache(tmp_path / "cache", RECORDS, {10: rows()})
    assert torch.equal(rows_of(resumed, "testing", 10), rows()[IS_TESTING])


def test_a_disk_that_cannot_hold_the_files_is_told_before_the_first_row(tmp_path, monkeypatch):
    def fallocate(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with (
        pytest.raises(OutputError, match="disk or quota is full"),
        writer_of(tmp_path / "cache", blueprint_of(RECORDS, [1], HIDDEN)),
    ):
        pytest.fail("the writer opened")
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_finished(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[:5], at))
    cache = write_cache(tmp_path / "cache", RECORDS, {10: rows()})
    assert torch.equal(rows_of(cache, "testing", 10), rows()[IS_TESTING])


def test_layers_are_added_without_touching_those_that_are_there(cache):
    before = (cache.path / "layer_10" / "test_activations.pt").stat()
    new = rows(15)
    grown = write_cache(cache.path, RECORDS, {15: new}, add_to=cache)
    assert grown.layers == (10, 15, 20)
    assert torch.equal(rows_of(grown, "testing", 15), new[IS_TESTING])
    after = (cache.path / "layer_10" / "test_activations.pt").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sorted(open_cache(cache.path).identity.weights) == [10, 15, 20]
    assert [path.name for path in cache.path.parent.iterdir()] == ["cache"]


def test_added_layers_count_only_once_the_manifest_names_them(cache, monkeypatch):
    before = (cache.path / "layer_info.json").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("probecache.store.commit.write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        write_cache(cache.path, RECORDS, {15: rows(15)}, add_to=cache)
    monkeypatch.undo()
    assert (cache.path / "layer_info.json").read_bytes() == before
    assert open_cache(cache.path).layers == (10, 20)
    finish_complete(cache.path)
    assert open_cache(cache.path).layers == (10, 15, 20)
    assert torch.equal(rows_of(open_cache(cache.path), "testing", 15), rows(15)[IS_TESTING])
    assert not (cache.path / "unfinished").exists()


# ---------------------------------------------------------------- runs


@pytest.fixture
def run(tmp_path):
    made = np.random.default_rng(0)
    probes = {
        layer: fit_difference_of_means(made.normal(1, 1, (4, 5)), made.normal(0, 1, (3, 5)))
        for layer in (4, 12)
    }
    about = {
        "method": METHOD,
        "positive_class": "deployment",
        "negative_class": "testing",
        "hidden_size": 5,
        "positions": "last",
        "answered": False,
        "source_cache": "somewhere",
        "source_cache_sha256": "0" * 64,
        "identity": IDENTITY,
    }
    return save(tmp_path / "run", probes, about), probes, about


def save(output, probes, about):
    layers = {layer: TrainedLayer(probe) for layer, probe in probes.items()}
    return save_run(output, {METHOD: TrainedRun(layers, about)})[METHOD]


def test_a_run_holds_raw_and_unit_vectors_and_explains_itself_in_both(run):
    folder, probes, _ = run
    assert sorted(path.name for path in folder.iterdir()) == [
        "normalized_vectors",
        "run.json",
        "vectors",
    ]
    for name in ("vectors", "normalized_vectors"):
        info = json.loads((folder / name / "vectors.json").read_text())
        assert info["positive_class"] == "deployment"
        assert info["normalized"] == (name == "normalized_vectors")
        assert "residual stream after L blocks" in info["layer_convention"]
        assert sorted(info["layers"]) == ["12", "4"]
    for layer, probe in probes.items():
        raw = torch.load(folder / "vectors" / f"layer_{layer}.pt", weights_only=True)
        unit = torch.load(folder / "normalized_vectors" / f"layer_{layer}.pt", weights_only=True)
        assert raw.dtype == unit.dtype == torch.float32
        assert raw.shape == unit.shape == (5,)
        assert unit.double().norm().item() == pytest.approx(1, abs=1e-6)
        assert torch.allclose(raw, unit * probe.raw_norm, rtol=1e-6)
        assert torch.equal(load_vectors(folder)[layer], unit)
        assert torch.equal(load_vectors(folder / "vectors")[layer], raw)


def test_thresholds_are_in_the_units_of_their_folders_scores(run):
    folder, probes, _ = run
    unit, raw = load_vectors(folder), load_vectors(folder / "vectors")
    for layer, probe in probes.items():
        assert unit.info.layers[layer].threshold == probe.threshold
        assert raw.info.layers[layer].threshold == pytest.approx(probe.threshold * probe.raw_norm)


def test_a_copied_folder_of_vectors_loads_and_means_the_same(run, tmp_path):
    import shutil

    folder, _, _ = run
    copy = shutil.copytree(folder / "normalized_vectors", tmp_path / "elsewhere")
    shutil.rmtree(folder)
    found = load_vectors(copy)
    assert found.layers == (4, 12)
    assert found.info.positive_class == "deployment"


def test_a_flipped_bit_in_a_vector_is_refused(run):
    folder, _, _ = run
    path = folder / "normalized_vectors" / "layer_12.pt"
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), 97):
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(StoreError, match=r"layer_12\.pt as it was written"):
            load_vectors(folder)
        content[place] ^= 1
    path.write_bytes(content)
    load_vectors(folder)


VECTOR_FORGERIES = {
    "a file of other width": lambda m: m["layers"]["4"]["file"].update(shape=[4]),
    "a file of no width": lambda m: m["layers"]["4"]["file"].update(shape=[-5]),
    "another width": lambda m: m.update(hidden_size=4),
    "a threshold that is no number": lambda m: m["layers"]["4"].update(threshold=float("nan")),
    "an infinite threshold": lambda m: m["layers"]["4"].update(threshold=float("inf")),
    "a norm of nothing": lambda m: m["layers"]["4"].update(raw_norm=0),
    "a layer that is a path": lambda m: m["layers"].update({"../4": m["layers"]["4"]}),
    "a layer without file": lambda m: m["layers"].update({"5": m["layers"]["4"]}),
    "no layers": lambda m: m.update(layers={}),
    "another format": lambda m: m.update(format="probecache"),
    "no positive class": lambda m: m.pop("positive_class"),
}


@pytest.mark.parametrize("forgery", VECTOR_FORGERIES)
def test_forged_vectors_are_refused(run, forgery):
    folder, _, _ = run
    path = folder / "normalized_vectors" / "vectors.json"
    manifest = json.loads(path.read_text())
    VECTOR_FORGERIES[forgery](manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="expected"):
        load_vectors(folder)


def test_two_runs_in_one_second_get_two_names(run, tmp_path):
    folder, probes, about = run
    second = save(tmp_path / "run", probes, about)
    third = save(tmp_path / "run", probes, about)
    assert len({folder, second, third}) == 3
    for path in (folder, second, third):
        stamp = path.name.removeprefix("run_")
        time.strptime(stamp, "%Y%m%d_%H%M%S")
        assert load_vectors(path).layers == (4, 12)


@pytest.mark.parametrize("name", [".", "/"])
def test_a_run_without_a_name_is_refused(run, name):
    with pytest.raises(OutputError, match="name a folder"):
        save(Path(name), run[1], run[2])


def test_a_place_without_vectors_is_refused_with_where_to_point(tmp_path):
    with pytest.raises(StoreError, match="RUN/normalized_vectors"):
        load_vectors(tmp_path)


# ---------------------------------------------------------------- in words


def test_a_cache_and_a_run_are_described(cache, run):
    text = "\n".join(describe(cache.path))
    for word in ("org/planted", "10,20", "testing 2 examples", "0 = embeddings", "float32"):
        assert word in text
    text = "\n".join(describe(run[0]))
    for word in ("unit norm", "deployment (against testing)", "4,12"):
        assert word in text


def test_control_characters_of_foreign_names_are_shown_and_not_obeyed(tmp_path):
    name = "org/\x1b[2J\x07evil"
    write_cache(tmp_path / "c", RECORDS, {10: rows()}, model=name)
    text = "".join(describe(tmp_path / "c"))
    assert "\\x1b[2J\\x07evil" in text
    assert "\x1b" not in text


def test_a_place_that_is_neither_is_refused(tmp_path):
    with pytest.raises(StoreError, match="a folder without their manifests"):
        describe(tmp_path)
    with pytest.raises(StoreError, match="nothing there"):
        describe(tmp_path / "none")


# ---------------------------------------------------------------- several writers, links


def adding(folder, layer):
    """A writer that adds a layer to a cache; leave its context to close it."""
    return writer_of(folder, blueprint_of(RECORDS, [layer], HIDDEN), open_cache(folder).info)


def commit(writer, layer, seed):
    writer.write(layer, range(len(RECORDS)), rows(seed))
    weights = {known: f"{known:064x}" for known in (10, 20, layer)}
    identity = replace(open_cache(writer.final).identity, weights=weights)
    writer.commit(identity, TIMING, EXECUTION)


def test_of_two_runs_that_add_layers_the_second_is_told_who_writes(cache):
    with adding(cache.path, 5) as first:
        with pytest.raises(OutputError, match=rf"process {os.getpid()} on .* is extracting"):
            adding(cache.path, 7).__enter__()
        commit(first, 5, seed=5)
    with adding(cache.path, 7) as second:
        commit(second, 7, seed=7)
    whole = open_cache(cache.path)
    assert whole.layers == (5, 7, 10, 20)
    assert set(whole.identity.weights) == {5, 7, 10, 20}
    for layer in (5, 7):
        assert torch.equal(rows_of(whole, "testing", layer), rows(layer)[IS_TESTING])


def test_a_users_file_where_a_layer_would_go_is_kept(cache):
    (cache.path / "layer_5").mkdir()
    (cache.path / "layer_5" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt"):
        require_free_layers(cache.path, blueprint_of(RECORDS, [5], HIDDEN))
    with adding(cache.path, 5) as writer:  # put there meanwhile
        commit(writer, 5, seed=1)
    assert (cache.path / "layer_5" / "notes.txt").read_text() == "mine"


def test_what_a_killed_run_left_where_a_layer_goes_is_replaced(cache):
    (cache.path / "layer_5").mkdir()
    (cache.path / "layer_5" / "test_activations.pt").write_bytes(b"half")
    with adding(cache.path, 5) as writer:
        commit(writer, 5, seed=3)
    assert torch.equal(rows_of(open_cache(cache.path), "testing", 5), rows(3)[IS_TESTING])


@pytest.mark.parametrize("there", [True, False], ids=["to an empty folder", "to nothing"])
def test_a_cache_written_through_a_link_lies_where_the_link_leads(tmp_path, there):
    target = tmp_path / "disk" / "cache"
    target.mkdir(parents=True) if there else target.parent.mkdir()
    (tmp_path / "link").symlink_to(target)
    cache = write_cache(tmp_path / "link", RECORDS, {10: rows()})
    assert (tmp_path / "link").is_symlink()
    write_cache(tmp_path / "link", RECORDS, {20: rows(2)}, add_to=cache)
    assert open_cache(target).layers == (10, 20)
    assert [path.name for path in target.parent.iterdir()] == ["cache"]
