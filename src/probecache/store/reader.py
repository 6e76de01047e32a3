"""Open a finished cache and read its rows, memory-mapped.

Guarantee: a folder is accepted only with a manifest that was committed and files of the recorded
sizes. Opening reads two JSON files and maps nothing; rows are paged in as they are touched. Content
hashes are not checked here, that costs a read of everything.
"""

from __future__ import annotations

import shlex
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError

from probecache.dataset import IN_MEMORY
from probecache.errors import LayerNotCachedError, StoreError, UsageError
from probecache.foreign import json_items, read_json, read_text_bytes, require_sane_density
from probecache.store.layout import (
    LAYER_INFO,
    METADATA,
    OWN_TENSORS,
    SPANS,
    TOKENS,
    UNFINISHED,
    ExampleRecord,
    LayerInfo,
    PlainRecord,
    activations_path,
)
from probecache.store.tensorfile import (
    as_float32,
    as_tensor,
    map_raw,
    require_size,
    require_tensor_size,
)
from probecache.unrecorded import is_imported

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from probecache.types import Identity

__all__ = ["WIDEST", "Cache", "open_cache", "read_manifest", "what_is_at"]

_Model = TypeVar("_Model", bound=BaseModel)
# Rows are turned into float32 this many bytes at a time, whatever the cache's size.
_CHUNK_BYTES = 8 << 20
# Of numbers in a row: a row is the least that is read at a time, so a forged one must have an end.
WIDEST = 1 << 20
# A manifest of 100 layers and 64 classes has 2 MB; more than 30 times that is no manifest.
_MOST_BYTES = 64 << 20
_MOST_FAULTS = 1000
_ENTRY = TypeAdapter(ExampleRecord)


