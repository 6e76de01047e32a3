"""Rows from the engine to the writer, which works in a thread of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from probecache.stopping import raise_if_asked

if TYPE_CHECKING:
    from probecache.engine import Rows

__all__ = ["Pipe"]

_MOST_BYTES = 64 << 20


class Pipe:
    """Context manager: what is put in is taken, in order, by a function in a thread.

    Neither side waits for the other, until 64 MB wait to be taken. An error of the function is
    raised by the next `put`, or on leaving; what was put in after it is dropped.
    """

    def __init__(self, take: Callable[[Rows], None]) -> None:
        self._take = take
        self._waiting: deque[Rows | None] = deque()
        self._bytes = 0
        self._change = threading.Condition()
        self._error: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def __enter__(self) -> Pipe:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        stop, drop = None, kind is not None
        while not self._ended:
            try:
                self._end(drop)
            except KeyboardInterrupt as interrupt:  # what the function uses is closed next
                stop, drop = interrupt, True
        self._thread.join()
        if stop is not None:
            raise stop
        if kind is None and self._error is not None:
            raise self._error

    def put(self, rows: Rows) -> None:
        """Hand rows over; waits only while too many bytes are on their way.

        Raises KeyboardInterrupt where the process was asked to stop.
        """
        raise_if_asked()
        with self._change:
            self._change.wait_for(lambda: self._bytes < _MOST_BYTES or self._error is not None)
            if self._error is not None:
                raise self._error
            self._waiting.append(rows)
            self._bytes += rows.values.nbytes
            self._change.notify_all()

    def wait(self) -> None:
        """Wait until all that was put in is taken."""
        with self._change:
            self._change.wait_for(lambda: self._bytes == 0 or self._error is not None)
            if self._error is not None:
                raise self._error

    def _end(self, drop: bool) -> None:
        """Let the thread come to its end, and wait for that.

        Not with `join`: one that is interrupted takes the thread for ended from then on.
        """
        with self._change:
            if drop:
                self._waiting.clear()
            self._waiting.append(None)
            self._change.notify_all()
            self._change.wait_for(lambda: self._ended)

    def _work(self) -> None:
        try:
            self._take_all()
        finally:
            with self._change:
                self._ended = True
                self._change.notify_all()

    def _take_all(self) -> None:
        while (rows := self._next()) is not None:
            try:
                self._take(rows)
            except BaseException as error:
                with self._change:
                    self._error = error
                    self._change.notify_all()
                return
            with self._change:
                self._bytes -= rows.values.nbytes
                self._change.notify_all()

    def _next(self) -> Rows | None:
        with self._change:
            self._change.wait_for(lambda: bool(self._waiting))
            return self._waiting.popleft()
