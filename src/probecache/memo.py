"""Digests of weights that this machine has taken before, so that no checkpoint is read twice.

Guarantee: a digest is given only for a file whose device, inode, size and both times, to the
nanosecond, are those that it had when its bytes were read, and whose times lay back far enough then
that any later change shows in them. Its path plays no part: a folder may be moved. A memo that
cannot be read counts as empty, and one that cannot be written is not. Not covered: a disk that
changes content by itself.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from probecache.atomic import write_bytes

__all__ = ["FileState", "Memo", "settled", "state_of"]

FileState = tuple[int, int, int, int, int]
_MOST_FILES = 2000
# A file that is changed twice within one tick of its file system's clock shows it only once.
_TICK_NS = 2 * 10**9


def state_of(path: Path, handle: int | None = None) -> FileState:
    """What a file is known by: device, inode, size, mtime and ctime.

    Args:
        handle: of the opened file, where it is open: its path may lead to another one by now.
    """
    found = path.stat() if handle is None else os.fstat(handle)
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return (found.st_dev, found.st_ino, found.st_size, *times)


def settled(state: FileState) -> bool:
    """Whether a change of the file from now on will show in its state."""
    return max(state[3:]) < time.time_ns() - _TICK_NS


def _place() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "probecache" / "weights.json"


def _file_of(state: FileState) -> str:
    return f"{state[0]}:{state[1]}"


@dataclass
class Memo:
    """Digests by file and tensor."""

    _files: dict[str, tuple[FileState, dict[str, str]]] = field(default_factory=dict)
    _changed: bool = False

    @classmethod
    def load(cls) -> Memo:
        """What was saved on this machine; nothing where that is not there or damaged."""
        memo = cls()
        with suppress(OSError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError):
            for file, (state, digests) in json.loads(_place().read_bytes()).items():
                memo._files[file] = (tuple(state), dict(digests))
        return memo

    def get(self, state: FileState, tensor: str) -> str | None:
        """The SHA-256 of a tensor of a file in this very state, or None."""
        known, digests = self._files.get(_file_of(state), (None, {}))
        return digests.get(tensor) if known == state else None

    def put(self, state: FileState, tensor: str, digest: str) -> None:
        """Remember a digest; those of the file in another state are forgotten."""
        if self.get(state, tensor) == digest:
            return
        known, digests = self._files.pop(_file_of(state), (None, {}))
        self._files[_file_of(state)] = (
            state,
            {**(digests if known == state else {}), tensor: digest},
        )
        self._changed = True

    def save(self) -> None:
        """Write what is new, together with what another process has saved meanwhile."""
        if not self._changed:
            return
        merged = {**Memo.load()._files, **self._files}
        newest = dict(list(merged.items())[-_MOST_FILES:])
        with suppress(OSError, RuntimeError):
            _place().parent.mkdir(parents=True, exist_ok=True)
            write_bytes(_place(), json.dumps(newest).encode())
            self._changed = False
