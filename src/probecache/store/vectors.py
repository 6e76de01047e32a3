"""Run folders: directions trained from one cache, in a form that explains itself when copied.

    RUN/vectors/layer_<L>.pt              raw, [hidden], float32
    RUN/normalized_vectors/layer_<L>.pt   unit norm, [hidden], float32
    RUN/{vectors,normalized_vectors}/vectors.json
    RUN/run.json

Guarantee: a run is committed by one rename; loading checks every file's size and SHA-256.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from probecache.atomic import (
    disk_errors_named,
    flush_folder,
    rename_free,
    sha256_of_file,
    temporary_sibling,
    write_uncommitted,
)
from probecache.errors import StoreError
from probecache.store.layout import ONLY_CONVENTION
from probecache.store.reader import WIDEST, read_manifest
from probecache.store.seal import NO_SEAL, seal_json
from probecache.store.tensorfile import FileRecord, data_offset, map_raw
from probecache.types import LAYER_CONVENTION, Identity

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = [
    "LayerRecord",
    "SavedVectors",
    "TrainedLayer",
    "VectorsInfo",
    "load_vectors",
    "save_run",
]

_MANIFEST = "vectors.json"
_OF_A_FOLDER = {"normalized", "format", "format_version", "manifest_sha256"}
# What a .pt may hold around its one vector; torch.save writes some 2 KB.
_MOST_AROUND = 1 << 20


class LayerRecord(BaseModel):
    """What is known of one layer's vector.

    `threshold` is in the units of a score with the vectors of the same folder; `raw_norm` is the
    norm before normalising; `typical_norm` the median norm of a row the vector was trained on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    raw_norm: float = Field(gt=0, allow_inf_nan=False)
    threshold: float = Field(allow_inf_nan=False)
    typical_norm: float = Field(ge=0, allow_inf_nan=False)
    n_positive: int = Field(ge=1)
    n_negative: int = Field(ge=1)
    file: FileRecord


class VectorsInfo(BaseModel):
    """vectors.json."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["probecache-vectors"] = "probecache-vectors"
    format_version: Literal[1] = 1
    normalized: bool
    method: str
    positive_class: str
    negative_class: str
    layer_convention: str = Field(default=LAYER_CONVENTION, pattern=ONLY_CONVENTION)
    hidden_size: int = Field(ge=1)
    layers: dict[int, LayerRecord] = Field(min_length=1)
    layers_without_direction: list[int] = Field(default_factory=list)
    source_cache: str
    source_cache_sha256: str
    allowed_mismatch: list[str] = Field(default_factory=list)
    identity: Identity
    manifest_sha256: str = NO_SEAL


@dataclass(frozen=True)
class SavedVectors:
    """Vectors of one folder: `vectors[20]` is a float32 torch tensor [hidden]."""

    path: Path
    info: VectorsInfo
    directions: Mapping[int, np.ndarray]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers, rising."""
        return tuple(sorted(self.directions))

    def __getitem__(self, layer: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.directions[layer].copy())


def load_vectors(path: str | Path) -> SavedVectors:
    """Load `normalized_vectors/` or `vectors/` of a run; a run's own folder means the normalised.

    Raises:
        StoreError: not such a folder, or a damaged one.
    """
    path = Path(path)
    if not (path / _MANIFEST).is_file() and (path / "normalized_vectors" / _MANIFEST).is_file():
        path = path / "normalized_vectors"
    if not (path / _MANIFEST).is_file():
        raise StoreError(
            f"expected {_MANIFEST} in {path}, got none; point --vectors at RUN/normalized_vectors "
            "as written by probecache train"
        )
    info = read_manifest(path / _MANIFEST, VectorsInfo)
    if info.hidden_size > WIDEST:
        raise StoreError(
            f"expected vectors of at most {WIDEST} numbers in {path / _MANIFEST}, got "
            f"{info.hidden_size}; no model has wider ones: the run is damaged"
        )
    directions = {layer: _load(path, layer, info) for layer in sorted(info.layers)}
    return SavedVectors(path, info, directions)


