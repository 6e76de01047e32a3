"""Make again what of a cache is damaged, and nothing else.

Rows that still have their checksum are copied, the others are extracted as they first were; the
model runs over the prompts that need it and no more. Goes the way of every extraction: what is
unfinished lies apart, and the cache changes by a rename.

Guarantee: nothing is written unless model, data and options are those of the cache. A file comes
out as it was written, to the byte, where the machine computes as the first one did; else that is
told.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probecache.atomic import real_path, write_bytes
from probecache.errors import MismatchError, StoreError
from probecache.identity import EXTENDING, require_same
from probecache.layers import format_layers
from probecache.store.claim import require_unclaimed
from probecache.store.journal import Begun, find_unfinished
from probecache.store.layout import (
    LAYER_INFO,
    METADATA,
    SPANS,
    TOKENS,
    ExampleRecord,
    LayerInfo,
    activations_path,
    checksums_path,
)
from probecache.store.place import claimed_place, finish_complete
from probecache.store.reader import read_manifest
from probecache.store.tensorfile import encode_int32
from probecache.store.verify import Report, damaged_examples, verify
from probecache.store.writer import CacheWriter, open_writer
from probecache.unrecorded import is_imported
from probecache.workflow.extract import Filling, Took, kept_spans, kept_tokens
from probecache.workflow.prepare import Plan, Preparation, prepare, work_out
from probecache.workflow.resume import begin, stops_told

if TYPE_CHECKING:
    from probecache.store.journal import Unfinished
    from probecache.types import Identity
    from probecache.workflow.prepare import ExtractRequest

__all__ = ["Repair", "repair"]


@dataclass(frozen=True)
class Repair:
    """What was damaged, what is now, and files that are whole but not the same bytes as before."""

    before: Report
    after: Report
    changed: tuple[str, ...] = ()


def repair(
    path: Path,
    request_of: Callable[[LayerInfo], ExtractRequest],
    announce: Callable[[Plan], None] | None = None,
    finished: Callable[[Took], None] | None = None,
) -> Repair:
    """Verify a cache and make again what is damaged.

    Args:
        path: the cache.
        request_of: what to extract, from the cache's manifest.
        announce: told the plan before any weight is read; not called where no rows are damaged.
        finished: told what extracting took.

    Raises:
        StoreError: the manifest is damaged, which says what everything else should be; or the cache
            was imported.
        MismatchError: model, data or options are not those of the cache.
    """
    finish_complete(path)
    before = verify(path)
    if before.whole:
        return Repair(before, before)
    damaged = {damage.file for damage in before.damages}
    if before.kind != "cache" or LAYER_INFO in damaged:
        raise StoreError(
            f"expected a cache with a whole {LAYER_INFO} to repair, got {path}: "
            f"{before.damages[0].file} is {before.damages[0].what}; copy it again, or make it anew"
        )
    info = read_manifest(path / LAYER_INFO, LayerInfo)
    if is_imported(info.identity):
        raise StoreError(
            f"expected a cache that was extracted to repair, got {path}, which was imported: "
            "nothing tells what its rows were made with; import the old cache again, or copy this "
            "one again"
        )
    prepared = prepare(request_of(info), info.identity)
    _require_cache(path, info, prepared.identity, ())
    with claimed_place(path):
        _write_small_files(path, info, prepared, damaged)
    layers = tuple(
        layer
        for layer in info.layers
        if any(activations_path(layer, r.prefix) in damaged for r in info.classes.values())
    )
    if layers:
        _extract(path, info, prepared, layers, damaged, announce, finished)
    after = verify(path)
    now = read_manifest(path / LAYER_INFO, LayerInfo).files
    changed = tuple(name for name in info.files if now[name].sha256 != info.files[name].sha256)
    return Repair(before, after, changed)


def _require_cache(
    path: Path, info: LayerInfo, identity: Identity, layers: tuple[int, ...]
) -> None:
    """Raise MismatchError unless this is what these layers were made from; see `require_same`."""
    known = replace(identity, attention=identity.attention or info.identity.attention)
    require_same(
        info.identity,
        known,
        EXTENDING,
        what=f"Cache {path} and what is to repair it",
        allowed=None,
        layers=layers,
        remedy="name the model and the data that it was made from with --model and --data",
    )


def _write_small_files(
    path: Path, info: LayerInfo, prepared: Preparation, damaged: set[str]
) -> None:
    """What follows from data and rows alone: entries, token ids, their spans, checksums."""
    if METADATA in damaged:
        _write(path, info, METADATA, prepared.blueprint.metadata)
    if TOKENS in damaged:
        _write(path, info, TOKENS, encode_int32(kept_tokens(prepared)))
    if SPANS in damaged:
        _write(path, info, SPANS, encode_int32(kept_spans(prepared)))
    for layer in info.layers:
        files = {activations_path(layer, r.prefix) for r in info.classes.values()}
        if checksums_path(layer) in damaged and not files & damaged:
            sums = _checksums(path, info, layer, prepared.blueprint.examples)
            _write(path, info, checksums_path(layer), sums)


def _write(path: Path, info: LayerInfo, name: str, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != info.files[name].sha256:
        raise MismatchError(
            f"expected the data to give {name} of {path} as it was written, got other bytes; name "
            "the data that the cache was made from with --data"
        )
    write_bytes(path / name, content)


def _checksums(
    path: Path, info: LayerInfo, layer: int, examples: tuple[ExampleRecord, ...]
) -> bytes:
    found = [
        zlib.crc32(_rows(path, info, layer, example))
        for label in info.classes
        for example in examples
        if example.label == label
    ]
    return np.array(found, dtype="<u4").tobytes()


def _rows(path: Path, info: LayerInfo, layer: int, example: ExampleRecord) -> bytes:
    name = activations_path(layer, info.classes[example.label].prefix)
    size = info.hidden_size * info.dtype.itemsize
    start, stop = (info.tensors[name].offset + row * size for row in example.rows)
    with (path / name).open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


# ---------------------------------------------------------------- rows


def _extract(
    path: Path,
    info: LayerInfo,
    prepared: Preparation,
    layers: tuple[int, ...],
    damaged: set[str],
    announce: Callable[[Plan], None] | None,
    finished: Callable[[Took], None] | None,
) -> None:
    _require_no_other(path, layers)
    blueprint = replace(
        prepared.blueprint, layers=layers, origin=info.origin, tells_spans=SPANS in info.files
    )
    planned = work_out(prepared, None, blueprint, path)
    prepared.source.check_device()
    if announce is not None:
        announce(planned)
    samples = prepared.source.weight_samples(layers)
    identity = replace(prepared.identity, weight_samples=samples)
    _require_cache(path, info, identity, layers)

    def begun() -> Begun:
        other = _require_no_other(path, layers)
        if other is not None:
            other.drop()
        return begin(prepared, planned, identity, repairs=True)

    with stops_told(path), open_writer(path, blueprint, begun, info) as writer:
        for layer in layers:
            _copy_whole_rows(writer, path, info, layer, damaged)
        filling = Filling(
            writer,
            prepared,
            planned,
            None,
            lambda found, _: _require_cache(path, info, found, layers),
        )
        filling.fill(identity)
        writer.commit(info.identity, info.timing, info.execution)
        if finished is not None:
            finished(filling.took())


def _require_no_other(path: Path, layers: tuple[int, ...]) -> Unfinished | None:
    """Raise MismatchError over an unfinished extraction; a repair of other layers comes back."""
    found = find_unfinished(real_path(path))
    if found is None or (found.begun.repairs and found.begun.layers == layers):
        return None
    if not found.begun.repairs:
        require_unclaimed(found.folder)
        raise MismatchError(
            f"expected nothing unfinished in {path} when it is repaired, got an extraction of "
            f"layers {format_layers(found.begun.layers)} ({found.share():.1%} of the rows on "
            "disk); finish it first with the command that it was begun with, or remove "
            f"{found.folder} to drop what it computed"
        )
    return found


def _copy_whole_rows(
    writer: CacheWriter, path: Path, info: LayerInfo, layer: int, damaged: set[str]
) -> None:
    """Take over what still has its checksum."""
    import torch

    examples, done = writer.blueprint.examples, writer.done([layer])
    bad: set[int] = set(range(len(examples)))
    if checksums_path(layer) not in damaged:
        found = damaged_examples(path, info, examples, layer)
        bad = {index for indices in found.values() for index in indices}
    dtype = getattr(torch, str(info.dtype))
    for example in examples:
        if example.idx in bad or done[example.idx]:
            continue
        data = bytearray(_rows(path, info, layer, example))
        rows = torch.frombuffer(data, dtype=dtype).view(-1, info.hidden_size)
        writer.write(layer, [example.idx], rows)
    writer.record()
