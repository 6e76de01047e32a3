"""Prompts through a model into a cache. Model and disk meet here and nowhere else.

    prepare(request)          everything that can be known, and refused, without reading a weight
    plan(request, output)     what it will cost
    extract(request, output)  do it

Guarantee: whatever can be refused is refused before a weight is read or a byte written; an error or
a kill during the run leaves no cache, or the old one as it was.
"""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probecache.atomic import free_bytes, real_path, require_place
from probecache.dataset import Dataset, load_dataset
from probecache.engine import ResidentEngine
from probecache.errors import NonFiniteError, OutputError
from probecache.identity import EXTENDING, require_same
from probecache.layers import parse_layers
from probecache.loaded import LoadedModel
from probecache.models import ModelOptions, ModelSource, open_model
from probecache.plan import (
    Batch,
    count_distinct_prefixes,
    estimate_working_set,
    plan_batches,
)
from probecache.progress import Progress
from probecache.prompts import PromptOptions, default_positions, fingerprint, tokenize_dataset
from probecache.store.layout import (
    LAYER_INFO,
    Blueprint,
    ClassRecord,
    ExampleRecord,
    class_prefixes,
    extended_manifest_bytes,
)
from probecache.store.reader import Cache, open_cache
from probecache.store.writer import CacheWriter, open_writer
from probecache.types import Identity, Positions, TokenizedPrompt
from probecache.workflow.preflight import check_engine

if TYPE_CHECKING:
    from probecache.engine import Rows

__all__ = ["ExtractRequest", "Plan", "extract", "plan"]

# Tokens per batch, padding included. On a CPU larger batches only add padding
# (docs/lab-notes.md); on an accelerator small ones leave it idle.
_TOKEN_BUDGET = {"cpu": 1024, "cuda": 16384, "mps": 4096}


