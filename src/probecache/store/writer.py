"""Fill a cache and commit it.

A new cache is built in a folder beside its final place and committed by renaming that folder.
Layers added to an existing cache are built the same way, moved in, and committed by replacing
layer_info.json. Guarantee: until that last rename a reader sees the old state, or nothing.

Rows may come in any order, layer by layer or batch by batch; they go to disk as they come, so
memory does not grow with the data set.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from probecache.atomic import (
    commit_folder,
    disk_errors_named,
    flush_folder,
    real_path,
    sha256_of_file,
    sync_folder,
    temporary_sibling,
    write_bytes,
)
from probecache.errors import OutputError
from probecache.identity import merged_weights
from probecache.store.layout import (
    LAYER_INFO,
    METADATA,
    TOKENS,
    Blueprint,
    LayerInfo,
    activations_path,
    encode_json,
)
from probecache.store.reader import read_manifest
from probecache.store.tensorfile import lay_down

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import torch

    from probecache.types import Identity

__all__ = ["CacheWriter", "open_writer", "require_free_layers"]


@dataclass
class _OpenFile:
    """A laid-down `.pt` and where its rows begin."""

    file: BinaryIO
    offset: int


@dataclass
class CacheWriter:
    """Takes rows of a blueprint's examples and puts them where they belong."""

    folder: Path
    final: Path
    blueprint: Blueprint
    extends: LayerInfo | None
    seconds: float = 0.0
    _files: dict[str, _OpenFile] = field(default_factory=dict)

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
        for index in examples:
            record = self.blueprint.examples[index]
            start, stop = record.rows
            size = (stop - start) * row_bytes
            prefix = self.blueprint.classes[record.label].prefix
            self._fill(activations_path(layer, prefix), start * row_bytes, data[at : at + size])
            at += size
        if at != len(data):
            raise ValueError(f"expected {at} bytes for these examples' rows, got {len(data)}")
        self.seconds += time.perf_counter() - started

    def write_tokens(self, ids: np.ndarray) -> None:
        """Store the kept token ids: classes one after the other, rows within them in order."""
        if self.blueprint.keeps_tokens and self.extends is None:
            self._fill(TOKENS, 0, memoryview(ids.astype("<i4").tobytes()))

    def commit(
        self,
        identity: Identity,
        timing: dict[str, float],
        non_finite: dict[int, int],
        execution: dict[str, str],
    ) -> LayerInfo:
        """Hash, flush and rename; afterwards the cache is there, or an error was raised."""
        started = time.perf_counter()
        offsets = {name: opened.offset for name, opened in self._files.items()}
        self.close()
        with ThreadPoolExecutor() as pool:
            hashes = dict(
                zip(
                    offsets,
                    pool.map(lambda n: sha256_of_file(self.folder / n), offsets),
                    strict=True,
                )
            )
        if self.extends is not None and self.blueprint.keeps_tokens:
            kept = self.extends.files[TOKENS]
            offsets[TOKENS], hashes[TOKENS] = kept.offset, kept.sha256
        self.seconds += time.perf_counter() - started
        info = self.blueprint.manifest(
            identity,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            timing={**timing, "write_s": round(self.seconds, 3)},
            non_finite=non_finite,
            execution=execution,
            hashes=hashes,
            offsets=offsets,
        )
        if self.extends is None:
            self._commit_new(info, identity)
            return info
        return self._commit_layers(info)

    def close(self) -> None:
        """Close the files; what was written stays in the temporary folder."""
        for opened in self._files.values():
            opened.file.close()
        self._files.clear()

    def lay_down_files(self) -> None:
        """Create every file at its final size: a full disk shows now and not hours later."""
        for name, (shape, dtype) in self.blueprint.files().items():
            if name == TOKENS and self.extends is not None:
                continue
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            file = path.open("w+b")
            offset = lay_down(file, shape, dtype)
            _reserve(file)
            self._files[name] = _OpenFile(file, offset)

    def _fill(self, name: str, at: int, data: memoryview) -> None:
        opened = self._files[name]
        position = opened.offset + at
        while data:
            written = os.pwrite(opened.file.fileno(), data, position)
            data, position = data[written:], position + written

    def _commit_new(self, info: LayerInfo, identity: Identity) -> None:
        (self.folder / METADATA).write_bytes(self.blueprint.metadata)
        content = encode_json(info.model_dump(mode="json"))
        padded = content.ljust(self.blueprint.manifest_bytes(identity))
        (self.folder / LAYER_INFO).write_bytes(padded)
        commit_folder(self.folder, self.final)

    def _commit_layers(self, new: LayerInfo) -> LayerInfo:
        for layer in new.layers:
            flush_folder(self.folder / f"layer_{layer}")
        with _locked(self.final):
            # Another run may have added layers since this one began.
            old = read_manifest(self.final / LAYER_INFO, LayerInfo)
            if twice := sorted({*old.layers} & {*new.layers}):
                raise OutputError(
                    f"expected to add layers {new.layers} to {self.final}, but another run has "
                    f"added {twice} meanwhile; run the command again to add what is still missing"
                )
            merged = _merged(old, new)
            size = self.blueprint.extended_manifest_bytes(old.layers, merged.identity)
            content = encode_json(merged.model_dump(mode="json")).ljust(size)
            self._move_layers(new)
            write_bytes(self.final / LAYER_INFO, content)
        return merged

    def _move_layers(self, new: LayerInfo) -> None:
        """Put the new layers in; what a killed run left in their places goes."""
        require_free_layers(self.final, self.blueprint)
        for layer in new.layers:
            target = self.final / f"layer_{layer}"
            shutil.rmtree(target, ignore_errors=True)
            (self.folder / f"layer_{layer}").rename(target)
        sync_folder(self.final)