@dataclass(frozen=True)
class Cache:
    """A finished cache. `cache["testing", 20]` or `cache["test", 20]` is a torch tensor."""

    path: Path
    info: LayerInfo

    @property
    def layers(self) -> tuple[int, ...]:
        """Cached layers, rising."""
        return tuple(self.info.layers)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class labels in data order."""
        return tuple(self.info.classes)

    @property
    def identity(self) -> Identity:
        """All that decides the numbers."""
        return self.info.identity

    @property
    def hidden_size(self) -> int:
        """Width of a row."""
        return self.info.hidden_size

    @cached_property
    def examples(self) -> tuple[ExampleRecord, ...]:
        """Entries of metadata.json, in data order."""
        examples = tuple(_read_examples(self.path / METADATA))
        self._require_whole(examples)
        return examples

    def _require_whole(self, examples: tuple[ExampleRecord, ...]) -> None:
        """Raise unless the examples share out every row of every class, in order."""
        rows, counts = Counter[str](), Counter[str]()
        for place, record in enumerate(examples):
            start, stop = record.rows
            if record.idx != place or start != rows[record.label] or stop <= start:
                raise StoreError(
                    f"expected entry {place} of {self.path / METADATA} to follow the one before, "
                    f"got idx {record.idx}, class {record.label!r}, rows {[start, stop]}; the "
                    "cache is damaged: copy it again or extract it anew"
                )
            rows[record.label], counts[record.label] = stop, counts[record.label] + 1
        declared = self.info.classes
        if {label: (counts[label], rows[label]) for label in counts} != {
            label: (record.examples, record.rows) for label, record in declared.items()
        }:
            raise StoreError(
                f"expected {self.path / METADATA} to hold the examples that {LAYER_INFO} counts, "
                "got others; the cache is damaged: copy it again or extract it anew"
            )

    def __getitem__(self, key: tuple[str, int]) -> torch.Tensor:
        """Rows of a class at a layer: memory-mapped tensor [rows, hidden] of the cache's dtype.

        The mapping is copy-on-write: changing the tensor never changes the file.

        Raises:
            LayerNotCachedError, UsageError: no such layer or class.
        """
        label, layer = key
        return as_tensor(self._raw(label, layer), str(self.info.dtype))

    def chunks(
        self, label: str, layer: int, rows: np.ndarray | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Rows of a class at a layer as float32 [rows, hidden], with the first one's number.

        Bounded memory: at most 8 MB of rows at a time.

        Args:
            rows: numbers of the wanted rows, rising; counted are then these. None: all.
        """
        count = len(self._raw(label, layer)) if rows is None else len(rows)
        step = max(1, _CHUNK_BYTES // (4 * self.hidden_size))
        for start in range(0, count, step):
            stop = min(start + step, count)
            if rows is None:
                yield start, self._part(label, layer, slice(start, stop))
                continue
            # Far apart, few rows touch as many pages as lie between them.
            wanted = rows[start:stop]
            near = np.split(wanted, np.flatnonzero(np.diff(wanted // step)) + 1)
            parts = [self._part(label, layer, block) for block in near]
            yield start, parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _part(self, label: str, layer: int, rows: slice | np.ndarray) -> np.ndarray:
        """Some rows as float32, through a mapping of their own.

        Pages that were touched count as the process's memory for as long as they are mapped.
        """
        return as_float32(self._raw(label, layer)[rows], str(self.info.dtype))

    def tokens(self, label: str) -> np.ndarray | None:
        """Kept token ids of a class in row order, int32 [rows]; None where one row is kept."""
        return self._of_class(TOKENS, label)

    def spans(self, label: str) -> np.ndarray | None:
        """What the kept tokens of a class stand for, in row order, int32 [rows, 4].

        Place of the token in the input, its message, first character and end in that message, as
        `layout.py` has them. As a file holds them: nothing says that they lie in the texts.
        None where one row is kept or nobody knows, as of an imported cache.
        """
        return self._of_class(SPANS, label)

    def _of_class(self, file: str, label: str) -> np.ndarray | None:
        """A class's part of a tensor that belongs to no layer; None where there is none."""
        if file not in self.info.files:
            return None
        values = map_raw(self.path / file, self.info.tensors[file])
        start = 0
        for name, record in self.info.classes.items():
            if name == self._label(label):
                return values[start : start + record.rows]
            start += record.rows
        raise AssertionError("unreachable: _label refuses unknown classes")

    def require_layer(self, layer: int) -> None:
        """Raise LayerNotCachedError unless the cache holds the layer."""
        if layer in self.info.layers:
            return
        deepest = self.identity.num_hidden_layers
        remedy = f"add it with: {self._command_that_adds(str(layer))}"
        if not 0 <= layer <= deepest:
            command = self._command_that_adds("LAYER")
            remedy = f"the model has layers 0 to {deepest}; add one of these with: {command}"
        if is_imported(self.identity):
            remedy = "it was imported, and no layer can be added: extract it into another cache"
        raise LayerNotCachedError(
            f"Layer {layer} not found in cache {self.path}: cached layers are "
            f"{', '.join(map(str, self.layers))}; {remedy}"
        )

    def _command_that_adds(self, layer: str) -> str:
        """The extract command that made this cache, asked for another layer."""
        identity, info = self.identity, self.info
        options = {
            "--model": identity.model,
            "--revision": identity.revision,
            "--adapter": info.origin.adapter,
            "--data": "DATA" if info.origin.data == IN_MEMORY else info.origin.data,
            "--layers": layer,
            "--output": str(self.path),
            "--dtype": str(info.dtype),
            "--positions": str(info.positions),
            "--system-prompt": identity.system_prompt,
        }
        flags = {
            "--no-chat-template": identity.chat_template is None,
            "--keep-special-tokens": identity.special_tokens_kept,
            "--truncate": info.origin.truncate,
        }
        words = [word for name, value in options.items() if value for word in (name, value)]
        return shlex.join(
            ["probecache", "extract", *words, *(name for name, given in flags.items() if given)]
        )

    def _raw(self, label: str, layer: int) -> np.ndarray:
        self.require_layer(layer)
        name = activations_path(layer, self.info.classes[self._label(label)].prefix)
        return map_raw(self.path / name, self.info.tensors[name])

    def _label(self, name: str) -> str:
        # A label first: one class may be called what another's files are called.
        if name in self.info.classes:
            return name
        for label, record in self.info.classes.items():
            if name == record.prefix:
                return label
        raise UsageError(f"expected one of the classes {', '.join(self.classes)}, got {name!r}")


def open_cache(path: str | Path) -> Cache:
    """Open a finished cache for reading.

    Raises:
        StoreError: not a cache, unfinished, or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise StoreError(
            f"expected a cache folder at {path}, got {what_is_at(path)}; check --cache"
        )
    if not (path / LAYER_INFO).is_file():
        raise StoreError(
            f"expected {LAYER_INFO} in {path}, got none: "
            + (
                f"its extraction has not finished; probecache info {path} says how far it is, the "
                "same extract command again goes on"
                if (path / UNFINISHED).is_dir()
                else "not a cache; run probecache extract"
            )
        )
    cache = Cache(path, read_manifest(path / LAYER_INFO, LayerInfo))
    for name, record in cache.info.tensors.items():
        if name not in OWN_TENSORS and name not in _declared(cache.info):
            raise StoreError(f"expected only declared files in {path / LAYER_INFO}, got {name!r}")
        require_tensor_size(path / name, record)
    for name, plain in cache.info.files.items():
        if isinstance(plain, PlainRecord):
            require_size(path / name, plain.bytes)
    if cache.hidden_size > WIDEST:
        raise StoreError(
            f"expected rows of at most {WIDEST} numbers in {path / LAYER_INFO}, got "
            f"{cache.hidden_size}; no model has wider ones: the cache is damaged"
        )
    return cache


def what_is_at(path: Path) -> str:
    """What is there in place of a folder, in words."""
    # A folder that is there now was made since it was looked for.
    return "a file" if path.exists() and not path.is_dir() else "nothing there"


def _declared(info: LayerInfo) -> set[str]:
    return {
        activations_path(layer, record.prefix)
        for layer in info.layers
        for record in info.classes.values()
    }


def read_manifest(path: Path, schema: type[_Model]) -> _Model:
    """Read and check a manifest.

    Raises:
        StoreError: missing, not JSON, or not of the schema.
    """
    with _damaged(path):
        content = read_json(path, _MOST_BYTES)
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise StoreError(_schema_message(path, error)) from error


def _read_examples(path: Path) -> Iterator[ExampleRecord]:
    """Entries one after the other: nothing but entries is ever kept in memory."""
    with _damaged(path):
        content = read_text_bytes(path)
        require_sane_density(content)
        for place, item in enumerate(json_items(content.decode())):
            try:
                yield _ENTRY.validate_python(item)
            except ValidationError as error:
                raise StoreError(_schema_message(path, error, place)) from error


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"expected the file {path}, got: {error.strerror}") from error
    except ValueError as error:
        raise StoreError(f"expected JSON in {path}, got: {error}; the file is damaged") from error


def _schema_message(path: Path, error: ValidationError, *place: int) -> str:
    if error.error_count() > _MOST_FAULTS:  # each would be spelt out, and take a kilobyte
        return f"expected {path} as probecache writes it, got {error.error_count()} faults in it"
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, (*place, *first["loc"]))) or "the whole"
    return f"expected {path} as probecache writes it, got at {where[:200]}: {first['msg']}"
