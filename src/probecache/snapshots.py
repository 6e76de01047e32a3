"""The residual stream of every token behind one block, in a file that a run can go on from.

    header    a page: magic, layer, tokens, width, steps, dtype, CRC-32 of these and the table
    rows      [tokens, width], one step of the work after the other
    table     int64 [steps, 3]: which step, its tokens, CRC-32 of its rows

Guarantee: the header is written when all else is on disk; a file that is unfinished, cut short or
changed is refused, and no row of it is given out. A run may ask for fewer steps than are there, not
for others. Not checked: whose prompts and weights they are.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from probecache.atomic import read_at, sync_folder, write_at
from probecache.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

__all__ = ["RowFile", "SnapshotReader", "SnapshotWriter"]

_MAGIC = b"probehid"
_HEADER, _CHECKSUM = struct.Struct("<8sqqqq16s"), struct.Struct("<I")
_PAGE = 4096
_ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


class _Step(Protocol):
    @property
    def tokens(self) -> int: ...
    @property
    def first(self) -> int: ...


class RowFile:
    """Rows of one width and dtype in an open file.

    Args:
        file: open for reading and writing, unbuffered or never used but through this.
        where: what to call it in errors.
        tokens: how many rows it will hold.
        base: where the first row begins.
    """

    def __init__(self, file: Any, where: Path, tokens: int, base: int = 0) -> None:
        self._file, self._where, self._tokens, self._base = file, where, tokens, base

    def write(self, offset: int, rows: torch.Tensor) -> None:
        """Put rows [count, width] on the CPU at an offset."""
        row_bytes = rows.shape[1] * rows.element_size()
        place = self._base + offset * row_bytes
        try:
            write_at(self._file.fileno(), _bytes_of(rows.contiguous()), place)
        except OSError as error:
            raise no_room(self._where, self._tokens * row_bytes, error) from error

    def read(self, offset: int, count: int, like: torch.Tensor) -> torch.Tensor:
        """The rows [count, width] at an offset, of width and dtype of another tensor's."""
        import torch

        rows = torch.empty((count, like.shape[1]), dtype=like.dtype)
        place = self._base + offset * like.shape[1] * like.element_size()
        if not read_at(self._file.fileno(), _bytes_of(rows), place):
            raise OutputError(f"expected hidden states in {self._where}, got a shorter file")
        return rows

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def no_room(where: Path, needed: int, error: OSError) -> OutputError:
    """The error for a place that does not take so many bytes."""
    return OutputError(
        f"expected room in {where} for {needed:,} bytes of hidden states, got: {error.strerror}; "
        "free some, or give more --memory"
    )


def _bytes_of(rows: torch.Tensor) -> memoryview:
    import torch

    return memoryview(rows.view(torch.uint8).numpy().data).cast("B")


