"""Run folders: directions trained from one cache, in a form that explains itself when copied.

    RUN/vectors/layer_<L>.pt              raw, [hidden], float32
    RUN/normalized_vectors/layer_<L>.pt   unit norm, [hidden], float32
    RUN/{vectors,normalized_vectors}/vectors.json
    RUN/run.json

Where several methods were trained at once, RUN holds such a folder for each, named by its method.

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
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

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
from probecache.store.seal import NO_SEAL, folders_by_method, seal_json, strangers_among
from probecache.store.tensorfile import FileRecord, data_offset, encode_vector, map_raw
from probecache.types import LAYER_CONVENTION, Identity

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = [
    "CrossValidationRecord",
    "Estimate",
    "LayerRecord",
    "PlattRecord",
    "SavedVectors",
    "TrainedLayer",
    "TrainedRun",
    "VectorsInfo",
    "load_vectors",
    "runs_in",
    "save_run",
]

_MANIFEST, _RUN = "vectors.json", "run.json"
_OF_A_FOLDER = {"normalized", "format", "format_version", "manifest_sha256"}
# What a .pt may hold around its one vector; torch.save writes some 2 KB.
_MOST_AROUND = 1 << 20


_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]


class Estimate(BaseModel):
    """An AUROC on examples that played no part in the fit, with its 95% interval."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    auroc: _Share
    low: _Share
    high: _Share


class PlattRecord(BaseModel):
    """The positive class has probability 1 / (1 + exp(-(slope * score + intercept))).

    Fitted on held-out scores; a score is that of the vectors of the same folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    slope: _Finite
    intercept: _Finite


class CrossValidationRecord(BaseModel):
    """How the held-out scores came about, and what choosing a layer by them is worth.

    `near_duplicates` counts examples with a like in another group, which shared its fold unless
    there are too many of them. `nested` is the AUROC of examples scored at the layer that the other
    folds chose for them; `layer_by_fold` names these layers, `best_layer` the one that all folds
    together would choose. Of two folds there is no `nested`, for leaving out both leaves nothing;
    nor of more than twenty, which would take too many fits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folds: int = Field(ge=2)
    groups: int = Field(ge=2)
    near_duplicates: int = Field(ge=0)
    near_duplicates_together: bool
    best_layer: int = Field(ge=0)
    nested: Estimate | None
    layer_by_fold: list[int]


class LayerRecord(BaseModel):
    """What is known of one layer's vector.

    `threshold` is in the units of a score with the vectors of the same folder; `raw_norm` is the
    norm before normalising; `typical_norm` the median norm of a row the vector was trained on.
    `strength` is the method's regularisation in scikit-learn's units: ridge's alpha, logistic
    regression's C, LDA's shrinkage. `pair_agreement` is the mean cosine between the differences of
    pairs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    raw_norm: float = Field(gt=0, allow_inf_nan=False)
    threshold: _Finite
    typical_norm: float = Field(ge=0, allow_inf_nan=False)
    n_positive: int = Field(ge=1)
    n_negative: int = Field(ge=1)
    strength: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    cross_validation: Estimate | None = None
    calibration: PlattRecord | None = None
    pair_agreement: float | None = Field(default=None, ge=-1.001, le=1.001)
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
    positions: str
    answered: bool
    standardized: bool = False
    cross_validation: CrossValidationRecord | None = None
    not_cross_validated: str | None = None
    source_cache: str
    source_cache_sha256: str
    allowed_mismatch: list[str] = Field(default_factory=list)
    identity: Identity
    notes: list[str] = Field(default_factory=list)
    manifest_sha256: str = NO_SEAL

    @model_validator(mode="after")
    def _layers_agree(self) -> VectorsInfo:
        held_out = self.cross_validation
        named = () if held_out is None else (held_out.best_layer, *held_out.layer_by_fold)
        if not set(named) <= self.layers.keys():
            raise ValueError("cross_validation names a layer that there is no vector of")
        return self


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
        if methods := [run.name for run in runs_in(path) if run != path]:
            raise StoreError(
                f"expected vectors of one method in {path}, got those of {', '.join(methods)}; "
                f"name one: {path / methods[0]}"
            )
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


class Direction(Protocol):
    """What of a probe is saved: unit direction, float32 [hidden], and what is known of it."""

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
    @property
    def strength(self) -> float | None: ...


@dataclass(frozen=True)
class TrainedLayer:
    """A probe and what held-out scores say of it; `calibration` is for unit-norm scores."""

    probe: Direction
    cross_validation: Estimate | None = None
    calibration: PlattRecord | None = None
    pair_agreement: float | None = None


@dataclass(frozen=True)
class TrainedRun:
    """One method's layers, and the fields of `VectorsInfo` that they share."""

    layers: Mapping[int, TrainedLayer]
    about: Mapping[str, Any]


