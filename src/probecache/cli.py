"""The command line: runs a command; errors to one line and an exit code, signals too."""

from __future__ import annotations

import io
import signal
import sys
from typing import Any

import typer

from probecache.cli_commands import Stopped, app
from probecache.errors import ProbecacheError, UsageError, printable

__all__ = ["app", "main"]

_REFUSED, _INTERRUPTED = 2, 130
_signals: list[int] = []  # that asked this process to stop


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; never returns.

    Exit codes: 0 done, 2 refused or failed with one line on stderr, 130 interrupted by Ctrl-C, 143
    by SIGTERM.
    """
    signal.signal(signal.SIGTERM, _stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may hold what a terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(words: list[str]) -> int:
    try:
        _require_text(words)
        code = app(words or ["--help"], prog_name="probecache", standalone_mode=False)
    except ProbecacheError as error:
        return _refuse(str(error))
    except Stopped as stopped:
        return _stopped(str(stopped))
    except OSError as error:  # a name too long, a disk that fails: nothing a module foresaw
        return _refuse(
            f"expected to read or write {error.filename or 'a file'}, got: "
            f"{error.strerror or error}; check the path and the disk"
        )
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        # Typer's own, of whichever package it brings its errors from.
        message = error.format_message()
        stop = "" if message.endswith((".", "?")) else "."
        return _refuse(f"{message}{stop} See probecache {_command(words)}--help")
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        return _stopped("stopped: what was not finished is not kept")
    return code if isinstance(code, int) else 0


def _stop(number: int, _frame: object) -> None:
    _signals.append(number)
    raise KeyboardInterrupt


def _stopped(message: str) -> int:
    print(printable(message), file=sys.stderr)
    return 128 + (_signals[0] if _signals else signal.SIGINT)


def _refuse(message: str) -> int:
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return _REFUSED


def _command(words: list[str]) -> str:
    known: Any = typer.main.get_command(app)
    return f"{words[0]} " if words[0] in known.commands else ""


def _require_text(words: list[str]) -> None:
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"expected arguments in UTF-8, got {word!r}; rename the file or set LANG=C.UTF-8"
            ) from error
        if "\0" in word:
            raise UsageError(f"expected arguments without NUL bytes, got {word!r}")
