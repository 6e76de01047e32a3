"""The folder of an unfinished extraction: damaged, forged, or left at the moment of a commit."""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from families import RECORDS
from synthetic import stop_at_write

import probecache
from probecache.errors import OutputError, StoreError
from probecache.store import claim, commit, journal, place, writer
from probecache.store import verify as verify_module
from probecache.store.describe import describe
from probecache.store.journal import find_unfinished
from probecache.store.seal import seal_json


@pytest.fixture
def llama(folders):
    return folders("llama")


def extracted(model, output, **options):
    settings = {"layers": [1, 2], "batch_tokens": 30, "quiet": True, "device": "cpu"}
    return probecache.extract(
        model=str(model), data=RECORDS, output=output, engine="resident", **{**settings, **options}
    )


def interrupted(model, output, monkeypatch):
    stop_at_write(monkeypatch, 4)
    with pytest.raises(probecache.errors.Interrupted):
        extracted(model, output)
    monkeypatch.undo()


def complete(model, output, monkeypatch):
    """All rows are there, and the run was stopped before it moved a file."""

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "finish", stopped)
    with pytest.raises(probecache.errors.Interrupted):
        extracted(model, output)
    monkeypatch.undo()


def content_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def flipped(place):
    def flip(path):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return flip


@pytest.mark.parametrize(
    "damage",
    [
        *map(flipped, (3, 700, -100, -1)),
        lambda path: os.truncate(path, 3000),
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, path.stat().st_size + 1),
        Path.unlink,
        lambda path: path.rename(path.with_name("x")) and path.symlink_to("x"),
    ],
    ids=[
        "head",
        "record",
        "directory",
        "end",
        "cut",
        "empty",
        "longer",
        "missing",
        "link",
    ],
)
def test_an_unfinished_file_that_was_damaged_is_made_right(llama, tmp_path, monkeypatch, damage):
    output = tmp_path / "cache"
    interrupted(llama, output, monkeypatch)
    damage(next(output.glob("unfinished/layer_*/test_activations.pt")))
    extracted(llama, output)
    assert probecache.verify(output).whole
    assert content_of(output) == content_of(extracted(llama, tmp_path / "whole").path)


def copy_of_what_is_there(monkeypatch, module, name, copy, number=1):
    """What a kill would leave on disk before a call."""
    function, calls = getattr(module, name), []

    def copying(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            (folder,) = (p.parent for p in (arguments[0] / "x").parents if p.name == "unfinished")
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("owner.json"))
        return function(*arguments)

    monkeypatch.setattr(module, name, copying)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_cache_whose_new_layers_are_on_their_way_is_whole(llama, tmp_path, monkeypatch, number):
    extracted(llama, tmp_path / "cache", layers=[1])
    copy_of_what_is_there(monkeypatch, commit, "_move", tmp_path / "killed", number)
    whole = extracted(llama, tmp_path / "cache", layers=[1, 3])
    monkeypatch.undo()
    killed = tmp_path / "killed"
    report = probecache.verify(killed)
    assert report.whole, report.damages
    assert report.notes == ["layers 3 are being added: 100.0% of their rows are on disk"]
    assert "unfinished        100.0% of the rows; the same command goes on" in describe(killed)
    assert probecache.repair(killed).after.notes == [], "whatever comes next finishes it"
    assert content_of(killed) == content_of(whole.path)


def test_leftovers_of_a_finished_extraction_are_told_as_such(llama, tmp_path):
    cache = extracted(llama, tmp_path / "cache", layers=[1])
    aside = cache.path / ".unfinished.123.tmp"
    (aside / "layer_1").mkdir(parents=True)
    (aside / "layer_1" / "test_activations.pt").write_bytes(b"rows")
    (cache.path / ".layer_info.json.123-abc.tmp").write_bytes(b"{")
    report = probecache.verify(cache.path)
    assert report.whole
    assert report.notes[0].startswith("2 leftovers of a run that was killed")
    probecache.repair(cache.path)
    assert probecache.verify(cache.path).notes == []
    (cache.path / ".layer_info.json").write_bytes(b"{")
    assert [one.file for one in probecache.verify(cache.path).damages] == [".layer_info.json"]


