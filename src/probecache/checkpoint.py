"""A model's files: where they are, what tensors they hold, what tells them from others.

Reads headers and small samples, never whole weights. Guarantee: a header is believed only as far as
the file's size bears it out, and a name in an index never leads outside the folder. How an
architecture names its tensors is told from outside (`Naming`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probecache.errors import ModelError, UsageError, one_line
from probecache.foreign import open_regular, parse_json, read_json, require_sane_density

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "Naming",
    "StoredTensor",
    "Weights",
    "folder_of",
    "hub_tensors",
    "indexed_files",
    "is_final_norm",
    "read_header",
    "require_safetensors",
    "weight_files",
]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Bits of one element, for the dtypes that torch can load.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16}
_BITS |= {"BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}
_LONGEST_HEADER = 100_000_000  # that of safetensors itself
_PIECE, _PIECES = 4 << 10, 8  # of a tensor: little beside what is read to run it


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: where the file is on this machine; None where only the hub has it.
        offset: of its first byte in that file.
        shard: the file's name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    file: Path | None
    offset: int
    shard: str

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


@dataclass(frozen=True)
class Naming:
    """How an architecture names its tensors.

    Attributes:
        wrappers: names under which a model with a head nests the model without.
        children: top-level names of the model without head.
        block_list: name of the list that holds the blocks.
        not_text: words in the names of towers whose blocks are not the language model's.
    """

    wrappers: frozenset[str]
    children: frozenset[str]
    block_list: str
    not_text: tuple[str, ...]

    def block_of(self, name: str) -> int | None:
        """The block that a tensor belongs to, or None."""
        relative = self.unwrapped(name)
        if any(word in relative for word in self.not_text):
            return None
        match = re.search(rf"(?:^|\.){re.escape(self.block_list)}\.(\d+)\.", relative)
        return int(match[1]) if match else None

    def in_base(self, name: str) -> bool:
        """Whether a tensor belongs to the model without head."""
        return self.unwrapped(name).split(".")[0] in self.children

    def unwrapped(self, name: str) -> str:
        """A tensor's name in the model without head."""
        first, _, rest = name.partition(".")
        while rest and first not in self.children and first in self.wrappers:
            name = rest
            first, _, rest = name.partition(".")
        return name


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors, and which of them a cut model needs.

    Of the files that make it up, only those are looked at that hold tensors somebody asks for; the
    others may be missing.

    Attributes:
        folder: where the files are, or will be once they are fetched.
        naming: how the architecture names its tensors.
        hub: id and commit, where absent files can be had from the hub.
    """

    folder: Path
    naming: Naming
    hub: tuple[str, str] | None = None
    _headers: dict[str, dict[str, StoredTensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def shards(self) -> Mapping[str, str]:
        """The file that holds each tensor."""
        listed = indexed_files(self.folder)
        if listed is not None:
            return listed
        files = weight_files(self.folder)
        if not files and self.hub is not None:
            return {tensor.name: tensor.shard for tensor in self._on_hub.values()}
        return {name: file for file in files for name in self._header(file)}

    def needed(self, blocks: range) -> list[StoredTensor]:
        """Tensors outside the blocks and in the blocks of a range: no head, no other block."""
        return [self._stored(name) for name in self._names(blocks)]

    def of_block(self, index: int) -> list[StoredTensor]:
        """Tensors of one block."""
        return [self._stored(name) for name in self._names(range(index, index + 1), False)]

    def require(self, blocks: range, shapes: Mapping[str, Sequence[int]], sized: bool) -> None:
        """Refuse a checkpoint that cannot fill these blocks and what stands outside of all.

        A file that is missing is named by whoever opens it: of blocks that do not run it may be.

        Args:
            blocks: the blocks.
            shapes: of each weight of the model that the config describes.
            sized: whether weights are stored in as many numbers as they have in the model.

        Raises:
            ModelError: names the block that is not there, or the weight of another shape.
        """
        filled = {self.naming.block_of(name) for name in shapes} - {None}
        for block in blocks:
            if block in filled and not self._by_block.get(block):
                raise ModelError(
                    f"expected block {block} in the weights in {self.folder}, as its config counts "
                    f"{len(filled)} from 0 on, got nothing of it; download the model again"
                )
        there = {
            file for file in self.shards.values() if self.hub or (self.folder / file).is_file()
        }
        names = [name for name in self._names(blocks) if self.shards[name] in there]
        for tensor in map(self._stored, names if sized else ()):
            shape = tuple(shapes.get(self.naming.unwrapped(tensor.name), tensor.shape))
            if tensor.count != math.prod(shape):  # some are turned round while they are loaded
                raise ModelError(
                    f"expected {tensor.name} of shape {shape} in {self.folder}, as the config has "
                    f"it, got another shape, {tensor.shape}; download the model again"
                )

    def absent_files(self, blocks: range, outside: bool = True) -> list[str]:
        """Files that are not on this machine, of tensors in these blocks and outside of all."""
        names = self._names(blocks, outside)
        files = sorted({self.shards[name] for name in names})
        return [file for file in files if not (self.folder / file).is_file()]

    def _names(self, blocks: range, outside: bool = True) -> list[str]:
        places = [None, *blocks] if outside else blocks
        return [name for place in places for name in self._by_block.get(place, [])]

    @cached_property
    def _by_block(self) -> dict[int | None, list[str]]:
        """Names of each block's tensors, and under None of those outside, head apart."""
        found: dict[int | None, list[str]] = {}
        for name in self.shards:
            block = self.naming.block_of(name)
            if block is not None or self.naming.in_base(name):
                found.setdefault(block, []).append(name)
        return found

    def _stored(self, name: str) -> StoredTensor:
        file = self.shards[name]
        on_hub = self.hub is not None and not (self.folder / file).is_file()
        found = (self._on_hub if on_hub else self._header(file)).get(name)
        if found is None:
            raise ModelError(
                f"expected {name} in {file} of {self.folder}, as the index says, got a file "
                "without it; download the model again"
            )
        return found

    def _header(self, file: str) -> dict[str, StoredTensor]:
        if file not in self._headers:
            self._headers[file] = {t.name: t for t in read_header(self.folder / file)}
        return self._headers[file]

    @cached_property
    def _on_hub(self) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for tensor in hub_tensors(*self.hub)} if self.hub else {}

    def samples(self, layers: tuple[int, ...]) -> dict[int, str]:
        """For each layer, a hash of samples of the embeddings and of all blocks below it.

        Tensors up to 32 KB are hashed whole, larger ones at eight places of 4 KB each, together
        with names, shapes and dtypes. Two trainings differ everywhere, so this tells them apart
        before any weight is loaded; a forged single weight it may miss, which is found when the
        weights are read (`content.py`).
        """
        by_block: dict[int, list[StoredTensor]] = {}
        for tensor in self.needed(range(max(layers))):
            block = self.naming.block_of(tensor.name)
            by_block.setdefault(-1 if block is None else block, []).append(tensor)
        running, found = hashlib.sha256(), {}
        for depth in range(max(layers) + 1):
            for tensor in sorted(by_block.get(depth - 1, []), key=lambda t: t.name):
                if depth or not is_final_norm(tensor.name):
                    running.update(tensor.sample())
            if depth in layers:
                found[depth] = running.hexdigest()
        return found


