"""SIGTERM and Ctrl-C end a command with 143 and 130, wherever they find it; what else ends it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
from families import RECORDS

from probecache import cli, progress, stopping
from probecache.progress import Progress
from probecache.stopping import listening, raise_if_asked
from probecache.workflow.pipe import Pipe

SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)


class StoppedAsItGoes:
    """A signal finds Python in its `__del__`, where no exception can be caught."""

    def __init__(self, number):
        self._number = number

    def __del__(self):
        signal.raise_signal(self._number)


@pytest.fixture
def ended(monkeypatch, capsys):
    """Runs a function as a command; its exit code and what is on stderr."""

    def run(function):
        monkeypatch.setattr("probecache.api.verify", lambda _: function())
        with pytest.raises(SystemExit) as end:
            cli.main(["verify", "x"])
        return end.value.code, capsys.readouterr().err

    return run


def as_process(statements, *arguments):
    """A real command line whose `verify` runs these statements."""
    code = (
        "import atexit, os, signal\nfrom types import SimpleNamespace\n"
        "from probecache import api, cli, cli_commands\ncli_commands.print_report = str\n"
        f"def verify(_):\n  {statements}\n  return SimpleNamespace(whole=True)\n"
        "api.verify = verify\ncli.main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "verify", "x"], capture_output=True, text=True, check=False
    )


# ---------------------------------------------------------------- where a signal finds a command


@SIGNALS
def test_a_signal_ends_a_command_in_one_line(ended, number, code):
    found = ended(lambda: signal.raise_signal(number))
    assert found == (code, "stopped: what was not finished is not kept\n")


@SIGNALS
def test_a_signal_while_a_module_executes_text_ends_the_process_with_its_own_code(number, code):
    ran = as_process(f"exec('signal.raise_signal({int(number)})')")
    assert (ran.returncode, ran.stderr.count("\n")) == (code, 1), ran.stderr


@SIGNALS
def test_a_signal_after_the_end_changes_nothing(number, code):
    ran = as_process(f"atexit.register(os.kill, os.getpid(), {int(number)})")
    assert (ran.returncode, ran.stderr) == (0, "")


@SIGNALS
def test_a_signal_that_python_loses_is_heard_at_the_next_progress(ended, number, code):
    steps = []

    def work():
        with Progress(9, "working", "steps", quiet=True) as bar:
            for step in range(9):
                if step == 3:
                    StoppedAsItGoes(number)
                steps.append(step)
                bar.update(1)

    found = ended(work)
    assert found == (code, "stopped: what was not finished is not kept\n")
    assert steps == [0, 1, 2, 3]


def test_a_run_whose_stop_python_loses_says_what_is_kept(folders, tmp_path, monkeypatch, capsys):
    from probecache.engine import ResidentEngine

    attempt, calls = ResidentEngine._attempt, []

    def attempted(self, *arguments):
        calls.append(None)
        if len(calls) == 4:
            StoppedAsItGoes(signal.SIGTERM)
        return attempt(self, *arguments)

    monkeypatch.setattr(ResidentEngine, "_attempt", attempted)
    data = tmp_path / "data.json"
    data.write_text(json.dumps(RECORDS))
    words = ["extract", "--model", folders("llama"), "--data", data, "--output", tmp_path / "c"]
    words += ["--engine", "resident", "--no-shared-prefixes", "--batch-tokens", 1, "--quiet"]
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, words)])
    assert end.value.code == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"stopped with .*% of the rows on disk|stopped before any rows", said)
    assert len(calls) == 4  # two are the preflight's


def test_a_signal_that_python_loses_is_heard_when_rows_are_handed_over():
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        listening([], to_the_end=False),
        Pipe(pytest.fail) as pipe,
    ):
        StoppedAsItGoes(signal.SIGTERM)
        pipe.put(None)


# ---------------------------------------------------------------- what hears, and when


def test_who_cleans_up_after_a_stop_is_not_stopped_again():
    cleaned = []
    with pytest.raises(KeyboardInterrupt), listening([], to_the_end=False):  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise_if_asked()
            cleaned.append(True)
    assert cleaned


def test_other_threads_go_on_to_where_the_main_one_waits_for_them():
    heard, asked = [], []

    def work():
        try:
            raise_if_asked()
        except KeyboardInterrupt:
            heard.append(True)

    with listening(asked, to_the_end=False):
        StoppedAsItGoes(signal.SIGINT)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert (asked, heard) == ([signal.SIGINT], [])


def test_signals_do_afterwards_what_they_did_before(ended):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)], sys.unraisablehook
    assert ended(lambda: signal.raise_signal(signal.SIGTERM))[0] == 143
    after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)], sys.unraisablehook
    assert after == before
    raise_if_asked()  # what was asked of that command is not asked of what comes after it


def test_ctrl_c_stays_ignored_where_it_was(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening([], to_the_end=False):
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_errors_that_nobody_can_catch_are_shown_as_ever(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: shown.append(lost.exc_type))

    class Broken:
        def __del__(self):
            raise ValueError

    with listening([], to_the_end=False):
        Broken()
    assert shown == [ValueError]


# ---------------------------------------------------------------- other ends


def test_an_error_of_the_system_in_a_command_that_was_stopped_is_a_stop(ended):
    def work():
        StoppedAsItGoes(signal.SIGINT)
        os.close(-1)

    assert ended(work) == (130, "stopped: what was not finished is not kept\n")


def test_what_nobody_foresaw_has_an_exit_code_of_its_own_and_a_traceback(ended):
    code, said = ended(lambda: {}["nothing"])
    assert code == 70
    assert said.startswith("Traceback")
    assert "KeyError: 'nothing'" in said


def test_too_little_memory_is_one_line(ended):
    def work():
        raise MemoryError("Unable to allocate 9 TiB")

    code, said = ended(work)
    assert code == 2
    assert said.startswith("error: expected enough memory, got: Unable to allocate 9 TiB; free")
    assert said.count("\n") == 1


def test_all_is_what_there_is():
    assert stopping.__all__ == ["listening", "raise_if_asked"]
    assert progress.__all__ == ["Progress"]
