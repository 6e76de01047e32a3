"""Files and folders that appear whole or not at all.

Guarantee: after `write_bytes` or `commit_folder` returns, the new content and its
name are on disk; a kill or a power cut before that leaves the old state under the final name. Not
covered: disks that acknowledge a flush they have not done, and network file systems.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from probecache.errors import OutputError
from probecache.processes import machine_start, runs

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "NO_LINKS",
    "commit_folder",
    "disk_errors_named",
    "file_named",
    "flush_folder",
    "free_bytes",
    "open_own",
    "read_at",
    "real_path",
    "rename_free",
    "require_place",
    "sha256_of_file",
    "sync_file",
    "sync_folder",
    "temporary_sibling",
    "write_at",
    "write_bytes",
    "write_uncommitted",
]

_CHUNK = 1 << 22
# What file systems without hard links answer.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def real_path(path: Path) -> Path:
    """Where a path leads: the target of a link, which may lie on another disk, or the path itself.

    A result is built beside its place and renamed, so the place has to be the real one.
    """
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def require_place(path: Path) -> None:
    """Raise OutputError unless a folder can be made at `path`, as far as can be told beforehand."""
    if path.name in ("", ".", ".."):
        raise OutputError(f"expected --output to name a folder, got {str(path)!r}")
    if path.is_symlink():  # its target was asked for, and cannot be told
        raise OutputError(
            f"expected {path} to be free or a folder, got a link that goes in circles"
        )
    parent = path.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise OutputError(
            f"expected to be able to make {path}, but {parent} is "
            f"{'not writable' if parent.is_dir() else 'not a folder'}; choose another --output"
        )


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's content, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(file: BinaryIO) -> None:
    """Put an open file's content on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. Without it a rename may be forgotten by a power cut."""
    with file_named(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_at(handle: int, data: memoryview | bytes, place: int) -> None:
    """Write all of `data` at a place of an open file; the system may take it in parts."""
    left = memoryview(data)
    while left:
        written = os.pwrite(handle, left, place)
        left, place = left[written:], place + written


def read_at(handle: int, into: memoryview, place: int) -> bool:
    """Fill `into` from a place of an open file; False where the file ends before."""
    while into:
        count = os.preadv(handle, [into], place)
        if not count:
            return False
        into, place = into[count:], place + count
    return True


def open_own(path: Path, *, new: bool) -> BinaryIO:
    """A file of ours for reading and writing; never what a link of that name leads to.

    Args:
        new: create it; whatever bears the name goes.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    if new:
        path.unlink(missing_ok=True)
        flags |= os.O_CREAT | os.O_EXCL
    return os.fdopen(os.open(path, flags, 0o666), "w+b" if new else "r+b")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace or create `path` so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(6)}.tmp")
    try:
        with file_named(path), open_own(temporary, new=True) as file:
            file.write(content)
            sync_file(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_uncommitted(path: Path, content: bytes) -> None:
    """Write a file of a folder that `flush_folder` puts on disk before it gets its name."""
    with file_named(path):
        path.write_bytes(content)


def flush_folder(folder: Path) -> None:
    """Put every file and every name below a folder on disk."""
    for inner, _, names in os.walk(folder):
        for name in names:
            path = Path(inner) / name
            with file_named(path), path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(inner))


def rename_free(temporary: Path, final: Path) -> bool:
    """Rename a flushed folder to a free name, or onto an empty folder; False where it is taken.

    Where the new name cannot be made durable, the folder has its old one again.
    """
    try:
        temporary.rename(final)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    try:
        sync_folder(final.parent)
    except OSError:
        final.rename(temporary)
        raise
    return True


def commit_folder(temporary: Path, final: Path) -> None:
    """Give a finished folder its final name: flush every file and folder in it, then rename.

    `final` must not exist, or be an empty folder.

    Raises:
        OutputError: something has appeared at `final` meanwhile; the result is kept beside it.
    """
    flush_folder(temporary)
    if not rename_free(temporary, final):
        # Not under the temporary name: what bears that is removed when the run ends.
        kept = Path(tempfile.mkdtemp(prefix=f"{final.name}.kept-", dir=final.parent))
        temporary.rename(kept)
        raise OutputError(
            f"expected nothing at {final}, but something was put there during the run; "
            f"the finished result lies in {kept}: move it to a free name"
        )


@contextmanager
def temporary_sibling(final: Path) -> Iterator[Path]:
    """A fresh folder beside `final`, on one file system with it; removed on exit if still there.

    Those that killed processes left there are removed too. Goes inside `disk_errors_named`.
    """
    require_place(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    _sweep_siblings(final)
    prefix = f".{final.name}.{'-'.join(_machine())}-{os.getpid()}-"
    temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=final.parent))
    try:
        # mkdtemp makes it private; the result should be as readable as any folder of the user's.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep_siblings(final: Path) -> None:
    """Remove temporary folders of processes of this machine that are dead."""
    host, boot = _machine()
    ours = re.compile(rf"\.{re.escape(final.name)}\.{host}-([0-9a-f]+)-(\d+)-\w+\.tmp")
    for path in final.parent.iterdir():
        match = ours.fullmatch(path.name)
        if match and not path.is_symlink() and (match[1] != boot or not runs(int(match[2]))):
            shutil.rmtree(path, ignore_errors=True)


def _machine() -> tuple[str, str]:
    """What tells this machine from others, and since when its processes count; short, for names."""
    host, boot = socket.gethostname(), machine_start()
    return _short(host), _short(boot)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@contextmanager
def disk_errors_named(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn the system's refusals to write into one clear line about `path`.

    An error on another file, which is read meanwhile, passes as it is; so does one that names no
    file, unless nothing but a write gives it: what is written stands inside `file_named`.

    Args:
        path: what the user asked to write.
        needed: bytes that have to fit there in all.
    """
    try:
        yield
    except OSError as error:
        where, size = error.filename or path, "" if needed is None else f"{needed:,} bytes"
        if error.errno in _FULL:
            raise OutputError(
                f"expected room{size and f' for {size}'} for the output at {path}, but the disk or "
                f"quota is full ({error.strerror}, writing {where}); what was there before is "
                "untouched; free space and run the same command again, or choose another --output"
            ) from error
        if not (_is_of(str(where), path) if error.filename else error.errno in _REFUSED):
            raise
        if error.errno in _REFUSED:
            raise OutputError(
                f"expected to be able to write at {path}, got: {error.strerror} "
                f"({where}); choose another --output"
            ) from error
        raise OutputError(
            f"expected to write {size and f'{size} to '}{path}, got: {error.strerror} (writing "
            f"{where}); what was there before is untouched; check the disk and run the same "
            "command again, or choose another --output"
        ) from error


def _is_of(file: str, path: Path) -> bool:
    """Whether a file is the output, a part of it, a folder above it, or what is built beside it."""
    found = Path(os.path.realpath(file))
    for place in (Path(os.path.realpath(path)), Path(os.path.realpath(path.parent)) / path.name):
        if place.is_relative_to(found) or found.is_relative_to(place):
            return True
        beside = found.parts[len(place.parent.parts) :]
        if found.is_relative_to(place.parent) and beside[0].startswith(f".{place.name}."):
            return True
    return False


@contextmanager
def file_named(path: Path) -> Iterator[None]:
    """Let the system's errors on an open file say which one it is."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path.absolute())) from error
        raise


def free_bytes(path: Path) -> int:
    """Bytes free to this user on the file system that `path` lies or would lie on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
