"""Prompts through a model into a cache. Model and disk meet here and nowhere else.

Guarantee: whatever can be refused is refused before the model is loaded or a byte written; an error
or a kill during the run leaves no cache, or the old one as it was.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probecache.atomic import real_path, require_place
from probecache.engine import ResidentEngine
from probecache.errors import NonFiniteError, OutputError
from probecache.identity import EXTENDING, require_same
from probecache.loaded import LoadedModel
from probecache.plan import (
    Batch,
    plan_batches,
)
from probecache.progress import Progress
from probecache.store.layout import Blueprint
from probecache.store.reader import Cache, open_cache
from probecache.store.writer import CacheWriter, open_writer, require_free_layers
from probecache.types import Identity, Positions
from probecache.workflow.preflight import check_engine
from probecache.workflow.prepare import (
    ExtractRequest,
    Plan,
    Preparation,
    existing_cache,
    missing,
    prepare,
    token_budget,
    work_out,
)

if TYPE_CHECKING:
    from probecache.engine import Rows

__all__ = ["extract"]


def extract(
    request: ExtractRequest,
    output: str | Path,
    announce: Callable[[Plan], None] | None = None,
    accept: Callable[[Identity, Sequence[str]], None] | None = None,
) -> Cache:
    """Run the model over the data and write the cache, or add the missing layers to one.

    Args:
        request: what to extract.
        output: the cache's folder: nothing, an empty folder, or a cache of the same identity.
        announce: told the plan before any weight is read.
        accept: told identity and classes before the model is loaded; raises to refuse them. It is
            asked twice: before anything of the weights is looked at, and when they are known.

    Returns:
        The finished cache, opened.

    Raises:
        Any of the tree: bad input as in `prepare`, then OutputError, MismatchError, PreflightError,
        OutOfMemoryError, NonFiniteError.
    """
    output = Path(output)
    existing = existing_cache(output)
    prepared = prepare(request)
    blueprint = missing(prepared.blueprint, existing)
    planned = work_out(prepared, existing, blueprint, output)
    _require_all(prepared.identity, prepared, existing, accept)
    if blueprint.layers:
        require_place(real_path(output))
        if existing is not None:
            require_free_layers(existing.path, blueprint)
        _require_room(planned)
        prepared.source.check_device()
    if announce is not None:
        announce(planned)
    identity = _with_weights(prepared, existing)
    _require_all(identity, prepared, existing, accept)
    if not blueprint.layers:
        return open_cache(output)

    started = time.perf_counter()
    model = prepared.source.load(max(blueprint.layers))
    load_seconds = time.perf_counter() - started
    identity = replace(identity, attention=model.attention)
    if existing is not None:
        _require_same_cache(existing, identity)
    with open_writer(output, blueprint, existing.info if existing else None) as writer:
        timing, non_finite = _fill(writer, model, prepared)
        timing |= {
            "load_s": round(load_seconds, 3),
            "tokens": planned.tokens,
            "distinct_tokens": planned.distinct_prefix_tokens,
            "peak_memory": _peak_memory(model),
        }
        writer.commit(identity, timing, non_finite)
    return open_cache(output)


# ---------------------------------------------------------------- who may refuse


def _require_all(
    identity: Identity,
    prepared: Preparation,
    existing: Cache | None,
    accept: Callable[[Identity, Sequence[str]], None] | None,
) -> None:
    """Ask everyone who may refuse these numbers before they are made."""
    if existing is not None:
        # Attention is known only once the model is loaded; all else is compared before that.
        _require_same_cache(existing, replace(identity, attention=existing.identity.attention))
    if accept is not None:
        accept(identity, prepared.dataset.labels)


def _require_same_cache(existing: Cache, identity: Identity) -> None:
    require_same(
        existing.identity,
        identity,
        EXTENDING,
        what=f"Cache {existing.path} and this run",
        remedy="ask for the same again, or extract into another --output",
    )


def _require_room(planned: Plan) -> None:
    if planned.bytes_total > planned.bytes_free:
        raise OutputError(
            f"expected {planned.bytes_total:,} bytes free for {planned.output}, got "
            f"{planned.bytes_free:,}, not enough disk; free some, ask for fewer layers or choose "
            "another --output"
        )


def _with_weights(prepared: Preparation, existing: Cache | None) -> Identity:
    layers = {*prepared.layers, *(existing.layers if existing else ())}
    prints = prepared.source.weights_fingerprints(tuple(sorted(layers)))
    return replace(prepared.identity, weights=prints)


# ---------------------------------------------------------------- the run


def _fill(
    writer: CacheWriter, model: LoadedModel, prepared: Preparation
) -> tuple[dict[str, float], dict[int, int]]:
    """Check the engine, then put every row into the writer; seconds, and bad rows per layer."""
    budget = token_budget(prepared.request, model.input_device.type)
    engine, layers = ResidentEngine(model), writer.blueprint.layers
    check_engine(engine, model, prepared.prompts, layers, prepared.source.dtype, budget)
    writer.write_tokens(_kept_tokens(prepared))
    started = time.perf_counter()
    non_finite = _run(engine, prepared, writer.blueprint, budget, writer)
    return {"extract_s": round(time.perf_counter() - started - writer.seconds, 3)}, non_finite


def _run(
    engine: ResidentEngine,
    prepared: Preparation,
    blueprint: Blueprint,
    budget: int,
    writer: CacheWriter,
) -> dict[int, int]:
    """Put every row into the writer; return rows with NaN or Inf per layer."""
    lengths = [len(prompt) for prompt in prepared.prompts]
    batches: list[Batch] = plan_batches(lengths, budget)
    non_finite: Counter[int] = Counter()
    mean = prepared.positions is Positions.MEAN
    with Progress(sum(lengths), "extracting", "tokens", quiet=prepared.request.quiet) as progress:
        for rows in engine.run(prepared.prompts, batches, blueprint.layers, mean=mean):
            _count_non_finite(rows, prepared, non_finite)
            writer.write(rows.layer, rows.prompts, rows.values)
            if rows.layer == blueprint.layers[-1]:
                progress.update(sum(lengths[index] for index in rows.prompts))
    return dict(non_finite)


def _count_non_finite(rows: Rows, prepared: Preparation, counts: Counter[int]) -> None:
    import torch

    bad = ~torch.isfinite(rows.values).all(dim=1)
    if not bad.any():
        return
    counts[rows.layer] += int(bad.sum())
    if prepared.request.allow_nonfinite:
        return
    sizes = [
        1 if prepared.positions.one_row else len(prepared.prompts[index].kept)
        for index in rows.prompts
    ]
    piece = int(np.searchsorted(np.cumsum(sizes), int(bad.nonzero()[0]), side="right"))
    row = prepared.dataset.examples[rows.prompts[piece]].row
    raise NonFiniteError(
        f"expected finite activations, got NaN or Inf in {int(bad.sum())} of {len(bad)} rows of a "
        f"batch at layer {rows.layer}, first on row {row} of {prepared.dataset.source}; float16 "
        "overflows where bfloat16 or float32 does not: change --dtype, or let extract keep them "
        "with --allow-nonfinite"
    )


def _kept_tokens(prepared: Preparation) -> np.ndarray:
    """Kept token ids, classes one after the other, in row order."""
    by_class: dict[str, list[np.ndarray]] = {label: [] for label in prepared.dataset.labels}
    for example, prompt in zip(prepared.dataset.examples, prepared.prompts, strict=True):
        by_class[example.label].append(prompt.ids[prompt.kept])
    return np.concatenate([ids for pieces in by_class.values() for ids in pieces])


def _peak_memory(model: LoadedModel) -> int:
    """Most bytes that the process held: on the CUDA device where there is one, else in RAM."""
    if model.input_device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(model.input_device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
