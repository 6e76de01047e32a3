"""A checkpoint's safetensors files: what tensors they hold and what tells them from others.

Reads headers and small samples, never whole weights. Guarantee: a header is believed only as far as
the file's size bears it out, and a name in an index never leads outside the folder. Which tensors a
model needs is not known here.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from probecache.errors import ModelError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["StoredTensor", "hub_tensors", "stored_tensors"]

_INDEX = "model.safetensors.index.json"
_PIECE, _PIECES = 64 << 10, 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file; `file` is None where only the hub has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    file: Path | None
    offset: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def sample(self) -> bytes:
        """What identifies the tensor: name, dtype, shape, and its bytes or eight pieces of them."""
        what = json.dumps([self.name.split(".")[-4:], self.dtype, self.shape]).encode()
        if self.file is None:
            raise ModelError("expected the weights to be on this machine to identify them")
        with self.file.open("rb") as file:
            if self.size <= _PIECE * _PIECES:
                return what + os.pread(file.fileno(), self.size, self.offset)
            step = (self.size - _PIECE) // (_PIECES - 1)
            places = (self.offset + number * step for number in range(_PIECES))
            return what + b"".join(os.pread(file.fileno(), _PIECE, place) for place in places)


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Every tensor of a checkpoint on this machine.

    Raises:
        ModelError: an index or a file that is not what it should be.
    """
    for name in weight_files(folder):
        yield from _read_header(folder / name)


def hub_tensors(name: str, revision: str | None) -> Iterator[StoredTensor]:
    """Every tensor of a checkpoint on the hub, from headers alone."""
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(name, revision=revision)
    except Exception as error:  # the hub client raises many kinds
        raise ModelError(
            f"expected safetensors weights in {name}, got: {first_line(error)}"
        ) from error
    for file in metadata.files_metadata.values():
        for tensor, info in file.tensors.items():
            start, stop = info.data_offsets
            yield StoredTensor(tensor, info.dtype, tuple(info.shape), stop - start, None, start)


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up a checkpoint, from its index where it has one."""
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"expected a weight_map in {index}, got: {error!r}") from error
        if any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise ModelError(f"expected plain file names in {index}, got a path")
        return names
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    return ["model.safetensors"] if "model.safetensors" in names else names


def _read_header(path: Path) -> Iterator[StoredTensor]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                at = 8 + length + start
                if not 0 <= start <= stop <= size - 8 - length:
                    raise ValueError(f"tensor {name} lies outside the file")
                yield StoredTensor(
                    name, entry["dtype"], tuple(entry["shape"]), stop - start, path, at
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(
            f"expected a safetensors file at {path}, got: {first_line(error)}; download it again"
        ) from error
