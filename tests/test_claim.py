"""One writer at a time: taking a claim, losing it, taking over a dead one; locks or not."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import time
from contextlib import contextmanager, suppress

import pytest

from probecache.errors import OutputError
from probecache.store import claim as claim_module
from probecache.store.claim import claimed


def without_effect(*_):
    return None


def not_supported(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def without_links(*_):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


LOCKS = {"locks": None, "locks without effect": without_effect, "no locks": not_supported}


@pytest.fixture(params=LOCKS)
def locks(request, monkeypatch):
    if LOCKS[request.param] is not None:
        monkeypatch.setattr(fcntl, "flock", LOCKS[request.param])


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch):
    if request.param == "no links":
        monkeypatch.setattr(os, "link", without_links)


def forked(action):
    """Run an action in a child; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return child


@contextmanager
def a_holder(folder):
    """A child that holds the claim until it is killed; yields its process id."""
    told, tell = os.pipe()

    def hold():
        with claimed(folder):
            os.write(tell, b"x")
            time.sleep(60)

    child = forked(hold)
    os.close(tell)
    try:
        assert os.read(told, 1) == b"x"
        yield child
    finally:
        os.close(told)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def die_holding(folder):
    with a_holder(folder) as child:
        pass
    return child


def owner_of(folder):
    return json.loads((folder / "owner.json").read_text())


def rewrite(folder, **changes):
    (folder / "owner.json").write_text(json.dumps({**owner_of(folder), **changes}))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "cache" / "unfinished"
    made.mkdir(parents=True)
    return made


def seconds_to_take(folder):
    started = time.monotonic()
    with claimed(folder):
        took = time.monotonic() - started
        assert owner_of(folder)["pid"] == os.getpid()
    assert list(folder.iterdir()) == []
    return took


# ---------------------------------------------------------------- holding


def test_a_claim_says_who_holds_it_and_leaves_nothing(folder, locks, links):
    seconds_to_take(folder)
    seconds_to_take(folder)


def test_the_folder_is_made_where_it_is_not_there(tmp_path):
    seconds_to_take(tmp_path / "a" / "b")


def test_the_second_is_told_which_process_on_which_machine_writes(folder, locks, links):
    with a_holder(folder) as child:
        host = owner_of(folder)["host"]
        with (
            pytest.raises(OutputError, match=rf"{folder.parent}.* process {child} on {host} .*"),
            claimed(folder),
        ):
            pytest.fail("two hold it")
    assert [path.name for path in folder.iterdir()] == ["owner.json"]


def test_a_holder_that_lost_its_claim_finds_out_and_leaves_the_other_alone(folder):
    with claimed(folder) as claim:
        claim.require()
        rewrite(folder, token="another", pid=1)
        assert not claim.held
        with pytest.raises(OutputError, match="another run has taken over"):
            claim.require()
    assert owner_of(folder)["token"] == "another"


# ---------------------------------------------------------------- dead holders


def test_a_killed_holder_is_followed_at_once(folder, locks, links):
    die_holding(folder)
    assert seconds_to_take(folder) < 1


def test_a_killed_holder_whose_parent_takes_no_notice_is_followed_at_once(folder):
    """As in a container whose first process does not wait for its children."""
    with a_holder(folder) as child:
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert seconds_to_take(folder) < 1


def test_a_process_number_that_was_given_to_another_counts_as_dead(folder):
    die_holding(folder)
    rewrite(folder, pid=os.getpid(), started="1")
    assert seconds_to_take(folder) < 1


@pytest.mark.parametrize("content", [b"", b'{"host": "a", "bo', b"\xff\x00", b"[]", b"[" * 100_000])
def test_a_claim_that_says_nothing_is_taken_over_once_it_is_silent(folder, content, monkeypatch):
    monkeypatch.setattr(claim_module, "_SILENT_S", 0.3)
    (folder / "owner.json").write_bytes(content)
    assert 0.25 < seconds_to_take(folder) < 2


