"""The command line: runs a command; errors to one line and an exit code, signals too."""

from __future__ import annotations

import io
import signal
import sys
import traceback
from typing import Any

import typer

# In this order --help lists the commands.
from probecache import cli_extraction, cli_probes, cli_commands  # noqa: F401 isort:skip
from probecache.cli_app import Stopped, app
from probecache.errors import ProbecacheError, UsageError, one_line, printable
from probecache.stopping import listening

__all__ = ["app", "main"]

_REFUSED, _UNFORESEEN, _INTERRUPTED = 2, 70, 130
_NOT_KEPT = "stopped: what was not finished is not kept"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; never returns.

    Exit codes: 0 done, 1 damaged (`verify`), 2 refused or failed with one line on stderr, 70 failed
    as nobody foresaw, with a traceback, 130 interrupted by Ctrl-C, 143 by SIGTERM.

    Args:
        arguments: None: those of the process, which ends with the command and so is deaf to both
            signals from then on.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may hold what a terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if arguments is None else arguments
    sys.exit(_run(words, to_the_end=arguments is None))


def _run(words: list[str], *, to_the_end: bool) -> int:
    asked: list[int] = []
    try:
        with listening(asked, to_the_end=to_the_end):
            _require_text(words)
            code = app(words or ["--help"], prog_name="probecache", standalone_mode=False)
    except ProbecacheError as error:
        return _refuse(str(error))
    except Stopped as stopped:
        return _stopped(str(stopped), asked)
    except OSError as error:  # a name too long, a disk that fails: nothing a module foresaw
        if asked:  # files were closed under whoever was stopped
            return _stopped(_NOT_KEPT, asked)
        return _refuse(
            f"expected to read or write {error.filename or 'a file'}, got: "
            f"{error.strerror or error}; check the path and the disk"
        )
    except MemoryError as error:
        return _refuse(
            f"expected enough memory, got: {one_line(error)}; free some, or ask for less "
            "of it with --memory or --batch-tokens"
        )
    except Exception as error:
        if not hasattr(error, "format_message"):
            traceback.print_exc()
            return _UNFORESEEN
        # Typer's own, of whichever package it brings its errors from.
        message = error.format_message()
        stop = "" if message.endswith((".", "?")) else "."
        return _refuse(f"{message}{stop} See probecache {_command(words)}--help")
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        return _stopped(_NOT_KEPT, asked)
    return code if isinstance(code, int) else 0


def _stopped(message: str, asked: list[int]) -> int:
    print(printable(message), file=sys.stderr)
    return 128 + (asked[0] if asked else signal.SIGINT)


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
