"""Layers at once: in order, in bounded number, and ended where one fails."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from threadpoolctl import threadpool_info

from probecache.workflow import layers_at_once as module
from probecache.workflow.layers_at_once import each_layer


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """Three cores, whatever there are."""
    monkeypatch.setattr(module, "_cores", lambda: 3)


def most_at_once(bytes_each, layers=range(8)):
    """How many layers were in work together."""
    now, most, lock = [0], [0], threading.Lock()

    def work(_layer):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1

    assert [layer for layer, _ in each_layer(list(layers), work, bytes_each)] == list(layers)
    return most[0]


def test_outcomes_come_in_the_order_of_the_layers_whichever_is_done_first():
    def work(layer):
        time.sleep(0.05 if layer == 7 else 0)
        return layer * 10

    found = [(layer, done.result()) for layer, done in each_layer([7, 3, 5, 1], work, 1)]
    assert found == [(7, 70), (3, 30), (5, 50), (1, 10)]


def test_no_layers_are_no_work():
    assert list(each_layer([], lambda layer: layer, 1)) == []


@pytest.mark.parametrize(
    ("bytes_each", "expected"),
    [(0, 3), (1, 3), (200 << 20, 3), (250 << 20, 2), (400 << 20, 1), (1 << 50, 1)],
)
def test_as_many_are_in_work_as_cores_and_memory_allow(bytes_each, expected):
    assert most_at_once(bytes_each) == expected


def test_there_are_no_more_threads_than_layers():
    assert most_at_once(1, layers=[4]) == 1


def test_the_algebra_underneath_has_one_thread_while_several_layers_are_in_work():
    import numpy as np

    np.ones((8, 8)) @ np.ones((8, 8))  # loads it
    before = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}

    def work(_layer):
        return [pool["num_threads"] for pool in threadpool_info()]

    counts = [done.result() for _, done in each_layer([1, 2], work, 1)]
    assert counts[0]
    assert {count for one in counts for count in one} == {1}
    assert {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()} == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_the_first_error_in_order_is_raised_and_what_was_not_begun_is_not_begun(error):
    begun = []

    def work(layer):
        begun.append(layer)
        if layer == 1:
            time.sleep(0.05)
            raise error("of layer 1")
        if layer == 2:
            raise LookupError("of layer 2, and sooner")
        time.sleep(0.1)

    def take_all():
        for _, done in each_layer(list(range(50)), work, 1):
            done.result()

    with pytest.raises(error, match="of layer 1"):
        take_all()
    assert len(begun) < 10
    count = len(begun)
    time.sleep(0.15)
    assert len(begun) == count


def test_an_interruption_from_outside_ends_once_what_is_in_work_is_done():
    begun, done = [], []

    def work(layer):
        begun.append(layer)
        time.sleep(0.05)
        if layer == 0:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        done.append(layer)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(each_layer(list(range(100)), work, 1))
    assert time.monotonic() - start < 2
    assert sorted(done) == sorted(begun)
    assert len(begun) < 10


def test_an_interruption_while_work_is_handed_out_ends_soon_too(monkeypatch):
    begun = []
    submit = module.ThreadPoolExecutor.submit

    def interrupted(self, work, layer):
        if layer == 50:
            raise KeyboardInterrupt
        return submit(self, work, layer)

    def work(layer):
        begun.append(layer)
        time.sleep(0.02)

    monkeypatch.setattr(module.ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(each_layer(list(range(100)), work, 1))
    assert len(begun) < 10


def test_work_that_takes_long_is_told_that_nobody_waits_for_it():
    stopped, ended = threading.Event(), []

    def work(layer):
        if layer == 0:
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
        ended.append(stopped.wait(20))

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(each_layer([0, 1, 2, 3, 4], work, 1, stopped=stopped))
    assert time.monotonic() - start < 5
    assert ended == [True] * 3


def test_a_caller_who_stops_listening_ends_the_rest():
    begun = []

    def work(layer):
        begun.append(layer)
        time.sleep(0.02)

    layers = each_layer(list(range(100)), work, 1)
    next(layers)
    layers.close()
    assert len(begun) < 12


def test_all_is_sorted_and_exists():
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
