"""Prompts through a model into a cache. Model and disk meet here and nowhere else.

Guarantee: whatever can be refused is refused before the model is loaded or a byte written; an error
or a kill during the run leaves no cache, or the old one as it was, and what the same command goes
on from. However often it was interrupted, the finished cache is the same to the byte.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probecache.atomic import real_path, require_place
from probecache.content import weights_content
from probecache.engine import release_memory
from probecache.errors import ModelError, NonFiniteError, OutputError
from probecache.loaded import LoadedModel
from probecache.memory import peak_bytes
from probecache.progress import Progress
from probecache.store.journal import Begun
from probecache.store.place import finish_complete
from probecache.store.reader import Cache, open_cache
from probecache.store.writer import CacheWriter, open_writer, require_free_layers
from probecache.types import Identity, Positions, TokenizedPrompt
from probecache.workflow.execution import EngineName, Passage
from probecache.workflow.pipe import Pipe
from probecache.workflow.prepare import (
    ExtractRequest,
    Plan,
    Preparation,
    existing_cache,
    missing,
    prepare,
    work_out,
)
from probecache.workflow.resume import (
    KeptSnapshots,
    begin,
    identity_before,
    require_same_cache,
    require_same_run,
    require_unchanged,
    stops_told,
)
from probecache.workflow.running import Run

if TYPE_CHECKING:
    import torch

    from probecache.engine import Rows

__all__ = ["Filling", "Took", "extract", "kept_spans", "kept_tokens"]


@dataclass(frozen=True)
class Took:
    """What a run took: seconds, and the most bytes that it held in memory."""

    load_s: float
    extract_s: float
    write_s: float
    peak_memory: int


def extract(
    request: ExtractRequest,
    output: str | Path,
    announce: Callable[[Plan], None] | None = None,
    accept: Callable[[Identity, Sequence[str]], None] | None = None,
    finished: Callable[[Took], None] | None = None,
) -> Cache:
    """Run the model over the data and write the cache, or add the missing layers to one.

    Args:
        request: what to extract.
        output: the cache's folder: nothing, an empty folder, a cache of the same identity, or what
            an interrupted run of the same request left.
        announce: told the plan before any weight is read.
        accept: told identity and classes; raises to refuse them. It is asked before anything of the
            weights is looked at, when samples of them are known, and when they have been read.
        finished: told what a run took, when it is done.

    Returns:
        The finished cache, opened.

    Raises:
        Any of the tree: bad input as in `prepare`, then OutputError, MismatchError, PreflightError,
        OutOfMemoryError, NonFiniteError.
        Interrupted: by a signal; says what is kept.
    """
    output = Path(output)
    with stops_told(output):
        finish_complete(output)
        existing = existing_cache(output)
        prepared = prepare(request, identity_before(output, existing))
        blueprint = missing(prepared.blueprint, existing)
        planned = work_out(prepared, existing, blueprint, output)
        _require_all(prepared.identity, prepared, existing, accept)
        if blueprint.layers:
            require_place(real_path(output))
            if existing is not None:
                require_free_layers(existing.path, blueprint)
            require_same_run(planned, prepared.identity)
            _require_room(planned)
            prepared.source.check_device()
        if announce is not None:
            announce(planned)
        identity = _with_weights(prepared, existing)
        _require_all(identity, prepared, existing, accept)
        if blueprint.layers:
            require_same_run(planned, identity)
            _run(prepared, planned, existing, identity, accept, finished)
        else:
            identity = _with_content(identity, prepared, max(prepared.layers), {})
            _require_all(identity, prepared, existing, accept)
        return open_cache(output)


def _run(
    prepared: Preparation,
    planned: Plan,
    existing: Cache | None,
    identity: Identity,
    accept: Callable[[Identity, Sequence[str]], None] | None,
    finished: Callable[[Took], None] | None,
) -> None:
    output, info = Path(planned.output), existing.info if existing else None
    blueprint, as_read = missing(prepared.blueprint, existing), identity

    def begun() -> Begun:
        require_same_run(planned, as_read)  # another may have begun since it was asked
        return begin(prepared, planned, as_read)

    with open_writer(output, blueprint, begun, info) as writer:
        filling = Filling(writer, prepared, planned, existing, accept)
        identity = filling.fill(identity)
        reused = {*prepared.layers} - {*blueprint.layers}
        if reused:  # what was asked for and is not run must be of the same weights too
            identity = _with_content(identity, prepared, max(reused), {})
        _note_allowed(writer, existing, _require_all(identity, prepared, existing, accept))
        writer.commit(identity, filling.timing(), filling.execution())
        if finished is not None:
            finished(filling.took())


# ---------------------------------------------------------------- who may refuse


def _require_all(
    identity: Identity,
    prepared: Preparation,
    existing: Cache | None,
    accept: Callable[[Identity, Sequence[str]], None] | None,
) -> list[str]:
    """Ask everyone who may refuse these numbers; returns the differences that are allowed."""
    if accept is not None:
        accept(identity, prepared.dataset.labels)
    if existing is None:
        return []
    return require_same_cache(existing, identity, prepared.request.allow_mismatch)


def _note_allowed(writer: CacheWriter, existing: Cache | None, allowed: Sequence[str]) -> None:
    """Put the differences that were allowed, now and before, into the manifest to be written."""
    before = existing.info.origin.allowed_mismatch if existing else []
    noted = list(dict.fromkeys([*before, *allowed]))
    origin = writer.blueprint.origin.model_copy(update={"allowed_mismatch": noted})
    writer.blueprint = replace(writer.blueprint, origin=origin)


def _require_room(planned: Plan) -> None:
    needed = planned.bytes_to_claim + planned.spill_bytes
    if needed > planned.bytes_free:
        raise OutputError(
            f"expected {needed:,} bytes free for {planned.output}, got "
            f"{planned.bytes_free:,}, not enough disk; free some, ask for fewer layers or choose "
            "another --output"
        )


def _with_weights(prepared: Preparation, existing: Cache | None) -> Identity:
    layers = {*prepared.layers, *(existing.layers if existing else ())}
    samples = prepared.source.weight_samples(tuple(sorted(layers)))
    return replace(prepared.identity, weight_samples=samples)


def _with_content(
    identity: Identity, prepared: Preparation, depth: int, known: Mapping[int, str]
) -> Identity:
    content = weights_content(prepared.source, depth, known, quiet=prepared.request.quiet)
    return replace(identity, weights={**identity.weights, **content})


# ---------------------------------------------------------------- the run


class Filling:
    """Puts every row into a writer that is not there yet: one passage after the other."""

    def __init__(
        self,
        writer: CacheWriter,
        prepared: Preparation,
        planned: Plan,
        existing: Cache | None,
        accept: Callable[[Identity, Sequence[str]], None] | None,
    ) -> None:
        assert planned.execution is not None
        self._accept = accept
        self._writer, self._prepared, self._planned = writer, prepared, planned
        self._existing, self._execution = existing, planned.execution
        self._progress = writer.unfinished.progress
        self._named_layers: set[int] = set()  # of the present passage
        self._load_s = self._extract_s = 0.0
        self._peak = 0

    def fill(self, identity: Identity) -> Identity:
        """Run; return the identity with what is known of it only now."""
        spans = kept_spans(self._prepared) if self._writer.blueprint.tells_spans else None
        self._writer.write_tokens(kept_tokens(self._prepared), spans)
        for passage in self._planned.passages:
            if not self._writer.done(passage.layers).all():
                self._pass(passage, identity)
                release_memory()  # of one model before the next is loaded
            elif self._known(identity).weights.get(passage.layers[-1]) is None:
                # Killed between the last row and the end: the weights are read to name them.
                self._progress.identity = self._checked(self._known(identity), passage)
        return self._known(identity)

    def _known(self, identity: Identity) -> Identity:
        """The identity with what this run or an interrupted one has found out."""
        return self._progress.identity or identity

    def timing(self) -> dict[str, int]:
        """Tokens, for the manifest."""
        return {
            "tokens": self._planned.tokens,
            "distinct_tokens": self._planned.distinct_prefix_tokens,
            "computed_tokens": max(p.computed_tokens for p in self._progress.passages.values()),
        }

    def execution(self) -> dict[str, str]:
        """How it went, in words, for the manifest."""
        ways = dict.fromkeys(p.batches for _, p in sorted(self._progress.passages.items()))
        return {"engine": str(self._execution.engine), "batches": "; ".join(ways)}

    def took(self) -> Took:
        """Of this run; what was there before it took nothing."""
        return Took(self._load_s, self._extract_s, self._writer.seconds, self._peak)

    def _pass(self, passage: Passage, identity: Identity) -> None:
        run = Run(
            self._prepared.source,
            self._prepared.tree,
            self._prepared.positions == Positions.MEAN,
            self._execution,
            passage,
            self._writer.folder,
            self._existing,
            self._prepared.request.share_prefixes,
        )
        started = time.perf_counter()
        model = run.load()
        self._load_s += time.perf_counter() - started
        identity = replace(self._known(identity), attention=model.attention)
        streamed = self._execution.engine is EngineName.STREAM
        if not streamed:  # what has been read may be refused before anything is computed
            identity = self._checked(identity, passage)
        self._progress.identity = identity
        self._named_layers.clear()
        run.prepare(self._progress.passages.get(passage.start))
        self._run(run)
        if streamed:
            self._progress.identity = self._checked(identity, passage)
        self._peak = max(self._peak, _peak_memory(model))

    def _named(self, identity: Identity, passage: Passage, layer: int) -> Identity:
        """The identity with the weights up to a layer that a passage has read."""
        known = self._existing.identity.weights if self._existing and passage.cached else {}
        record = self._progress.passages.get(passage.start)
        if record is not None and record.snapshot is not None:
            known = self._known(identity).weights  # of blocks that an interrupted run has read
        return _with_content(identity, self._prepared, layer, known)

    def _checked(self, identity: Identity, passage: Passage, layer: int | None = None) -> Identity:
        """The identity with the weights that a passage has read, refused where they differ.

        Args:
            layer: up to which; None: the passage's last.
        """
        found = self._named(identity, passage, passage.layers[-1] if layer is None else layer)
        _require_all(found, self._prepared, self._existing, self._accept)
        require_unchanged(self._progress.identity, found)
        return found

    def _run(self, run: Run) -> None:
        started = time.perf_counter()
        while True:
            try:
                self._take_all(run)
                break
            except ModelError as error:
                if not run.goes_on_after(error):
                    raise
                self._writer.start_over(run.passage.layers)
        self._extract_s += time.perf_counter() - started

    def _take_all(self, run: Run) -> None:
        quiet = self._prepared.request.quiet
        if run.why_padded and not quiet:
            print(f"Prefixes are not shared: {run.why_padded}", file=sys.stderr)
        done = self._writer.done(run.passage.layers)
        with Pipe(lambda rows: self._take(rows, run)) as pipe:
            snapshots = KeptSnapshots(
                self._writer, run, lambda layer: self._settle(pipe, run, layer)
            )
            resumed = snapshots.latest()
            total = run.total(done, resumed)
            with Progress(total, "extracting", "tokens x blocks", quiet=quiet) as progress:
                for rows in run.rows(done, progress.update, snapshots, resumed):
                    pipe.put(rows)

    def _settle(self, pipe: Pipe, run: Run, layer: int) -> None:
        """Before a snapshot counts: all rows below are with the writer, the weights have a name."""
        pipe.wait()
        assert self._progress.identity is not None
        self._progress.identity = self._named(self._progress.identity, run.passage, layer)

    def _take(self, rows: Rows, run: Run) -> None:
        if not _all_finite(rows.values):
            run.require_apart()
            if not self._prepared.request.allow_nonfinite:
                _require_finite(rows, self._prepared)
        self._name_weights(run.passage, rows.layer)
        if not self._writer.holds(rows.layer, rows.prompts):
            self._writer.write(rows.layer, rows.prompts, rows.values)
            self._writer.record_now_and_then()

    def _name_weights(self, passage: Passage, layer: int) -> None:
        """Before rows of a layer are kept: the weights that made them have a name.

        A streamed run that is stopped would else leave rows of which nobody can say, when it goes
        on, whether they were made by the weights that are read then.
        """
        if self._execution.engine is EngineName.STREAM and layer not in self._named_layers:
            assert self._progress.identity is not None
            self._progress.identity = self._checked(self._progress.identity, passage, layer)
            self._named_layers.add(layer)


def _require_finite(rows: Rows, prepared: Preparation) -> None:
    import torch

    bad = ~torch.isfinite(rows.values).all(dim=1)
    if not bad.any():
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


def _all_finite(values: torch.Tensor) -> bool:
    """Whether no number is NaN or Inf; where numbers are huge it may say no for nothing.

    With NumPy in one thread: this runs beside the model, whose threads torch's would stand in the
    way of.
    """
    import torch

    if values.dtype == torch.float32:
        with np.errstate(over="ignore", invalid="ignore"):
            return bool(np.isfinite(values.numpy().sum()))
    exponent = 0x7F80 if values.dtype == torch.bfloat16 else 0x7C00
    return not bool((values.view(torch.int16).numpy() & exponent == exponent).any())


def kept_tokens(prepared: Preparation) -> np.ndarray:
    """Kept token ids, classes one after the other, in row order."""
    return np.concatenate([prompt.ids[prompt.kept] for prompt in _by_class(prepared)])


def kept_spans(prepared: Preparation) -> np.ndarray:
    """What the kept tokens stand for, int32 [rows, 4], in the same order.

    Place of the token in the input, its message, first character and end in that message.
    """
    pieces = []
    for prompt in _by_class(prepared):
        assert prompt.places is not None
        pieces.append(np.column_stack([prompt.kept, prompt.places]))
    return np.concatenate(pieces)


def _by_class(prepared: Preparation) -> list[TokenizedPrompt]:
    """The prompts, classes one after the other."""
    by_class: dict[str, list[TokenizedPrompt]] = {label: [] for label in prepared.dataset.labels}
    for example, prompt in zip(prepared.dataset.examples, prepared.prompts, strict=True):
        by_class[example.label].append(prompt)
    return [prompt for prompts in by_class.values() for prompt in prompts]


def _peak_memory(model: LoadedModel) -> int:
    """Most bytes that the process held: on the CUDA device where there is one, else in RAM."""
    if model.input_device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(model.input_device))
    return peak_bytes()