def is_final_norm(name: str) -> bool:
    """A final norm stands outside the blocks but decides nothing in the residual stream."""
    if "embed" in name:  # ModernBERT norms its embeddings under the same name
        return False
    return bool(re.search(r"(^|\.)(norm|norm_f|ln_f|final_(norm|layer_norm|layernorm))\.", name))


# ---------------------------------------------------------------- files


def folder_of(name: str, revision: str | None, patterns: list[str]) -> Path:
    """A local folder as it is; a hub id as its snapshot, with the files of these patterns.

    Raises:
        ModelError: neither a folder nor a hub id that can be reached.
        UsageError: a revision of a local folder.
    """
    path = Path(name)
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"expected --revision with a hub id only, got the folder {name}")
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"expected a model folder or a hub id such as org/name at {name}, got "
            f"{'a file' if path.exists() else 'nothing there'}; check the path"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds
        raise ModelError(
            f"expected a model folder or a hub id that can be reached, got {name}: "
            f"{one_line(error)}"
        ) from error


def require_safetensors(folder: Path) -> None:
    """Raise ModelError over a folder without safetensors, or with nothing but pickled weights."""
    if not list(folder.glob("*.safetensors")):
        pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        got = f"only pickled weights ({pickled[0]})" if pickled else "no weights"
        raise ModelError(
            f"expected safetensors weights in {folder}, got {got}; pickles can run code: convert "
            "them with save_pretrained and use the result"
        )


