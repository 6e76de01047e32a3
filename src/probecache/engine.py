"""Token ids to residual streams.

An `Engine` takes prompts cut into steps and yields rows, layer by layer or step by step, in
whatever order suits it; it knows neither files nor examples. Guarantee: each prompt's kept rows
come out exactly once per layer, in the order of `kept`, as if the prompt had run alone (up to the
rounding of the dtype). Only the kept rows leave the device, and the next step computes meanwhile.
"""

from __future__ import annotations

import gc
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from probecache.errors import OutOfMemoryError
from probecache.feeds import Context
from probecache.loaded import hidden_of, input_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from probecache.feeds import Feed, Work
    from probecache.loaded import LoadedModel
    from probecache.plan import Step

__all__ = [
    "Engine",
    "ResidentEngine",
    "Rows",
    "Start",
    "Transfer",
    "is_out_of_memory",
    "no_room",
    "release_memory",
]


@dataclass(frozen=True)
class Rows:
    """Rows of some prompts at one layer: [K, hidden] on the CPU, prompt after prompt."""

    layer: int
    prompts: tuple[int, ...]
    values: torch.Tensor


class Start(Protocol):
    """Residual streams that are known already, so that the blocks below need not run."""

    @property
    def layer(self) -> int:
        """Where the rows belong."""
        ...

    def rows(self, prompts: NDArray[np.int64], depths: NDArray[np.int64]) -> torch.Tensor:
        """The rows [tokens, hidden] of some tokens, given by prompt and place in it; on the CPU.

        A prompt of -1 stands for padding; any finite row will do.
        """
        ...


class Engine(Protocol):
    """Runs prompts through a model and yields the rows that are kept."""

    def run(
        self,
        work: Work,
        layers: Sequence[int],
        start: Start | None = None,
        told: Callable[[int], None] = lambda _: None,
    ) -> Iterator[Rows]:
        """Yield the kept rows of every prompt at every layer.

        Args:
            work: all prompts of the run, in steps.
            layers: rising; each at most the depth that was loaded.
            start: where to begin, below the first of the layers; None: at the tokens.
            told: of tokens x blocks as they are computed.

        Raises:
            OutOfMemoryError: a step does not fit and cannot be cut.
            PreflightError: the model does not share prefixes although `work` asks for it.
        """
        ...


@dataclass
class ResidentEngine:
    """The whole (cut) model stays on its devices; steps go through one after the other.

    A step that does not fit is halved and run again; so is every later one of its size.
    """

    model: LoadedModel
    _largest: int = field(default=1 << 62)

    def run(
        self,
        work: Work,
        layers: Sequence[int],
        start: Start | None = None,
        told: Callable[[int], None] = lambda _: None,
    ) -> Iterator[Rows]:
        """See `Engine.run`."""
        blocks = range(start.layer if start else 0, self.model.depth)
        waiting, context = deque(work.steps), Context()
        computed: Transfer | None = None
        with work.attention([self.model.model]):
            while waiting:
                step = waiting.popleft()
                if step.tokens > self._largest and step.divisible:
                    waiting.extendleft(reversed(step.halves()))
                    continue
                feed = work.feed(step, context, self.model)
                transfer = self._attempt(feed, blocks, layers, start)
                if transfer is None:
                    self._shrink(step)
                    waiting.appendleft(step)
                    continue
                told(step.tokens * len(blocks))
                if computed is not None:
                    yield from computed.rows()
                computed = transfer
        if computed is not None:
            yield from computed.rows()

    def _attempt(
        self, feed: Feed, blocks: range, layers: Sequence[int], start: Start | None
    ) -> Transfer | None:
        """A step's rows on their way to the CPU; None when memory ran out."""
        import torch

        try:
            with torch.inference_mode():
                transfer = Transfer(feed.prompts, self._forward(feed, layers, start))
                feed.finish(len(blocks))  # last: what failed is run again from the same context
                return transfer
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _shrink(self, step: Step) -> None:
        # Runs after the except clause: the traceback would have kept the step's tensors alive.
        release_memory()
        if not step.divisible:
            raise no_room(step.tokens)
        self._largest = step.tokens // 2

    def _forward(
        self, feed: Feed, layers: Sequence[int], start: Start | None
    ) -> dict[int, torch.Tensor]:
        kept: dict[int, torch.Tensor] = {}

        def keep(layer: int, hidden: torch.Tensor) -> None:
            kept[layer] = feed.rows(layer, hidden)

        with ExitStack() as hooks:
            for hook in [*self._begin(feed, start), *self._listen(layers, keep)]:
                hooks.callback(hook.remove)
            with feed.running():
                self.model.forward(**feed.inputs)
        return kept

    def _begin(self, feed: Feed, start: Start | None) -> list[Any]:
        """Let the first block that runs take the rows that are known already."""
        if start is None:
            return []
        known = start.rows(feed.owners, feed.depths).view(*feed.shape, -1)
        return [self.model.feed_block(start.layer, known)]

    def _listen(
        self, layers: Sequence[int], keep: Callable[[int, torch.Tensor], None]
    ) -> list[Any]:
        """Listen where layer L passes: at the first block's input for 0, else behind block L-1.

        `hidden_states` of Hugging Face would hold every layer of every token, the last one normed.
        """
        blocks, hooks = self.model.blocks, []
        for layer in layers:
            if layer == 0:
                hooks.append(
                    blocks[0].register_forward_pre_hook(
                        lambda _m, args, kwargs: keep(0, input_of(args, kwargs)), with_kwargs=True
                    )
                )
            else:
                hooks.append(
                    blocks[layer - 1].register_forward_hook(
                        lambda _m, _a, out, layer=layer: keep(layer, hidden_of(out))
                    )
                )
        return hooks


class Transfer:
    """Rows on their way from the device to the CPU, without waiting for them."""

    def __init__(self, prompts: tuple[int, ...], kept: dict[int, torch.Tensor]) -> None:
        import torch

        self._prompts = prompts
        self._events: list[Any] = []
        self._values: dict[int, torch.Tensor] = {}
        for layer, rows in kept.items():
            if rows.device.type != "cuda":
                self._values[layer] = rows.cpu()
                continue
            self._values[layer] = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self._values[layer].copy_(rows, non_blocking=True)
            self._events.append(torch.cuda.current_stream(rows.device).record_event())

    def rows(self) -> Iterator[Rows]:
        """The rows, once they have arrived; none where no prompt ends in the step."""
        for event in self._events:
            event.synchronize()
        if self._prompts:
            for layer in sorted(self._values):
                yield Rows(layer, self._prompts, self._values[layer])


def release_memory() -> None:
    """Give back what dead tensors hold."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def no_room(tokens: int) -> OutOfMemoryError:
    """The error for a step of so many tokens that does not fit even alone."""
    return OutOfMemoryError(
        f"expected room for a prompt of {tokens} tokens beside the weights, but memory ran out; "
        "use --engine stream, fewer layers, --truncate on shorter texts or another --dtype"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU's and mps' allocators raise plain RuntimeErrors.
    return "out of memory" in str(error) or "can't allocate memory" in str(error)
