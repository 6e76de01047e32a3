"""A bar on a terminal, lines elsewhere, nothing when quiet; always on stderr."""

from __future__ import annotations

import io
import re
import sys
import time
import types

import pytest

from probecache import progress
from probecache.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Makes stderr a terminal; called in the test, because pytest sets stderr after fixtures."""

    def opened():
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return opened


@pytest.fixture
def wait(monkeypatch):
    """Lets time pass without waiting."""
    real, passed = time.monotonic, [0.0]
    monkeypatch.setattr(
        progress, "time", types.SimpleNamespace(monotonic=lambda: real() + passed[0])
    )

    def later(seconds):
        passed[0] += seconds

    return later


def lines(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


# ---------------------------------------------------------------- elsewhere: lines


def test_a_line_says_how_much_is_done_how_long_it_took_and_what_is_left(capsys, wait):
    with Progress(4000, "extracting", "tokens") as bar:
        wait(30)
        bar.update(1000)
        (line,) = lines(capsys)
    assert line == "extracting: 1,000 of 4,000 tokens (25%), 30 s, about 90 s left"


def test_lines_come_a_few_seconds_apart_however_often_work_is_reported(capsys, wait):
    with Progress(1000, "extracting", "tokens") as bar:
        for _ in range(100):
            wait(1)
            bar.update(10)
    found = lines(capsys)
    assert len(found) == 20
    done = [int(re.search(r"[\d,]+", line)[0].replace(",", "")) for line in found[:-1]]
    assert done == list(range(50, 1000, 50))
    assert "1,000 of 1,000 tokens (100%), 100 s, about 0 s left" in found[-1]


def test_a_short_run_prints_no_line(capsys):
    with Progress(10, "extracting", "tokens") as bar:
        for _ in range(10):
            bar.update(1)
    assert lines(capsys) == []


def test_a_run_of_nothing_is_no_error(capsys, wait):
    with Progress(0, "extracting", "tokens") as bar:
        wait(10)
        bar.update(0)
    assert "0 of 0 tokens" in lines(capsys)[0]


def test_each_line_is_flushed_so_that_a_log_shows_it_at_once(monkeypatch, wait):
    flushed = []
    stream = io.StringIO()
    stream.flush = lambda: flushed.append(stream.getvalue())
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(10, "extracting", "tokens") as bar:
        wait(10)
        bar.update(5)
    assert "5 of 10" in flushed[-1]


# ---------------------------------------------------------------- a terminal: a bar


def test_a_terminal_gets_a_bar_that_ends_full(terminal, capsys):
    screen = terminal()
    with Progress(4000, "extracting", "tokens") as bar:
        for _ in range(4):
            bar.update(1000)
    shown = screen.getvalue()
    assert shown.split("\r")[-1].startswith("extracting: 100%")
    assert "4.00k/4.00k" in shown
    assert "tokens/s" in shown
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_no_lines_beside_the_bar(terminal, wait):
    screen = terminal()
    with Progress(4000, "extracting", "tokens") as bar:
        wait(100)
        bar.update(1000)
    assert "s left" not in screen.getvalue()
    assert "25%" in screen.getvalue()


def test_the_bar_is_closed_when_the_run_fails_and_the_error_goes_on(terminal):
    screen = terminal()
    with (  # noqa: PT012
        pytest.raises(RuntimeError, match="the run broke"),
        Progress(10, "extracting", "tokens") as bar,
    ):
        inner = bar._bar
        raise RuntimeError("the run broke")
    assert inner.disable  # what tqdm sets on a bar that is closed
    assert screen.getvalue().endswith("\n")


def notebook(shell):
    """An IPython whose shell is of this class."""
    return types.SimpleNamespace(get_ipython=type(shell, (), {}))


@pytest.mark.parametrize(
    ("shell", "bar_expected"), [("ZMQInteractiveShell", True), ("TerminalInteractiveShell", False)]
)
def test_a_notebook_gets_a_bar_though_it_is_no_terminal(monkeypatch, shell, bar_expected):
    monkeypatch.setitem(sys.modules, "IPython", notebook(shell))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress(10, "extracting", "tokens") as bar:
        assert (bar._bar is not None) == bar_expected


# ---------------------------------------------------------------- quiet


def test_quiet_prints_nothing_on_a_terminal(terminal, wait):
    screen = terminal()
    with Progress(10, "extracting", "tokens", quiet=True) as bar:
        wait(100)
        bar.update(10)
    assert screen.getvalue() == ""


def test_quiet_prints_nothing_elsewhere(capsys, wait):
    with Progress(10, "extracting", "tokens", quiet=True) as bar:
        wait(100)
        bar.update(10)
    assert lines(capsys) == []


def test_all_is_what_there_is():
    assert progress.__all__ == ["Progress"]
