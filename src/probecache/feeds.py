"""What goes into a model in one forward pass, and which rows come out of it.

A `Work` is prompts and the steps they are cut into; a `Feed` is one step made ready for a device.
Both ways of cutting give the same rows (up to rounding), so an engine need not know which it runs:

    PaddedWork    prompts padded on the right to one length, as any model takes them
    TreeWork      a pack of the prefix tree in one row, for causal models whose attention is ours

Dimensions: B rows of T tokens go in, H hidden size, K rows come out.
"""

from __future__ import annotations

from bisect import bisect_right
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from probecache.attention import KeyValues, PackPass, attend_to_ancestors, columns_on
from probecache.errors import PreflightError
from probecache.plan import Batch, Stretch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from probecache.loaded import LoadedModel
    from probecache.plan import Step
    from probecache.prefixes import Pack, PrefixTree
    from probecache.types import TokenizedPrompt

__all__ = ["Context", "Feed", "PaddedWork", "TreeWork", "Work"]


@dataclass
class Context:
    """What a step leaves to the next one of the same walk: empty for padded batches.

    Attributes:
        keys: keys and values of each attention.
        rows: residuals by layer, for prompts that keep tokens of an earlier step.
    """

    keys: KeyValues = field(default_factory=dict)
    rows: dict[int, torch.Tensor] = field(default_factory=dict)


