"""Manifests and data files of any make: read as they say, or refused by an error of ours.

More than ten thousand examples, each held against an independent reading by json, csv and NumPy.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from synthetic import labelled, train, validate, write_cache

from probecache.dataset import load_dataset
from probecache.errors import DataError, StoreError
from probecache.report.saved import read_validation
from probecache.store.describe import describe
from probecache.store.reader import open_cache
from probecache.store.vectors import load_vectors

LABELS = ["testing", "deployment"] * 3
TOKENS = [2, 1, 3, 1, 1, 2]
HIDDEN = 4
NUMPY = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int32": "<i4"}


def many(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


# ---------------------------------------------------------------- manifests


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache, a run and a validation, small and whole."""
    folder = tmp_path_factory.mktemp("made")
    generator = torch.Generator().manual_seed(0)
    rows = {layer: torch.randn(sum(TOKENS), HIDDEN, generator=generator) for layer in (0, 3)}
    records = labelled(*LABELS)
    cache = write_cache(folder / "cache", records, rows, tokens=TOKENS, positions="all")
    vectors = train(cache, folder / "run")
    validate(cache, vectors, folder / "validation")
    return {"cache": cache.path, "run": vectors.path, "validation": folder / "validation"}


EDGES = [None, True, False, 0, 1, 2, -1, 3.0, 1e300, 2**31, 2**63, 2**64, 10**30, 10**400, "", "0"]
EDGES += ["..", "../../x", "/etc/passwd", "a\0b", "\x1b[2J", "\ud800", "x" * 300, "CON", "test"]
EDGES += [[], {}, [0], [[]], {"": {}}, {"..": 1}, [2**40, 2**40], [0, 10**30], [True, 4], "layer_0"]
ANY = st.sampled_from(EDGES) | st.integers(-3, 60) | st.text(max_size=4)


