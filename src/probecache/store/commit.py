"""Move a complete extraction into its cache and commit it by renaming layer_info.json.

Guarantee: may be killed and begun again at any point; until the last rename readers see the old
state. Needs no model and no data: whatever command comes next can do it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from probecache.atomic import NO_LINKS, sync_folder, write_bytes
from probecache.errors import OutputError, StoreError
from probecache.identity import merged_weights
from probecache.store.layout import LAYER_INFO, LayerInfo, manifest_size
from probecache.store.reader import read_manifest
from probecache.store.seal import seal_json

if TYPE_CHECKING:
    from probecache.store.claim import Claim
    from probecache.store.journal import Unfinished

__all__ = ["encode_manifest", "finish", "is_committed"]


def encode_manifest(info: LayerInfo) -> bytes:
    """The bytes of a layer_info.json: sealed, padded to a size that is known beforehand."""
    return seal_json(info.model_dump(mode="json"), manifest_size(info))


def finish(unfinished: Unfinished, claim: Claim) -> LayerInfo:
    """Put the files of a complete extraction in their places, then its manifest.

    Raises:
        OutputError: another run has added the same layers with other numbers.
    """
    folder, final = unfinished.folder, unfinished.folder.parent
    new = read_manifest(unfinished.finished_path, LayerInfo)
    claim.require()
    merged = _with_cached(new, final, unfinished.begun.repairs)
    for name in new.files:
        _move(folder / name, final / name)
    for layer in new.layers:
        sync_folder(final / f"layer_{layer}")
    sync_folder(final)
    write_bytes(final / LAYER_INFO, encode_manifest(merged))
    return merged


def is_committed(unfinished: Unfinished) -> bool:
    """Whether all of an extraction is in its cache, so that its folder may go."""
    folder, final = unfinished.folder, unfinished.folder.parent
    if not (final / LAYER_INFO).is_file():
        return False
    cached = read_manifest(final / LAYER_INFO, LayerInfo)
    if not unfinished.complete:
        return not unfinished.begun.repairs and {*unfinished.begun.layers} <= {*cached.layers}
    try:
        new = read_manifest(unfinished.finished_path, LayerInfo)
    except StoreError:
        if unfinished.finished_path.exists():
            raise
        return True  # gone at this moment, since another run has committed it
    if any(cached.files.get(name) != record for name, record in new.files.items()):
        return False
    # Of a repair the manifest was there all along: its files have to be in their places, too.
    repairs = unfinished.begun.repairs
    return not (repairs and any(_waits(folder / name, final / name) for name in new.files))


def _waits(source: Path, target: Path) -> bool:
    return source.exists() and not (target.exists() and source.samefile(target))


def _with_cached(new: LayerInfo, final: Path, repairs: bool) -> LayerInfo:
    """The manifest of the cache with the new layers; another run may have added some meanwhile."""
    if not (final / LAYER_INFO).is_file():
        return new
    old = read_manifest(final / LAYER_INFO, LayerInfo)
    differing = [
        name
        for name in new.files.keys() & old.files.keys()
        if new.files[name].sha256 != old.files[name].sha256
    ]
    if differing and not repairs:
        raise OutputError(
            f"expected to add layers {new.layers} to {final}, but another run has added "
            f"{sorted({*old.layers} & {*new.layers})} meanwhile, with other numbers in "
            f"{differing[0]}; nothing was changed"
        )
    kept = {layer: count for layer, count in old.non_finite.items() if layer not in new.layers}
    a, b = old.identity, new.identity
    identity = replace(  # where the two differ, and may, the cache's own stays
        a,
        weights=merged_weights(a.weights, b.weights, old.layers, new.layers),
        weight_samples=merged_weights(a.weight_samples, b.weight_samples, old.layers, new.layers),
    )
    return new.model_copy(
        update={
            "layers": sorted({*old.layers, *new.layers}),
            "files": {**old.files, **new.files},
            "non_finite": dict(sorted({**kept, **new.non_finite}.items())),
            "identity": identity,
        }
    )


def _put(source: Path, target: Path) -> None:
    """Give a file its final name; the old one stays until the manifest is committed.

    So that nothing hangs on a file system that forgets half of a rename when the power fails.
    """
    try:
        os.link(source, target)
    except FileExistsError:  # linked before a kill, or damaged and to be replaced
        if not source.samefile(target):
            source.replace(target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        source.replace(target)


def _move(source: Path, target: Path) -> None:
    if source.exists():
        if target.parent.is_symlink():
            raise OutputError(f"expected {target.parent} to be a folder, got a link; remove it")
        target.parent.mkdir(exist_ok=True)
        _put(source, target)
    elif not target.is_file():  # neither moved before a kill nor of the cache that is extended
        raise OutputError(
            f"expected {source} of a complete extraction, got nothing; remove "
            f"{source.parent.parent} and extract anew"
        )
