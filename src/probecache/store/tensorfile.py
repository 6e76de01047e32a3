"""One tensor in a `.pt` file: laid down at its final size, filled in place, mapped without torch.

Plain `torch.load` opens the files. Our own reading unpickles nothing: the tensor's offset, dtype
and shape stand in a manifest (`FileRecord`) and the bytes are mapped. Importing torch costs more
than a second, so only `lay_down` does it.

The zip entry of the data carries no CRC, because the rows come later than the entry; torch.load
never checks it, and the manifest holds a SHA-256 instead.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import struct
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from probecache.errors import StoreError
from probecache.types import Dtype

if TYPE_CHECKING:
    import torch

__all__ = [
    "FileRecord",
    "as_float32",
    "as_tensor",
    "data_offset",
    "file_bytes",
    "lay_down",
    "map_raw",
    "require_size",
    "reserve",
]

# How numbers lie in memory; NumPy has no bfloat16, so those are carried as bits.
_RAW = {Dtype.FLOAT32: "<f4", Dtype.FLOAT16: "<f2", Dtype.BFLOAT16: "<u2"}
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_DATA_RECORD = "archive/data/0"


class FileRecord(BaseModel):
    """What a manifest says of one `.pt` file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=0)
    offset: int = Field(ge=0)
    shape: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, max_length=2)
    dtype: str = Field(pattern=r"^(float32|float16|bfloat16|int32)$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def lay_down(file: BinaryIO, shape: tuple[int, ...], dtype: str) -> int:
    """Write a `.pt` of this shape around a hole where the data belong; return the hole's offset."""
    import torch
    from torch.serialization import skip_data

    count = int(np.prod(shape))
    # A mapping that is never touched costs no memory, whatever the size.
    size = max(count * torch.empty(0, dtype=getattr(torch, dtype)).itemsize, 1)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    with mmap.mmap(-1, size, flags=flags) as nothing, skip_data():
        tensor = torch.frombuffer(nothing, dtype=getattr(torch, dtype), count=count)
        torch.save(tensor.view(shape), file)
        del tensor  # the mapping cannot close while a tensor points into it
    file.flush()
    return data_offset(file)


def reserve(file: BinaryIO) -> None:
    """Claim the disk blocks behind a hole: a full disk shows now and not hours later.

    Where the file system cannot, writing will tell.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


@lru_cache(maxsize=64)
def file_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Exact size of the `.pt` file of a tensor, in bytes."""
    with tempfile.TemporaryFile() as file:  # sparse: takes a few KB whatever the shape
        lay_down(file, shape, dtype)
        return os.fstat(file.fileno()).st_size


def data_offset(file: BinaryIO) -> int:
    """Where the tensor's bytes begin in a `.pt` that torch.save wrote to a file object."""
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo(_DATA_RECORD).header_offset
    header = os.pread(file.fileno(), 30, start)
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    return int(start + 30 + name_length + extra_length)


def map_raw(path: Path, record: FileRecord) -> np.ndarray:
    """Map the tensor copy-on-write: reading pages in on demand, writing never reaches the file.

    Returns:
        array of the record's shape; float32, float16, int32, or bfloat16 as uint16 bits.

    Raises:
        StoreError: the file is missing, or its size is not the recorded one.
    """
    raw = np.dtype("<i4" if record.dtype == "int32" else _RAW[Dtype(record.dtype)])
    # Python's own integers: NumPy's would wrap around at sizes that a forged manifest may claim.
    needed = record.offset + math.prod(record.shape) * raw.itemsize
    require_size(path, record.bytes, needed)
    if 0 in record.shape:
        return np.empty(record.shape, dtype=raw)
    try:
        return np.memmap(path, dtype=raw, mode="c", offset=record.offset, shape=record.shape)
    except OSError as error:
        raise StoreError(f"expected to read {path}, got: {error.strerror}") from error


def require_size(path: Path, size: int, needed: int = 0) -> None:
    """Raise StoreError unless a file has the recorded size, and room for what is said to be in it.

    Args:
        size: as recorded.
        needed: bytes that it has to have at least.
    """
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise StoreError(f"expected the file {path}, got: {error.strerror}") from error
    if actual != size or needed > actual:
        raise StoreError(
            f"expected {path} to have {max(size, needed)} bytes, got {actual}; the file was cut or "
            "replaced: probecache verify --repair makes it again, or copy the cache again"
        )


def as_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw rows as float32, exactly."""
    if dtype == Dtype.BFLOAT16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def as_tensor(raw: np.ndarray, dtype: str) -> torch.Tensor:
    """Raw rows as a torch tensor of the recorded dtype, without copying."""
    import torch

    tensor = torch.from_numpy(raw)
    return tensor.view(torch.bfloat16) if dtype == Dtype.BFLOAT16 else tensor