class SnapshotWriter:
    """Takes the rows of all steps in their order; `finish` makes a snapshot of them.

    Args:
        path: a new file, or one to replace.
        layer: behind how many blocks.
        steps: of the work.

    Raises:
        OutputError: the file cannot be made.
    """

    def __init__(self, path: Path, layer: int, steps: Sequence[_Step]) -> None:
        self.path, self.layer = path, layer
        self._table = np.array([(step.first, step.tokens, 0) for step in steps], dtype="<i8")
        self._starts = np.cumsum([0, *self._table[:, 1]])
        self._row: torch.Tensor | None = None
        self.seconds = 0.0  # that the disk has taken so far
        try:
            path.unlink(missing_ok=True)  # a reader of the old one keeps it
            file = path.open("x+b", buffering=0)
        except OSError as error:
            raise OutputError(
                f"expected to be able to write hidden states to {path}, got: {error.strerror}; "
                "choose another --output"
            ) from error
        self.rows = RowFile(file, path, int(self._starts[-1]), _PAGE)

    def write(self, offset: int, rows: torch.Tensor) -> None:
        """Put rows [count, width] of one step on the CPU at an offset; called in rising order."""
        started = time.perf_counter()
        self._row = rows[:0]
        step = int(np.searchsorted(self._starts, offset, side="right")) - 1
        before = int(self._table[step, 2])
        self._table[step, 2] = zlib.crc32(_bytes_of(rows.contiguous()), before)
        self.rows.write(offset, rows)
        self.seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Put all on disk, and only then the header."""
        assert self._row is not None
        started = time.perf_counter()
        tokens, width = int(self._starts[-1]), self._row.shape[1]
        table, size = self._table.tobytes(), tokens * width * self._row.element_size()
        dtype = str(self._row.dtype).removeprefix("torch.").encode()
        header = _HEADER.pack(_MAGIC, self.layer, tokens, width, len(self._table), dtype)
        header += _CHECKSUM.pack(zlib.crc32(header + table))
        try:
            # Opened anew: whoever reads the rows meanwhile may close the file.
            with self.path.open("r+b", buffering=0) as file:
                write_at(file.fileno(), table, _PAGE + size)
                os.fsync(file.fileno())
                write_at(file.fileno(), header, 0)
                os.fsync(file.fileno())
            sync_folder(self.path.parent)
        except OSError as error:
            raise no_room(self.path, _PAGE + size + len(table), error) from error
        self.seconds += time.perf_counter() - started

    def discard(self) -> None:
        """Take the file away."""
        self.path.unlink(missing_ok=True)


class SnapshotReader:
    """Gives out the rows of a snapshot, once their checksums are found right.

    Args:
        path: the file.
        layer: behind how many blocks it should be.

    Raises:
        OutputError: it is not what `SnapshotWriter.finish` leaves there.
    """

    def __init__(self, path: Path, layer: int) -> None:
        self.path, self.layer = path, layer
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise self._refused(f"{error.strerror}") from error
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self._row.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Their type."""
        return self._row.dtype

    def __enter__(self) -> SnapshotReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, step: _Step) -> torch.Tensor:
        """The rows [tokens, width] of a step.

        Raises:
            OutputError: there is no such step, or its rows are not those that were written.
        """
        place = self._places.get(step.first)
        if place is None or self._table[place, 1] != step.tokens:
            raise self._refused(f"none of the step at {step.first} of {step.tokens} tokens")
        rows = self._rows.read(int(self._starts[place]), step.tokens, self._row)
        if zlib.crc32(_bytes_of(rows)) != self._table[place, 2]:
            raise self._refused(f"other bytes at token {self._starts[place]}")
        return rows

    def _open(self) -> None:
        import torch

        size = os.fstat(self._file.fileno()).st_size
        header = os.pread(self._file.fileno(), _HEADER.size + _CHECKSUM.size, 0)
        if len(header) < _HEADER.size + _CHECKSUM.size or header[: len(_MAGIC)] != _MAGIC:
            raise self._refused("a file that was not finished")
        _, layer, tokens, width, steps, name = _HEADER.unpack_from(header)
        dtype = name.rstrip(b"\0").decode("ascii", "replace")
        if layer != self.layer or dtype not in _ITEM_SIZES or min(tokens, width, steps) < 1:
            raise self._refused(f"layer {layer}, {tokens} x {width} of {dtype!r}")
        rows_end = _PAGE + tokens * width * _ITEM_SIZES[dtype]
        if size != rows_end + 24 * steps:
            raise self._refused(f"{size:,} bytes where {rows_end + 24 * steps:,} should be")
        table = os.pread(self._file.fileno(), 24 * steps, rows_end)
        self._table: NDArray[np.int64] = np.frombuffer(table, dtype="<i8").reshape(steps, 3)
        self._starts = np.cumsum([0, *self._table[:, 1]])
        checksum = _CHECKSUM.pack(zlib.crc32(header[: _HEADER.size] + table))
        if checksum != header[_HEADER.size :] or self._starts[-1] != tokens:
            raise self._refused("another table of steps than was written")
        self._row = torch.empty((0, width), dtype=getattr(torch, dtype))
        self._places = {int(first): place for place, first in enumerate(self._table[:, 0])}
        self._rows = RowFile(self._file, self.path, tokens, _PAGE)

    def _refused(self, found: str) -> OutputError:
        return OutputError(
            f"expected the hidden states of this run behind block {self.layer} in {self.path}, "
            f"got {found}; remove it and run the same command again"
        )
