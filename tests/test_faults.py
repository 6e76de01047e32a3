"""Dying, failing and losing power at every call that the store makes: no row is lost or doubled.

The rows come from a generator, not from a model, so that thousands of trials are quick.
"""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from faults import WRITES, Fault, tree_hash, trial
from synthetic import EXECUTION, IDENTITY, TIMING, blueprint_of, labelled, rows_of, writer_of

from probecache.errors import StoreError
from probecache.store import claim as claim_module
from probecache.store import writer as writer_module
from probecache.store.place import finish_complete
from probecache.store.reader import open_cache
from probecache.store.verify import verify

HIDDEN = 6
RECORDS = labelled("testing", "deployment", "deployment", "testing", "deployment")
TOKENS = [2, 3, 1, 2, 1]
ENDS = [sum(TOKENS[: n + 1]) for n in range(len(TOKENS))]


def rows(layer):
    return torch.randn(ENDS[-1], HIDDEN, generator=torch.Generator().manual_seed(layer))


def fill(folder, layers):
    """An extraction as the workflow runs it: goes on from what is there, records after each row."""
    finish_complete(folder)
    cache = open_cache(folder) if (folder / "layer_info.json").exists() else None
    missing = [layer for layer in layers if cache is None or layer not in cache.layers]
    if not missing:
        return
    blueprint = blueprint_of(
        RECORDS, missing, HIDDEN, positions="all", tokens=TOKENS, tells_spans=True
    )
    identity = IDENTITY.__class__(
        **{**IDENTITY.__dict__, "positions": "all", "hidden_size": HIDDEN}
    )
    with writer_of(folder, blueprint, cache.info if cache else None, identity) as writer:
        writer.write_tokens(torch.arange(ENDS[-1]).numpy(), torch.ones(ENDS[-1], 4).numpy())
        for layer in missing:
            values = rows(layer)
            for index in (4, 0, 3, 1, 2):  # not in the order of the file
                if not writer.done([layer])[index]:
                    piece = values[ENDS[index] - TOKENS[index] : ENDS[index]]
                    writer.write(layer, [index], piece)
                    writer.record_now_and_then()
        writer.commit(identity, TIMING, EXECUTION)


SCENARIOS = {"a new cache": ([], [5]), "an addition": ([5], [5, 7])}


@pytest.fixture(scope="module", autouse=True)
def recorded_after_every_row():
    patch = pytest.MonkeyPatch()
    patch.setattr(writer_module, "_RECORD_S", 0.0)
    patch.setattr(writer_module, "_RECORD_SHARE", 0)
    patch.setattr(claim_module, "_SILENT_S", 0.3)  # power loss leaves claims that say nothing
    yield
    patch.undo()


@pytest.fixture(scope="module", params=SCENARIOS)
def scene(request, tmp_path_factory):
    """What is there before, what to do, how it ends, and how many calls it takes."""
    first, layers = SCENARIOS[request.param]
    root = tmp_path_factory.mktemp("scene")
    before, whole = root / "before", root / "whole"
    before.mkdir()
    whole.mkdir()
    if first:
        fill(before / "c", first)
        shutil.copytree(before / "c", whole / "c")
    outcome = trial(whole, lambda: fill(whole / "c", layers))
    assert outcome.code == 0, outcome.said
    return before, layers, tree_hash(whole), outcome.calls


def moments(calls, kinds=()):
    """Numbers of the calls to strike at; of writes to one file in a row, the first and the last."""
    found = []
    for number, call in enumerate(calls, 1):
        inside = call.startswith("file.write") and call in calls[number - 2 : number - 1]
        if (not inside or call not in calls[number : number + 1]) and (
            not kinds or call.split()[0] in kinds
        ):
            found.append(number)
    return found


def place(scene, tmp_path, number):
    """A fresh folder as it was before."""
    folder = tmp_path / f"t{number}"
    shutil.copytree(scene[0], folder)
    return folder


def require_old_or_new(folder, before):
    """A reader gets a whole cache, or the one that was there, or is refused."""
    try:
        found = open_cache(folder / "c")
    except StoreError:
        assert not (before / "c").exists()
        return
    for layer in found.layers:
        for label in found.classes:
            assert torch.equal(found[label, layer], rows_of(found, label, layer))
            mine = [n for n, record in enumerate(RECORDS) if record["type"] == label]
            expected = torch.cat([rows(layer)[ENDS[n] - TOKENS[n] : ENDS[n]] for n in mine])
            assert torch.equal(found[label, layer], expected)


def require_finished(folder, scene):
    _, layers, expected, _ = scene
    again = trial(folder, lambda: fill(folder / "c", layers))
    assert again.code == 0, again.said
    assert tree_hash(folder) == expected
    assert verify(folder / "c").whole
    return again


