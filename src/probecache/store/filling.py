"""One activation file while it is filled: rows go to their places, checksums are taken on the way.

Rows may come in any order. The file's SHA-256 grows with them as far as they lie there without a
gap; what came out of order is read back once the gap before it has closed, as a rule from the page
cache. Every example's rows have a CRC-32 of their own, taken before they are written: by it a
resumed run knows what reached the disk, and `verify` which rows are damaged.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from probecache.atomic import file_named, open_own, read_at, write_at
from probecache.store.tensorfile import file_bytes, frame, lay_down, reserve
from probecache.types import Dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FillingFile", "non_finite_rows"]

_CHUNK = 4 << 20


class FillingFile:
    """A `.pt` of [rows, hidden] and what is known of it.

    Args:
        path: where it is, or is to be laid down.
        shape: (rows, hidden).
        dtype: of the numbers.
        starts: first row of every example of the class in data order, and the number of rows.
        done: bool [examples], which of them are there already; None lays the file down anew. Those
            whose rows do not agree with `checksums` are taken out of it, all of them where the file
            is missing or of another size. What lies around the rows is made right.
        checksums: uint32 [examples], filled here.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int],
        dtype: str,
        starts: Sequence[int],
        done: NDArray[np.bool_] | None,
        checksums: NDArray[np.uint32],
    ) -> None:
        self.path, self.dtype = path, dtype
        self._row_bytes = shape[1] * Dtype(dtype).itemsize
        self._hidden = shape[1]
        self.checksums = checksums
        there = None if done is None else _open(path, file_bytes(shape, dtype))
        if done is None or there is None:
            self._file: BinaryIO = open_own(path, new=True)
            with file_named(path):
                self.offset = lay_down(self._file, shape, dtype)
                reserve(self._file)
            self.done = np.zeros(len(starts) - 1, dtype=np.bool_)
            self.dirty = True
        else:
            self._file, self.done = there, done
            self.offset = len(frame(shape, dtype)[0])
            self.dirty = self._mend_frame(shape)
        self._places = [self.offset + start * self._row_bytes for start in starts]
        self._start_hash()
        if there is not None:
            self._check()

    def start_over(self) -> None:
        """Forget all rows."""
        self.done[:] = False
        self._start_hash()

    def write(self, first: int, stop: int, data: memoryview) -> None:
        """Put the rows of the examples first..stop of the class in their place."""
        place, end = self._places[first], self._places[stop]
        if len(data) != end - place:
            raise ValueError(f"expected {end - place} bytes of rows, got {len(data)}")
        before = self.checksums[first:stop].copy()
        for number in range(first, stop):
            piece = data[self._places[number] - place : self._places[number + 1] - place]
            self.checksums[number] = zlib.crc32(piece)
        if first < self._hashed and (before != self.checksums[first:stop]).any():
            self._start_hash()  # other rows than those that are in the hash already
        self.dirty = True
        with file_named(self.path):
            write_at(self._file.fileno(), data, place)
        self.done[first:stop] = True
        if first == self._hashed:
            self._update(data, stop)
        self._catch_up()

    def sync(self) -> None:
        """Put what was written on disk for good."""
        if self.dirty:
            with file_named(self.path):
                os.fsync(self._file.fileno())
            self.dirty = False

    def finish(self) -> str:
        """The whole file's SHA-256; every example must be there."""
        if not self.done.all():
            missing = int(np.flatnonzero(~self.done)[0])
            raise ValueError(f"expected all examples in {self.path}, got none of number {missing}")
        self._catch_up()
        at = self._places[-1]
        while piece := os.pread(self._file.fileno(), _CHUNK, at):
            self._hash.update(piece)
            at += len(piece)
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file; what was written stays."""
        self._file.close()

    def _start_hash(self) -> None:
        self._hash = hashlib.sha256(os.pread(self._file.fileno(), self.offset, 0))
        self._hashed = self.non_finite = 0  # examples whose rows are in the hash; rows with NaN/Inf

    def _update(self, data: memoryview, stop: int) -> None:
        self._hash.update(data)
        self.non_finite += non_finite_rows(data, self._hidden, self.dtype)
        self._hashed = stop

    def _catch_up(self) -> None:
        """Hash what lies behind a gap that has closed."""
        while self._hashed < len(self.done) and self.done[self._hashed]:
            stop = self._hashed + 1
            while (
                stop < len(self.done)
                and self.done[stop]
                and self._places[stop + 1] - self._places[self._hashed] <= _CHUNK
            ):
                stop += 1
            self._update(memoryview(self._read(self._hashed, stop)), stop)

    def _read(self, first: int, stop: int) -> bytearray:
        data = bytearray(self._places[stop] - self._places[first])
        if not read_at(self._file.fileno(), memoryview(data), self._places[first]):
            raise OSError(f"{self.path} ends early")
        return data

    def _mend_frame(self, shape: tuple[int, int]) -> bool:
        """Make what lies around the rows as `lay_down` leaves it; whether it was not."""
        handle, before, mended = self._file.fileno(), frame(shape, self.dtype), False
        end = os.fstat(handle).st_size - len(before[1])
        for content, place in zip(before, (0, end), strict=True):
            if os.pread(handle, len(content), place) != content:
                with file_named(self.path):
                    write_at(handle, content, place)
                mended = True
        return mended

    def _check(self) -> None:
        """Keep as done only what is there as it was written; hash it as far as there is no gap."""
        for number in np.flatnonzero(self.done).tolist():
            data = memoryview(self._read(number, number + 1))
            if zlib.crc32(data) != self.checksums[number]:
                self.done[number] = False
            elif number == self._hashed:
                self._update(data, number + 1)


def _open(path: Path, size: int) -> BinaryIO | None:
    """The file of a run before; None where it is not there, is a link, or has another size."""
    try:
        file = open_own(path, new=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise
    if os.fstat(file.fileno()).st_size == size:
        return file
    file.close()
    return None


def non_finite_rows(data: memoryview, hidden: int, dtype: str) -> int:
    """How many rows of raw bytes hold NaN or Inf."""
    if dtype == "float32":
        values = np.frombuffer(data, dtype="<f4")
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(values.sum()):
                return 0
        bad = ~np.isfinite(values)
    else:
        exponent = 0x7F80 if dtype == "bfloat16" else 0x7C00
        bad = (np.frombuffer(data, dtype="<u2") & exponent) == exponent
    return int(bad.reshape(-1, hidden).any(axis=1).sum())
