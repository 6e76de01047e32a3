"""What is kept of an extraction that is not finished, so that the same command goes on with it.

    CACHE/unfinished/begun.json      what was begun; never changes
    CACHE/unfinished/progress.json   which rows are on disk for good; replaced every few seconds
    CACHE/unfinished/finished.json   the manifest, once all rows are there: only files have to move
    CACHE/unfinished/layer_<L>/...   files as in a cache, at their final sizes

Guarantee: what `progress.json` calls done was flushed to disk before it was written.
"""

from __future__ import annotations

import base64
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from probecache.atomic import sync_folder, write_bytes
from probecache.errors import StoreError
from probecache.store.layout import UNFINISHED, Blueprint, Origin, PositionsField
from probecache.store.reader import read_manifest
from probecache.store.seal import NO_SEAL, is_intact, seal_json
from probecache.types import Dtype, Identity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

__all__ = ["Begun", "DoneRows", "PassageRecord", "Progress", "Unfinished", "find_unfinished"]

_Record = TypeVar("_Record", bound=BaseModel)
BEGUN, PROGRESS, FINISHED = "begun.json", "progress.json", "finished.json"


class Begun(BaseModel):
    """begun.json.

    `execution` is how the run goes, `asked` the options that decided it: a run that is asked for
    the same goes on in the same way, whatever memory is free meanwhile. `repairs` says that the
    layers are in the cache already and only some of their rows are made again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["probecache-unfinished"] = "probecache-unfinished"
    format_version: Literal[1] = 1
    layers: tuple[int, ...] = Field(min_length=1)
    examples: int = Field(ge=1)
    dtype: Dtype
    positions: PositionsField
    identity: Identity
    origin: Origin
    execution: dict[str, Any] = Field(default_factory=dict)
    asked: dict[str, Any] = Field(default_factory=dict)
    repairs: bool = False
    manifest_sha256: str = NO_SEAL

    @classmethod
    def of(cls, blueprint: Blueprint, identity: Identity, **how: Any) -> Begun:
        """What is begun where a blueprint's layers are written; `how` is what was not said yet."""
        return cls(
            layers=blueprint.layers,
            examples=len(blueprint.examples),
            dtype=blueprint.dtype,
            positions=blueprint.positions,
            identity=identity,
            origin=blueprint.origin,
            **how,
        )


