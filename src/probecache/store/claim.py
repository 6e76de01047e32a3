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

from probecache.atomic import file_named
from probecache.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Claim", "claimed"]

_NAME = "owner.json"
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
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
        return cls(socket.gethostname(), _boot(), os.getpid(), _started(os.getpid()), _token())

    @property
    def here(self) -> bool:
        """Whether the process can be looked up from here."""
        return self.host == socket.gethostname() and self.boot == _boot()

    @property
    def alive(self) -> bool:
        """Whether the process runs; only where it is `here`."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return self.started in ("", _started(self.pid))


class Claim:
    """A claim that is held."""

    def __init__(self, path: Path, owner: _Owner, handle: int) -> None:
        self._path, self._owner, self._handle = path, owner, handle
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raise OutputError where another writer has taken over."""
        if _read(self._path) != self._owner:
            raise OutputError(
                f"expected to be the only one who writes to {self._path.parent.parent}, but "
                "another run has taken over while this one did not move; nothing was changed since"
            )

    def release(self) -> None:
        """Give the claim back."""
        self._over.set()
        self._thread.join()
        if _read(self._path) == self._owner:
            self._path.unlink(missing_ok=True)
        os.close(self._handle)

    def _keep(self) -> None:
        while not self._over.wait(_TOUCH_S):
            with suppress(OSError):
                os.utime(self._handle)


@contextmanager
def claimed(folder: Path) -> Iterator[Claim]:
    """Hold the claim on a folder, which is there.

    Raises:
        OutputError: another writer holds it.
    """
    claim = _take(folder)
    try:
        yield claim
    finally:
        claim.release()


def _take(folder: Path) -> Claim:
    path = folder / _NAME
    for _ in range(20):
        owner = _Owner.me()
        with file_named(path):
            handle = _create(path, owner)
        if handle is not None:
            return Claim(path, owner, handle)
        holder = _read(path)
        if _lives(path, holder):
            break
        _remove_dead(path, holder)
    raise OutputError(
        f"expected to be the only one who writes to {folder.parent}, but {_words(_read(path))} is "
        "extracting into it; wait for it, or choose another --output"
    )


def _create(path: Path, owner: _Owner) -> int | None:
    """Make the claim, whole from the first moment; None where there is one."""
    temporary = path.with_name(f".{_NAME}.{os.getpid()}-{owner.token}.tmp")
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        os.write(handle, json.dumps(asdict(owner)).encode())
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            os.link(temporary, path)  # fails where the name is taken, on network disks too
            return handle
        except OSError as error:
            os.close(handle)
            if error.errno == errno.EEXIST:
                return None
            if error.errno not in _NO_LINKS:
                raise
            return _create_here(path, owner)
    finally:
        temporary.unlink(missing_ok=True)


def _create_here(path: Path, owner: _Owner) -> int | None:
    """The same on a file system without hard links; for a moment the claim says nothing."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    except FileExistsError:
        return None
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(handle, json.dumps(asdict(owner)).encode())
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


def _remove_dead(path: Path, holder: _Owner | None) -> None:
    """Move a dead holder's claim away, so that of several who would only one does."""
    aside = path.with_name(f".{_NAME}.{os.getpid()}-{_token()}.tmp")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != holder:  # a new holder was quicker: what was moved is his
        with suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()


def _read(path: Path) -> _Owner | None:
    try:
        return _Owner(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _words(owner: _Owner | None) -> str:
    return "another run" if owner is None else f"process {owner.pid} on {owner.host}"


def _token() -> str:
    return uuid.uuid4().hex[:12]


def _boot() -> str:
    """What tells this start of the machine, and the container's processes, from others."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks: a number may be given to another process."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