@pytest.mark.parametrize(
    "forged", [{"pid": "1"}, {"pid": -1}, {"pid": 10**30}, {"host": 3}, {"token": "../../x"}]
)
def test_a_forged_claim_holds_nobody_up_for_long(folder, forged, monkeypatch):
    monkeypatch.setattr(claim_module, "_SILENT_S", 0.3)
    die_holding(folder)
    rewrite(folder, **forged)
    assert seconds_to_take(folder) < 2


# ---------------------------------------------------------------- holders elsewhere


def test_a_silent_holder_elsewhere_is_followed_after_a_while(folder, monkeypatch):
    monkeypatch.setattr(claim_module, "_SILENT_S", 0.5)
    die_holding(folder)
    rewrite(folder, host="elsewhere")
    assert 0.45 < seconds_to_take(folder) < 2


def test_a_holder_elsewhere_is_respected_while_it_touches_its_claim(folder, locks, monkeypatch):
    monkeypatch.setattr(claim_module, "_SILENT_S", 1.0)
    monkeypatch.setattr(claim_module, "_TOUCH_S", 0.2)
    with a_holder(folder):
        rewrite(folder, host="elsewhere")
        with pytest.raises(OutputError, match="on elsewhere"), claimed(folder):
            pytest.fail("two hold it")


def test_a_holder_elsewhere_that_wakes_up_at_the_last_moment_keeps_its_claim(folder, monkeypatch):
    monkeypatch.setattr(claim_module, "_SILENT_S", 0.2)
    die_holding(folder)
    rewrite(folder, host="elsewhere")
    before, real = owner_of(folder), claim_module._written

    def written(path, owner):
        os.utime(folder / "owner.json")  # while the other prepares to take over
        return real(path, owner)

    monkeypatch.setattr(claim_module, "_written", written)
    monkeypatch.setattr(claim_module, "_TRIES", 2)
    with pytest.raises(OutputError, match="on elsewhere"), claimed(folder):
        pytest.fail("two hold it")
    assert owner_of(folder) == before


def test_who_dies_while_he_takes_over_is_followed_at_once(folder, links):
    die_holding(folder)

    def die_over_it():
        real, others = claim_module._written, []

        def written(path, owner):
            if path.name != "owner.json":
                others.append(path)  # the claim on taking over
            elif others:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(path, owner)

        claim_module._written = written
        with claimed(folder):
            pass

    for _ in range(3):
        _, status = os.waitpid(forked(die_over_it), 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    left = sorted(path.name for path in folder.iterdir())
    assert "owner.json" in left
    assert len(left) > 1
    with claimed(folder):
        assert owner_of(folder)["pid"] == os.getpid()


# ---------------------------------------------------------------- many at once

ROUNDS = 6


def take_once(folder, log, chance):
    """Take the claim, write down when it is held and when not any more, and maybe die of it."""
    with suppress(OutputError), claimed(folder):
        os.write(log, f"+{os.getpid()}\n".encode())
        time.sleep(0.003)
        os.write(log, f"-{os.getpid()}\n".encode())
        if chance.random() < 0.5:
            os.kill(os.getpid(), signal.SIGKILL)


def compete(folder, log, start, chance):
    """Take the claim again and again, in a process of its own each time."""
    real = claim_module._lives

    def lives(path, holder):
        answer = real(path, holder)
        time.sleep(chance.random() / 200)  # by then it may be another's
        return answer

    claim_module._lives = lives
    os.read(start, 1)
    for _ in range(ROUNDS):
        os.waitpid(forked(lambda: take_once(folder, log, chance)), 0)
        chance.random()


@pytest.mark.parametrize("count", [2, 8])
def test_of_those_who_begin_together_one_holds_it(folder, locks, links, count):
    die_holding(folder)
    log = os.open(folder.parent / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    start, go = os.pipe()
    children = [
        forked(lambda n=number: compete(folder, log, start, random.Random(n)))
        for number in range(count)
    ]
    os.write(go, b"x" * count)
    for child in children:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    for handle in (log, start, go):
        os.close(handle)
    lines = (folder.parent / "log").read_text().split()
    assert len(lines) >= 2 * count
    for entered, left in zip(lines[::2], lines[1::2], strict=True):
        assert (entered[0], left[0]) == ("+", "-")
        assert entered[1:] == left[1:]
    assert seconds_to_take(folder) < 1
