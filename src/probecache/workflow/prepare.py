"""Everything about an extraction that can be known, and refused, without reading a weight.

    prepare(request)          data read, prompts rendered and checked, files laid out
    plan(request, output)     what it will cost

Guarantee: nothing is written, and of a model only its config, tokenizer and headers are read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from probecache.atomic import free_bytes, real_path
from probecache.content import config_content, tokenizer_content
from probecache.dataset import Dataset, load_dataset
from probecache.dates import choose_day
from probecache.errors import MismatchError, OutputError
from probecache.identity import EXTENDING, require_fields
from probecache.layers import parse_layers
from probecache.models import ModelOptions, ModelSource, open_model
from probecache.prefixes import PrefixTree
from probecache.prompts import PromptOptions, default_positions, fingerprint, tokenize_dataset
from probecache.store.journal import find_unfinished
from probecache.store.layout import LAYER_INFO, SPANS, UNFINISHED, Blueprint, Origin, lay_out
from probecache.store.reader import Cache, open_cache
from probecache.types import Identity, Positions, TokenizedPrompt
from probecache.unrecorded import is_imported
from probecache.workflow.execution import (
    EngineName,
    Execution,
    Passage,
    choose_execution,
    find_passages,
)
from probecache.workflow.resume import (
    execution_of,
    identity_before,
    require_same_cache,
    require_same_run,
)

__all__ = [
    "ExtractRequest",
    "Plan",
    "Preparation",
    "existing_cache",
    "missing",
    "plan",
    "prepare",
    "work_out",
]


@dataclass(frozen=True)
class ExtractRequest:
    """What to extract.

    Attributes:
        model: which model, in which precision, where.
        data: a data file, or records in memory.
        layers: as `parse_layers` takes them.
        prompts: how examples become prompts, and which positions are kept.
        batch_tokens: most tokens per step; None takes what suits device and memory.
        engine: resident, stream, or auto: whichever fits into memory.
        memory: bytes that the run may take; None: what there is.
        share_prefixes: compute what prompts begin with alike once, where the model allows it.
        allow_nonfinite: keep rows with NaN or Inf, counted in the manifest, instead of stopping.
        quiet: no progress on stderr.
        default_date: ISO date for a chat template that asks for one, where neither `prompts` nor
            the cache that gains layers says which; None: today.
        allow_mismatch: identity fields in which the run may differ from the cache that it adds to.
    """

    model: ModelOptions
    data: str | Path | Sequence[Mapping[str, Any]]
    layers: str | int | Sequence[int] = "all"
    prompts: PromptOptions = field(default_factory=PromptOptions)
    batch_tokens: int | None = None
    engine: EngineName = EngineName.AUTO
    memory: int | None = None
    share_prefixes: bool = True
    allow_nonfinite: bool = False
    quiet: bool = False
    default_date: str | None = None
    allow_mismatch: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a run will cost. Bytes on disk and of weights are exact, memory is an estimate.

    Attributes:
        passages: which blocks run, and from where.
        execution: how; None where nothing is missing.
        spill_bytes: of hidden states between streamed blocks, on the output's disk meanwhile.
        bytes_to_claim: of `bytes_total`, what an interrupted run has not claimed already.
        done: share of the rows that an interrupted run has left on disk.
    """

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
    spill_bytes: int
    passages: tuple[Passage, ...]
    execution: Execution | None
    bytes_to_claim: int
    done: float


@dataclass(frozen=True)
class Preparation:
    """A request, checked and worked out as far as no weights are needed."""

    request: ExtractRequest
    source: ModelSource
    dataset: Dataset
    prompts: list[TokenizedPrompt]
    tree: PrefixTree
    layers: tuple[int, ...]
    positions: Positions
    blueprint: Blueprint
    identity: Identity


