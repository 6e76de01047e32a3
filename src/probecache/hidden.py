"""The residual stream of every token between two blocks: in memory, or in a file.

A file is read ahead of the step that needs it and written behind the one that made it, by a thread
that does one thing after another. It has no name, so that nothing is left of it after a kill.
Guarantee: `read` gives what was last written there, bit for bit.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probecache.errors import OutputError

if TYPE_CHECKING:
    import torch

__all__ = ["HiddenStates"]

_PENDING = 2  # writes that may wait: more would only take memory


class HiddenStates:
    """Rows of one width and dtype, as the first ones written have them.

    Args:
        tokens: how many rows.
        folder: where the file goes; None keeps the rows in memory, on the device they come from.
    """

    def __init__(self, tokens: int, folder: Path | None = None) -> None:
        self.tokens, self._folder = tokens, folder
        self._rows: torch.Tensor | None = None
        self._file: Any = None
        self._row: torch.Tensor | None = None  # an empty one, for width and dtype
        self._pool = ThreadPoolExecutor(1)
        self._ahead: dict[tuple[int, int], Future[torch.Tensor]] = {}
        self._behind: list[Future[None]] = []

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self._rows = None
        if self._file is not None:
            self._file.close()

    def write(self, offset: int, rows: torch.Tensor) -> None:
        """Put rows [count, width] at an offset; they must not be changed afterwards."""
        self._prepare(rows)
        if self._rows is not None:
            self._rows[offset : offset + len(rows)] = rows
            return
        while len(self._behind) >= _PENDING:
            self._behind.pop(0).result()
        self._behind.append(self._pool.submit(self._write, offset, rows.cpu()))

    def expect(self, offset: int, count: int) -> None:
        """Say that these rows will be read next."""
        if self._rows is None:
            self._ahead[offset, count] = self._pool.submit(self._read, offset, count)

    def read(self, offset: int, count: int) -> torch.Tensor:
        """The rows [count, width] at an offset: on the CPU from a file, else where they lie."""
        if self._rows is not None:
            # A copy begins where memory is aligned, and alignment decides how sums are rounded.
            return self._rows[offset : offset + count].clone()
        ahead = self._ahead.pop((offset, count), None)
        rows = (ahead or self._pool.submit(self._read, offset, count)).result()
        for write in self._behind:
            if write.done():
                write.result()  # of one that failed the rows are still those before it
        return rows

    def _prepare(self, rows: torch.Tensor) -> None:
        import torch

        if self._row is not None:
            return
        self._row = rows.new_empty((0, rows.shape[1]), device="cpu")
        if self._folder is None:
            self._rows = torch.empty(
                (self.tokens, rows.shape[1]), dtype=rows.dtype, device=rows.device
            )
        else:
            try:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            except OSError as error:
                raise self._no_room(error) from error

    @property
    def _row_bytes(self) -> int:
        assert self._row is not None
        return self._row.shape[1] * self._row.element_size()

    def _write(self, offset: int, rows: torch.Tensor) -> None:
        import torch

        data = memoryview(rows.contiguous().view(torch.uint8).numpy().data).cast("B")
        at = offset * self._row_bytes
        try:
            while data:
                done = os.pwrite(self._file.fileno(), data, at)
                data, at = data[done:], at + done
        except OSError as error:
            raise self._no_room(error) from error

    def _no_room(self, error: OSError) -> OutputError:
        return OutputError(
            f"expected room in {self._folder} for {self.tokens * self._row_bytes:,} bytes of "
            f"hidden states, got: {error.strerror}; free some, or give more --memory"
        )

    def _read(self, offset: int, count: int) -> torch.Tensor:
        import torch

        assert self._row is not None
        rows = torch.empty((count, self._row.shape[1]), dtype=self._row.dtype)
        data = memoryview(rows.view(torch.uint8).numpy().data).cast("B")
        at = offset * self._row_bytes
        while data:
            done = os.preadv(self._file.fileno(), [data], at)
            if not done:
                raise OutputError(f"expected hidden states in {self._folder}, got a shorter file")
            data, at = data[done:], at + done
        return rows
