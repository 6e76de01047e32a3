"""Every change of every file of what we write is found, and the right file is named."""

from __future__ import annotations

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from synthetic import labelled, write_cache

from probecache import train, validate
from probecache.cli import main
from probecache.errors import StoreError
from probecache.store.verify import verify

LABELS = ["testing", "deployment", "deployment", "testing", "deployment", "testing"]
RECORDS = labelled(*LABELS)
HIDDEN = 6


def rows(seed, count=6):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def cache_of_last(folder):
    return write_cache(folder, RECORDS, {10: rows(1), 20: rows(2)})


def cache_of_all(folder):
    tokens = [2, 3, 1, 2, 1, 4]
    spans = np.arange(52).reshape(13, 4)
    return write_cache(
        folder, RECORDS, {7: rows(3, 13)}, tokens=tokens, positions="all", spans=spans
    )


def run_of(folder):
    cache = cache_of_last(folder.parent / "source")
    return train(cache=cache, output=folder).path.parent


def validation_of(folder):
    run = run_of(folder.parent / "run")
    validate(vectors=run, cache=folder.parent / "source", output=folder, visualize=True)
    return folder


MADE = {
    "cache of last": lambda folder: cache_of_last(folder).path,
    "cache of all": lambda folder: cache_of_all(folder).path,
    "run": run_of,
    "vectors": lambda folder: run_of(folder) / "vectors",
    "validation": validation_of,
}


@pytest.fixture(scope="module", params=MADE)
def made(request, tmp_path_factory):
    """A folder of ours; whoever changes a file puts it back."""
    return MADE[request.param](tmp_path_factory.mktemp("made") / "it")


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def named(folder):
    return {damage.file for damage in verify(folder).damages}


def test_what_was_written_is_whole(made):
    report = verify(made)
    assert report.whole
    assert report.files >= len(files_of(made))
    assert not report.notes


@pytest.mark.slow
def test_every_flipped_bit_is_found_and_its_file_named(made):
    chance, files = random.Random(str(made.name)), files_of(made)
    for number in range(max(300, 4 * len(files))):
        file = files[number % len(files)]
        content = file.read_bytes()
        place, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
        changed = bytearray(content)
        changed[place] ^= bit
        file.write_bytes(changed)
        assert named(made) == {file.relative_to(made).as_posix()}, (file, place, bit)
        file.write_bytes(content)
    assert verify(made).whole


@pytest.mark.slow
def test_every_cut_or_longer_or_missing_file_is_found_and_named(made):
    chance, files = random.Random(0), files_of(made)
    for number in range(max(60, 4 * len(files))):
        file = files[number % len(files)]
        content = file.read_bytes()
        sizes = [0, len(content) - 1, chance.randrange(len(content))]
        for changed in (content[: chance.choice(sizes)], content + b"\0"):
            file.write_bytes(changed)
            assert named(made) == {file.relative_to(made).as_posix()}, (file, len(changed))
        file.unlink()
        if file.name not in ("layer_info.json", "summary.json", "run.json") and file.parent != made:
            assert named(made) == {file.relative_to(made).as_posix()}
        file.write_bytes(content)
    assert verify(made).whole


def test_damaged_rows_are_named_with_their_examples(tmp_path):
    cache = cache_of_all(tmp_path / "c")
    record = cache.info.tensors["layer_7/deploy_activations.pt"]
    file = cache.path / "layer_7" / "deploy_activations.pt"
    content = bytearray(file.read_bytes())
    content[record.offset + 3 * 4 * HIDDEN + 5] ^= 1  # row 3: the second deployment example
    file.write_bytes(content)
    (damage,) = verify(cache.path).damages
    assert damage.file == "layer_7/deploy_activations.pt"
    assert "rows 3 (examples 'q2') are not what was written" in damage.what
    assert damage.examples == (2,)
    content[record.offset + 7] ^= 128
    file.write_bytes(content)
    (damage,) = verify(cache.path).damages
    assert damage.examples == (1, 2)
    assert "rows 0-3 (examples 'q1', 'q2')" in damage.what


