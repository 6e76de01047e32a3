"""Layer by layer: all prompts go through one block before the next is loaded.

For models that do not fit: two blocks are in memory at a time, the one that computes and the next,
which is read meanwhile. Every weight is read once. What waits between two blocks, the residual
stream of every token, lies in memory or in a file (`HiddenStates`).

Rows equal the resident engine's bit for bit where the steps are the same. A run may leave
snapshots of the stream, and a later run go on from one with the same rows, bit for bit. None is
left where a block has handed on more than the stream (Gemma 4's shared keys and values).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from probecache.engine import Rows, Start, Transfer, is_out_of_memory, no_room, release_memory
from probecache.feeds import Context
from probecache.loaded import Leftovers
from probecache.snapshots import SnapshotReader, SnapshotWriter

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from probecache.feeds import Feed, Work
    from probecache.hidden import HiddenStates
    from probecache.loaded import LoadedModel
    from probecache.plan import Step

__all__ = [
    "BlockSource",
    "Snapshot",
    "SnapshotStart",
    "Snapshots",
    "Strand",
    "StreamingEngine",
]


class BlockSource(Protocol):
    """Where blocks come from."""

    def read_block(self, index: int) -> Any:
        """A block's weights as they are stored. Called in a thread beside the one that computes."""
        ...

    def build_block(self, index: int, weights: Any) -> Any:
        """The block as a module on its device."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """Hidden states behind so many blocks, as a run of the same work left them in a file."""

    layer: int
    path: Path


@dataclass(frozen=True)
class SnapshotStart:
    """A `Start` from a snapshot, for other works of some of the same prompts.

    Attributes:
        snapshot: where the rows are.
        work: all that was run when it was left.
    """

    snapshot: Snapshot
    work: Work

    @property
    def layer(self) -> int:
        """Where the rows belong."""
        return self.snapshot.layer

    def rows(self, prompts: NDArray[np.int64], depths: NDArray[np.int64]) -> torch.Tensor:
        """See `Start.rows`.

        Raises:
            OutputError: the file is not a whole snapshot of this work.
        """
        import torch

        real = np.flatnonzero(prompts >= 0)
        numbers, within = self.work.places(prompts[real], depths[real])
        with SnapshotReader(self.snapshot.path, self.layer) as reader:
            found = torch.zeros((len(prompts), reader.width), dtype=reader.dtype)
            for number in np.unique(numbers):
                here = np.flatnonzero(numbers == number)
                rows = reader.read(self.work.steps[number])
                found[torch.from_numpy(real[here])] = rows[torch.from_numpy(within[here])]
        return found


class Snapshots(Protocol):
    """Where a run leaves snapshots, and how often. Called from where rows are taken."""

    def place(self, layer: int) -> Path | None:
        """Where to leave the next one, behind block `layer`; None: not this time.

        Asked before that block runs, of every block but the last. A file that is left there without
        being told of as saved is of no use.
        """
        ...

    def saved(self, layer: int, seconds: float) -> None:
        """Told that the one behind `layer` is complete on disk, and how long the disk took.

        All rows up to and including this layer were yielded before. Earlier ones may go.
        """
        ...


@dataclass(frozen=True)
class Strand:
    """One of the works that go through the blocks together; the arguments of `Engine.run`.

    Attributes:
        resumed: where to go on; rows of layers above it alone come out. Steps that were left out
            since it was saved may be missing from `work`.
        snapshots: takes snapshots; None: none are wanted.
    """

    work: Work
    layers: Sequence[int]
    start: Start | None = None
    told: Callable[[int], None] = lambda _: None
    resumed: Snapshot | None = None
    snapshots: Snapshots | None = None

    @property
    def first_block(self) -> int:
        """The first block that runs."""
        begin = self.resumed or self.start
        return begin.layer if begin else 0


@dataclass
class StreamingEngine:
    """Holds everything but the blocks, and two blocks at a time.

    Attributes:
        model: the model with pass-throughs for blocks.
        source: where the blocks come from.
        hidden_states: makes the store for the residual streams of so many tokens.
    """

    model: LoadedModel
    source: BlockSource
    hidden_states: Callable[[int], HiddenStates]

    def run(
        self,
        work: Work,
        layers: Sequence[int],
        start: Start | None = None,
        told: Callable[[int], None] = lambda _: None,
    ) -> Iterator[Rows]:
        """See `Engine.run`; rows come layer by layer."""
        for _, rows in self.run_together([Strand(work, layers, start, told)]):
            yield rows

    def run_together(
        self, strands: Sequence[Strand], seen: Callable[[int], None] = lambda _: None
    ) -> Iterator[tuple[int, Rows]]:
        """Run several works through each block while it is there, in their order.

        Args:
            strands: what to run; all begin at one layer.
            seen: told when a block is in its place in the model, before anything runs through it.

        Yields:
            Which of the strands, and its rows.

        Raises:
            OutputError: what a strand is resumed from is not a whole snapshot of its work; nothing
                was yielded then.
        """
        if not any(strand.work.steps for strand in strands):
            return
        with ExitStack() as stack:
            walks = [_Walk(one, stack.enter_context(self._store(one.work))) for one in strands]
            for number, walk in enumerate(walks):
                for rows in self._enter(walk):
                    yield number, rows
            for index, block in self._loaded(range(strands[0].first_block, self.model.depth)):
                seen(index)
                for number, walk in enumerate(walks):
                    walk.ends = index + 1 == self.model.depth
                    walk.open_snapshot(index + 1)
                    for rows in self._through(index, block, walk):
                        yield number, rows
                    walk.close_snapshot()

    def _store(self, work: Work) -> HiddenStates:
        return self.hidden_states(sum(step.tokens for step in work.steps))

    def _loaded(self, blocks: range) -> Iterator[tuple[int, Any]]:
        """Each block in its place in the model, the next one being read meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[Any] | None = pool.submit(self.source.read_block, blocks[0])
            for index in blocks:
                assert ahead is not None
                weights = ahead.result()
                ahead = None
                if index + 1 in blocks:
                    ahead = pool.submit(self.source.read_block, index + 1)
                passing = self.model.blocks[index]
                self.model.blocks[index] = self.source.build_block(index, weights)
                del weights
                try:
                    yield index, self.model.blocks[index]
                finally:
                    self.model.blocks[index] = passing

    # -- steps

    def _enter(self, walk: _Walk) -> Iterator[Rows]:
        """Put into the store what the first block takes."""
        start, resumed = walk.strand.start, walk.strand.resumed
        if resumed is not None:
            walk.take_up(resumed, self.model.input_device)
            return

        def known(feed: Feed, _hidden: None) -> torch.Tensor:
            if start is None:
                with feed.running():
                    return self.model.embed(feed.inputs)
            rows = start.rows(feed.owners, feed.depths)
            return rows.to(self.model.input_device).view(*feed.shape, -1)

        wanted = 0 if start is None and 0 in walk.strand.layers else None
        with walk.strand.work.attention([self.model.model]):
            yield from self._steps(walk, known, wanted, blocks=0)

    def _through(self, index: int, block: Any, walk: _Walk) -> Iterator[Rows]:
        """Take the stored stream through one block and put it back."""

        def run(feed: Feed, hidden: torch.Tensor) -> torch.Tensor:
            with feed.running():
                return self.model.run_block(index, feed.inputs, hidden, walk.left())[1]

        wanted = index + 1 if index + 1 in walk.strand.layers else None
        with walk.strand.work.attention([self.model.model, block]):
            yield from self._steps(walk, run, wanted, blocks=1)

    def _steps(
        self,
        walk: _Walk,
        function: Callable[[Feed, Any], torch.Tensor],
        wanted: int | None,
        blocks: int,
    ) -> Iterator[Rows]:
        """Take every step's stream through so many blocks; yield the rows of a wanted layer."""
        walk.begin(reads=blocks > 0)
        computed: Transfer | None = None
        while (step := walk.step) is not None:
            result = self._attempt(walk, step, function, wanted, blocks)
            if result is None:
                walk.divide()
                continue
            hidden, transfer = result
            walk.advance(hidden)
            walk.tell_saved()
            walk.strand.told(step.tokens * blocks)
            if computed is not None:
                yield from computed.rows()
            computed = transfer
        if computed is not None:
            yield from computed.rows()

    def _attempt(
        self,
        walk: _Walk,
        step: Step,
        function: Callable[[Feed, Any], torch.Tensor],
        wanted: int | None,
        blocks: int,
    ) -> tuple[torch.Tensor, Transfer] | None:
        """A step's new stream and the rows of a wanted layer; None when memory ran out."""
        import torch

        try:
            with torch.inference_mode():
                feed = walk.strand.work.feed(step, walk.context, self.model)
                stored = walk.hidden(self.model.input_device) if blocks else None
                given = None if stored is None else stored.view(*feed.shape, -1)
                hidden = function(feed, given)
                kept = {} if wanted is None else {wanted: feed.rows(wanted, hidden)}
                result = hidden.flatten(0, 1), Transfer(feed.prompts, kept)
                feed.finish(blocks)  # last: what failed is run again from the same context
                return result
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None


