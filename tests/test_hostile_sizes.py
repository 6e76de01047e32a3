"""Files that claim to be large, or grow large as they are read: refused, or read in little memory.

Memory is what the kernel says of a process of its own that does nothing else.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from synthetic import labelled, train, write_cache

from probecache.checkpoint import indexed_files, read_header
from probecache.errors import ModelError, NoDirectionError, StoreError
from probecache.store.reader import WIDEST, open_cache
from probecache.store.tensorfile import FileRecord, map_raw
from probecache.store.vectors import load_vectors

MB = 1 << 20
SIZE = 10 * MB
HASH = "0" * 64

# ---------------------------------------------------------------- what grows when it is read

SCRIPT = """
import re, resource, sys, time
from pathlib import Path
import numpy, pydantic
from probecache.dataset import load_dataset
from probecache.errors import ProbecacheError
from probecache.report.saved import read_validation
from probecache.store.reader import open_cache, _read_examples
from probecache.store.vectors import load_vectors
from probecache.store.layout import LayerInfo

def memory(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
path, before, started = Path(sys.argv[1]), memory("VmRSS"), time.monotonic()
if path.name == "layer_info.json":
    read = lambda: open_cache(path.parent)
elif path.name == "metadata.json":
    read = lambda: tuple(_read_examples(path))
elif path.name == "vectors.json":
    read = lambda: load_vectors(path.parent)
elif path.name == "summary.json":
    read = lambda: read_validation(path.parent)
else:
    read = lambda: load_dataset(path)
try:
    read()
    outcome = "read"
except ProbecacheError as error:
    outcome = "refused"
print(outcome, memory("VmHWM") - before, time.monotonic() - started)
"""

BOMBS = {
    "open brackets": b"[" * SIZE,
    "open objects": b'{"a":' * (SIZE // 5),
    "empty lists": b"[" + b"[]," * (SIZE // 3) + b"[]]",
    "empty objects": b"[" + b"{}," * (SIZE // 3) + b"{}]",
    "small objects": b"[" + b'{"a":1},' * (SIZE // 8) + b"{}]",
    "small numbers": b'{"layers": [' + b"1," * (SIZE // 2) + b"1]}",
    "numbers": b"[" + b"999," * (SIZE // 4) + b"1]",
    "one long number": b"[" + b"9" * SIZE + b"]",
    "an exponent": b"[1e" + b"9" * SIZE + b"]",
    "many fields": b"[{" + b",".join(b'"%x":1' % n for n in range(SIZE // 10)) + b"}]",
    "faults": b'{"layers": [' + b'"0123",' * (SIZE // 7) + b"0]}",
    "fields": b"{" + b",".join(b'"%x":1' % n for n in range(SIZE // 10)) + b"}",
    "quotes": b'["' + b'\\"' * (SIZE // 2),
    "a text": b'["' + b"x" * SIZE + b'"]',
    "a text of wide characters": b'["\xf0\x9f\x99\x82' + b"x" * SIZE + b'"]',
    "blanks": b" " * SIZE,
    "lines": b"\n" * SIZE,
    "commas": b"," * SIZE,
    "short columns": b"a,b\n" + b"x,y\n" * (SIZE // 4),
    "a quote that nothing closes": b'text,label\n"' + b"x\n" * (SIZE // 2),
}
JSON_FILES = ["layer_info.json", "metadata.json", "vectors.json", "summary.json"]
JSON_FILES += ["d.json", "d.jsonl"]
# Every bomb in one file, and every file with one of the worst bombs.
PAIRS = [(name, JSON_FILES[place % len(JSON_FILES)]) for place, name in enumerate(BOMBS)]
PAIRS += [("empty objects", name) for name in JSON_FILES]
PAIRS += [(name, "d.csv") for name in ("lines", "commas", "short columns", "quotes", "blanks")]
PAIRS += [("a quote that nothing closes", "d.csv"), ("many fields", "metadata.json")]
PAIRS += [("numbers", "metadata.json"), ("lines", "d.jsonl"), ("fields", "layer_info.json")]
PAIRS += [("faults", name) for name in ("layer_info.json", "vectors.json", "summary.json")]


@pytest.mark.slow
@pytest.mark.parametrize(("bomb", "name"), sorted(set(PAIRS)))
def test_reading_a_bomb_takes_a_small_multiple_of_its_size(tmp_path, bomb, name):
    (tmp_path / name).write_bytes(BOMBS[bomb])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / name)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcome, taken, seconds = done.stdout.split()
    assert outcome == "refused"
    assert int(taken) < 50 * SIZE, f"{int(taken) / SIZE:.1f} times the file"
    assert float(seconds) < 60


# ---------------------------------------------------------------- what claims to be large


def cache_of(folder, labels=("testing", "deployment") * 2):
    rows = torch.ones(len(labels), 4)
    return write_cache(folder / "cache", labelled(*labels), {0: rows})


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def record(**fields):
    whole = {"bytes": 1000, "offset": 64, "shape": (2, 3), "dtype": "float32", "sha256": HASH}
    return FileRecord.model_validate(whole | fields)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.pt"
    path.write_bytes(bytes(range(250)) * 4)
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": (2**40, 2**40)},
        {"shape": (2**62, 4)},
        {"shape": (2**64 + 2, 3)},
        {"shape": (10**400,)},
        {"shape": (0, 10**30)},
        {"shape": (10**30, 0)},
        {"shape": (1000, 1)},
        {"offset": 10**30},
        {"offset": 990},
        {"offset": 66},
        {"bytes": 10**15},
        {"bytes": 999},
    ],
)
def test_a_shape_or_place_that_the_file_does_not_have_is_refused_before_it_is_mapped(file, fields):
    with pytest.raises(StoreError, match="expected"):
        map_raw(file, record(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": (True, 3)},
        {"shape": (-1, 3)},
        {"shape": (2.0, 3)},
        {"shape": ("2", 3)},
        {"shape": ()},
        {"shape": (1, 2, 3)},
        {"offset": -4},
        {"offset": True},
        {"bytes": "1000"},
        {"dtype": "object"},
        {"dtype": "float64"},
        {"sha256": "0" * 63},
    ],
)
def test_a_record_of_other_kinds_of_values_is_none(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        record(**fields)


@pytest.mark.parametrize("offset", [0, 4, 64, 900])
def test_rows_are_found_at_any_whole_place(file, offset):
    rows = map_raw(file, record(offset=offset))
    assert rows.tobytes() == file.read_bytes()[offset : offset + 24]
    rows[:] = 7.0
    assert file.read_bytes() == bytes(range(250)) * 4
    assert map_raw(file, record(offset=offset, shape=(0, 3))).shape == (0, 3)


def test_rows_behind_the_first_pages_are_found(tmp_path):
    path, numbers = tmp_path / "rows.pt", np.arange(100_000, dtype="<i4")
    path.write_bytes(b"x" * 70_004 + numbers.tobytes())
    fields = {"bytes": 470_004, "offset": 70_004, "shape": (100_000,), "dtype": "int32"}
    assert np.array_equal(map_raw(path, record(**fields)), numbers)


def sparse_cache(folder, rows, width):
    """A cache whose one layer claims so many rows and columns, in files of holes."""
    cache = cache_of(folder)
    size = 64 + rows * width * 4
    file = {"bytes": size, "offset": 64, "shape": [rows, width], "dtype": "float32", "sha256": HASH}

    def share_out(entries):
        for number, entry in enumerate(entries):  # classes take turns, with two examples each
            entry["rows"] = [0, rows // 2] if number < 2 else [rows // 2, rows]

    def claim(manifest):
        manifest["hidden_size"] = manifest["identity"]["hidden_size"] = width
        for name in manifest["files"]:
            if name.endswith(".pt"):
                manifest["files"][name] = file
                os.truncate(cache.path / name, size)
        manifest["files"]["metadata.json"]["bytes"] = (cache.path / "metadata.json").stat().st_size
        for of_class in manifest["classes"].values():
            of_class["rows"] = rows

    edit(cache.path / "metadata.json", share_out)
    edit(cache.path / "layer_info.json", claim)
    return cache.path


def test_a_cache_far_larger_than_memory_is_opened_and_its_rows_are_mapped(tmp_path):
    cache = open_cache(sparse_cache(tmp_path, rows=2**28, width=2**10))  # a terabyte a class
    tracemalloc.start()
    rows = cache["testing", 0]
    assert rows.shape == (2**28, 2**10)
    assert rows[-1].sum() == 0
    first = next(cache.chunks("testing", 0))[1]
    assert tracemalloc.get_traced_memory()[1] < 200 * MB
    tracemalloc.stop()
    assert first.nbytes <= 64 * MB


def test_a_sparse_layer_is_fitted_in_bounded_memory(tmp_path):
    cache = open_cache(sparse_cache(tmp_path, rows=2**17, width=2**10))  # half a gigabyte a class
    tracemalloc.start()
    with pytest.raises(NoDirectionError):
        train(cache, tmp_path / "run", layers=[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 320 * MB  # two chunks of 64 MB, in float64


def test_a_row_without_end_is_refused(tmp_path):
    path = sparse_cache(tmp_path, rows=1, width=WIDEST + 1)
    with pytest.raises(StoreError, match="no model has wider ones"):
        open_cache(path)


@pytest.mark.parametrize("change", ["width", "file"])
def test_vectors_without_end_are_refused_before_they_are_read(tmp_path, change):
    run = train(write_cache(tmp_path / "c", labelled("testing", "deployment"),
                            {0: torch.eye(2, 4)}), tmp_path / "run").path  # fmt: skip
    width = WIDEST + 1 if change == "width" else 4
    size = 1 << 40

    def claim(manifest):
        manifest["hidden_size"] = width
        manifest["layers"]["0"]["file"].update(bytes=size, shape=[width])

    edit(run / "vectors.json", claim)
    os.truncate(run / "layer_0.pt", size)
    with pytest.raises(StoreError, match=r"no model has wider|a file of one vector"):
        load_vectors(run)


def test_zip_tricks_in_a_tensors_file_are_not_looked_at(tmp_path):
    """A .pt is a zip, but its directory is never read: a bomb or a path in it leads nowhere."""
    cache = cache_of(tmp_path)
    name = "layer_0/test_activations.pt"
    path = cache.path / name
    before = cache["testing", 0].clone()
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../../escaped", "x")
        archive.writestr("archive/data/1", bytes(50 * MB))
        archive.writestr("archive/data/0", b"overlapping")
    edit(cache.path / "layer_info.json",
         lambda m: m["files"][name].update(bytes=path.stat().st_size))  # fmt: skip
    tracemalloc.start()
    assert torch.equal(open_cache(cache.path)["testing", 0], before)
    assert tracemalloc.get_traced_memory()[1] < MB
    tracemalloc.stop()
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


# ---------------------------------------------------------------- weights


def safetensors(path, header, data=b"\0" * 64, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(start, stop, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": tensor(0, 16), "b": tensor(8, 24)}, "a and b in the same bytes"),
        ({"a": tensor(0, 16), "b": tensor(0, 16)}, "in the same bytes"),
        ({"a": tensor(0, 160, (40,))}, "outside the file"),
        ({"a": tensor(-16, 0)}, "outside the file"),
        ({"a": tensor(16, 0)}, "outside the file"),
        ({"a": tensor(0.0, 16.0)}, "outside the file"),
        ({"a": tensor(False, 16)}, "outside the file"),
        ({"a": tensor(0, 16, (2**64 + 4,))}, "in 16 bytes"),
        ({"a": tensor(0, 16, (-2, -2))}, "of shape"),
        ({"a": tensor(0, 16, (True, 4))}, "of shape"),
        ({"a": tensor(0, 16, (2**32, 2**32))}, "in 16 bytes"),
        (b'{"a": {}, "a": {}}', "a field twice"),
        (b"[" * 10_000, "nested too deep"),
        (b"[]", "expected a safetensors file"),
        (b"[" + b"{}," * MB + b"{}]", "too many values"),
    ],
)
def test_a_header_that_its_file_denies_is_refused(tmp_path, header, words):
    with pytest.raises(ModelError, match=words):
        list(read_header(safetensors(tmp_path / "m.safetensors", header)))


def test_tensors_side_by_side_and_empty_ones_are_read(tmp_path):
    header = {"a": tensor(16, 32), "none": tensor(8, 8, (0,)), "b": tensor(0, 16)}
    header["__metadata__"] = {"format": "pt"}
    found = list(read_header(safetensors(tmp_path / "m.safetensors", header)))
    assert [one.name for one in found] == ["a", "none", "b"]


@pytest.mark.parametrize("length", [10**6, 2**63, 2**64 - 1, 200_000_000])
def test_a_header_of_a_length_that_none_has_is_refused_before_it_is_read(tmp_path, length):
    path = safetensors(tmp_path / "m.safetensors", {}, length=length)
    if length == 200_000_000:
        os.truncate(path, 1 << 40)
    tracemalloc.start()
    with pytest.raises(ModelError, match="a header of"):
        list(read_header(path))
    assert tracemalloc.get_traced_memory()[1] < MB
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "", "a/b", 3, None])
def test_an_index_leads_nowhere_but_into_its_folder(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="plain file names"):
        indexed_files(tmp_path)