class DoneRows(BaseModel):
    """Examples whose rows are on disk, of some layers: a bit each, most significant first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[int, ...]
    examples: str

    @classmethod
    def of(cls, done: Mapping[int, NDArray[np.bool_]]) -> list[DoneRows]:
        """Layers of equal examples together."""
        groups: dict[str, list[int]] = {}
        for layer, flags in sorted(done.items()):
            bits = base64.b64encode(np.packbits(flags).tobytes()).decode()
            groups.setdefault(bits, []).append(layer)
        return [cls(layers=tuple(layers), examples=bits) for bits, layers in groups.items()]

    def flags(self, count: int) -> NDArray[np.bool_]:
        """bool [count].

        Raises:
            ValueError: not so many bits; nothing is allocated for them.
        """
        bits = np.frombuffer(base64.b64decode(self.examples), dtype=np.uint8)
        if len(bits) != -(-count // 8):
            raise ValueError(f"expected {count} examples, got {8 * len(bits)} bits")
        return np.unpackbits(bits, count=count).astype(np.bool_)


class PassageRecord(BaseModel):
    """How one passage through the model goes, where that shows only while it runs."""

    model_config = ConfigDict(extra="forbid")

    why_padded: str = ""
    mixed: bool = True
    computed_tokens: Annotated[int, Field(ge=0)] = 0
    batches: str = ""
    snapshot: int | None = None  # layer whose hidden states are in the unfinished folder


class Progress(BaseModel):
    """progress.json."""

    model_config = ConfigDict(extra="forbid")

    done: list[DoneRows] = Field(default_factory=list)
    identity: Identity | None = None
    passages: dict[int, PassageRecord] = Field(default_factory=dict)
    manifest_sha256: str = NO_SEAL


@dataclass
class Unfinished:
    """An unfinished extraction's folder, as it was found: another run may be at work in it.

    Attributes:
        folder: where it is.
        begun: what was begun.
        progress: what was done when it was last recorded.
        recorded: when that was, in seconds since 1970; None before the files are laid down.
    """

    folder: Path
    begun: Begun
    progress: Progress = field(default_factory=Progress)
    recorded: float | None = None

    @property
    def progress_path(self) -> Path:
        """Where it is recorded what is done."""
        return self.folder / PROGRESS

    @property
    def laid_down(self) -> bool:
        """Whether all files are there, so that rows may be in them."""
        return self.recorded is not None

    @property
    def finished_path(self) -> Path:
        """Where the manifest is once all rows are there."""
        return self.folder / FINISHED

    @property
    def complete(self) -> bool:
        """Whether all rows are there and only files have to move."""
        return self.finished_path.is_file()

    @property
    def bytes_to_finish(self) -> int | None:
        """What a commit writes where all rows are there and only files have to move, else None."""
        with suppress(FileNotFoundError):
            return self.finished_path.stat().st_size
        return None

    def done(self) -> dict[int, NDArray[np.bool_]]:
        """Which examples' rows are on disk, by layer: bool [examples].

        Raises:
            StoreError: the record is damaged.
        """
        return {layer: flags for layers, flags in self._groups() for layer in layers}

    def counts(self) -> dict[int, int]:
        """How many examples' rows are on disk, by layer; takes no more memory than the record."""
        if not self.laid_down:
            return dict.fromkeys(self.begun.layers, 0)
        return {n: int(flags.sum()) for layers, flags in self._groups() for n in layers}

    def _groups(self) -> Iterator[tuple[tuple[int, ...], NDArray[np.bool_]]]:
        groups = self.progress.done
        try:
            if sorted(n for group in groups for n in group.layers) != sorted(self.begun.layers):
                raise ValueError("other layers than were begun")
            for group in groups:
                yield group.layers, group.flags(self.begun.examples)
        except ValueError as error:
            raise StoreError(
                f"expected {self.progress_path} as probecache writes it, got: {error}; "
                f"{_remedy(self.folder)}"
            ) from error

    def share(self) -> float:
        """How much of the rows is on disk, 0 to 1."""
        if self.complete:
            return 1.0
        return sum(self.counts().values()) / (self.begun.examples * len(self.begun.layers))

    def drop(self) -> None:
        """Forget what was begun and done; rows are of no use afterwards."""
        for path in (self.progress_path, self.folder / BEGUN):  # in this order: see `laid_down`
            path.unlink(missing_ok=True)
            sync_folder(self.folder)

    def begin(self) -> None:
        """Write what was begun."""
        _write(self.folder / BEGUN, self.begun)

    def save(self, done: Mapping[int, NDArray[np.bool_]]) -> None:
        """Write what is done. The rows have to be on disk before."""
        self.progress.done = DoneRows.of(done)
        _write(self.progress_path, self.progress)
        self.recorded = time.time()


def find_unfinished(cache: Path) -> Unfinished | None:
    """The unfinished extraction in a cache's folder, if one was begun.

    Raises:
        StoreError: its records are damaged.
    """
    folder = cache / UNFINISHED
    begun = None if folder.is_symlink() else _read(folder / BEGUN, Begun)
    if begun is None:
        return None
    found = Unfinished(folder, begun[0])
    progress = _read(found.progress_path, Progress)
    if progress is not None:
        found.progress, found.recorded = progress
    return found


def _read(path: Path, schema: type[_Record]) -> tuple[_Record, float] | None:
    """A record and when it was written; None where it is not there, or is removed meanwhile."""
    if not path.is_file():
        return None
    try:
        written = path.stat().st_mtime
        record, intact = read_manifest(path, schema), is_intact(path.read_bytes())
    except FileNotFoundError:
        return None
    except StoreError as error:
        if not path.exists():
            return None
        raise StoreError(f"{error}; {_remedy(path.parent)}") from error
    if not intact:
        raise StoreError(
            f"expected {path} as it was written, got other bytes; {_remedy(path.parent)}"
        )
    return record, written


def _remedy(folder: Path) -> str:
    return f"remove {folder} to begin anew"


def _write(path: Path, record: BaseModel) -> None:
    write_bytes(path, seal_json(record.model_dump(mode="json")))