class _Walk:
    """Where a strand stands: its step, and what that leaves to the next."""

    def __init__(self, strand: Strand, store: HiddenStates) -> None:
        self.strand, self._store = strand, store
        self._steps: list[Step] = list(strand.work.steps)
        self._left: dict[Step, Leftovers] = {}
        self.ends = False  # whether nothing reads what is stored now
        self._snapshot: SnapshotWriter | None = None  # what is written
        self._saving: SnapshotWriter | None = None  # what is not told of yet
        self.begin(reads=False)

    def begin(self, reads: bool) -> None:
        """Go back to the first step."""
        self.context, self._number, self._offset = Context(), 0, 0
        if reads and self._steps:
            self._store.expect(0, self._steps[0].tokens)

    @property
    def step(self) -> Step | None:
        """The present step; None behind the last."""
        return self._steps[self._number] if self._number < len(self._steps) else None

    def left(self) -> Leftovers:
        """What blocks left for later blocks of the present step."""
        return self._left.setdefault(self._steps[self._number], Leftovers())

    def hidden(self, device: torch.device) -> torch.Tensor:
        """The present step's stream [tokens, hidden]; the next one's is read meanwhile."""
        tokens = self._steps[self._number].tokens
        rows = self._store.read(self._offset, tokens)
        if self._number + 1 < len(self._steps):
            self._store.expect(self._offset + tokens, self._steps[self._number + 1].tokens)
        return rows.to(device, non_blocking=True)

    def advance(self, hidden: torch.Tensor) -> None:
        """Store the present step's new stream and go on."""
        if not self.ends:
            self._store.write(self._offset, hidden)
        self._offset += self._steps[self._number].tokens
        self._number += 1

    # -- snapshots

    def take_up(self, snapshot: Snapshot, device: torch.device) -> None:
        """Put into the store what a snapshot holds of the steps."""
        with SnapshotReader(snapshot.path, snapshot.layer) as reader:
            for step in self._steps:
                self._store.write(self._offset, reader.read(step).to(device))
                self._offset += step.tokens

    def open_snapshot(self, layer: int) -> None:
        """Begin a block; what comes out of it goes into a snapshot if one is wanted."""
        self.tell_saved()
        snapshots, self._snapshot = self.strand.snapshots, None
        waits = self._saving is not None or self._leaves
        if snapshots is not None and self._steps and not (self.ends or waits):
            path = snapshots.place(layer)
            if path is not None:
                self._snapshot = SnapshotWriter(path, layer, self.strand.work.steps)
        self._store.begin(self._snapshot)

    def close_snapshot(self) -> None:
        """End a block; where it left more than the stream there is no going on behind it."""
        if self._snapshot is None:
            return
        if self._leaves:
            self._snapshot.discard()
            return
        self._saving = self._snapshot
        self._store.keep()

    def tell_saved(self) -> None:
        """Say so once a snapshot is complete."""
        if self._saving is not None and self._store.is_kept():
            saved, self._saving = self._saving, None
            assert self.strand.snapshots is not None
            self.strand.snapshots.saved(saved.layer, saved.seconds)

    @property
    def _leaves(self) -> bool:
        return any(left.entries for left in self._left.values())

    # -- memory

    def divide(self) -> None:
        """Cut the present step in two, for this block and all later ones."""
        step = self._steps[self._number]
        release_memory()
        if not step.divisible or self.left().entries:
            raise no_room(step.tokens)
        self._steps[self._number : self._number + 1] = step.halves()