def test_damage_outside_the_rows_is_told_as_such(tmp_path):
    cache = cache_of_last(tmp_path / "c")
    file = cache.path / "layer_10" / "test_activations.pt"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (damage,) = verify(cache.path).damages
    assert "its rows are whole" in damage.what


def test_a_manifest_that_claims_other_counts_of_nan_is_contradicted(tmp_path):
    values = rows(1)
    values[2, 3] = float("nan")
    cache = write_cache(tmp_path / "c", RECORDS, {10: values})
    assert cache.info.non_finite == {10: 1}
    assert verify(cache.path).whole
    reseal(cache.path / "layer_info.json", non_finite={})
    (damage,) = verify(cache.path).damages
    assert (damage.file, damage.what) == (
        "layer_10",
        "1 rows hold NaN or Inf, where 0 were counted",
    )


def reseal(path, **changes):
    from probecache.store.seal import seal_json

    path.write_bytes(seal_json({**json.loads(path.read_bytes()), **changes}))


def test_files_of_strangers_are_named(made):
    strange = made / "notes.txt"
    strange.write_text("hello")
    assert named(made) == {"notes.txt"}
    strange.unlink()


def test_a_pipe_in_a_files_place_is_named_and_not_waited_for(tmp_path):
    cache = cache_of_last(tmp_path / "c")
    file = cache.path / "layer_10" / "test_activations.pt"
    file.unlink()
    os.mkfifo(file)
    (damage,) = verify(cache.path).damages
    assert damage.file == "layer_10/test_activations.pt"
    assert "no regular file" in damage.what


def test_swapped_files_are_both_named(tmp_path):
    cache = cache_of_last(tmp_path / "c")
    one, other = (cache.path / f"layer_{n}" / "test_activations.pt" for n in (10, 20))
    shutil.move(one, tmp_path / "x")
    shutil.move(other, one)
    shutil.move(tmp_path / "x", other)
    assert named(cache.path) == {"layer_10/test_activations.pt", "layer_20/test_activations.pt"}


def test_a_record_that_leads_outside_the_folder_is_refused(tmp_path):
    run = run_of(tmp_path / "r")
    outside = tmp_path / "outside"
    outside.write_text("x")
    reseal(run / "run.json", files={"../outside": {"bytes": 1, "sha256": "0" * 64}})
    assert named(run) == {"run.json"}


@pytest.mark.parametrize("there", [True, False])
def test_what_is_none_of_ours_is_refused(tmp_path, there):
    folder = tmp_path / "x"
    if there:
        folder.mkdir()
    with pytest.raises(StoreError, match="expected a cache, a run or a validation"):
        verify(folder)


@pytest.mark.parametrize(("harm", "code"), [(False, 0), (True, 1)])
def test_the_exit_code_tells(tmp_path, capsys, harm, code):
    cache = cache_of_last(tmp_path / "c")
    if harm:
        (cache.path / "metadata.json").write_bytes(b"[]")
    with pytest.raises(SystemExit) as left:
        main(["verify", str(cache.path)])
    assert left.value.code == code
    said = capsys.readouterr().out
    assert ("is whole" in said) is not harm
    assert ("damaged  metadata.json: 2 bytes" in said) is harm


def test_checksums_of_rows_are_plain_crc32_in_the_order_of_the_classes(tmp_path):
    import zlib

    cache = cache_of_last(tmp_path / "c")
    found = np.fromfile(cache.path / "layer_10" / "rows.crc32", dtype="<u4").tolist()
    values = rows(1).numpy()
    order = [n for label in ("testing", "deployment") for n, x in enumerate(LABELS) if x == label]
    assert found == [zlib.crc32(values[n].tobytes()) for n in order]