def _merged(old: LayerInfo, new: LayerInfo) -> LayerInfo:
    """The manifest of a cache that gains layers; where they differ, the cache's own stays."""
    a, b = old.identity, new.identity
    identity = replace(
        a,
        weights=merged_weights(a.weights, b.weights, old.layers, new.layers),
        weight_samples=merged_weights(a.weight_samples, b.weight_samples, old.layers, new.layers),
    )
    return new.model_copy(
        update={
            "layers": sorted({*old.layers, *new.layers}),
            "files": {**old.files, **new.files},
            "non_finite": {**old.non_finite, **new.non_finite},
            "identity": identity,
        }
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let no other run change the cache meanwhile, where the file system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # and with it the lock


def require_free_layers(final: Path, blueprint: Blueprint) -> None:
    """Raise OutputError where something but a killed run's leftovers lies where a layer will go."""
    for layer in blueprint.layers:
        folder = final / f"layer_{layer}"
        ours = {Path(activations_path(layer, r.prefix)).name for r in blueprint.classes.values()}
        if folder.is_dir() and not folder.is_symlink():
            foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours)
        else:
            foreign = [folder.name] if os.path.lexists(folder) else []
        if foreign:
            raise OutputError(
                f"expected {folder} to be free for new rows, but it holds {foreign[0]}, which is "
                "not of this cache; move it"
            )


@contextmanager
def open_writer(
    final: Path, blueprint: Blueprint, extends: LayerInfo | None = None
) -> Iterator[CacheWriter]:
    """A writer into a temporary folder beside `final`; whatever is not committed is removed.

    Args:
        final: where the cache will be, or is, when layers are added to it.
        blueprint: what to write; when adding, of the missing layers.
        extends: the manifest of the existing cache that gains layers.

    Raises:
        OutputError: no room or no permission.
    """
    final = real_path(final)
    with disk_errors_named(final), temporary_sibling(final) as folder:
        writer = CacheWriter(folder, final, blueprint, extends)
        try:
            writer.lay_down_files()
            yield writer
        finally:
            writer.close()


def _reserve(file: BinaryIO) -> None:
    """Claim the disk blocks behind the hole. Where the file system cannot, writing will tell."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