def test_what_a_run_left_that_was_killed_when_all_was_committed_is_not_unfinished(
    llama, tmp_path, monkeypatch
):
    copy_of_what_is_there(monkeypatch, place, "_leave", tmp_path / "killed")
    whole = extracted(llama, tmp_path / "cache", layers=[1])
    monkeypatch.undo()
    killed = tmp_path / "killed"
    assert (killed / "unfinished").is_dir()
    report = probecache.verify(killed)
    assert report.whole
    assert report.notes == []
    assert not [line for line in describe(killed) if line.startswith("unfinished")]
    extracted(llama, killed, layers=[1])
    assert content_of(killed) == content_of(whole.path)


@pytest.mark.parametrize("examples", [10**8, 10**12, 10**30])
def test_how_many_examples_were_begun_is_not_taken_on_trust(llama, tmp_path, monkeypatch, examples):
    cache = tmp_path / "cache"
    interrupted(llama, cache, monkeypatch)
    begun = find_unfinished(cache).begun.model_dump(mode="json")
    path = cache / "unfinished" / "begun.json"
    path.write_bytes(seal_json(begun | {"examples": examples}))
    for command in (describe, partial(extracted, llama)):
        with pytest.raises(StoreError, match=r"expected \d+ examples, got \d+ bits; remove"):
            command(cache)
    path.with_name("progress.json").unlink()
    assert "unfinished        0.0% of the rows; the same command goes on" in describe(cache)


# ---------------------------------------------------------------- beside a run that is at work


def test_what_was_found_stays_as_it_was_found(llama, tmp_path, monkeypatch):
    """Another run lays its files down between the look and the use of what was seen."""
    interrupted(llama, tmp_path / "c", monkeypatch)
    whole = find_unfinished(tmp_path / "c")
    content = whole.progress_path.read_bytes()
    whole.progress_path.unlink()
    before = find_unfinished(tmp_path / "c")
    whole.progress_path.write_bytes(content)
    assert whole.share() > 0
    assert (before.laid_down, before.share(), before.counts()) == (False, 0, {1: 0, 2: 0})


@pytest.mark.parametrize("name", ["begun.json", "progress.json"])
def test_records_that_another_run_removes_while_they_are_read_are_not_damage(
    llama, tmp_path, monkeypatch, name
):
    interrupted(llama, tmp_path / "c", monkeypatch)
    real = journal.read_manifest

    def read_manifest(path, schema):
        if path.name == name:
            path.unlink()
        return real(path, schema)

    monkeypatch.setattr(journal, "read_manifest", read_manifest)
    found = find_unfinished(tmp_path / "c")
    assert (found is None) == (name == "begun.json")
    assert found is None or found.share() == 0


def test_a_disk_too_full_to_finish_on_is_told_with_the_bytes(llama, tmp_path, monkeypatch):
    complete(llama, tmp_path / "c", monkeypatch)
    needed = (tmp_path / "c/unfinished/finished.json").stat().st_size

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in ((claim, "_take"), (commit, "write_bytes")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, full)
            with pytest.raises(OutputError, match=f"{needed:,} bytes"):
                place.finish_complete(tmp_path / "c")
    place.finish_complete(tmp_path / "c")
    assert probecache.verify(tmp_path / "c").whole


def test_what_another_run_finishes_while_one_looks_is_finished(llama, tmp_path, monkeypatch):
    """Complete when it is found, in the cache when the claim is had."""
    extracted(llama, tmp_path / "whole")
    complete(llama, tmp_path / "c", monkeypatch)
    found = find_unfinished(tmp_path / "c")
    assert found.complete
    real = place.claimed_place

    def claimed_place(*arguments):
        monkeypatch.undo()
        place.finish_complete(tmp_path / "c")
        return real(*arguments)

    monkeypatch.setattr(place, "claimed_place", claimed_place)
    place.finish_complete(tmp_path / "c")
    assert commit.is_committed(found)
    assert content_of(tmp_path / "c") == content_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["metadata.json", "layer_1/rows.crc32"])
def test_layers_that_are_committed_while_a_cache_is_verified_are_not_foreign(
    llama, tmp_path, monkeypatch, name
):
    extracted(llama, tmp_path / "c")
    real = verify_module._fault

    def fault(path, *record):
        if path == tmp_path / "c" / name and not (tmp_path / "c/layer_3").exists():
            extracted(llama, tmp_path / "c", layers=[1, 2, 3])
        return real(path, *record)

    monkeypatch.setattr(verify_module, "_fault", fault)
    assert probecache.verify(tmp_path / "c").whole
    assert probecache.open_cache(tmp_path / "c").layers == (1, 2, 3)
    (tmp_path / "c/layer_3/x").write_text("x")
    assert [damage.file for damage in probecache.verify(tmp_path / "c").damages] == ["layer_3/x"]