class Feed(Protocol):
    """A step made ready.

    Attributes:
        prompts: those whose rows come out of this step.
        shape: (B, T).
        inputs: what the model's forward takes, on the device.
        owners: int64 [B * T], a prompt that each token belongs to; -1 for padding.
        depths: int64 [B * T], each token's place in that prompt.
    """

    prompts: tuple[int, ...]
    shape: tuple[int, int]
    inputs: dict[str, torch.Tensor]
    owners: NDArray[np.int64]
    depths: NDArray[np.int64]

    def running(self) -> AbstractContextManager[None]:
        """Open while the model or some of its blocks run."""
        ...

    def rows(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The kept rows [K, H] in the residual stream [B, T, H], prompt after prompt."""
        ...

    def finish(self, blocks: int) -> None:
        """Hand on to the next step after so many blocks.

        Raises:
            PreflightError: attention did not run as it must.
        """
        ...


class Work(Protocol):
    """Prompts, and the steps they are cut into."""

    @property
    def prompts(self) -> Sequence[TokenizedPrompt]:
        """All prompts."""
        ...

    @property
    def steps(self) -> Sequence[Step]:
        """In the order in which they must run."""
        ...

    def attention(self, modules: list[Any]) -> AbstractContextManager[None]:
        """Open while these modules run."""
        ...

    def feed(self, step: Any, context: Context, model: LoadedModel) -> Feed:
        """A step made ready for a model's device."""
        ...

    def remaining(self, done: NDArray[np.bool_]) -> Work:
        """The work of the prompts that are not done: their rows alone, bit for bit the same.

        Args:
            done: bool [prompts].
        """
        ...

    def places(
        self, prompts: NDArray[np.int64], depths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of the steps each token is in, and where in it; of a work that has all its steps.

        Args:
            prompts: int64 [n], of each token.
            depths: int64 [n], its place in the prompt.
        """
        ...


# ---------------------------------------------------------------- padded batches


@dataclass(frozen=True)
class PaddedWork:
    """Prompts in padded batches.

    Attributes:
        prompts: all prompts.
        steps: which of them go together.
        mean: one row per prompt, the mean over its kept tokens.
        done: bool [prompts], those whose rows are not wanted; None: all are.
    """

    prompts: Sequence[TokenizedPrompt]
    steps: Sequence[Batch]
    mean: bool = False
    done: NDArray[np.bool_] | None = None

    def attention(self, modules: list[Any]) -> AbstractContextManager[None]:
        """The model's own attention."""
        return nullcontext()

    def remaining(self, done: NDArray[np.bool_]) -> PaddedWork:
        """See `Work.remaining`; batches stay whole, so that their shapes and numbers do."""
        steps = [step for step in self.steps if not done[list(step.prompts)].all()]
        return replace(self, steps=steps, done=done)

    def feed(self, step: Batch, context: Context, model: LoadedModel) -> Feed:
        """A batch made ready."""
        prompts = [self.prompts[index] for index in step.prompts]
        return _PaddedFeed(step, prompts, self.mean, model, self.done)

    def places(
        self, prompts: NDArray[np.int64], depths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Work.places`."""
        numbers, rows = np.empty((2, len(self.prompts)), dtype=np.int64)
        for number, step in enumerate(self.steps):
            numbers[list(step.prompts)] = number
            rows[list(step.prompts)] = np.arange(len(step.prompts)) * step.padded_length
        return numbers[prompts], rows[prompts] + depths


class _PaddedFeed:
    """Padded on the right whatever the tokenizer prefers.

    On the right no real token of a causal model can see padding, and positions count from 0 with
    no position ids given, in every architecture.
    """

    def __init__(
        self,
        batch: Batch,
        prompts: list[TokenizedPrompt],
        mean: bool,
        model: LoadedModel,
        done: NDArray[np.bool_] | None,
    ) -> None:
        import torch

        wanted = _wanted(batch.prompts, done)
        self.prompts = tuple(batch.prompts[number] for number in wanted)
        # A half of a batch keeps the padding of the whole, which its numbers and place depend on.
        longest = batch.padded_length
        self.shape = (len(prompts), longest)
        ids = np.full(self.shape, model.pad_token_id, dtype=np.int64)
        owners = np.full(self.shape, -1, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt.ids
            owners[row, : len(prompt)] = batch.prompts[row]
        self.owners = owners.ravel()
        self.depths = np.tile(np.arange(longest), len(prompts))
        self.inputs = {"input_ids": torch.from_numpy(ids).to(model.input_device)}
        if (owners < 0).any():
            mask = torch.from_numpy((owners >= 0).astype(np.int64))
            self.inputs["attention_mask"] = mask.to(model.input_device)
        kept = [row * longest + prompts[row].kept.astype(np.int64) for row in wanted]
        self._select = _Selector(kept, mean)

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()

    def rows(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return self._select(hidden.flatten(0, 1))

    def finish(self, blocks: int) -> None:
        """Nothing is handed on."""


# ---------------------------------------------------------------- packs of the prefix tree


@dataclass(frozen=True)
class TreeWork:
    """Prompts as stretches of their prefix tree.

    Attributes:
        tree: the prompts.
        steps: in the order of the walk; none stands under one that is left out.
        tile: tokens that share one call of attention, up to four times as many behind a context.
        mean: one row per prompt, the mean over its kept tokens.
        done: bool [prompts], those whose rows are not wanted; None: all are.
    """

    tree: PrefixTree
    steps: Sequence[Stretch]
    tile: int
    mean: bool = False
    done: NDArray[np.bool_] | None = None

    @property
    def prompts(self) -> Sequence[TokenizedPrompt]:
        """All prompts."""
        return self.tree.prompts

    def attention(self, modules: list[Any]) -> AbstractContextManager[None]:
        """Attention that sees ancestors."""
        return attend_to_ancestors(modules)

    def remaining(self, done: NDArray[np.bool_]) -> TreeWork:
        """See `Work.remaining`.

        Steps stay whole. Beside those in which a prompt ends that is not done, those stay that hold
        what they stand under, and what these stand under in turn.
        """
        starts = np.array([step.start for step in self.steps])
        ends = self.tree.ends[~done]
        wanted = {*np.unique(np.searchsorted(starts, ends, side="right") - 1).tolist()}
        needed: set[int] = set()
        while wanted:
            number = wanted.pop()
            needed.add(number)
            above = np.searchsorted(starts, self.tree.path(int(starts[number])), side="right") - 1
            wanted |= {*np.unique(above).tolist()} - needed
        return replace(self, steps=[self.steps[n] for n in sorted(needed)], done=done)

    def feed(self, step: Stretch, context: Context, model: LoadedModel) -> Feed:
        """A pack made ready."""
        # Behind a long context larger tiles copy its keys less often.
        tile = max(self.tile, min(4 * self.tile, self.tree.depth(step.start) // 8))
        pack = self.tree.pack(step.start, step.stop, tile, self._then(step.stop))
        return _TreeFeed(pack, self, context, model)

    def places(
        self, prompts: NDArray[np.int64], depths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Work.places`."""
        tokens = self.tree.tokens(prompts, depths)
        starts = np.array(self._starts)
        numbers = np.searchsorted(starts, tokens, side="right") - 1
        return numbers, tokens - starts[numbers]

    def _then(self, stop: int) -> int:
        """Where the step begins that follows the one which ends at `stop`."""
        number = bisect_right(self._starts, stop - 1)
        inside = number and stop < self.steps[number - 1].stop  # a step was cut in two
        if inside:
            return stop
        return self._starts[number] if number < len(self.steps) else len(self.tree)

    @cached_property
    def _starts(self) -> list[int]:
        return [step.start for step in self.steps]


class _TreeFeed:
    """A pack as one row; a token's position is its depth."""

    def __init__(self, pack: Pack, work: TreeWork, context: Context, model: LoadedModel) -> None:
        import torch

        device = model.input_device
        wanted = _wanted(pack.prompts, work.done)
        self.prompts = tuple(pack.prompts[number] for number in wanted)
        self.owners, self.depths = pack.owners, pack.depths
        self.shape = (1, len(pack.ids))
        ids, depths = torch.from_numpy(pack.ids), torch.from_numpy(pack.depths)
        self.inputs = {
            "input_ids": ids[None].to(device),
            "position_ids": depths[None].to(device),
            # Without a mask transformers would take a jump in positions for a new document.
            "attention_mask": torch.ones(self.shape, dtype=torch.long, device=device),
        }
        self._pass = PackPass(pack, context.keys)
        self._context, self._carried = context, dict[int, "torch.Tensor"]()
        # Rows are carried from the first depth that any prompt keeps.
        lowest = work.tree.first_kept
        self._ahead = max(pack.context - lowest, 0)
        offset = min(lowest, pack.context)
        self._select = _Selector([pack.rows[number] - offset for number in wanted], work.mean)
        ahead = pack.carried[lowest:] - offset
        self._next = columns_on(ahead, device) if len(ahead) else None

    def running(self) -> AbstractContextManager[None]:
        return self._pass.running()

    def rows(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        import torch

        own = hidden[0]
        if self._ahead:
            own = torch.cat([self._context.rows[layer], own])
        if isinstance(self._next, slice):
            self._carried[layer] = own[self._next]
        elif self._next is not None:
            self._carried[layer] = own.index_select(0, self._next.to(own.device))
        return self._select(own)

    def finish(self, blocks: int) -> None:
        if self._pass.calls != blocks:
            raise PreflightError(
                f"expected every one of {blocks} blocks to attend once over the prefix tree, got "
                f"{self._pass.calls} attentions; this architecture does not share prefixes"
            )
        self._context.keys, self._context.rows = self._pass.carried, self._carried


# ---------------------------------------------------------------- rows


def _wanted(prompts: Sequence[int], done: NDArray[np.bool_] | None) -> list[int]:
    """Places of the prompts whose rows are wanted."""
    return [n for n, prompt in enumerate(prompts) if done is None or not done[prompt]]


class _Selector:
    """From [tokens, H] to the kept rows [K, H], or to their means."""

    def __init__(self, kept: Sequence[NDArray[np.int64]], mean: bool) -> None:
        import torch

        none = np.empty(0, dtype=np.int64)
        self._flat = torch.from_numpy(np.concatenate([none, *kept]))
        self._counts = [len(indices) for indices in kept]
        self._mean = mean

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        import torch

        rows = hidden.index_select(0, self._flat.to(hidden.device))
        if not self._mean or not self._counts:
            return rows
        # A mean of long texts in bfloat16 loses the direction; mps has no float64.
        wide = torch.float32 if hidden.device.type == "mps" else torch.float64
        pieces = torch.split(rows, self._counts)
        return torch.stack([piece.to(wide).mean(0) for piece in pieces]).to(hidden.dtype)
