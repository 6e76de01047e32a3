"""Runs side by side, as a comparison shows them: a validation's figures, or a training's own.

Guarantees: what is read is checked as a report's is, and refused in one line of StoreError. A
training's figures are its cross-validated ones, never those on prompts that it was fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probecache.errors import StoreError
from probecache.foreign import read_json
from probecache.report.fields import Interval, count, interval, optional, text
from probecache.report.saved import Validation, malformed, read_validation

__all__ = ["ComparedRun", "LayerFigures", "read_compared"]

MANIFEST = "vectors.json"
MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class LayerFigures:
    """One layer: AUROC on the prompts that were validated, and cross-validated in training."""

    validated: Interval | None
    cross_validated: Interval | None


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison; None and empty where its folder does not say.

    `facts` has model, method, positions, data and aggregate. `best_layer` is the one of the highest
    AUROC, for vectors that of the cross-validation; `nested` is the training's estimate with the
    layer chosen inside the folds. `validation` is None for a folder of vectors.
    """

    path: Path
    letter: str
    positive_class: str
    facts: dict[str, str]
    best_layer: int | None
    best: Interval | None
    p_value: float | None
    nested: Interval | None
    best_baseline: tuple[str, float] | None
    gain: float | None
    layers: dict[int, LayerFigures]
    validation: Validation | None

    @property
    def kind(self) -> str:
        return "vectors" if self.validation is None else "validation"


def read_compared(path: Path, letter: str) -> ComparedRun:
    """Read a validation's folder, a run's, or that of its vectors.

    Raises:
        StoreError: it is none of these, or malformed.
    """
    if (path / "summary.json").is_file():
        return _of_validation(read_validation(path), letter)
    for folder in (path, path / "normalized_vectors"):
        if (folder / MANIFEST).is_file():
            return _of_vectors(folder / MANIFEST, path, letter)
    raise StoreError(
        f"expected {path} to be a validation (summary.json) or a run ({MANIFEST}), got neither; "
        "name folders that `probecache validate` or `probecache train` wrote"
    )


def _of_validation(validation: Validation, letter: str) -> ComparedRun:
    evidence, best = validation.evidence, validation.best
    artefacts, test = evidence.artefacts, evidence.best_of_all
    baseline = artefacts.best if artefacts else None
    facts = {name: validation.facts[name] or "" for name in ("model", "method", "positions")}
    return ComparedRun(
        path=validation.folder,
        letter=letter,
        positive_class=validation.positive_class,
        facts={
            **facts,
            "data": validation.facts["data"] or validation.facts["cache"] or "",
            "aggregate": evidence.aggregate,
        },
        best_layer=best.layer,
        best=Interval(best.auroc, best.auroc_low, best.auroc_high),
        p_value=test.p_value if test else None,
        nested=evidence.training.nested if evidence.training else None,
        best_baseline=(baseline.title, baseline.estimate.value)
        if baseline and baseline.estimate
        else None,
        gain=artefacts.gain if artefacts else None,
        layers={
            layer: LayerFigures(
                Interval(result.auroc, result.auroc_low, result.auroc_high),
                evidence.layers[layer].cross_validated,
            )
            for layer, result in validation.results.items()
        },
        validation=validation,
    )


def _of_vectors(manifest: Path, path: Path, letter: str) -> ComparedRun:
    try:
        record = read_json(manifest, MOST_BYTES)
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or error
        raise StoreError(f"expected JSON in {manifest}, got: {got}; train again") from error
    with malformed(manifest, "train again"):
        if not isinstance(record, dict) or record.get("format") != "probecache-vectors":
            raise ValueError('expected an object with "format": "probecache-vectors"')
        return _vectors(record, path, letter)


def _vectors(record: dict[str, Any], path: Path, letter: str) -> ComparedRun:
    if not record["layers"]:
        raise ValueError("expected at least one layer")
    layers = {_layer(name): _figures(row) for name, row in sorted(record["layers"].items())}
    chosen = record.get("cross_validation") or {}
    best_layer = optional(chosen.get("best_layer"), count)
    if best_layer is not None and best_layer not in layers:
        raise ValueError("expected cross_validation to name one of the layers as the best")
    model = optional(record["identity"].get("model"), text)
    nested = optional(chosen.get("nested"), lambda one: interval(one, "auroc"))
    return ComparedRun(
        path=path,
        letter=letter,
        positive_class=text(record["positive_class"]),
        facts={
            "model": model or "",
            "method": text(record["method"]),
            "positions": optional(record.get("positions"), text) or "",
            "data": optional(record.get("source_cache"), text) or "",
            "aggregate": "",
        },
        best_layer=best_layer,
        best=None if best_layer is None else layers[best_layer].cross_validated,
        p_value=None,
        nested=nested,
        best_baseline=None,
        gain=None,
        layers=dict(sorted(layers.items())),
        validation=None,
    )


def _layer(name: Any) -> int:
    if not (isinstance(name, str) and name.isascii() and name.isdigit() and len(name) <= 6):
        raise ValueError(f"expected layers named by their numbers, got {str(name)[:60]!r}")
    return int(name)


def _figures(row: Any) -> LayerFigures:
    return LayerFigures(
        None, optional(row.get("cross_validation"), lambda one: interval(one, "auroc"))
    )