def _load(path: Path, layer: int, info: VectorsInfo) -> np.ndarray:
    record, file = info.layers[layer].file, path / f"layer_{layer}.pt"
    if record.shape != (info.hidden_size,) or record.dtype != "float32":
        raise StoreError(
            f"expected {path / _MANIFEST} to record float32 [{info.hidden_size}] for layer {layer},"
            f" got {record.dtype} {list(record.shape)}"
        )
    if record.bytes > 4 * info.hidden_size + _MOST_AROUND:
        raise StoreError(
            f"expected {path / _MANIFEST} to record a file of one vector for layer {layer}, got "
            f"one of {record.bytes} bytes; train again"
        )
    direction = map_raw(file, record)
    if sha256_of_file(file) != record.sha256:
        raise StoreError(f"expected {file} as it was written, got other content; train again")
    return direction


class TrainedLayer(Protocol):
    """What of a trained probe is saved: unit direction, float32 [hidden], and what is known."""

    @property
    def direction(self) -> np.ndarray: ...
    @property
    def raw_norm(self) -> float: ...
    @property
    def threshold(self) -> float: ...
    @property
    def typical_norm(self) -> float: ...
    @property
    def n_positive(self) -> int: ...
    @property
    def n_negative(self) -> int: ...


def save_run(output: str | Path, layers: Mapping[int, TrainedLayer], about: dict[str, Any]) -> Path:
    """Write `<output>_<YYYYmmdd_HHMMSS>/` and commit it by rename.

    Args:
        output: path of the run without its time stamp.
        layers: what to save.
        about: the fields of `VectorsInfo` that all layers share.

    Returns:
        The run's folder.
    """
    output = Path(output)
    contents = _contents(layers, about)
    needed = sum(map(len, contents.values()))
    with disk_errors_named(output, needed), temporary_sibling(output) as folder:
        for name, content in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_uncommitted(folder / name, content)
        flush_folder(folder)
        while True:
            final = output.with_name(f"{output.name}_{datetime.now():%Y%m%d_%H%M%S}")
            if not os.path.lexists(final) and rename_free(folder, final):
                return final
            time.sleep(0.1)  # two runs within one second get two names


def _contents(layers: Mapping[int, TrainedLayer], about: dict[str, Any]) -> dict[str, bytes]:
    """Every file of a run by its name in it, and its bytes."""
    raw, _ = _vectors_files("vectors", layers, about, normalized=False)
    unit, info = _vectors_files("normalized_vectors", layers, about, normalized=True)
    contents = {**raw, **unit}
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(contents.items())
    }
    summary = info.model_dump(mode="json", exclude=_OF_A_FOLDER)
    run = {"format": "probecache-run", "format_version": 1, **summary, "files": files}
    return {**contents, "run.json": seal_json(run)}


def _vectors_files(
    folder: str, layers: Mapping[int, TrainedLayer], about: dict[str, Any], *, normalized: bool
) -> tuple[dict[str, bytes], VectorsInfo]:
    """The files of `vectors/` or `normalized_vectors/`, and what its manifest says."""
    contents, records = {}, {}
    for layer, trained in sorted(layers.items()):
        scale = 1.0 if normalized else trained.raw_norm
        direction = (trained.direction.astype(np.float64) * scale).astype(np.float32)
        content, record = _encode(direction)
        contents[f"{folder}/layer_{layer}.pt"] = content
        records[layer] = LayerRecord(
            raw_norm=trained.raw_norm,
            threshold=trained.threshold * scale,
            typical_norm=trained.typical_norm,
            n_positive=trained.n_positive,
            n_negative=trained.n_negative,
            file=record,
        )
    info = VectorsInfo.model_validate({**about, "normalized": normalized, "layers": records})
    contents[f"{folder}/{_MANIFEST}"] = seal_json(info.model_dump(mode="json"))
    return contents, info


def _encode(vector: np.ndarray) -> tuple[bytes, FileRecord]:
    """A vector's `.pt` and what is recorded of it."""
    import torch

    buffer = io.BytesIO()
    torch.save(torch.from_numpy(vector), buffer)
    content = buffer.getvalue()
    return content, FileRecord(
        bytes=len(content),
        offset=data_offset(buffer),
        shape=vector.shape,
        dtype="float32",
        sha256=hashlib.sha256(content).hexdigest(),
    )