def save_run(output: str | Path, runs: Mapping[str, TrainedRun]) -> dict[str, Path]:
    """Write `<output>_<YYYYmmdd_HHMMSS>/` and commit it by rename.

    Args:
        output: path of the run without its time stamp.
        runs: what to save, by method. One alone is the run; of several each gets a folder of its
            method's name within it.

    Returns:
        Each method's run folder.
    """
    output = Path(output)
    places = {method: f"{method}/" if len(runs) > 1 else "" for method in runs}
    contents = {
        f"{places[method]}{name}": content
        for method, run in runs.items()
        for name, content in _contents(run).items()
    }
    needed = sum(map(len, contents.values()))
    with disk_errors_named(output, needed), temporary_sibling(output) as folder:
        for name, content in contents.items():
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            write_uncommitted(folder / name, content)
        flush_folder(folder)
        while True:
            final = output.with_name(f"{output.name}_{datetime.now():%Y%m%d_%H%M%S}")
            if not os.path.lexists(final) and rename_free(folder, final):
                return {method: final / place for method, place in places.items()}
            time.sleep(0.1)  # two runs within one second get two names


def runs_in(path: str | Path) -> tuple[Path, ...]:
    """The runs, or folders of vectors, that a path stands for: itself, or one per method.

    Raises:
        StoreError: a folder of several methods holds something else, such as a run without its
            manifest.
    """
    path = Path(path)
    found = folders_by_method(path)
    runs = tuple(one for one in found if any((one / n).is_file() for n in (_MANIFEST, _RUN)))
    if runs and (strangers := strangers_among(path, runs)):
        raise StoreError(
            f"expected runs alone in {path}, got {', '.join(strangers[:5])} beside "
            f"{', '.join(run.name for run in runs)}; probecache verify {path} says what is damaged"
        )
    return runs


def _contents(run: TrainedRun) -> dict[str, bytes]:
    """Every file of a run by its name in it, and its bytes."""
    raw, _ = _vectors_files("vectors", run, normalized=False)
    unit, info = _vectors_files("normalized_vectors", run, normalized=True)
    contents = {**raw, **unit}
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(contents.items())
    }
    summary = info.model_dump(mode="json", exclude=_OF_A_FOLDER)
    manifest = {"format": "probecache-run", "format_version": 1, **summary, "files": files}
    return {**contents, _RUN: seal_json(manifest)}


def _vectors_files(
    folder: str, run: TrainedRun, *, normalized: bool
) -> tuple[dict[str, bytes], VectorsInfo]:
    """The files of `vectors/` or `normalized_vectors/`, and what its manifest says."""
    contents, records = {}, {}
    for layer, trained in sorted(run.layers.items()):
        probe = trained.probe
        scale = 1.0 if normalized else probe.raw_norm
        direction = (probe.direction.astype(np.float64) * scale).astype(np.float32)
        contents[f"{folder}/layer_{layer}.pt"] = content = encode_vector(direction)
        records[layer] = LayerRecord(
            raw_norm=probe.raw_norm,
            threshold=probe.threshold * scale,
            typical_norm=probe.typical_norm,
            n_positive=probe.n_positive,
            n_negative=probe.n_negative,
            strength=probe.strength,
            cross_validation=trained.cross_validation,
            calibration=_scaled(trained.calibration, scale),
            pair_agreement=trained.pair_agreement,
            file=_record(content, direction),
        )
    info = VectorsInfo.model_validate({**run.about, "normalized": normalized, "layers": records})
    contents[f"{folder}/{_MANIFEST}"] = seal_json(info.model_dump(mode="json"))
    return contents, info


def _scaled(calibration: PlattRecord | None, scale: float) -> PlattRecord | None:
    """The same calibration for scores that are `scale` times as large."""
    if calibration is None:
        return None
    return PlattRecord(slope=calibration.slope / scale, intercept=calibration.intercept)


def _record(content: bytes, vector: np.ndarray) -> FileRecord:
    return FileRecord(
        bytes=len(content),
        offset=data_offset(io.BytesIO(content)),
        shape=vector.shape,
        dtype="float32",
        sha256=hashlib.sha256(content).hexdigest(),
    )