def hub_tensors(name: str, revision: str) -> Iterator[StoredTensor]:
    """Every tensor of a checkpoint on the hub, from headers alone.

    Offsets count from the first tensor: how long a header is, the hub does not say.
    """
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(name, revision=revision)
    except Exception as error:  # the hub client raises many kinds
        raise ModelError(
            f"expected safetensors weights in {name}, got: {one_line(error)}"
        ) from error
    for shard, file in metadata.files_metadata.items():
        for tensor, info in file.tensors.items():
            start, stop = info.data_offsets
            shape = tuple(info.shape)
            yield StoredTensor(tensor, info.dtype, shape, stop - start, None, start, shard)


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up a checkpoint: those that transformers loads."""
    listed = indexed_files(folder)
    if listed is not None:
        return sorted(set(listed.values()))
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    return [_SINGLE] if _SINGLE in names else names


def indexed_files(folder: Path) -> dict[str, str] | None:
    """The file that holds each tensor, as a checkpoint's index says; None where it counts not.

    A single file goes before an index, as it does in transformers.

    Raises:
        ModelError: an index that is not what it should be.
    """
    index = folder / _INDEX
    if (folder / _SINGLE).is_file() or not index.is_file():
        return None
    try:
        listed = dict(read_json(index, _LONGEST_HEADER)["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"expected a weight_map in {index}, got: {error!r}") from error
    for name in listed.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise ModelError(f"expected plain file names in {index}, got {name!r}")
    return listed


def read_header(path: Path) -> Iterator[StoredTensor]:
    """Every tensor of a safetensors file.

    Raises:
        ModelError: the file's header is not what it should be.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            content = file.read(length)
        require_sane_density(content)
        header = parse_json(content.decode())
        header.pop("__metadata__", None)
        tensors = [_checked(name, entry, path, 8 + length, size) for name, entry in header.items()]
        _require_apart(tensors)
        yield from tensors
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError),
        struct.error,
    ) as error:
        raise ModelError(
            f"expected a safetensors file at {path}, got: {one_line(error)}; download it again"
        ) from error


def _require_apart(tensors: list[StoredTensor]) -> None:
    """Tensors that share bytes would take more memory than the file has."""
    filled = sorted((tensor for tensor in tensors if tensor.size), key=lambda tensor: tensor.offset)
    for one, other in pairwise(filled):
        if one.offset + one.size > other.offset:
            raise ValueError(f"tensors {one.name} and {other.name} in the same bytes")


def _checked(name: str, entry: dict[str, Any], path: Path, data: int, size: int) -> StoredTensor:
    """A header's entry, held against the file's size; `data` is where its tensors begin."""
    (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop <= size - data:
        raise ValueError(f"tensor {name} lies outside the file")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"tensor {name} of shape {shape}")
    tensor = StoredTensor(
        name, str(entry["dtype"]), shape, stop - start, path, data + start, path.name
    )
    bits = _BITS.get(tensor.dtype)
    if bits is not None and tensor.count * bits != tensor.size * 8:
        raise ValueError(f"tensor {name} of shape {shape} {tensor.dtype} in {tensor.size} bytes")
    return tensor