def prepare(request: ExtractRequest, known: Identity | None = None) -> Preparation:
    """Read data, config and tokenizer; render and check every prompt.

    Args:
        known: of the cache that is there, finished or not: its date goes into the prompts.

    Raises:
        DataError, PromptError, UsageError, ModelError: whatever can be refused by now.
    """
    require_fields(request.allow_mismatch, EXTENDING)
    dataset = load_dataset(request.data)
    source = open_model(request.model)
    layers = parse_layers(request.layers, source.num_hidden_layers)
    request = _dated(request, source, known)
    positions = default_positions(request.prompts, dataset.paired)
    prompts = tokenize_dataset(dataset, source.tokenizer, source.facts, request.prompts)
    source.check_ids(max(int(prompt.ids.max()) for prompt in prompts))
    source.check_blocks(max(layers))
    return Preparation(
        request=request,
        source=source,
        dataset=dataset,
        prompts=prompts,
        tree=PrefixTree(prompts),
        layers=layers,
        positions=positions,
        blueprint=_blueprint(request, dataset, prompts, layers, positions, source),
        identity=_identity(request, source, dataset, prompts, positions),
    )


def plan(request: ExtractRequest, output: str | Path | None) -> Plan:
    """Work out a run without reading weights or writing anything.

    Args:
        output: the cache's folder; None stands for a free place in the current one.

    Raises:
        As `prepare`; OutputError, MismatchError: the output holds something else, finished or not.
    """
    existing = None if output is None else existing_cache(Path(output))
    output = Path() if output is None else Path(output)
    prepared = prepare(request, identity_before(output, existing))
    planned = work_out(prepared, existing, missing(prepared.blueprint, existing), output)
    if existing is not None:
        require_same_cache(existing, prepared.identity, request.allow_mismatch)
    if planned.layers:
        require_same_run(planned, prepared.identity)
    return planned


def work_out(
    prepared: Preparation, existing: Cache | None, blueprint: Blueprint, output: Path
) -> Plan:
    """The cost of writing what `blueprint` still lacks in `existing`, or all of it, to `output`."""
    passages = find_passages(blueprint.layers, _known_layers(prepared, existing, blueprint))
    unfinished = find_unfinished(real_path(output))
    execution = execution_of(unfinished, prepared.request) if passages else None
    if passages and execution is None:
        execution = _execution(prepared, passages)
    bytes_total = _bytes_to_write(blueprint, prepared.identity, existing)
    claimed = unfinished is not None and unfinished.laid_down
    spills = execution is not None and execution.hidden_on_disk
    row_bytes = prepared.source.hidden_size * prepared.source.dtype.itemsize
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
        distinct_prefix_tokens=len(prepared.tree),
        rows_per_layer=blueprint.rows,
        bytes_per_layer=blueprint.bytes_per_layer,
        bytes_total=bytes_total,
        bytes_free=free_bytes(output),
        weight_bytes=sum(
            prepared.source.weight_bytes(one.blocks.stop, one.blocks.start) for one in passages
        ),
        spill_bytes=_computed_tokens(prepared) * row_bytes if spills else 0,
        passages=tuple(passages),
        execution=execution,
        bytes_to_claim=0 if claimed else bytes_total,
        done=unfinished.share() if unfinished is not None else 0.0,
    )


# ---------------------------------------------------------------- what will be written


def _blueprint(
    request: ExtractRequest,
    dataset: Dataset,
    prompts: list[TokenizedPrompt],
    layers: tuple[int, ...],
    positions: Positions,
    source: ModelSource,
) -> Blueprint:
    classes, records = lay_out(
        dataset.examples,
        kept=[len(prompt.kept) for prompt in prompts],
        fed=[len(prompt) for prompt in prompts],
        positions=positions,
    )
    return Blueprint(
        layers=layers,
        hidden_size=source.hidden_size,
        dtype=source.dtype,
        positions=positions,
        num_examples=dataset.num_examples,
        origin=Origin(
            data=dataset.source,
            adapter=request.model.adapter,
            truncate=request.prompts.truncate,
        ),
        classes=classes,
        examples=records,
        tells_spans=prompts[0].places is not None,
    )


def missing(blueprint: Blueprint, existing: Cache | None) -> Blueprint:
    """The blueprint of those layers that are not cached yet."""
    if existing is None:
        return blueprint
    return replace(
        blueprint,
        layers=tuple(layer for layer in blueprint.layers if layer not in existing.layers),
        tells_spans=SPANS in existing.info.files,
    )


