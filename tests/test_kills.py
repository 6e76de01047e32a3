"""Whole commands that are killed, stopped, or run beside one another lose and double nothing."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from faults import tree_hash
from fork_server import Commands

import probecache
from probecache.cli import main
from probecache.errors import MismatchError, StoreError
from probecache.store.journal import find_unfinished
from probecache.store.verify import verify
from probecache.workflow import extract as extract_module

KILLS = 13  # of every way to run
WAYS = {
    "shared": ["--engine", "resident", "--positions", "last"],
    "shared, all tokens": ["--engine", "resident", "--positions", "all"],
    "padded": ["--engine", "resident", "--no-shared-prefixes", "--positions", "last"],
    "padded, all tokens": ["--engine", "resident", "--no-shared-prefixes", "--positions", "all"],
    "stream": ["--engine", "stream", "--positions", "last"],
    "stream, all tokens": ["--engine", "stream", "--positions", "all"],
}
ADDITIONS = {
    "added": WAYS["shared"],
    "added, all tokens": WAYS["shared, all tokens"],
}


@pytest.fixture(scope="module")
def commands(model, data, tmp_path_factory):
    with Commands() as made:
        warm = tmp_path_factory.mktemp("warm") / "c"  # what is read for the first time takes longer
        done = made.run("extract", "--model", model, "--data", data, "--output", warm)
        assert done.code == 0, done.err
        yield made


@pytest.fixture(scope="module")
def model(folders):
    return folders("llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    chance = random.Random(0)
    words = ["is", "it", "a", "test", "or", "not", "what", "does", "the", "model", "do"]
    records = [
        {
            "question": " ".join(chance.choices(words, k=chance.randint(2, 12))),
            "type": chance.choice(["testing", "deployment"]),
        }
        for _ in range(80)
    ]
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def extraction(model, data):
    """The words of an extract command."""

    def words(output, way, layers="1,2,4"):
        told = ["extract", "--model", model, "--data", data, "--output", output]
        return [*told, "--layers", layers, "--batch-tokens", 64, "--quiet", *way]

    return words


@pytest.fixture(scope="module")
def whole(commands, extraction, tmp_path_factory):
    """What a way to run leaves if nobody disturbs it, what is there before, and its seconds."""
    made = {}

    def reference(name):
        if name not in made:
            root = tmp_path_factory.mktemp("whole")
            way = {**WAYS, **ADDITIONS}[name]
            (root / "before").mkdir()
            if name in ADDITIONS:
                first = commands.run(*extraction(root / "before" / "c", way, layers="2"))
                assert first.code == 0, first.err
            shutil.copytree(root / "before", root / "after")
            started = time.monotonic()
            second = commands.run(*extraction(root / "after" / "c", way))
            assert second.code == 0, second.err
            made[name] = (root, time.monotonic() - started)
        return made[name]

    return reference


def share_on_disk(output):
    """How much is recorded; 0 where nothing is there, or just being written."""
    try:
        found = find_unfinished(output)
    except (StoreError, OSError):
        return 0.0
    return 0.0 if found is None else found.share()


def require_same_rows(found, reference):
    """Every row of the reference, in its place, and no other."""
    assert found.layers == reference.layers
    assert [e.rows for e in found.examples] == [e.rows for e in reference.examples]
    for label, layer in product(reference.classes, reference.layers):
        assert torch.equal(found[label, layer], reference[label, layer])


def require_as_undisturbed(place, root):
    assert [path.name for path in place.iterdir()] == ["c"]
    require_same_rows(probecache.open_cache(place / "c"), probecache.open_cache(root / "after/c"))
    assert tree_hash(place) == tree_hash(root / "after")
    assert verify(place / "c").whole


def require_old_or_new(output, root):
    """At any moment a reader gets what was there before, or the finished cache, or a refusal."""
    try:
        found = probecache.open_cache(output)
    except StoreError:
        assert not (root / "before/c").exists()
        return
    states = [
        probecache.open_cache(p / "c")
        for p in (root / "before", root / "after")
        if (p / "c").exists()
    ]
    require_same_rows(found, next(s for s in states if s.layers == found.layers))


def wait_until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def minds_the_signal(process):
    """Whether a process has said what it does on SIGTERM: from then on it runs the command."""
    caught = re.search(r"SigCgt:\t(\w+)", Path(f"/proc/{process}/status").read_text())
    return int(caught[1], 16) >> (signal.SIGTERM - 1) & 1


def paused(commands, words):
    """A command that has stopped amid its rows; its process id."""
    (child,) = commands.start(*words, pause=9)
    stat = Path(f"/proc/{child}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
    return child


def holds(output, process):
    """Whether a process writes there."""
    with suppress(OSError):
        return json.loads((output / "unfinished/owner.json").read_bytes())["pid"] == process
    return False


# ---------------------------------------------------------------- kills


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WAYS, *ADDITIONS])
def test_an_extraction_killed_again_and_again_ends_as_if_nothing_had_happened(
    commands, extraction, whole, tmp_path, name
):
    root, seconds = whole(name)
    way = {**WAYS, **ADDITIONS}[name]
    chance, kills, resumed, finished, fresh = random.Random(name), 0, 0, 0, True
    while kills < KILLS or not finished:
        place = tmp_path / f"p{finished}"
        if fresh:
            shutil.copytree(root / "before", place)
        delay = chance.uniform(0.05, 1) * seconds
        (child,) = commands.start(*extraction(place / "c", way))
        if kills < KILLS:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        (end,) = commands.wait()
        if end.code == -signal.SIGKILL:
            kills += 1
            resumed += share_on_disk(place / "c") > 0
            require_old_or_new(place / "c", root)
            fresh = False
            continue
        assert end.code == 0, end.err
        require_as_undisturbed(place, root)
        if fresh:  # it was quicker than the reference: aim better
            seconds = min(seconds, delay)
        finished, fresh = finished + 1, True
    assert resumed > 0


@pytest.mark.slow
def test_the_real_command_killed_again_and_again_ends_as_if_nothing_had_happened(
    extraction, whole, tmp_path
):
    root, _ = whole("padded, all tokens")
    place = tmp_path / "p"
    words = [str(w) for w in extraction(place / "c", WAYS["padded, all tokens"])]
    command = [sys.executable, "-m", "probecache", *words]
    chance = random.Random(5)
    for number in range(5):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        if number:  # the first is killed while it imports, the others while they write
            wait_until(partial(holds, place / "c", process.pid))
        time.sleep(chance.uniform(0, 0.4))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        require_old_or_new(place / "c", root)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    require_as_undisturbed(place, root)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_who_is_stopped_says_how_much_is_on_disk_and_goes_on_from_there(
    commands, extraction, whole, tmp_path, number, code
):
    root, _ = whole("padded, all tokens")
    place = tmp_path / "p"
    words = extraction(place / "c", WAYS["padded, all tokens"])
    child = paused(commands, words)
    assert 0 < share_on_disk(place / "c") < 1
    os.kill(child, number)
    os.kill(child, signal.SIGCONT)
    (end,) = commands.wait()
    assert end.code == code
    said = re.fullmatch(
        rf"stopped with ([\d.]+)% of the rows on disk in {place / 'c'}; the same command again "
        r"goes on from there\n",
        end.err,
    )
    assert said, end.err
    assert float(said[1]) == pytest.approx(100 * share_on_disk(place / "c"), abs=0.06)
    assert not (place / "c/unfinished/owner.json").exists()
    assert commands.run(*words).code == 0
    require_as_undisturbed(place, root)


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_a_command_in_one_line(commands, extraction, whole, tmp_path):
    root, seconds = whole("padded, all tokens")
    place, chance = tmp_path / "p", random.Random(1)
    words = extraction(place / "c", WAYS["padded, all tokens"])
    for _ in range(12):
        (child,) = commands.start(*words)
        wait_until(partial(minds_the_signal, child))
        time.sleep(chance.uniform(0, 0.9) * seconds)
        os.kill(child, signal.SIGTERM)
        (end,) = commands.wait()
        assert end.code in (143, 0), end
        assert end.err.count("\n") == (end.code != 0), end
        require_old_or_new(place / "c", root)
        if end.code == 0:
            break
    assert commands.run(*words).code == 0
    require_as_undisturbed(place, root)


def test_a_stopped_command_that_caches_nothing_says_so(commands, model, data, tmp_path):
    words = ["train", "--model", model, "--data", data, "--output", tmp_path / "run"]
    (child,) = commands.start(*words, "--layers", "1,2", "--batch-tokens", 16, "--quiet")
    wait_until(lambda: minds_the_signal(child))
    time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    (end,) = commands.wait()
    assert (end.code, end.err) == (143, "stopped: what was not finished is not kept\n")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- several at once


@pytest.mark.slow
@pytest.mark.parametrize("flock", [True, False], ids=["locks", "locks without effect"])
@pytest.mark.parametrize(("name", "count"), [("shared", 2), ("shared", 8), ("added", 8)])
def test_of_several_commands_at_once_one_writes_and_the_others_are_told(
    commands, extraction, whole, tmp_path, name, count, flock
):
    root, _ = whole(name)
    way = {**WAYS, **ADDITIONS}[name]
    place = tmp_path / "p"
    shutil.copytree(root / "before", place)
    children = commands.start(*extraction(place / "c", way), count=count, flock=flock)
    ends = commands.wait()
    assert any(end.code == 0 for end in ends), ends
    for end in ends:
        if end.code != 0:
            assert end.code == 2, end
            told = re.fullmatch(
                r"error: expected to be the only one .* process (\d+) on .*\n", end.err
            )
            assert told, end.err
            assert int(told[1]) in children
    again = commands.run(*extraction(place / "c", way))
    assert again.code == 0, again.err
    require_as_undisturbed(place, root)


@pytest.mark.parametrize(
    "asked",
    [["--layers", "1"], ["--layers", "1,2,4", "--dtype", "bfloat16"]],
    ids=["layers", "dtype"],
)
def test_nobody_is_told_to_remove_what_another_run_is_writing(
    commands, extraction, model, data, tmp_path, capsys, asked
):
    way = WAYS["padded, all tokens"]
    child = paused(commands, extraction(tmp_path / "c", way))
    told = ["extract", "--model", model, "--data", data, "--output", tmp_path / "c", *asked, *way]

    def refusal():
        with pytest.raises(SystemExit, match="2"):
            main([str(word) for word in told])
        return capsys.readouterr().err

    unfinished = tmp_path / "c/unfinished"
    beside = refusal()
    assert f"process {child} on " in beside
    assert str(unfinished) not in beside
    os.kill(child, signal.SIGKILL)
    commands.wait()
    assert f"remove {unfinished} to drop what it computed" in refusal()


def test_what_another_run_begins_at_the_last_moment_is_not_taken_for_ones_own(
    commands, extraction, whole, model, data, tmp_path, monkeypatch
):
    """As many prompts of another data set, killed between this run's checks and its claim."""
    others = tmp_path / "others.json"
    records = [
        {**record, "question": record["question"] + "?"} for record in json.loads(data.read_text())
    ]
    others.write_text(json.dumps(records))
    output = tmp_path / "c"
    words = extraction(output, WAYS["padded, all tokens"])
    real = extract_module.open_writer

    def open_writer(*arguments):
        os.kill(paused(commands, words), signal.SIGKILL)
        commands.wait()
        assert 0 < share_on_disk(output) < 1
        return real(*arguments)

    monkeypatch.setattr(extract_module, "open_writer", open_writer)
    with pytest.raises(MismatchError, match="unfinished extraction"):
        probecache.extract(
            model=str(model),
            data=others,
            output=output,
            layers=[1, 2, 4],
            engine="resident",
            positions="all",
        )
    ended = commands.run(*words)
    assert ended.code == 0, ended.err
    require_same_rows(
        probecache.open_cache(output),
        probecache.open_cache(whole("padded, all tokens")[0] / "after/c"),
    )


