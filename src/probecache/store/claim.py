"""One writer at a time, with file locks or without.

A claim is a file that says who writes. Its holder keeps a lock on it and touches it every few
seconds. Whoever finds it tells a dead holder from a living one: by the lock, where the file system
has locks that work; on the same machine by the process; from elsewhere by whether the file is still
touched. Guarantee: of writers that begin together one gets the claim, and a holder that lost it
(say, its machine slept) finds out before it commits.
Not covered: a network file system on which creating a file exclusively is not atomic.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from probecache.atomic import NO_LINKS, file_named
from probecache.errors import OutputError
from probecache.processes import machine_start, runs, started

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Claim", "claimed", "require_unclaimed"]

_NAME = "owner.json"
_TRIES, _AGAIN_S = 20, 0.01
_TOUCH_S = 2.0
_SILENT_S = 10.0  # a holder elsewhere that has not touched its claim for so long is dead


@dataclass(frozen=True)
class _Owner:
    """Who holds a claim."""

    host: str
    boot: str
    pid: int
    started: str
    token: str

    @classmethod
    def me(cls) -> _Owner:
        return cls(
            socket.gethostname(), machine_start(), os.getpid(), started(os.getpid()), _token()
        )

    @property
    def here(self) -> bool:
        """Whether the process can be looked up from here."""
        return self.host == socket.gethostname() and self.boot == machine_start()

    @property
    def alive(self) -> bool:
        """Whether the process runs; only where it is `here`."""
        return runs(self.pid, self.started)


class Claim:
    """A claim that is held."""

    def __init__(self, path: Path, owner: _Owner, handle: int) -> None:
        self._path, self._owner, self._handle = path, owner, handle
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)
        self._thread.start()

    @property
    def held(self) -> bool:
        """Whether no other writer has taken over."""
        return _read(self._path) == self._owner

    def require(self) -> None:
        """Raise OutputError where another writer has taken over."""
        if not self._path.exists():
            raise OutputError(
                f"expected {self._path}, which says that this run writes here, got nothing: "
                f"{self._path.parent} was removed meanwhile; run the same command again"
            )
        if not self.held:
            raise OutputError(
                f"expected to be the only one who writes to {self._path.parent.parent}, but "
                "another run has taken over while this one did not move; nothing was changed since"
            )

    def release(self) -> None:
        """Give the claim back."""
        self._over.set()
        self._thread.join()
        if self.held:
            self._path.unlink(missing_ok=True)
        os.close(self._handle)

    def _keep(self) -> None:
        while not self._over.wait(_TOUCH_S):
            with suppress(OSError):
                os.utime(self._handle)


@contextmanager
def claimed(folder: Path) -> Iterator[Claim]:
    """Hold the claim on a folder, which is made where it is not there.

    Raises:
        OutputError: another writer holds it.
    """
    path = folder / _NAME
    taken = _take(path, parents=True)
    if taken is None:
        raise _refusal(folder, _read(path))
    claim = Claim(path, *taken)
    try:
        yield claim
    finally:
        claim.release()


def require_unclaimed(folder: Path) -> None:
    """Raise OutputError where another run that is alive holds the claim on a folder."""
    path = folder / _NAME
    holder = _read(path)
    if holder is None or (holder.here and holder.pid == os.getpid()):
        return
    if _lives(path, holder):
        raise _refusal(folder, holder)


def _refusal(folder: Path, holder: _Owner | None) -> OutputError:
    who = "another run" if holder is None else f"process {holder.pid} on {holder.host}"
    return OutputError(
        f"expected to be the only one who writes to {folder.parent}, but {who} is extracting into "
        "it; wait for it, or choose another --output"
    )


def _take(path: Path, *, parents: bool = False) -> tuple[_Owner, int] | None:
    """Owner and open file of a claim that is now ours; None where another is alive."""
    for _ in range(_TRIES):
        owner = _Owner.me()
        if parents:  # another run may have removed it while it tidied up
            path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), file_named(path):
            handle = _create(path, owner)
            if handle is None:
                state = _state(path)
                if _lives(path, _read(path)):
                    return None
                handle = _replace(path, state, owner)
            if handle is not None:
                return owner, handle
        time.sleep(_AGAIN_S)
    return None


def _replace(path: Path, state: str, owner: _Owner) -> int | None:
    """Put our claim in a dead one's place; None where another is doing that, or has.

    Of several who find the same dead claim only one may replace it, or the second would replace
    the first: the one who holds the claim on that. Should he die over it, the same goes for his.
    """
    guard = path.with_name(f".{_NAME}.0-{state[:24]}.tmp")
    taken = _take(guard)
    if taken is None:
        return None
    try:
        if _state(path) != state:
            return None
        temporary, handle = _written(path, owner)
        try:
            temporary.replace(path)
        except BaseException:
            os.close(handle)
            temporary.unlink(missing_ok=True)
            raise
        return handle
    finally:
        guard.unlink(missing_ok=True)
        os.close(taken[1])


def _create(path: Path, owner: _Owner) -> int | None:
    """Make the claim, whole from the first moment; None where there is one."""
    temporary, handle = _written(path, owner)
    kept = False
    try:
        os.link(temporary, path)  # fails where the name is taken, on network disks too
        kept = True
        return handle
    except OSError as error:
        if error.errno == errno.EEXIST:
            return None
        if error.errno not in NO_LINKS:
            raise
        return _create_here(path, owner)
    finally:
        temporary.unlink(missing_ok=True)
        if not kept:
            os.close(handle)


def _written(path: Path, owner: _Owner) -> tuple[Path, int]:
    """A claim beside the place where it will be, and its locked file."""
    temporary = path.with_name(f".{_NAME}.{os.getpid()}-{owner.token}.tmp")
    try:
        temporary.write_text(json.dumps(asdict(owner)))
        return temporary, _locked_file(temporary, 0)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _create_here(path: Path, owner: _Owner) -> int | None:
    """The same on a file system without hard links; for a moment the claim says nothing."""
    try:
        handle = _locked_file(path, os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return None
    try:
        os.write(handle, json.dumps(asdict(owner)).encode())
    except OSError:
        path.unlink()
        os.close(handle)
        raise
    return handle


def _locked_file(path: Path, more: int) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | more, 0o666)
    with suppress(OSError):  # where there are no locks, the rest of this module is enough
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _lives(path: Path, holder: _Owner | None) -> bool:
    """Whether the holder of a claim is alive."""
    if holder is not None and holder.here:
        return holder.alive
    with suppress(FileNotFoundError):
        return _locked(path) or _touched(path)
    return False


def _locked(path: Path) -> bool:
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return False
    finally:
        os.close(handle)
    return False


def _touched(path: Path) -> bool:
    """Whether somebody touches the file; by its own times, since clocks of machines differ."""
    before, end = path.stat().st_mtime_ns, time.monotonic() + _SILENT_S
    while time.monotonic() < end:
        time.sleep(0.2)
        if path.stat().st_mtime_ns != before:
            return True
    return False


def _state(path: Path) -> str:
    """What tells a claim from a later one in its place, and from itself when it is touched."""
    found = path.stat()
    seen = f"{found.st_ino} {found.st_mtime_ns} ".encode() + path.read_bytes()
    return hashlib.sha256(seen).hexdigest()


def _read(path: Path) -> _Owner | None:
    try:
        owner = _Owner(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts = (owner.host, owner.boot, owner.started, owner.token)
    is_ours = all(isinstance(text, str) for text in texts) and type(owner.pid) is int
    return owner if is_ours and owner.pid > 0 else None


def _token() -> str:
    return uuid.uuid4().hex[:12]
