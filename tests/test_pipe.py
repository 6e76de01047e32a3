"""Rows go to a thread in order, neither side waits without need, and no error is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from probecache.engine import Rows
from probecache.workflow import pipe as pipes
from probecache.workflow.pipe import Pipe

PATIENCE = 10.0  # seconds after which something hangs


def rows(number, kilobytes=1):
    return Rows(number, (number,), torch.full((kilobytes, 256), float(number)))


def writers():
    return [thread for thread in threading.enumerate() if thread.name == "writer"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert writers() == []


def finishes(function):
    """Run in a thread of its own, so that a hang fails the test and does not stop the suite."""
    found = SimpleNamespace(error=None)

    def run():
        try:
            function()
        except BaseException as error:
            found.error = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "hangs"
    if found.error is not None:
        raise found.error


def test_everything_is_taken_in_order_before_the_pipe_closes():
    taken = []

    def run():
        with Pipe(lambda one: taken.append(one.layer)) as pipe:
            for number in range(500):
                pipe.put(rows(number))

    finishes(run)
    assert taken == list(range(500))


def test_nothing_put_in_is_nothing_taken():
    finishes(lambda: Pipe(pytest.fail).__enter__().__exit__(None))


def test_who_puts_does_not_wait_for_who_takes():
    may_take, taken = threading.Event(), []

    def take(one):
        may_take.wait(PATIENCE)
        taken.append(one.layer)

    def run():
        with Pipe(take) as pipe:
            for number in range(50):
                pipe.put(rows(number))
            assert taken == []
            may_take.set()

    finishes(run)
    assert len(taken) == 50


def test_who_takes_does_not_wait_for_who_puts():
    taken = threading.Semaphore(0)

    def run():
        with Pipe(lambda _: taken.release()) as pipe:
            for number in range(20):
                pipe.put(rows(number))
                assert taken.acquire(timeout=PATIENCE)  # taken although no more follows yet

    finishes(run)


def test_only_so_many_bytes_may_wait(monkeypatch):
    monkeypatch.setattr(pipes, "_MOST_BYTES", 10 << 10)
    may_take, put = threading.Semaphore(0), []

    def run():
        with Pipe(lambda _: may_take.acquire(timeout=PATIENCE)) as pipe:
            for number in range(40):
                pipe.put(rows(number))
                put.append(number)

    runner = threading.Thread(target=run, daemon=True)
    runner.start()
    wait_until(lambda: len(put) == 10)
    time.sleep(0.05)
    assert len(put) == 10  # ten kilobytes wait; the eleventh has to
    may_take.release(3)
    wait_until(lambda: len(put) == 13)
    may_take.release(100)
    runner.join(PATIENCE)
    assert len(put) == 40


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "hangs"
        time.sleep(0.001)


def test_rows_larger_than_all_that_may_wait_pass_all_the_same(monkeypatch):
    monkeypatch.setattr(pipes, "_MOST_BYTES", 10)
    taken = []

    def run():
        with Pipe(lambda one: taken.append(one.layer)) as pipe:
            for number in range(5):
                pipe.put(rows(number))

    finishes(run)
    assert taken == list(range(5))


def failing_at(number, error):
    def take(one):
        if one.layer == number:
            raise error

    return take


def test_an_error_of_the_taker_reaches_who_puts_next():
    failure, put = OSError("disk"), []

    def run():
        with Pipe(failing_at(3, failure)) as pipe:
            for number in range(10**9):
                pipe.put(rows(number))
                put.append(number)

    with pytest.raises(OSError, match="disk") as caught:
        finishes(run)
    assert caught.value is failure
    assert len(put) >= 4


def test_an_error_of_the_taker_reaches_who_waits_for_room(monkeypatch):
    monkeypatch.setattr(pipes, "_MOST_BYTES", 1)
    started = threading.Event()

    def take(_):
        started.wait(PATIENCE)
        time.sleep(0.02)  # by now the other side waits
        raise OSError("disk")

    def run():
        with Pipe(take) as pipe:
            pipe.put(rows(0))
            started.set()
            pipe.put(rows(1))

    with pytest.raises(OSError, match="disk"):
        finishes(run)


def test_an_error_with_the_last_rows_is_raised_on_leaving():
    def run():
        with Pipe(failing_at(2, OSError("disk"))) as pipe:
            for number in range(3):
                pipe.put(rows(number))

    with pytest.raises(OSError, match="disk"):
        finishes(run)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError])
def test_whatever_the_taker_raises_is_an_error(error):
    def run():
        with Pipe(failing_at(0, error())) as pipe:
            pipe.put(rows(0))

    with pytest.raises(error):
        finishes(run)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_of_who_puts_drops_what_waits_and_is_the_one_that_is_raised(error):
    first, may_take, taken = threading.Event(), threading.Event(), []

    def take(one):
        first.set()
        may_take.wait(PATIENCE)
        taken.append(one.layer)
        raise OSError("disk")

    def run():
        with Pipe(take) as pipe:
            for number in range(20):
                pipe.put(rows(number))
            first.wait(PATIENCE)
            threading.Timer(0.02, may_take.set).start()
            raise error("mine")

    with pytest.raises(error, match="mine"):
        finishes(run)
    assert taken == [0]  # it was on its way; the others were not


def test_ctrl_c_on_leaving_waits_for_what_is_on_its_way_and_drops_the_rest():
    leaving, taken = threading.Event(), []

    def take(one):
        leaving.wait(PATIENCE)
        for _ in range(2):  # one who does not wait to press it again
            time.sleep(0.05)  # by now the other side waits for the end
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        taken.append(one.layer)

    with pytest.raises(KeyboardInterrupt), Pipe(take) as pipe:  # noqa: PT012
        for number in range(20):
            pipe.put(rows(number))
        leaving.set()
    assert taken == [0]