# ---------------------------------------------------------------- what the system is asked


TRACED = "fsync,fdatasync,rename,renameat,renameat2,pwrite64,write,openat,linkat,link"
CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (?:0|[1-9]\d*)\b")


def traced(log):
    """Calls that went well, as (name, path, new path); paths of handles as strace -y shows them."""
    for line in log.read_text().splitlines():
        found = CALL.match(line)
        if not found or found[1] in ("openat", "link", "linkat"):
            continue
        if found[1].startswith("rename"):
            old, new = re.findall(r'"([^"]*)"', found[2])
            yield "rename", old, new
        elif path := re.match(r"\d+<([^>]*)>", found[2]):
            yield found[1], path[1], ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_kernel_sees_every_file_flushed_before_the_rename_that_counts_on_it(
    extraction, tmp_path
):
    log, output = tmp_path / "log", tmp_path / "c"
    words = [str(word) for word in extraction(output, WAYS["shared, all tokens"])]
    watch = ["strace", "-f", "-y", "-s", "1", "--seccomp-bpf", "-o", str(log), "-e"]
    done = subprocess.run(
        [*watch, f"trace={TRACED}", sys.executable, "-m", "probecache", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in done.stderr or "PTRACE" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    dirty, synced, manifests, rows = set(), [], [], set()
    for name, path, new in traced(log):
        if not path.startswith(str(tmp_path)):
            continue
        if name in ("write", "pwrite64"):
            dirty.add(path)
            rows |= {path} if path.endswith(".pt") else set()
        elif name in ("fsync", "fdatasync"):
            dirty.discard(path)
            synced.append(path)
        elif new.endswith(("progress.json", "finished.json", "layer_info.json", "begun.json")):
            assert path not in dirty, f"{path} is renamed before it is flushed"
            assert not {one for one in dirty if one.endswith((".pt", ".crc32"))}, new
            manifests.append(Path(new).name)
            synced.clear()
    assert len(rows) == 8  # of two classes at three layers, the tokens and their spans
    assert manifests[0] == "begun.json"
    assert manifests[-2:] == ["finished.json", "layer_info.json"]
    assert "progress.json" in manifests
    assert synced[0] == str(output), "the folder is flushed after the last rename"