def _bytes_to_write(blueprint: Blueprint, identity: Identity, existing: Cache | None) -> int:
    if existing is None:
        return blueprint.total_bytes(identity)
    if not blueprint.layers:
        return 0
    before = (existing.path / LAYER_INFO).stat().st_size
    manifest = blueprint.extended_manifest_bytes(existing.layers, identity) - before
    return blueprint.bytes_per_layer * len(blueprint.layers) + manifest


def existing_cache(output: Path) -> Cache | None:
    """The cache that is there already, or None for a free place."""
    if output.is_dir() and (output / LAYER_INFO).is_file():
        found = open_cache(output)
        if is_imported(found.identity):
            raise MismatchError(
                f"expected --output {output} to be a cache that records what it was made by, got "
                "one that was imported, whose weights, tokenizer and prompts nobody knows; extract "
                "into another folder"
            )
        return found
    if output.exists() and not (output.is_dir() and _is_free(output)):
        raise OutputError(
            f"expected --output {output} to be free or a cache to add layers to, but it holds "
            "something else; choose another folder"
        )
    return None


def _is_free(folder: Path) -> bool:
    """Whether there is nothing but what interrupted runs left."""
    ours = re.compile(rf"{UNFINISHED}|\.{UNFINISHED}\.\d+\.tmp|\.{re.escape(LAYER_INFO)}\.\d+\.tmp")
    return all(ours.fullmatch(path.name) for path in folder.iterdir())


# ---------------------------------------------------------------- identity and cost


def _dated(request: ExtractRequest, source: ModelSource, known: Identity | None) -> ExtractRequest:
    """The request with the day that its prompts are told."""
    template = source.tokenizer.chat_template if request.prompts.chat_template else None
    stored = (known.template_date if known else None) or request.default_date
    day = choose_day(template, request.prompts.template_date, stored)
    return replace(request, prompts=replace(request.prompts, template_date=day))


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
        revision=source.revision,
        weights={},
        weight_samples={},
        config=config_content(source.config),
        architecture=source.architecture,
        num_hidden_layers=source.num_hidden_layers,
        hidden_size=source.hidden_size,
        dtype=source.dtype,
        quantization=source.quantization,
        adapter=source.adapter.fingerprint if source.adapter else None,
        attention=source.attention,
        tokenizer=tokenizer_content(source.tokenizer),
        chat_template=hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        template_date=request.prompts.template_date,
        system_prompt=request.prompts.system_prompt,
        data=dataset.fingerprint(),
        token_ids=fingerprint(prompts),
        positions=positions,
        special_tokens_kept=request.prompts.keep_special_tokens,
        versions={name: version(name) for name in ("probecache", "torch", "transformers")},
    )


# ---------------------------------------------------------------- how it goes


def _known_layers(
    prepared: Preparation, existing: Cache | None, blueprint: Blueprint
) -> tuple[int, ...]:
    """Cached layers that hold every token of every prompt, so that the next block can go on."""
    if existing is None or prepared.positions != Positions.ALL:
        return ()
    if max(blueprint.layers, default=0) > prepared.source.independent_blocks:
        return ()
    whole = all(len(prompt.kept) == len(prompt.ids) for prompt in prepared.prompts)
    return existing.layers if whole and not any(existing.info.non_finite.values()) else ()


def _computed_tokens(prepared: Preparation) -> int:
    """How many tokens go through a block, padding apart, as far as is known without weights."""
    longest = max(map(len, prepared.prompts))
    if prepared.request.share_prefixes and not prepared.source.why_not_shared(longest):
        return len(prepared.tree)
    return sum(map(len, prepared.prompts))


def _execution(prepared: Preparation, passages: list[Passage]) -> Execution:
    request = prepared.request
    return choose_execution(
        prepared.source,
        passages,
        tokens=_computed_tokens(prepared),
        longest=max(map(len, prepared.prompts)),
        engine=request.engine,
        memory=request.memory,
        batch_tokens=request.batch_tokens,
    )
