"""One tensor in a `.pt` file: laid down at its final size, filled in place, mapped without torch.

Plain `torch.load` opens the files. Our own reading unpickles nothing: the tensor's offset, dtype
and shape stand in a manifest (`FileRecord`) and the bytes are mapped. Importing torch costs more
than a second, so only `lay_down` does it; a single vector is written without (`encode_vector`).

The zip entry of the data carries no CRC, because the rows come later than the entry; torch.load
never checks it, and the manifest holds a SHA-256 instead.
"""

from __future__ import annotations

import errno
import io
import math
import mmap
import os
import stat
import struct
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from probecache.atomic import file_named
from probecache.errors import StoreError
from probecache.foreign import open_regular
from probecache.types import Dtype

if TYPE_CHECKING:
    import torch

__all__ = [
    "FileRecord",
    "as_float32",
    "as_tensor",
    "data_offset",
    "encode_int32",
    "encode_vector",
    "file_bytes",
    "frame",
    "lay_down",
    "map_raw",
    "require_size",
    "require_tensor_size",
    "reserve",
]

# How numbers lie in memory; NumPy has no bfloat16, so those are carried as bits.
_RAW = {Dtype.FLOAT32: "<f4", Dtype.FLOAT16: "<f2", Dtype.BFLOAT16: "<u2"}
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_DATA_RECORD = "archive/data/0"
_LOCAL_HEADER = 30  # bytes before the name of an entry of a zip file
_LONGEST = 1 << 48  # beyond any disk; without a limit an empty tensor could claim any width
_Whole = Annotated[int, Field(ge=0, strict=True)]


class FileRecord(BaseModel):
    """What a manifest says of one `.pt` file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: _Whole
    offset: _Whole
    shape: tuple[_Whole, ...] = Field(min_length=1, max_length=2)
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


def encode_int32(values: np.ndarray) -> bytes:
    """The `.pt` of whole numbers, such as token ids, as int32."""
    with tempfile.TemporaryFile() as file:
        offset = lay_down(file, values.shape, "int32")
        file.seek(offset)
        file.write(values.astype("<i4").tobytes())
        file.seek(0)
        return file.read()


def encode_vector(vector: np.ndarray) -> bytes:
    """The `.pt` of one vector, float32 [n], as torch.save lays it out; needs no torch."""
    count = struct.pack("<i", len(vector))
    # The pickle of a contiguous tensor: storage 0, offset 0, shape (n,), stride (1,), no gradient.
    pickled = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
        b"X\x03\x00\x00\x00cpuJ%btQK\x00J%b\x85K\x01\x85\x89"
        b"ccollections\nOrderedDict\n)RtR."
    ) % (count, count)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(_entry("data.pkl"), pickled)
        archive.writestr(_entry("byteorder"), b"little")
        data = _entry("data/0")
        # Readers map the numbers where they lie: they begin at a multiple of 64 bytes.
        start = buffer.tell() + _LOCAL_HEADER + len(data.filename)
        padding = -(start + 4) % 64
        data.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        archive.writestr(data, np.asarray(vector, dtype="<f4").tobytes())
        archive.writestr(_entry("version"), b"3\n")
    return buffer.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"archive/{name}")  # dated 1980: the same vector gives the same bytes


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
def frame(shape: tuple[int, ...], dtype: str) -> tuple[bytes, bytes]:
    """What the `.pt` of a tensor holds before its numbers and behind them."""
    where = Path(tempfile.gettempdir())
    with file_named(where), tempfile.TemporaryFile() as file:  # sparse: a few KB for any shape
        offset = lay_down(file, shape, dtype)
        end = offset + math.prod(shape) * _raw_dtype(dtype).itemsize
        size = os.fstat(file.fileno()).st_size
        return os.pread(file.fileno(), offset, 0), os.pread(file.fileno(), size - end, end)


def file_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Exact size of the `.pt` file of a tensor, in bytes."""
    return sum(map(len, frame(shape, dtype))) + math.prod(shape) * _raw_dtype(dtype).itemsize


def data_offset(file: BinaryIO) -> int:
    """Where the tensor's bytes begin in a `.pt` that torch.save wrote to a file object."""
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo(_DATA_RECORD).header_offset
    file.seek(start)
    header = file.read(30)
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    return int(start + 30 + name_length + extra_length)


def require_tensor_size(path: Path, record: FileRecord) -> None:
    """Raise StoreError unless a regular file of the recorded size is there, and holds the tensor.

    Opens nothing; links are followed.
    """
    _require_size(path, record, require_size(path, record.bytes))


def require_size(path: Path, size: int) -> int:
    """Raise StoreError unless a regular file of so many bytes is there; return the size."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise _not_there(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(f"expected the file {path}, got something else there: copy it again")
    if found.st_size != size:
        raise _cut(path, size, found.st_size)
    return found.st_size


def _cut(path: Path, size: int, actual: int) -> StoreError:
    return StoreError(
        f"expected {path} to have {size} bytes, got {actual}; the file was cut or replaced: copy "
        "it again, or let probecache verify --repair make it again"
    )


def map_raw(path: Path, record: FileRecord) -> np.ndarray:
    """Map the tensor copy-on-write: reading pages in on demand, writing never reaches the file.

    Returns:
        array of the record's shape; float32, float16, int32, or bfloat16 as uint16 bits.

    Raises:
        StoreError: the file is missing, or its size is not the recorded one.
    """
    raw = _raw_dtype(record.dtype)
    try:
        with open_regular(path) as file:
            _require_size(path, record, os.fstat(file.fileno()).st_size)
            count = math.prod(record.shape)
            if count == 0:
                return np.empty(record.shape, dtype=raw)
            # Not NumPy's memmap: the kernel would set aside memory for a whole copy, and refuse
            # a file that is larger than the machine's.
            start = record.offset - record.offset % mmap.ALLOCATIONGRANULARITY
            mapped = mmap.mmap(
                file.fileno(),
                record.offset + count * raw.itemsize - start,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=start,
            )
    except (OSError, ValueError) as error:
        raise _not_there(path, error) from error
    flat = np.frombuffer(mapped, dtype=raw, count=count, offset=record.offset - start)
    return flat.reshape(record.shape)


def _raw_dtype(dtype: str) -> np.dtype:
    return np.dtype("<i4" if dtype == "int32" else _RAW[Dtype(dtype)])


def _not_there(path: Path, error: Exception) -> StoreError:
    return StoreError(f"expected the file {path}, got: {getattr(error, 'strerror', None) or error}")


def _require_size(path: Path, record: FileRecord, actual: int) -> None:
    itemsize = _raw_dtype(record.dtype).itemsize
    # Python's own integers: NumPy's would wrap around at sizes that a forged manifest may claim.
    needed = record.offset + math.prod(record.shape) * itemsize
    if actual != record.bytes or needed > actual:
        raise _cut(path, max(record.bytes, needed), actual)
    if record.offset % itemsize or max(record.shape) > _LONGEST:
        raise StoreError(
            f"expected rows of {path} where a .pt has them, got the shape {list(record.shape)} at "
            f"offset {record.offset}; the manifest is damaged: copy it again"
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
