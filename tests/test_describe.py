"""A cache or a run in words: what its manifests say, a line for each fact, safe for a terminal."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from datetime import datetime

import pytest
import torch
from synthetic import labelled, train, write_cache

from probecache.errors import StoreError
from probecache.store import describe as module
from probecache.store.describe import describe

RECORDS = labelled("testing", "deployment", "deployment", "testing", "deployment")
ROWS = torch.arange(5 * 6, dtype=torch.float32).reshape(5, 6)


def cache_in(folder, name="cache", rows=ROWS, layers=(0, 20), **options):
    return write_cache(folder / name, RECORDS, dict.fromkeys(layers, rows), **options)


def facts(path):
    """The lines by what stands at their beginning; every line in the one form."""
    lines = describe(path)
    found = dict(re.fullmatch(r"(\S.{0,15}\S) +(\S.*)", line).groups() for line in lines)
    assert [f"{name:<17} {value}" for name, value in found.items()] == lines
    return found


# ---------------------------------------------------------------- a cache


def test_a_cache_is_told_fact_by_fact(tmp_path):
    cache = cache_in(tmp_path)
    found = facts(cache.path)
    files = list(cache.path.glob("layer_*/*.pt"))
    assert len(files) == 4
    size = sum(file.stat().st_size for file in files)
    assert found["cache"] == str(cache.path)
    assert found["model"] == "org/planted (Planted, 24 blocks)"
    assert found["hidden size"] == "6"
    assert found["dtype"] == "float32"
    assert found["data"] == "planted.json"
    assert found["layers"] == "0,20"
    assert found["positions"] == "last"
    assert found["examples"] == "5 (testing 2 examples, 2 rows; deployment 3 examples, 3 rows)"
    assert found["tensors"] == f"{size:,} bytes in 4 files"
    assert found["rows with NaN/Inf"] == "0"
    written = datetime.fromtimestamp((cache.path / "layer_info.json").stat().st_mtime)
    assert found["written"] == f"{written:%Y-%m-%d %H:%M:%S}"
    assert "0 = embeddings" in found["layer convention"]
    assert found["versions"] == "probecache 0"


def test_a_cache_of_many_tokens_counts_rows_apart_from_examples(tmp_path):
    tokens = [2, 3, 1, 2, 1]
    cache = cache_in(tmp_path, rows=torch.ones(9, 6), tokens=tokens, positions="all")
    found = facts(cache.path)
    assert found["positions"] == "all"
    assert found["examples"] == "5 (testing 2 examples, 4 rows; deployment 3 examples, 5 rows)"
    assert found["tensors"].endswith("in 5 files")


def test_pairs_count_once_as_examples(tmp_path):
    pairs = [{"question": "Who?", "positive": "A grader", "negative": "A user"}] * 3
    cache = write_cache(tmp_path / "c", pairs, {3: torch.ones(6, 4)})
    assert facts(cache.path)["examples"].startswith("3 (testing 3 examples, 3 rows; ")


def test_bad_rows_that_were_kept_are_counted(tmp_path):
    cache = cache_in(tmp_path)
    path = cache.path / "layer_info.json"
    manifest = json.loads(path.read_text())
    manifest["non_finite"] = {"0": 2, "20": 3}
    path.write_text(json.dumps(manifest))
    assert facts(cache.path)["rows with NaN/Inf"] == "5"


@pytest.mark.parametrize(
    ("field", "value", "line", "expected"),
    [
        ("revision", "abc123", "model", "org/planted @ abc123 (Planted, 24 blocks)"),
        ("quantization", "4-bit", "dtype", "float32 quantised"),
        ("adapter", "a" * 64, "adapter", "a" * 64),
        ("adapter", None, "adapter", "none"),
        ("chat_template", "1" * 64, "prompts", "chat template"),
        ("chat_template", None, "prompts", "raw text"),
        ("system_prompt", "You are kind.", "system prompt", "'You are kind.'"),
        ("system_prompt", "two\nlines", "system prompt", r"'two\nlines'"),
        ("system_prompt", None, "system prompt", "none"),
        ("versions", {"torch": "2.10", "probecache": "1"}, "versions", "torch 2.10, probecache 1"),
    ],
)
def test_what_decides_the_numbers_is_told_of_cache_and_run(tmp_path, field, value, line, expected):
    cache = cache_in(tmp_path, **{field: value})
    assert facts(cache.path)[line] == expected
    run = train(cache, tmp_path / "run")
    assert facts(run.path)[line] == expected


# ---------------------------------------------------------------- a run


def test_a_run_is_told_fact_by_fact(tmp_path):
    cache = cache_in(tmp_path)
    vectors = train(cache, tmp_path / "run", positive_class="testing")
    found = facts(vectors.path)
    assert found["vectors"] == f"{vectors.path} (unit norm)"
    assert found["method"] == "difference-of-means"
    assert found["higher means"] == "testing (against deployment)"
    assert found["model"] == "org/planted (Planted, 24 blocks)"
    assert found["layers"] == "0,20"
    assert found["no direction at"] == "none"
    assert found["trained on"] == str(cache.path)
    assert "0 = embeddings" in found["layer convention"]


def test_a_runs_own_folder_is_told_as_its_normalised_vectors(tmp_path):
    vectors = train(cache_in(tmp_path), tmp_path / "run")
    assert describe(vectors.path.parent) == describe(vectors.path)


def test_raw_vectors_are_told_to_be_raw(tmp_path):
    vectors = train(cache_in(tmp_path), tmp_path / "run")
    raw = vectors.path.parent / "vectors"
    assert facts(raw)["vectors"] == f"{raw} (raw)"


def test_layers_without_direction_are_told(tmp_path):
    same = torch.ones(5, 6)
    cache = write_cache(tmp_path / "c", RECORDS, {0: same, 1: same, 20: ROWS})
    found = facts(train(cache, tmp_path / "run").path)
    assert found["no direction at"] == "0,1"
    assert found["layers"] == "20"


def test_a_copied_folder_of_vectors_still_tells_its_origin(tmp_path):
    cache = cache_in(tmp_path)
    copy = shutil.copytree(train(cache, tmp_path / "run").path, tmp_path / "copied")
    shutil.rmtree(cache.path)
    assert facts(copy)["trained on"] == str(cache.path)


# ---------------------------------------------------------------- foreign names


HOSTILE = "org/\x1b[2J\x07\r\n\u202eevil\x9b測試"
SHOWN = r"org/\x1b[2J\x07\r\n\u202eevil\x9b測試"


@pytest.mark.parametrize("field", ["model", "revision", "architecture", "adapter", "system_prompt"])
def test_control_characters_of_a_name_are_shown_and_not_obeyed(tmp_path, field):
    cache = cache_in(tmp_path, **{field: HOSTILE})
    run = train(cache, tmp_path / "run")
    for path in (cache.path, run.path):
        lines = describe(path)
        assert all(line.isprintable() for line in lines)
        assert SHOWN in "".join(lines)


def test_control_characters_of_classes_and_versions_are_shown_and_not_obeyed(tmp_path):
    labels = [HOSTILE, "deployment"]
    cache = write_cache(
        tmp_path / "c", labelled(*labels), {3: torch.eye(2)}, versions={HOSTILE: HOSTILE}
    )
    run = train(cache, tmp_path / "run")
    for path in (cache.path, run.path):
        lines = describe(path)
        assert all(line.isprintable() for line in lines)
        assert "".join(lines).count(SHOWN) == 3


# ---------------------------------------------------------------- neither


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"without their manifests.*extract or train"):
        describe(tmp_path)


def test_a_place_with_nothing_there_and_a_file_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for name, what in (("none", "nothing there"), ("file", "a file")):
        with pytest.raises(StoreError, match=f"a cache or a run at .*{name}, got {what}"):
            describe(tmp_path / name)


def test_a_damaged_cache_is_refused_by_name(tmp_path):
    cache = cache_in(tmp_path)
    (cache.path / "layer_20" / "deploy_activations.pt").unlink()
    with pytest.raises(StoreError, match=r"layer_20/deploy_activations\.pt"):
        describe(cache.path)


def test_a_run_whose_vectors_are_gone_is_refused(tmp_path):
    run = train(cache_in(tmp_path), tmp_path / "run").path.parent
    shutil.rmtree(run / "normalized_vectors")
    with pytest.raises(StoreError, match=r"RUN/normalized_vectors"):
        describe(run)


def test_a_cache_is_told_without_torch(tmp_path):
    cache = cache_in(tmp_path)
    code = (
        "import sys; from pathlib import Path; from probecache.store.describe import describe; "
        "print(len(describe(Path(sys.argv[1]))), 'torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(cache.path)], capture_output=True, text=True
    )
    assert found.stdout.split() == [str(len(describe(cache.path))), "False"], found.stderr


def test_all_is_what_there_is():
    assert module.__all__ == ["describe"]
