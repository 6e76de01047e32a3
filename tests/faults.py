"""Faults on purpose: a process that dies, tears a write, fails or loses power at its N-th call.

What a process does to files below a folder goes through the calls in `CALLS`; here each of them is
counted, and at a chosen number something happens. Trials run in forked children, so that dying is
cheap and real: SIGKILL, no clean-up.

Power loss is modelled: of every file what its last fsync saw, of every folder the names that its
last fsync saw; what came later is lost, or a part of it (`Power`).
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CALLS = (
    *("pwrite", "write", "fsync", "rename", "replace", "link", "unlink", "mkdir", "rmdir"),
    *("posix_fallocate", "utime"),
)
WRITES = ("pwrite", "write", "file.write")


@dataclass(frozen=True)
class Fault:
    """What happens at the N-th call, counted from 1; number 0: nothing, calls are counted.

    `kind`: "kill" before the call, "torn": half of a write and then a kill, "power": a kill and
    what power loss leaves, or the name of an errno that the call fails with.
    """

    number: int = 0
    kind: str = "kill"
    seed: int = 0


@dataclass
class Power:
    """What is on disk for good, as fsync was told."""

    root: Path
    contents: dict[int, bytes] = field(default_factory=dict)
    names: dict[int, dict[str, tuple[int, bool]]] = field(default_factory=dict)

    def synced(self, handle: int) -> None:
        inode = os.fstat(handle).st_ino
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.is_dir():
            entries = list(os.scandir(path))
            self.names[inode] = {
                e.name: (e.inode(), e.is_dir(follow_symlinks=False)) for e in entries
            }
        else:
            size = os.fstat(handle).st_size
            with open(path, "rb") as file:  # noqa: PTH123
                self.contents[inode] = file.read(size)

    def cut(self, chance: random.Random) -> None:
        """Put the tree into a state that power loss may leave it in.

        Of names that were not synced the old state or the new one; of contents what was synced, or
        with the luck of the draw what was written since, page by page.
        """
        now = {
            e.st_ino: p for p in [*self.root.rglob("*")] if not p.is_symlink() for e in [p.stat()]
        }
        bytes_now = {ino: p.read_bytes() for ino, p in now.items() if p.is_file()}
        lucky = chance.random() < 0.5

        def content(inode: int) -> bytes:
            synced, new = self.contents.get(inode, b""), bytes_now.get(inode, b"")
            if lucky or inode not in bytes_now:
                return synced
            size = len(chance.choice([synced, new]))
            pages = []
            for at in range(0, size, 4096):
                source = chance.choice([synced, new])
                pages.append(source[at : at + 4096].ljust(min(4096, size - at), b"\0"))
            return b"".join(pages)

        def rebuild(inode: int, path: Path | None) -> dict[str, Any]:
            new = {}
            if path is not None:
                for entry in os.scandir(path):
                    new[entry.name] = (entry.inode(), entry.is_dir(follow_symlinks=False))
            old = self.names.get(inode, {})
            names = dict(old)
            for name in {*old, *new}:
                if old.get(name) != new.get(name) and chance.random() < 0.5:
                    if name in new:
                        names[name] = new[name]
                    else:
                        names.pop(name)
            return {
                name: rebuild(number, now.get(number)) if is_folder else content(number)
                for name, (number, is_folder) in names.items()
            }

        tree = rebuild(self.root.stat().st_ino, self.root)
        for path in sorted(self.root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        _put(self.root, tree)


def _put(folder: Path, tree: dict[str, Any]) -> None:
    for name, content in tree.items():
        if isinstance(content, dict):
            (folder / name).mkdir()
            _put(folder / name, content)
        else:
            (folder / name).write_bytes(content)


class Layer:
    """Counts the calls of this process below a folder and lets one of them go wrong."""

    def __init__(self, root: Path, fault: Fault, log: int) -> None:
        self.root, self.fault, self.log, self.count = str(root), fault, log, 0
        self.real = {name: getattr(os, name) for name in CALLS}
        self.open = io.open
        self.power = Power(root) if fault.kind == "power" else None

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._wrapped(name))
        io.open = self._open
        os.remove = os.unlink
        if self.power is not None:
            handle = os.open(self.root, os.O_RDONLY)
            self.power.synced(handle)  # what was there before is on disk
            for path in Path(self.root).rglob("*"):
                inner = os.open(path, os.O_RDONLY)
                self.power.synced(inner)
                os.close(inner)
            os.close(handle)

    def _concerns(self, where: Any) -> bool:
        if isinstance(where, int):
            try:
                where = Path(f"/proc/self/fd/{where}").readlink()
            except OSError:
                return False
        return str(where).startswith(self.root)

    def _wrapped(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not self._concerns(arguments[0]):
                return self.real[name](*arguments, **options)
            self._next(name, arguments)
            result = self.real[name](*arguments, **options)
            if name == "fsync" and self.power is not None:
                self.power.synced(arguments[0])
            return result

        return call

    def _open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        opened = self.open(file, mode, *arguments, **options)
        if set(mode) & set("wax+") and self._concerns(file):
            return _File(opened, self)
        return opened

    def _next(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.count += 1
        where = arguments[0]
        shown = Path(f"/proc/self/fd/{where}").readlink() if isinstance(where, int) else str(where)
        to = f" -> {arguments[1]}" if name in ("rename", "replace", "link") else ""
        self.real["write"](self.log, f"{name} {shown}{to}\n".encode())
        if self.count == self.fault.number:
            self._strike(name, arguments)

    def _strike(self, name: str, arguments: tuple[Any, ...]) -> None:
        kind = self.fault.kind
        if kind not in ("kill", "torn", "power"):
            number = getattr(errno, kind)
            named = [] if isinstance(arguments[0], int) else [str(arguments[0])]
            raise OSError(number, os.strerror(number), *named)
        if kind == "torn" and name == "pwrite":
            handle, data, at = arguments
            self.real["pwrite"](handle, bytes(data)[: len(data) // 2], at)
        if kind == "torn" and name == "file.write":
            file, data = arguments[2], arguments[1]
            file.write(data[: len(data) // 2])
            file.flush()
        if self.power is not None:
            for call, real in self.real.items():
                setattr(os, call, real)
            io.open = self.open
            self.power.cut(random.Random(self.fault.seed))
        os.kill(os.getpid(), signal.SIGKILL)


class _File:
    """An open file whose writes count."""

    def __init__(self, file: Any, layer: Layer) -> None:
        self._file, self._layer = file, layer

    def write(self, data: Any) -> int:
        self._layer._next("file.write", (self._file.fileno(), data, self._file))
        written: int = self._file.write(data)
        return written

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: its exit code or minus the signal, what it said, and its calls."""

    code: int
    said: str
    calls: list[str]


def trial(root: Path, action: Callable[[], None], fault: Fault | None = None) -> Outcome:
    """Run an action in a child whose calls below `root` are counted and may go wrong."""
    from probecache.errors import ProbecacheError

    log_read, log_write = os.pipe()
    said_read, said_write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Layer(root, fault or Fault(), log_write).install()
            action()
            code = 0
        except ProbecacheError as error:
            os.write(said_write, str(error).encode())
            code = 2
        except BaseException:
            os.write(said_write, traceback.format_exc().encode()[:60_000])
        finally:
            os._exit(code)
    os.close(log_write)
    os.close(said_write)
    with os.fdopen(log_read) as log, os.fdopen(said_read) as said:
        calls, words = log.read().splitlines(), said.read()
    _, status = os.waitpid(child, 0)
    return Outcome(os.waitstatus_to_exitcode(status), words, calls)


def tree_hash(folder: Path) -> str:
    """SHA-256 over the names and the bytes of every file below a folder, and of empty folders."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)}\0{path.is_dir()}\0".encode())
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
