"""A planned passage through a model: load, prove, run.

Tries shared prefixes first where the architecture may share them, and padded batches where it turns
out that it does not; the preflight decides. Guarantee: rows are yielded only of a way of running
that agrees with plain forwards so far; a way that fails is started over by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probecache.engine import ResidentEngine
from probecache.errors import ForwardError, ModelError, PreflightError
from probecache.feeds import PaddedWork, TreeWork
from probecache.hidden import HiddenStates
from probecache.model_config import place_limit
from probecache.plan import Batch, plan_batches, plan_stretches
from probecache.prefixes import PrefixTree
from probecache.store.journal import PassageRecord
from probecache.streaming import Snapshot, Snapshots, Strand, StreamingEngine
from probecache.workflow.execution import EngineName, Execution, Passage
from probecache.workflow.preflight import (
    Comparison,
    PlainRun,
    Sample,
    check_engine,
    choose_sample,
    foreign_errors_named,
)

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from probecache.engine import Rows, Start
    from probecache.feeds import Work
    from probecache.loaded import LoadedModel
    from probecache.models import ModelSource
    from probecache.store.reader import Cache

__all__ = ["CachedRows", "Run", "SpreadError"]

# Tokens that share a call of attention: few waste little on tokens that do not see one another,
# many keep an accelerator busy.
_TILE = {"cpu": 64, "cuda": 512}
SHARED, _AS_ASKED = "shared prefixes", "asked for"


class SpreadError(PreflightError):
    """Numbers that are not finite came out of rows that prompts share."""


@dataclass
class Run:
    """One passage, with its model.

    Attributes:
        source: the model.
        tree: the run's prompts.
        mean: one row per prompt.
        execution: how to run.
        passage: which blocks, from where.
        spill: folder for hidden states that are to go to disk.
        cache: holds the rows of the passage's start.
        share: whether to share prefixes where the model allows it.
        why_padded: why prefixes are not shared; empty where they are.
    """

    source: ModelSource
    tree: PrefixTree
    mean: bool
    execution: Execution
    passage: Passage
    spill: Path
    cache: Cache | None
    share: bool = True
    why_padded: str = ""
    _mixed: bool = True

    def load(self) -> LoadedModel:
        """Read the weights: all of the passage's, or those outside the blocks."""
        blocks = self.passage.blocks
        if self.execution.engine is EngineName.STREAM:
            self.model = self.source.skeleton(blocks.stop)
        else:
            self.model = self.source.load(blocks.stop, blocks.start)
        return self.model

    @property
    def batches(self) -> str:
        """How prompts went through, in words."""
        if not self.why_padded:
            return SHARED
        kind = "padded batches" if self._mixed else "batches of one length"
        return f"{kind}, because {self.why_padded}"

    def total(self, done: NDArray[np.bool_], resumed: Snapshot | None = None) -> int:
        """Tokens x blocks that the run computes where these prompts' rows are there already."""
        blocks = self.passage.blocks
        count = blocks.stop - (blocks.start if resumed is None else resumed.layer)
        return _tokens(self._work().remaining(done)) * count

    def record(self) -> PassageRecord:
        """How the run goes, for one that goes on with it."""
        return PassageRecord(
            why_padded=self.why_padded,
            mixed=self._mixed,
            computed_tokens=_tokens(self._work()),
            batches=self.batches,
        )

    def prepare(self, begun: PassageRecord | None = None) -> None:
        """Decide whether to share prefixes, as far as that can be known before rows come out.

        Args:
            begun: how an interrupted run went; this one goes the same way.

        Raises:
            PreflightError: the model disagrees with plain forwards either way.
        """
        longest = max(map(len, self.tree.prompts))
        if begun is not None:
            self.why_padded, self._mixed = begun.why_padded, begun.mixed
        else:
            self.why_padded = self.source.why_not_shared(longest) if self.share else _AS_ASKED
            self._mixed = not self.source.depends_on_length(longest)
        self._sample = choose_sample(self.tree, self._start())
        if self.execution.engine is EngineName.STREAM:
            with foreign_errors_named(self.model):
                self.model.check_layer_convention()
            return
        self._engine = ResidentEngine(self.model)
        comparison = Comparison(self.model, self.source.dtype)
        while True:
            try:
                work = self._sample_work(self._sample)
                check_engine(self._engine, comparison, self._sample, work, self.passage.layers)
                return
            except ModelError as error:
                if not self.goes_on_after(error):
                    raise

    def goes_on_after(self, error: ModelError) -> bool:
        """Go over to padded batches after an error, then to batches without padding.

        Returns:
            False where nothing is left to try, or the error has another cause.
        """
        if not isinstance(error, PreflightError | ForwardError):
            return False
        if not self.why_padded:
            self.why_padded = self._reason(error)
        elif self._mixed and isinstance(error, PreflightError):
            self._mixed = False  # some architectures let padding reach the tokens before it
        else:
            return False
        return True

    def _reason(self, error: ModelError) -> str:
        name = self.source.architecture
        if isinstance(error, SpreadError):
            return "numbers that are not finite would reach other prompts that share a row"
        if isinstance(error, PreflightError):
            return f"{name} with shared prefixes gave other numbers"
        return f"the attention of {name} does not take a tree of prefixes"

    def require_apart(self) -> None:
        """Raise SpreadError where numbers that are not finite may come from another prompt.

        What is masked out counts with a weight of 0, and 0 times infinity is not 0.
        """
        if not self.why_padded:
            raise SpreadError("expected finite numbers in rows that prompts share")

    def rows(
        self,
        done: NDArray[np.bool_],
        told: Callable[[int], None],
        snapshots: Snapshots | None = None,
        resumed: Snapshot | None = None,
    ) -> Iterator[Rows]:
        """The rows at every wanted layer of every prompt that is not done.

        Args:
            done: bool [prompts].
            told: of tokens x blocks as they are computed.
            snapshots: takes hidden states between streamed blocks.
            resumed: from where to stream; only layers above come out.

        Raises:
            ModelError: see `goes_on_after`; then all rows have to be asked for again.
        """
        work = self._work().remaining(done)
        if self.execution.engine is EngineName.RESIDENT:
            yield from self._engine.run(work, self.passage.layers, self._start(), told)
            return
        folder = self.spill if self.execution.hidden_on_disk else None
        engine = StreamingEngine(
            self.model, self.source, lambda tokens: HiddenStates(tokens, folder)
        )
        with foreign_errors_named(self.model):
            run = Strand(work, self.passage.layers, self._start(), told, resumed, snapshots)
            if resumed is not None:  # the model is that of the run which was compared
                for _, rows in engine.run_together([run]):
                    yield rows
            else:
                yield from self._streamed(engine, run)

    def _streamed(self, engine: StreamingEngine, run: Strand) -> Iterator[Rows]:
        """The sample goes through each block before the run does, and is compared there."""
        sample, start, first = self._sample, self._start(), self.passage.blocks.start
        early = {first + 1} if start else {first, first + 1}  # so that a fault shows at once
        layers = sorted({*early, *self.passage.layers} & {*range(self.model.depth + 1)})
        comparison = Comparison(self.model, self.source.dtype)
        plain = PlainRun(comparison, sample, layers)
        probe = Strand(self._sample_work(sample), layers, sample.as_start())
        held: list[Rows] = []  # of the first layer: its plain rows are known with the first block
        for number, rows in engine.run_together([probe, run], plain.through):
            if number == 1:
                yield rows
            elif rows.layer == first and not start:
                held.append(rows)
            else:
                for waiting in [*held, rows]:
                    comparison.check(waiting, sample)
                held.clear()

    def _work(self) -> Work:
        """The prompts in steps."""
        if not self.why_padded:
            return self._shared(self.tree, len(self.tree), self.mean)
        return PaddedWork(self.tree.prompts, self._batches(self.tree), self.mean)

    def _sample_work(self, sample: Sample) -> Work:
        """The sample cut alike: handing on and padding happen in every prompt of it."""
        tree = PrefixTree(sample.prompts)
        if not self.why_padded:
            return self._shared(tree, -(-len(tree) // 2), mean=False)
        batches = self._batches(tree)
        if self._mixed:
            batches = [Batch(b.prompts, self._longer(b.padded_length)) for b in batches]
        return PaddedWork(tree.prompts, batches)

    def _longer(self, length: int) -> int:
        more, most = length + max(1, length // 4), self.source.facts.context_length
        return more if most is None else min(more, most)

    def _batches(self, tree: PrefixTree) -> list[Batch]:
        lengths = [len(prompt) for prompt in tree.prompts]
        return plan_batches(lengths, self.execution.batch_tokens, mixed=self._mixed)

    def _shared(self, tree: PrefixTree, most: int, mean: bool) -> TreeWork:
        limits = (self.execution.batch_tokens, place_limit(self.source.config), most)
        budget = min(limit for limit in limits if limit is not None)
        tile = _TILE.get(self.model.input_device.type, _TILE["cuda"])
        return TreeWork(tree, plan_stretches(tree.bounds, tree.shared, budget), tile, mean)

    def _start(self) -> Start | None:
        if not self.passage.cached:
            return None
        assert self.cache is not None
        return CachedRows(self.cache, self.passage.start)


def _tokens(work: Work) -> int:
    return sum(step.tokens for step in work.steps)


class CachedRows:
    """A `Start` from a cache that holds every token of every prompt at a layer."""

    def __init__(self, cache: Cache, layer: int) -> None:
        self.layer = layer
        self._tensors = [cache[label, layer] for label in cache.classes]
        classes = {label: number for number, label in enumerate(cache.classes)}
        # One entry more, which padding's -1 points to.
        self._class = np.array([*(classes[e.label] for e in cache.examples), -1])
        self._first = np.array([*(e.rows[0] for e in cache.examples), 0])

    def rows(self, prompts: NDArray[np.int64], depths: NDArray[np.int64]) -> torch.Tensor:
        """See `Start.rows`."""
        import torch

        one: Any = self._tensors[0]
        found = torch.zeros((len(prompts), one.shape[1]), dtype=one.dtype)
        owner, places = self._class[prompts], self._first[prompts] + depths
        for number, tensor in enumerate(self._tensors):
            here = np.flatnonzero(owner == number)
            found[torch.from_numpy(here)] = tensor[torch.from_numpy(places[here])]
        return found
