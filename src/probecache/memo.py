"""Digests of weights that this machine has taken before, so that no checkpoint is read twice.

Guarantee: a digest is given only for a file whose place, size, inode and both times, to the
nanosecond, are those that it had when its bytes were read. A memo that cannot be read counts as
empty, and one that cannot be written is not. Not covered: a disk that changes content by itself.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from probecache.atomic import write_bytes

__all__ = ["FileState", "Memo", "state_of"]

FileState = tuple[str, int, int, int, int, int]
_MOST_FILES = 2000


def state_of(path: Path, handle: int | None = None) -> FileState:
    """What a file is known by: real path, size, mtime, ctime, inode and device.

    Args:
        handle: of the opened file, where it is open: its path may lead to another one by now.
    """
    found = path.stat() if handle is None else os.fstat(handle)
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return (os.path.realpath(path), found.st_size, *times, found.st_ino, found.st_dev)


def _place() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "probecache" / "weights.json"


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
            for path, (state, digests) in json.loads(_place().read_bytes()).items():
                memo._files[path] = (tuple(state), dict(digests))
        return memo

    def get(self, state: FileState, tensor: str) -> str | None:
        """The SHA-256 of a tensor of a file in this very state, or None."""
        known, digests = self._files.get(state[0], (None, {}))
        return digests.get(tensor) if known == state else None

    def put(self, state: FileState, tensor: str, digest: str) -> None:
        """Remember a digest; those of the file in another state are forgotten."""
        if self.get(state, tensor) == digest:
            return
        known, digests = self._files.pop(state[0], (None, {}))
        self._files[state[0]] = (state, {**(digests if known == state else {}), tensor: digest})
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
