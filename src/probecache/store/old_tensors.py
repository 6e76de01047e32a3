"""Tensors out of a `.pt` file that somebody else's tool wrote.

Guarantee: nothing of the file runs. Before torch opens it (`weights_only`), its pickle is gone
through step by step and may name nothing but what builds plain tensors: torch itself allows more,
some of which allocates what a file asks for. No more memory is taken than the file is long, and
tensors stay in the file until they are touched. `content_of` finds every damaged byte of them.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickletools
import re
import stat
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probecache.errors import StoreError
from probecache.types import Dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

__all__ = ["content_of", "load_old"]

_CHUNK = 4 << 20
# Bytes that describe a file's tensors: some, and half of the numbers' at most, as in lists of short
# rows. What is longer would be unpickled to far more objects than there are rows.
_LONGEST_REST = 64 << 10
_BUILDERS = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict|"
    r"torch (Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
# Ways of naming something to call that torch.save does not take.
_FOREIGN_WAYS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_PLAIN = (str, int, float, bool, type(None))


def load_old(path: Path) -> torch.Tensor | list[torch.Tensor]:
    """The tensor in a file, or the list of them; a dict's only tensor counts as a tensor.

    Returns:
        tensors on the CPU, mapped from the file, each of float32, float16 or bfloat16; all of them
        together are no larger than the file.

    Raises:
        StoreError: anything else; names the file.
    """
    import torch

    size = _size_of_regular(path)
    with _opened(path) as archive:
        _require_plain_archive(archive, path, size)
        (name,) = _pickles(archive)
        _require_builders(archive.read(name), path)
    with _foreign_errors(path):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    found: torch.Tensor | list[torch.Tensor] = _tensors(content, path)
    tensors = found if isinstance(found, list) else [found]
    _require_floats(tensors, path)
    claimed = sum(math.prod(one.shape) * one.dtype.itemsize for one in tensors)
    if claimed > size:
        raise StoreError(
            f"expected the tensors of {path} to lie in its {size:,} bytes, got shapes that stand "
            f"for {claimed:,}; the file is forged or holds an expanded view: save a clone()"
        )
    return found


def content_of(path: Path) -> str:
    """Hex SHA-256 of all that a file holds, checked against the checksums that torch.save wrote.

    Raises:
        StoreError: a byte is not what was written.
    """
    digest = hashlib.sha256()
    with _opened(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as record:
                while chunk := record.read(_CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()


def _size_of_regular(path: Path) -> int:
    try:
        found = os.lstat(path)
    except OSError as error:
        raise StoreError(f"expected the file {path}, got: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(f"expected {path} to be a regular file, got a link or a device; copy it")
    return found.st_size


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with _foreign_errors(path), path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise StoreError(
                f"expected {path} as torch.save has written it since torch 1.6, got something "
                "else; load it with what wrote it and save it again with torch.save"
            )
        with zipfile.ZipFile(file) as archive:
            yield archive


@contextmanager
def _foreign_errors(path: Path) -> Iterator[None]:
    """Whatever a stranger's file makes zipfile, pickletools or torch raise, in one line."""
    try:
        yield
    except StoreError:
        raise
    # What broken files raise in them is documented nowhere. Their words are not passed on: torch's
    # advise to load the file without protection.
    except Exception as error:
        raise StoreError(
            f"expected {path} to be a whole file of torch.save with nothing but tensors in it, got "
            f"a {type(error).__name__}; it was cut, damaged, or saved without checksums: copy it "
            "again, or load it with what wrote it and save it again"
        ) from error


def _require_plain_archive(archive: zipfile.ZipFile, path: Path, size: int) -> None:
    """Records as torch.save lays them: not compressed, each once, not on top of one another."""
    records = archive.infolist()
    names = {record.filename for record in records}
    plain = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    fits = sum(record.file_size for record in records) <= size
    if not plain or not fits or len(names) < len(records) or len(_pickles(archive)) != 1:
        raise StoreError(
            f"expected {path} as torch.save writes it, got an archive with records that are "
            "compressed, repeated, or larger than the file; it was not opened"
        )
    numbers = sum(record.file_size for record in records if "/data/" in record.filename)
    longest = _LONGEST_REST + numbers // 2
    length = archive.getinfo(_pickles(archive)[0]).file_size
    if length > longest:
        raise StoreError(
            f"expected at most {longest:,} bytes that describe {numbers:,} bytes of tensors in "
            f"{path}, got {length:,}; it was not opened"
        )


def _pickles(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in archive.namelist() if re.fullmatch(r"[^/]*/data\.pkl", name)]


def _require_builders(pickle: bytes, path: Path) -> None:
    """Raise StoreError where a pickle names anything that does not build plain tensors."""
    with _foreign_errors(path):
        for step, argument, _ in pickletools.genops(pickle):
            wanted = step.name == "GLOBAL" and not _BUILDERS.fullmatch(str(argument))
            if wanted or step.name in _FOREIGN_WAYS:
                name = ".".join(str(argument).split()) if wanted else f"a {step.name}"
                raise StoreError(
                    f"expected nothing but tensors in {path}, got {name[:80]!r}, which may run "
                    "code; it was not opened: if you trust the file, load it with what wrote it "
                    "and save its tensors again"
                )


def _tensors(content: Any, path: Path) -> Any:
    """The tensor or tensors in what a file holds."""
    import torch

    if isinstance(content, torch.Tensor):
        return content.detach()
    if isinstance(content, (list, tuple)):
        if content and all(isinstance(one, torch.Tensor) for one in content):
            return [one.detach() for one in content]
    elif isinstance(content, dict):
        tensors = [one for one in content.values() if isinstance(one, torch.Tensor)]
        others = [one for one in content.values() if not isinstance(one, torch.Tensor)]
        if len(tensors) == 1 and all(isinstance(one, _PLAIN) for one in others):
            return tensors[0].detach()
    raise StoreError(
        f"expected {path} to hold a tensor, a list of tensors or a dict with one, got "
        f"{_kind(content)}; save the activations alone"
    )


def _kind(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dict with the fields {', '.join(repr(str(key)[:40]) for key in [*content][:5])}"
    size = f" of {len(content)}" if isinstance(content, (list, tuple)) else ""
    return f"a {type(content).__name__}{size}"


def _require_floats(tensors: Sequence[torch.Tensor], path: Path) -> None:
    """All of one dtype that a cache can keep."""
    dtypes = {str(one.dtype).removeprefix("torch.") for one in tensors}
    if len(dtypes) > 1 or not dtypes <= set(Dtype):
        raise StoreError(
            f"expected activations of one of {', '.join(Dtype)} in {path}, got "
            f"{' and '.join(sorted(dtypes))}; convert them yourself (tensor.float()), since that "
            "may round them"
        )
