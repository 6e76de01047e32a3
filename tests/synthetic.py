"""Caches of planted numbers, written through the real writer without any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probecache.dataset import load_dataset
from probecache.fit import parse_methods
from probecache.store.journal import Begun
from probecache.store.layout import Blueprint, LayerInfo, Origin, lay_out
from probecache.store.reader import Cache, open_cache
from probecache.store.vectors import SavedVectors
from probecache.store.writer import CacheWriter, open_writer
from probecache.types import Dtype, Identity, Positions
from probecache.workflow.train import TrainOptions
from probecache.workflow.train import train as run_train
from probecache.workflow.validate import ValidateOptions
from probecache.workflow.validate import validate as run_validate

IDENTITY = Identity(
    model="org/planted",
    revision=None,
    weights={},
    weight_samples={},
    config={"rope_theta": 10000.0},
    architecture="Planted",
    num_hidden_layers=24,
    hidden_size=1,
    dtype="float32",
    quantization=None,
    adapter=None,
    attention="eager",
    tokenizer="0" * 64,
    chat_template="1" * 64,
    template_date=None,
    system_prompt=None,
    data="",
    token_ids="2" * 64,
    positions="last",
    special_tokens_kept=False,
    versions={"probecache": "0"},
)
TIMING = {"tokens": 30, "distinct_tokens": 20, "computed_tokens": 20}
EXECUTION = {"engine": "resident", "batches": "shared prefixes"}


def labelled(*labels: str) -> list[dict[str, str]]:
    """A labelled record per label."""
    return [
        {"question": f"question {place}", "type": label, "id": f"q{place}"}
        for place, label in enumerate(labels)
    ]


def blueprint_of(
    records: Sequence[Mapping[str, Any]],
    layers: Sequence[int],
    hidden: int,
    *,
    dtype: str = "float32",
    positions: str = "last",
    tokens: Sequence[int] | None = None,
    tells_spans: bool = False,
) -> Blueprint:
    """The plan of a cache of these records; `tokens` are rows per example."""
    dataset = load_dataset(list(records))
    kept = tokens or [1] * len(dataset)
    classes, entries = lay_out(
        dataset.examples, kept, [count + 2 for count in kept], Positions(positions)
    )
    return Blueprint(
        layers=tuple(layers),
        hidden_size=hidden,
        dtype=Dtype(dtype),
        positions=Positions(positions),
        num_examples=dataset.num_examples,
        origin=Origin(data="planted.json"),
        classes=classes,
        examples=entries,
        tells_spans=tells_spans,
    )


def writer_of(
    folder: Path,
    blueprint: Blueprint,
    extends: LayerInfo | None = None,
    identity: Identity = IDENTITY,
) -> AbstractContextManager[CacheWriter]:
    """A writer of these rows; `identity` is what an unfinished extraction is told by."""

    return open_writer(folder, blueprint, lambda: Begun.of(blueprint, identity), extends)


def write_cache(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    activations: Mapping[int, torch.Tensor],
    *,
    tokens: Sequence[int] | None = None,
    positions: str = "last",
    spans: np.ndarray | None = None,
    add_to: Cache | None = None,
    **identity: Any,
) -> Cache:
    """Write a cache.

    Args:
        activations: layer to rows [rows, hidden] in data order, the same for every layer.
        tokens: rows per example; None: one.
        spans: [rows, 4], what they stand for, classes one after the other; None: not told.
        add_to: an existing cache at `folder` that gains these layers.
        identity: fields that differ from `IDENTITY`.
    """
    first = next(iter(activations.values()))
    dtype = str(first.dtype).removeprefix("torch.")
    blueprint = blueprint_of(
        records,
        sorted(activations),
        first.shape[1],
        dtype=dtype,
        positions=positions,
        tokens=tokens,
        tells_spans=spans is not None,
    )
    layers = {*activations, *(add_to.layers if add_to else ())}
    own = {
        "weights": {layer: f"{layer:064x}" for layer in layers},
        "hidden_size": first.shape[1],
        "dtype": dtype,
        "positions": positions,
        "data": load_dataset(list(records)).fingerprint(),
    }
    with writer_of(folder, blueprint, add_to.info if add_to else None) as writer:
        writer.write_tokens(np.arange(len(first)), spans)
        for layer, rows in activations.items():
            writer.write(layer, range(len(blueprint.examples)), rows)
        writer.commit(replace(IDENTITY, **(own | identity)), TIMING, EXECUTION)
    return open_cache(folder)


def rows_of(cache: Cache, label: str, layer: int) -> torch.Tensor:
    """A class's rows as plain torch reads them, knowing nothing of probecache."""
    prefix = cache.info.classes[label].prefix
    path = cache.path / f"layer_{layer}" / f"{prefix}_activations.pt"
    return torch.load(path, weights_only=True)


def stop_at_write(monkeypatch, number):
    """Ctrl-C before the rows of a write are taken, counted from 1."""
    write, calls = CacheWriter.write, []

    def stopped(self, *arguments):
        calls.append(arguments)
        if len(calls) == number:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(CacheWriter, "write", stopped)


def train(cache, output, *, layers=None, source=None, **options) -> SavedVectors:
    """Vectors of one method, the difference of means unless told otherwise."""
    methods = parse_methods(options.pop("method", "dom"))
    found = run_train(cache, output, TrainOptions(methods, **options), layers=layers, source=source)
    (vectors,) = found.values()
    return vectors


def validate(cache, vectors, output, *, dataset=None, layers=None, source=None, **options):
    """A validation of one method's vectors."""
    return run_validate(
        cache,
        vectors,
        output,
        ValidateOptions(**options),
        dataset=dataset,
        layers=layers,
        source=source,
    )
