"""SIGTERM and Ctrl-C as KeyboardInterrupt, which arrives even where Python loses one.

Python raises in the main thread wherever that is. In a `__del__`, or in a callback of the garbage
collector or of C code, nobody can catch it: it is printed, and the work goes on. So a signal is
remembered, and work that takes long asks for it now and then.
Not covered: between two such questions a lost signal is not heard.
"""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["listening", "raise_if_asked"]

_asked: list[int] = []  # signals that came while this process listens


@contextmanager
def listening(asked: list[int], *, to_the_end: bool) -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and Ctrl-C, unless Ctrl-C is ignored or somebody else's.

    Args:
        asked: gets the numbers of the signals that came.
        to_the_end: the process ends after this: from then on it ignores both. False: they do what
            they did before.
    """
    global _asked

    def stop(number: int, _frame: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    before: dict[int, Any] = {signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.default_int_handler
    show, _asked = sys.unraisablehook, asked

    def show_but_stops(lost: sys.UnraisableHookArgs) -> None:
        if not (asked and issubclass(lost.exc_type, KeyboardInterrupt)):
            show(lost)

    try:
        sys.unraisablehook = show_but_stops
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            # None is a handler that Python did not set, and cannot set again.
            signal.signal(number, signal.SIG_IGN if to_the_end else handler or signal.SIG_DFL)
        sys.unraisablehook, _asked = show, []
        # A KeyboardInterrupt that left an `exec` of a text (dataclasses and named tuples use it
        # when modules load) makes Python end by SIGINT, whatever exit code is asked for, though it
        # was caught since. The next `exec` of a text takes that back.
        exec("")


def raise_if_asked() -> None:
    """Raise KeyboardInterrupt where the process was asked to stop and this thread has not heard.

    In the main thread only, which the others are waited for by, and not while it cleans up after
    one: then it has heard.
    """
    if (
        _asked
        and threading.current_thread() is threading.main_thread()
        and not isinstance(sys.exception(), KeyboardInterrupt)
    ):
        raise KeyboardInterrupt