@dataclass(frozen=True)
class ExtractRequest:
    """What to extract.

    Attributes:
        model: which model, in which precision, where.
        data: a data file, or records in memory.
        layers: as `parse_layers` takes them.
        prompts: how examples become prompts, and which positions are kept.
        batch_tokens: most tokens per batch; None takes what suits the device.
        allow_nonfinite: keep rows with NaN or Inf, counted in the manifest, instead of stopping.
        quiet: no progress on stderr.
    """

    model: ModelOptions
    data: str | Path | Sequence[Mapping[str, Any]]
    layers: str | int | Sequence[int] = "all"
    prompts: PromptOptions = field(default_factory=PromptOptions)
    batch_tokens: int | None = None
    allow_nonfinite: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run will cost. Bytes on disk and of weights are exact, memory is an estimate."""

    model: str
    data: str
    output: str
    positions: str
    dtype: str
    layers: tuple[int, ...]
    cached_layers: tuple[int, ...]
    num_hidden_layers: int
    hidden_size: int
    prompts: int
    tokens: int
    distinct_prefix_tokens: int
    rows_per_layer: int
    bytes_per_layer: int
    bytes_total: int
    bytes_free: int
    weight_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Preparation:
    """A request, checked and worked out as far as no weights are needed."""

    request: ExtractRequest
    source: ModelSource
    dataset: Dataset
    prompts: list[TokenizedPrompt]
    layers: tuple[int, ...]
    positions: Positions
    blueprint: Blueprint
    identity: Identity


def prepare(request: ExtractRequest) -> Preparation:
    """Read data, config and tokenizer; render and check every prompt.

    Raises:
        DataError, PromptError, UsageError, ModelError: whatever can be refused by now.
    """
    dataset = load_dataset(request.data)
    source = open_model(request.model)
    layers = parse_layers(request.layers, source.num_hidden_layers)
    positions = default_positions(request.prompts, dataset.paired)
    prompts = tokenize_dataset(dataset, source.tokenizer, source.facts, request.prompts)
    source.check_ids(max(int(prompt.ids.max()) for prompt in prompts))
    return Preparation(
        request=request,
        source=source,
        dataset=dataset,
        prompts=prompts,
        layers=layers,
        positions=positions,
        blueprint=_blueprint(dataset, prompts, layers, positions, source),
        identity=_identity(request, source, dataset, prompts, positions),
    )


def plan(request: ExtractRequest, output: str | Path | None) -> Plan:
    """Work out a run without reading weights or writing anything.

    Args:
        output: the cache's folder; None stands for a free place in the current one.

    Raises:
        As `prepare`; OutputError, MismatchError: the output holds something else.
    """
    existing = None if output is None else _existing_cache(Path(output))
    output = Path() if output is None else Path(output)
    prepared = prepare(request)
    return _plan(prepared, existing, _missing(prepared.blueprint, existing), output)


def _plan(
    prepared: Preparation, existing: Cache | None, blueprint: Blueprint, output: Path
) -> Plan:
    weight_bytes = prepared.source.weight_bytes(max(blueprint.layers)) if blueprint.layers else 0
    return Plan(
        model=prepared.request.model.model,
        data=prepared.dataset.source,
        output=str(output),
        positions=prepared.positions,
        dtype=prepared.source.dtype,
        layers=blueprint.layers,
        cached_layers=existing.layers if existing else (),
        num_hidden_layers=prepared.source.num_hidden_layers,
        hidden_size=prepared.source.hidden_size,
        prompts=len(prepared.prompts),
        tokens=sum(map(len, prepared.prompts)),
        distinct_prefix_tokens=count_distinct_prefixes(prepared.prompts),
        rows_per_layer=blueprint.rows,
        bytes_per_layer=blueprint.bytes_per_layer,
        bytes_total=_bytes_to_write(blueprint, prepared.identity, existing),
        bytes_free=free_bytes(output),
        weight_bytes=weight_bytes,
        memory_bytes=_estimate_memory(prepared, blueprint.layers),
    )


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
    existing = _existing_cache(output)
    prepared = prepare(request)
    blueprint = _missing(prepared.blueprint, existing)
    planned = _plan(prepared, existing, blueprint, output)
    _require_all(prepared.identity, prepared, existing, accept)
    if blueprint.layers:
        require_place(real_path(output))
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
    budget = request.batch_tokens or _TOKEN_BUDGET.get(model.input_device.type, 16384)
    engine = ResidentEngine(model)
    check_engine(engine, model, prepared.prompts, blueprint.layers, prepared.source.dtype, budget)
    with open_writer(output, blueprint, existing.info if existing else None) as writer:
        writer.write_tokens(_kept_tokens(prepared))
        started = time.perf_counter()
        non_finite = _run(engine, prepared, blueprint, budget, writer)
        timing = {
            "load_s": round(load_seconds, 3),
            "extract_s": round(time.perf_counter() - started - writer.seconds, 3),
            "tokens": planned.tokens,
            "distinct_tokens": planned.distinct_prefix_tokens,
            "peak_memory": _peak_memory(model),
        }
        writer.commit(identity, timing, non_finite)
    return open_cache(output)


# ---------------------------------------------------------------- what will be written


def _blueprint(
    dataset: Dataset,
    prompts: list[TokenizedPrompt],
    layers: tuple[int, ...],
    positions: Positions,
    source: ModelSource,
) -> Blueprint:
    rows: Counter[str] = Counter()
    records = []
    for index, (example, prompt) in enumerate(zip(dataset.examples, prompts, strict=True)):
        start = rows[example.label]
        rows[example.label] += 1 if positions.one_row else len(prompt.kept)
        records.append(
            ExampleRecord(
                idx=index,
                id=example.id,
                group=example.group,
                label=example.label,
                question=example.question,
                answer=example.answer,
                category=example.category,
                rows=(start, rows[example.label]),
                n_tokens=len(prompt.kept),
                input_tokens=len(prompt),
            )
        )
    counts = Counter(example.label for example in dataset.examples)
    prefixes = class_prefixes(dataset.labels)
    classes = {
        label: ClassRecord(prefix=prefixes[label], examples=counts[label], rows=rows[label])
        for label in dataset.labels
    }
    return Blueprint(
        layers=layers,
        hidden_size=source.hidden_size,
        dtype=source.dtype,
        positions=positions,
        num_examples=dataset.num_examples,
        data_source=dataset.source,
        classes=classes,
        examples=tuple(records),
    )


def _missing(blueprint: Blueprint, existing: Cache | None) -> Blueprint:
    """The blueprint of those layers that are not cached yet."""
    have = set(existing.layers) if existing else set()
    return replace(blueprint, layers=tuple(x for x in blueprint.layers if x not in have))


def _bytes_to_write(blueprint: Blueprint, identity: Identity, existing: Cache | None) -> int:
    if existing is None:
        return blueprint.total_bytes(identity)
    if not blueprint.layers:
        return 0
    layers = (*existing.layers, *blueprint.layers)
    before = (existing.path / LAYER_INFO).stat().st_size
    manifest = extended_manifest_bytes(blueprint, layers, identity) - before
    return blueprint.bytes_per_layer * len(blueprint.layers) + manifest


def _kept_tokens(prepared: Preparation) -> np.ndarray:
    """Kept token ids, classes one after the other, in row order."""
    by_class: dict[str, list[np.ndarray]] = {label: [] for label in prepared.dataset.labels}
    for example, prompt in zip(prepared.dataset.examples, prepared.prompts, strict=True):
        by_class[example.label].append(prompt.ids[prompt.kept])
    return np.concatenate([ids for pieces in by_class.values() for ids in pieces])


# ---------------------------------------------------------------- where it goes


def _existing_cache(output: Path) -> Cache | None:
    """The cache that is there already, or None for a free place."""
    if output.is_dir() and (output / LAYER_INFO).is_file():
        return open_cache(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OutputError(
            f"expected --output {output} to be free or a cache to add layers to, but it holds "
            "something else; choose another folder"
        )
    return None


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


# ---------------------------------------------------------------- identity and cost


def _identity(
    request: ExtractRequest,
    source: ModelSource,
    dataset: Dataset,
    prompts: list[TokenizedPrompt],
    positions: Positions,
) -> Identity:
    template = source.tokenizer.chat_template if request.prompts.chat_template else None
    return Identity(
        model=request.model.model,
        revision=request.model.revision,
        weights={},
        architecture=source.architecture,
        num_hidden_layers=source.num_hidden_layers,
        hidden_size=source.hidden_size,
        dtype=source.dtype,
        quantization=source.quantization,
        adapter=source.adapter.fingerprint if source.adapter else None,
        attention="",
        tokenizer=source.tokenizer_fingerprint,
        chat_template=hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        system_prompt=request.prompts.system_prompt,
        data=dataset.fingerprint(),
        token_ids=fingerprint(prompts),
        positions=positions,
        special_tokens_kept=request.prompts.keep_special_tokens,
        versions={name: version(name) for name in ("probecache", "torch", "transformers")},
    )


def _with_weights(prepared: Preparation, existing: Cache | None) -> Identity:
    layers = {*prepared.layers, *(existing.layers if existing else ())}
    prints = prepared.source.weights_fingerprints(tuple(sorted(layers)))
    return replace(prepared.identity, weights=prints)


def _estimate_memory(prepared: Preparation, layers: tuple[int, ...]) -> int:
    if not layers:
        return 0
    source, config = prepared.source, prepared.source.text_config
    device = (prepared.request.model.device or "cpu").split(":")[0]
    budget = prepared.request.batch_tokens or _TOKEN_BUDGET.get(device, 16384)
    working_set = estimate_working_set(
        plan_batches([len(prompt) for prompt in prepared.prompts], budget),
        hidden_size=source.hidden_size,
        intermediate_size=_largest(config, "intermediate_size") or 4 * source.hidden_size,
        heads=_largest(config, "num_attention_heads") or 1,
        itemsize=source.dtype.itemsize,
    )
    return source.loaded_bytes(max(layers)) + working_set


def _largest(config: Any, name: str) -> int:
    """A size from a config, which some architectures state per block; 0 where there is none."""
    value = getattr(config, name, None) or 0
    return int(max(value)) if isinstance(value, (list, tuple)) else int(value)


def _peak_memory(model: LoadedModel) -> int:
    """Most bytes that the process held: on the CUDA device where there is one, else in RAM."""
    if model.input_device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(model.input_device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------- the run


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
        "overflows where bfloat16 or float32 does not: change --dtype, or pass --allow-nonfinite"
    )