def test_an_extraction_makes_many_calls(scene):
    calls = scene[3]
    assert len(moments(calls)) > 50
    kinds = {call.split()[0] for call in calls}
    assert kinds >= {"pwrite", "fsync", "replace", "link", "mkdir", "file.write"}


def test_a_kill_before_every_call_loses_nothing(scene, tmp_path):
    before, layers, _, calls = scene
    for number in moments(calls):
        folder = place(scene, tmp_path, number)
        died = trial(folder, lambda f=folder: fill(f / "c", layers), Fault(number, "kill"))
        assert died.code == -9, (number, died)
        require_old_or_new(folder, before)
        require_finished(folder, scene)
        shutil.rmtree(folder)


def test_a_torn_write_at_every_write_loses_nothing(scene, tmp_path):
    before, layers, _, calls = scene
    for number in moments(calls, WRITES):
        folder = place(scene, tmp_path, number)
        died = trial(folder, lambda f=folder: fill(f / "c", layers), Fault(number, "torn"))
        assert died.code == -9
        require_old_or_new(folder, before)
        require_finished(folder, scene)
        shutil.rmtree(folder)


def test_rows_that_were_recorded_are_not_asked_for_again(scene, tmp_path):
    """Killed after a record, the next run writes only what came later."""
    _, layers, _, calls = scene
    records = [n for n, call in enumerate(calls, 1) if "-> " in call and "progress.json" in call]
    assert len(records) > 5
    number = records[len(records) // 2] + 2
    folder = place(scene, tmp_path, 0)
    trial(folder, lambda: fill(folder / "c", layers), Fault(number, "kill"))
    again = require_finished(folder, scene)
    written = sum(call.startswith("pwrite") for call in again.calls)
    assert 0 < written < sum(call.startswith("pwrite") for call in calls)


@pytest.mark.slow
def test_two_kills_one_after_the_other_lose_nothing(scene, tmp_path):
    before, layers, _, calls = scene
    chance = random.Random(0)
    for number in range(30):
        folder = place(scene, tmp_path, number)
        for _ in range(chance.choice([2, 3, 5])):
            fault = Fault(chance.randint(1, len(calls)), chance.choice(["kill", "torn"]))
            trial(folder, lambda f=folder: fill(f / "c", layers), fault)
            require_old_or_new(folder, before)
        require_finished(folder, scene)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ENOSPC", "EIO"])
def test_an_error_at_every_call_is_told_and_costs_nothing(scene, tmp_path, kind):
    before, layers, _, calls = scene
    for number in moments(calls):
        call, folder = calls[number - 1], place(scene, tmp_path, number)
        failed = trial(folder, lambda f=folder: fill(f / "c", layers), Fault(number, kind))
        # What only tidies up may fail without harm.
        assert failed.code in (0, 2), (number, call, failed.said)
        if failed.code == 2:
            assert str(folder) in failed.said
            assert "\n" not in failed.said
            if kind != "EIO":
                assert "bytes" in failed.said, failed.said
        require_old_or_new(folder, before)
        require_finished(folder, scene)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_power_loss_at_every_call_loses_nothing_that_was_recorded(scene, tmp_path):
    before, layers, _, calls = scene
    for number in moments(calls):
        folder = place(scene, tmp_path, number)
        fault = Fault(number, "power", seed=number)
        died = trial(folder, lambda f=folder: fill(f / "c", layers), fault)
        assert died.code == -9
        require_old_or_new(folder, before)
        require_finished(folder, scene)
        shutil.rmtree(folder)


def test_what_is_recorded_was_flushed_before_and_manifests_come_last(scene):
    calls = [call.replace("file.write", "write") for call in scene[3]]
    dirty: set[str] = set()
    for call in calls:
        kind, path, *rest = call.split()
        if kind in ("pwrite", "write"):
            dirty.add(path)
        elif kind == "fsync":
            dirty.discard(path)
        elif kind in ("replace", "rename") and rest[1].endswith(".json"):
            assert path not in dirty, f"{path} is renamed before it is flushed"
            if rest[1].endswith(("progress.json", "finished.json", "layer_info.json")):
                rows_left = {one for one in dirty if one.endswith((".pt", ".crc32"))}
                assert not rows_left, f"{rest[1]} before {rows_left} are flushed"
    places = [n for n, call in enumerate(calls) if "layer_info.json" in call.split()[-1]]
    renamed = max(n for n in places if calls[n].startswith("replace"))
    assert calls[renamed - 1].startswith("fsync")
    assert calls[renamed + 1] == f"fsync {calls[renamed].split()[-1].rsplit('/', 1)[0]}"
    moved = [n for n, call in enumerate(calls) if call.startswith("link") and ".pt" in call]
    assert max(moved) < renamed
