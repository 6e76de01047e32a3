"""Fill a cache, so that nothing that was once computed is lost, and commit it.

Rows go to `CACHE/unfinished/` at their final places, in any order, as they come; memory does not
grow with the data set. Every few seconds what is there is flushed and recorded (`journal.py`). A
finished cache is committed by one rename of layer_info.json; layers that are added to a cache go
the same way.

Guarantee: a kill or a failing disk at any moment leaves every reader the old state, and whoever
opens a writer for the same cache again all rows that were recorded.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probecache.atomic import (
    disk_errors_named,
    file_named,
    open_own,
    sha256_of_file,
    sync_file,
    sync_folder,
    write_bytes,
)
from probecache.errors import OutputError, ProbecacheError
from probecache.store.commit import encode_manifest, finish
from probecache.store.filling import FillingFile
from probecache.store.journal import Begun, Unfinished, find_unfinished
from probecache.store.layout import (
    METADATA,
    OWN_TENSORS,
    SPANS,
    TOKENS,
    Blueprint,
    LayerInfo,
    activations_path,
    checksums_path,
)
from probecache.store.place import claimed_place
from probecache.store.tensorfile import data_offset, encode_int32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from numpy.typing import NDArray

    from probecache.store.claim import Claim
    from probecache.types import Identity

__all__ = ["CacheWriter", "open_writer", "require_free_layers"]

# Rows are recorded this often, or less where that would take more than 1/20 of the time.
_RECORD_S, _RECORD_SHARE = 2.0, 20


@dataclass
class CacheWriter:
    """Takes rows of a blueprint's examples and puts them where they belong.

    Attributes:
        folder: of the unfinished files.
        final: the cache's folder.
        blueprint: what is written.
        extends: the manifest of the cache that gains layers; None makes a new one.
        unfinished: what is recorded.
        seconds: spent here.
    """

    folder: Path
    final: Path
    blueprint: Blueprint
    extends: LayerInfo | None
    unfinished: Unfinished
    claim: Claim
    seconds: float = 0.0
    _files: dict[tuple[int, str], FillingFile] = field(default_factory=dict)
    _recorded: float = field(default_factory=time.monotonic)
    _cost: float = 0.0
    _changed: bool = False

    def __post_init__(self) -> None:
        self._members = _members(self.blueprint)
        self._ordinal = np.empty(len(self.blueprint.examples), dtype=np.int64)
        self._labels = [record.label for record in self.blueprint.examples]
        for members in self._members.values():
            self._ordinal[members] = np.arange(len(members))
        self._checksums = {
            layer: np.zeros(len(self._labels), dtype="<u4") for layer in self.blueprint.layers
        }

    # -- rows

    def done(self, layers: Sequence[int]) -> NDArray[np.bool_]:
        """Which examples' rows are there at all of these layers: bool [examples]."""
        flags = np.ones(len(self._labels), dtype=np.bool_)
        for layer in layers:
            flags &= self._done(layer)
        return flags

    def holds(self, layer: int, examples: Sequence[int]) -> bool:
        """Whether the rows of all these examples are there at a layer."""
        return all(
            self._files[layer, self._labels[index]].done[self._ordinal[index]] for index in examples
        )

    def write(self, layer: int, examples: Sequence[int], rows: torch.Tensor) -> None:
        """Store the rows of some examples at one layer.

        Args:
            layer: one of the blueprint's.
            examples: indices into the blueprint's examples.
            rows: [rows, hidden] on the CPU in the cache's dtype: the examples' rows in that order.
        """
        import torch

        started = time.perf_counter()
        row_bytes = self.blueprint.hidden_size * self.blueprint.dtype.itemsize
        data = memoryview(rows.contiguous().view(torch.uint8).numpy().data).cast("B")
        at = 0
        for label, first, stop, count in self._runs(examples):
            size = count * row_bytes
            self._files[layer, label].write(first, stop, data[at : at + size])
            at += size
        if at != len(data):
            raise ValueError(f"expected {at} bytes for these examples' rows, got {len(data)}")
        self._changed = True
        self.seconds += time.perf_counter() - started

    def start_over(self, layers: Sequence[int]) -> None:
        """Forget all rows of some layers: they will come again, and maybe differ."""
        for (layer, _), file in self._files.items():
            if layer in layers:
                file.start_over()
        self.record()

    def write_tokens(self, ids: NDArray[np.int32], spans: NDArray[np.int32] | None = None) -> None:
        """Store the kept token ids: classes one after the other, rows within them in order.

        Args:
            spans: what these tokens stand for, [rows, 4], where the blueprint tells it.
        """
        if self.extends is not None:
            return
        values = {TOKENS: ids, SPANS: spans}
        for name in self.blueprint.own_tensors:
            path, tensor = self.folder / name, values[name]
            if tensor is None:
                raise ValueError(f"expected the numbers of {name}, which the blueprint tells")
            with file_named(path), open_own(path, new=True) as file:
                file.write(encode_int32(tensor))
                sync_file(file)

    def record_now_and_then(self) -> bool:
        """Record what is there, if that was not done for a while; whether it was."""
        due = max(_RECORD_S, _RECORD_SHARE * self._cost)
        if not self._changed or time.monotonic() - self._recorded < due:
            return False
        self.record()
        return True

    def record(self) -> None:
        """Flush all rows to disk and record which they are."""
        started = time.monotonic()
        self.claim.require()
        # First, so that a layer counts as changed until its checksums are on disk.
        for layer in sorted({layer for (layer, _), file in self._files.items() if file.dirty}):
            self._write_checksums(layer)
        for file in self._files.values():
            file.sync()
        self.unfinished.save({layer: self._done(layer) for layer in self.blueprint.layers})
        self._changed = False
        self._recorded = time.monotonic()
        self._cost = self._recorded - started
        self.seconds += self._cost

    # -- the end

    def commit(
        self, identity: Identity, timing: dict[str, int], execution: dict[str, str]
    ) -> LayerInfo:
        """Flush and rename; afterwards the cache is there, or an error was raised."""
        started = time.perf_counter()
        self.record()
        hashes, offsets = self._hashes()
        non_finite: dict[int, int] = {}
        for (layer, _), file in self._files.items():
            if file.non_finite:
                non_finite[layer] = non_finite.get(layer, 0) + file.non_finite
        info = self.blueprint.manifest(
            identity,
            timing=timing,
            non_finite=dict(sorted(non_finite.items())),
            execution=execution,
            hashes=hashes,
            offsets=offsets,
        )
        if self.extends is not None:  # an earlier version's entries tell less, and stay as they are
            info.files[METADATA] = self.extends.files[METADATA]
        self.close()
        write_bytes(self.unfinished.finished_path, encode_manifest(info))
        self.seconds += time.perf_counter() - started
        return finish(self.unfinished, self.claim)

    @property
    def is_open(self) -> bool:
        """Whether rows can be written."""
        return bool(self._files)

    def close(self) -> None:
        """Close the files; what was written stays."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    # -- files

    def open_files(self) -> None:
        """Lay down every file at its final size, or take up those that are there."""
        done = self.unfinished.done() if self.unfinished.laid_down else None
        if done is None:
            for name in OWN_TENSORS:
                with suppress(FileNotFoundError):
                    (self.folder / name).unlink()
        for layer in self.blueprint.layers:
            _make_folder(self.folder / f"layer_{layer}")
            if done is not None:
                self._checksums[layer] = self._read_checksums(layer)
        jobs = [(layer, label) for layer in self.blueprint.layers for label in self._members]
        with ThreadPoolExecutor(1 if done is None else None) as pool:
            files = list(pool.map(lambda job: self._open(job[0], job[1], done), jobs))
        self._files = dict(zip(jobs, files, strict=True))
        if done is None:
            for layer in self.blueprint.layers:
                self._write_checksums(layer)  # so that its name is there for good, too
                sync_folder(self.folder / f"layer_{layer}")
            sync_folder(self.folder)
        self.record()

    def _open(
        self, layer: int, label: str, done: dict[int, NDArray[np.bool_]] | None
    ) -> FillingFile:
        record = self.blueprint.classes[label]
        members = self._members[label]
        starts = [*(self.blueprint.examples[index].rows[0] for index in members), record.rows]
        return FillingFile(
            self.folder / activations_path(layer, record.prefix),
            (record.rows, self.blueprint.hidden_size),
            str(self.blueprint.dtype),
            starts,
            None if done is None else done[layer][members],
            self._checksums[layer][self._slices[label]],
        )

    @property
    def _slices(self) -> dict[str, slice]:
        """Where each class's checksums are."""
        found, at = {}, 0
        for label, members in self._members.items():
            found[label] = slice(at, at + len(members))
            at += len(members)
        return found

    def _done(self, layer: int) -> NDArray[np.bool_]:
        flags = np.empty(len(self._labels), dtype=np.bool_)
        for label, members in self._members.items():
            flags[members] = self._files[layer, label].done
        return flags

    def _runs(self, examples: Sequence[int]) -> Iterator[tuple[str, int, int, int]]:
        """Class, first and last ordinal and rows, of examples that follow one another in a file."""
        run: tuple[str, int, int, int] | None = None
        for index in examples:
            label, ordinal = self._labels[index], int(self._ordinal[index])
            start, stop = self.blueprint.examples[index].rows
            if run is not None and run[0] == label and run[2] == ordinal:
                run = (label, run[1], ordinal + 1, run[3] + stop - start)
                continue
            if run is not None:
                yield run
            run = (label, ordinal, ordinal + 1, stop - start)
        if run is not None:
            yield run

    def _write_checksums(self, layer: int) -> None:
        path = self.folder / checksums_path(layer)
        with file_named(path), open_own(path, new=not path.exists()) as file:
            file.write(self._checksums[layer].tobytes())
            sync_file(file)

    def _read_checksums(self, layer: int) -> NDArray[np.uint32]:
        """What is there of them; rows without theirs are made again."""
        try:
            content = (self.folder / checksums_path(layer)).read_bytes()
        except FileNotFoundError:
            content = b""
        found = np.zeros(len(self._labels), dtype="<u4")
        known = np.frombuffer(content, dtype="<u4", count=min(len(content) // 4, len(found)))
        found[: len(known)] = known
        return found

    def _hashes(self) -> tuple[dict[str, str], dict[str, int]]:
        """SHA-256 of every file, and where the numbers begin in those that hold some."""
        names = {
            activations_path(layer, self.blueprint.classes[label].prefix): file
            for (layer, label), file in self._files.items()
        }
        offsets = {name: file.offset for name, file in names.items()}
        with ThreadPoolExecutor() as pool:
            finished = pool.map(lambda file: file.finish(), names.values())
            hashes = dict(zip(names, finished, strict=True))
        for layer in self.blueprint.layers:
            checksums = self._checksums[layer].tobytes()
            hashes[checksums_path(layer)] = hashlib.sha256(checksums).hexdigest()
        if self.extends is not None:
            hashes[METADATA] = self.extends.files[METADATA].sha256
            for name in self.blueprint.own_tensors:
                record = self.extends.tensors[name]
                offsets[name], hashes[name] = record.offset, record.sha256
            return hashes, offsets
        write_bytes(self.folder / METADATA, self.blueprint.metadata)
        hashes[METADATA] = hashlib.sha256(self.blueprint.metadata).hexdigest()
        for name in self.blueprint.own_tensors:
            hashes[name] = sha256_of_file(self.folder / name)
            with (self.folder / name).open("rb") as file:
                offsets[name] = data_offset(file)
        return hashes, offsets


def _make_folder(folder: Path) -> None:
    if folder.is_symlink():
        raise OutputError(f"expected {folder} to be a folder, got a link; remove it")
    folder.mkdir(exist_ok=True)


def _members(blueprint: Blueprint) -> dict[str, NDArray[np.int64]]:
    """Indices of each class's examples, in data order."""
    labels = [record.label for record in blueprint.examples]
    codes = {label: number for number, label in enumerate(blueprint.classes)}
    coded = np.array([codes[label] for label in labels])
    return {label: np.flatnonzero(coded == number) for label, number in codes.items()}


def require_free_layers(final: Path, blueprint: Blueprint) -> None:
    """Raise OutputError where something but a killed run's leftovers lies where a layer will go."""
    for layer in blueprint.layers:
        folder = final / f"layer_{layer}"
        ours = {Path(activations_path(layer, r.prefix)).name for r in blueprint.classes.values()}
        ours.add(Path(checksums_path(layer)).name)
        if folder.is_dir() and not folder.is_symlink():
            foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours)
        else:
            foreign = [folder.name] if folder.is_symlink() or folder.exists() else []
        if foreign:
            raise OutputError(
                f"expected {folder} to be free for new rows, but it holds {foreign[0]}, which is "
                "not of this cache; move it"
            )


# ---------------------------------------------------------------- open and leave


@contextmanager
def open_writer(
    final: Path,
    blueprint: Blueprint,
    begin: Callable[[], Begun],
    extends: LayerInfo | None = None,
) -> Iterator[CacheWriter]:
    """A writer that goes on with what is unfinished, or begins.

    What is not committed stays for the next one if any rows are recorded; else nothing is left.

    Args:
        final: where the cache will be, or is, when layers are added to it.
        blueprint: what to write; when adding, of the missing layers.
        begin: says what is begun, or raises where what is unfinished there is another's. Asked when
            no other run can begin or go on with anything there.
        extends: the manifest of the existing cache that gains layers.

    Raises:
        OutputError: no room, no permission, or another run is writing there.
    """
    needed = blueprint.bytes_per_layer * len(blueprint.layers)
    with claimed_place(final, needed) as (folder, claim):
        begun, unfinished = begin(), find_unfinished(folder.parent)
        if unfinished is None:
            unfinished = Unfinished(folder, begun)
            unfinished.begin()
            for inner in (folder.parent, folder.parent.parent):  # where new names are
                with disk_errors_named(inner, needed):
                    sync_folder(inner)
        writer = CacheWriter(folder, folder.parent, blueprint, extends, unfinished, claim)
        try:
            writer.open_files()
            yield writer
        except BaseException as error:
            # What a kill would have left is worth keeping; so is what came since it was recorded.
            foreseen = isinstance(error, ProbecacheError) and not isinstance(error, OutputError)
            if writer.is_open and not foreseen:
                with suppress(OSError, OutputError):
                    writer.record()
            raise
        finally:
            writer.close()