def places(content: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value that something can be put to."""
    if not isinstance(content, dict | list):
        return []
    found = []
    for key in content if isinstance(content, dict) else range(len(content)):
        found += [(*at, key), *places(content[key], (*at, key))]
    return found


def changed(data: st.DataObject, content: Any) -> Any:
    """The content with one to three things replaced, removed, renamed, added or doubled."""
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        found = places(content)
        assume(found)
        *parents, key = data.draw(st.sampled_from(found))
        inside = content
        for parent in parents:
            inside = inside[parent]
        match data.draw(st.sampled_from(["replace", "replace", "remove", "rename", "double"])):
            case "replace":
                inside[key] = copy.deepcopy(data.draw(ANY))
            case "remove":
                del inside[key]
            case "rename" if isinstance(inside, dict):
                inside[str(data.draw(ANY))] = inside.pop(key)
            case _ if isinstance(inside, list):
                inside.insert(key, copy.deepcopy(inside[key]))
            case _:
                inside[key] = [inside[key]] * 2
    return content


INSERTS = [b"[", b"]", b"{", b"}", b",", b'"', b"\\", b"\0", b"\xff", b"NaN", b"1e999", b"9" * 5000]
INSERTS += [b"\xef\xbb\xbf", b"\n", b"null", b"-", b'"a":', b"\\ud800", b"[" * 2000, b"\x1b[2J"]


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """The bytes with one piece cut out, put in, or put in the place of another."""
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.sampled_from([start, start, start + 1, start + 20, len(content)]))
    return content[:start] + data.draw(st.sampled_from([b"", *INSERTS])) + content[stop:]


def hold_against(
    data: st.DataObject, path: Path, opened: Callable[[], None], refused: type[Exception]
) -> None:
    """Change a manifest; what opens it says what is true, or refuses by an error of this kind."""
    before = path.read_bytes()
    if data.draw(st.integers(0, 3)):
        text = json.dumps(changed(data, json.loads(before)))
        path.write_bytes(text.encode())
    else:
        path.write_bytes(damaged(data, before))
    try:
        read_or_refused(opened, refused)
    finally:
        path.write_bytes(before)


def read_or_refused(read: Callable[[], Any], refused: type[Exception]) -> Any:
    """What is read, or None after an error of this kind, in one short line that shows all of it."""
    try:
        return read()
    except refused as error:
        message = str(error)
    assert {unicodedata.category(c)[0] for c in message if c not in "\u200c\u200d"} <= set("LMNPSZ")
    assert 10 < len(message) < 2100
    return None


def open_whole_cache(folder: Path) -> None:
    cache = open_cache(folder)
    describe(folder)
    raw = NUMPY[str(cache.info.dtype)]
    entries = cache.examples
    assert [entry.idx for entry in entries] == list(range(len(entries)))
    for label, record in cache.info.classes.items():
        spans = [entry.rows for entry in entries if entry.label == label]
        assert [i for start, stop in spans for i in range(start, stop)] == list(range(record.rows))
        for layer in cache.layers:
            name = f"layer_{layer}/{record.prefix}_activations.pt"
            file = cache.info.files[name]
            rows = cache[label, layer]
            assert rows.shape == (record.rows, cache.hidden_size)
            there = (folder / name).read_bytes()
            assert len(there) == file.bytes
            expected = np.frombuffer(there, raw, rows.numel(), file.offset)
            assert rows.contiguous().view(torch.uint8).numpy().tobytes() == expected.tobytes()
        tokens = cache.tokens(label)
        assert tokens is None or tokens.shape == (record.rows,)


def open_all_vectors(folder: Path) -> None:
    vectors = load_vectors(folder)
    describe(folder)
    for layer in vectors.layers:
        file = vectors.info.layers[layer].file
        there = (folder / f"layer_{layer}.pt").read_bytes()
        expected = np.frombuffer(there, "<f4", vectors.info.hidden_size, file.offset)
        assert vectors[layer].numpy().tobytes() == expected.tobytes()


def open_whole_validation(folder: Path) -> None:
    found = read_validation(folder)
    for layer, scores in found.scores.items():
        with (folder / f"probe_stats_layer{layer}.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        assert list(scores.classes) == [row["type"] for row in table]
        assert list(scores.scores) == [float(row["mean_score"]) for row in table]
        assert found.results[layer].n_positive == int(scores.is_positive.sum())


@pytest.mark.slow
@many(2500)
@given(data=st.data())
def test_a_manifest_of_any_make_opens_to_what_the_files_hold_or_is_refused(made, data):
    folder = made["cache"]
    hold_against(data, folder / "layer_info.json", lambda: open_whole_cache(folder), StoreError)


@pytest.mark.slow
@many(2500)
@given(data=st.data())
def test_metadata_of_any_make_share_out_every_row_or_are_refused(made, data):
    folder = made["cache"]
    hold_against(data, folder / "metadata.json", lambda: open_whole_cache(folder), StoreError)


@pytest.mark.slow
@many(1500)
@given(data=st.data())
def test_vectors_of_any_make_are_those_of_the_files_or_refused(made, data):
    folder = made["run"]
    hold_against(data, folder / "vectors.json", lambda: open_all_vectors(folder), StoreError)


@pytest.mark.slow
@many(1500)
@given(data=st.data(), name=st.sampled_from(["summary.json", "probe_stats_layer3.csv"]))
def test_a_validation_of_any_make_agrees_with_its_scores_or_is_refused(made, data, name):
    folder, path = made["validation"], made["validation"] / name
    if name == "summary.json":
        hold_against(data, path, lambda: open_whole_validation(folder), StoreError)
        return
    before = path.read_bytes()
    path.write_bytes(damaged(data, before))
    try:
        read_or_refused(lambda: open_whole_validation(folder), StoreError)
    finally:
        path.write_bytes(before)


# ---------------------------------------------------------------- data sets

AWKWARD = ["a", "=1+1", 'a "quote"', "a,b", "two\nlines", "two\r\nlines", "\0", "\x1b[2J", "\u2028"]
AWKWARD += ["é", "測", "\ufeffmark", "\u202eturned", "NaN", "[[[", "{}", "\\", "\\ud800", "😀", " "]
TEXTS = st.sampled_from([*AWKWARD, "x" * 3000]) | st.text(max_size=10)
QUESTIONS = TEXTS.filter(str.strip)
CLASSES = st.sampled_from(["test", "deploy", "a", "=b", "../../c", "NUL", "é"])


@st.composite
def records(draw):
    """Labelled records or pairs, some with an id, a group, a category; all of one set of fields."""
    names = ["question", "positive", "negative"] if draw(st.booleans()) else ["text", "label"]
    names += draw(st.lists(st.sampled_from(["id", "group", "category"]), unique=True))
    values = {"label": CLASSES, **dict.fromkeys(["id", "group", "category"], TEXTS.filter(bool))}
    one = st.fixed_dictionaries({name: values.get(name, QUESTIONS) for name in names})
    found = draw(st.lists(one, min_size=1, max_size=4))
    if "label" in names:
        found += [{**found[0], "label": label} for label in ("a", "b")]
    if "id" in names:  # each its own
        found = [{**one, "id": f"{one['id']}-{number}"} for number, one in enumerate(found)]
    return found


def as_json(rows):
    return json.dumps(rows, ensure_ascii=False).encode("utf-8", "surrogatepass")


def as_jsonl(rows):
    return b"\n".join(json.dumps(row).encode() for row in rows) + b"\n\n"


def as_csv(rows):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def independently(content: bytes, suffix: str) -> dict[int, dict[str, Any]]:
    """Row number to record, by the standard library alone."""
    text = content.decode("utf-8-sig")
    if suffix == ".json":
        return dict(enumerate(json.loads(text), start=1))
    if suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)
        return {row: json.loads(line) for row, line in lines if line.strip()}
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    return {
        row: {name: cell for name, cell in record.items() if cell != ""}
        for row, record in enumerate(table, start=1)
    }


def require_no_row_shifted(dataset, content, suffix):
    rows = independently(content, suffix)
    per_row = 2 if dataset.paired else 1
    assert [e.row for e in dataset.examples] == [row for row in rows for _ in range(per_row)]
    for place, found in enumerate(dataset.examples):
        record = rows[found.row]
        texts = [record[n] for n in ("question", "text", "prompt") if n in record]
        assert texts in ([found.question], [])  # none: messages
        assert found.id == str(record.get("id", place // per_row))
        if dataset.paired:
            names = ("positive", "negative") if "positive" in record else ("test", "deploy")
            assert found.answer == record[names[place % 2]]
            assert found.label == ("testing", "deployment")[place % 2]
        else:
            said = str(record.get("type", record.get("label")))
            assert found.label in (said, {"test": "testing", "deploy": "deployment"}.get(said))


ENCODERS = {".json": as_json, ".jsonl": as_jsonl, ".csv": as_csv}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ENCODERS)
@many(1000)
@given(data=st.data(), rows=records())
def test_a_data_file_gives_every_record_in_its_row_or_is_refused(tmp_path, suffix, data, rows):
    content, path = ENCODERS[suffix](rows), tmp_path / f"data{suffix}"
    for _ in range(data.draw(st.integers(0, 2))):
        content = damaged(data, content)
    path.write_bytes(content)
    dataset = read_or_refused(lambda: load_dataset(path), DataError)
    if dataset is not None:
        require_no_row_shifted(dataset, content, suffix)


@pytest.mark.parametrize("suffix", ENCODERS)
@many(150)
@given(rows=records())
def test_a_whole_data_file_is_read(tmp_path, suffix, rows):
    content, path = ENCODERS[suffix](rows), tmp_path / f"data{suffix}"
    path.write_bytes(content)
    dataset = load_dataset(path)
    require_no_row_shifted(dataset, content, suffix)
    assert dataset.num_examples == len(rows)
