"""Token ids to residual streams.

An `Engine` takes prompts and planned batches and yields rows, layer by layer or batch by batch, in
whatever order suits it; it knows neither files nor examples. Guarantee: each prompt's kept rows
come out exactly once per layer, in the order of `kept`, as if the prompt had run alone (up to the
rounding of the dtype). Only the kept rows leave the device.

Dimensions: B prompts of a batch, T padded tokens, H hidden size, K kept rows of the batch.
"""

from __future__ import annotations

import gc
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from probecache.errors import OutOfMemoryError
from probecache.loaded import hidden_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import torch

    from probecache.loaded import LoadedModel
    from probecache.plan import Batch
    from probecache.types import TokenizedPrompt

__all__ = ["Engine", "ResidentEngine", "Rows", "is_out_of_memory", "no_room"]


@dataclass(frozen=True)
class Rows:
    """Rows of some prompts at one layer: [K, hidden] on the CPU, prompt after prompt."""

    layer: int
    prompts: tuple[int, ...]
    values: torch.Tensor


class Engine(Protocol):
    """Runs prompts through a model and yields the rows that are kept."""

    def run(
        self,
        prompts: Sequence[TokenizedPrompt],
        batches: Iterable[Batch],
        layers: Sequence[int],
        *,
        mean: bool = False,
    ) -> Iterator[Rows]:
        """Yield the kept rows of every prompt at every layer.

        Args:
            prompts: all prompts of the run.
            batches: which of them go together.
            layers: rising; each at most the depth that was loaded.
            mean: one row per prompt, the mean over its kept tokens.

        Raises:
            OutOfMemoryError: a single prompt does not fit.
        """
        ...


@dataclass
class ResidentEngine:
    """The whole (cut) model stays on its devices; batches go through one after the other.

    A batch that does not fit is halved and run again; so is every later one of its size.
    """

    model: LoadedModel
    _largest_padded: int = field(default=1 << 62)

    def run(
        self,
        prompts: Sequence[TokenizedPrompt],
        batches: Iterable[Batch],
        layers: Sequence[int],
        *,
        mean: bool = False,
    ) -> Iterator[Rows]:
        """See `Engine.run`."""
        waiting = deque(batches)
        while waiting:
            batch = waiting.popleft()
            if batch.padded_tokens > self._largest_padded and len(batch.prompts) > 1:
                waiting.extendleft(reversed(batch.halves()))
                continue
            rows = self._attempt(prompts, batch, layers, mean)
            if rows is None:
                self._shrink(batch, prompts)
                waiting.appendleft(batch)
                continue
            for layer, values in rows.items():
                yield Rows(layer, batch.prompts, values)

    def _attempt(
        self, prompts: Sequence[TokenizedPrompt], batch: Batch, layers: Sequence[int], mean: bool
    ) -> dict[int, torch.Tensor] | None:
        """Rows of a batch by layer; None when memory ran out."""
        import torch

        try:
            with torch.inference_mode():
                return self._forward([prompts[index] for index in batch.prompts], layers, mean)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _shrink(self, batch: Batch, prompts: Sequence[TokenizedPrompt]) -> None:
        # Runs after the except clause: the traceback would have kept the batch's tensors alive.
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch.prompts) == 1:
            raise no_room(len(prompts[batch.prompts[0]]))
        self._largest_padded = batch.padded_tokens // 2

    def _forward(
        self, prompts: Sequence[TokenizedPrompt], layers: Sequence[int], mean: bool
    ) -> dict[int, torch.Tensor]:
        import torch

        device = self.model.input_device
        ids, mask = _pad(prompts, self.model.pad_token_id)
        select = _selector(prompts, ids.shape[1], mean)
        kept: dict[int, torch.Tensor] = {}
        hooks = self._hook(layers, lambda layer, hidden: kept.__setitem__(layer, select(hidden)))
        try:
            full = bool(mask.all())
            self.model.forward(
                torch.from_numpy(ids).to(device),
                None if full else torch.from_numpy(mask).to(device),
            )
        finally:
            for hook in hooks:
                hook.remove()
        return {layer: kept[layer].cpu() for layer in layers}

    def _hook(self, layers: Sequence[int], keep: Callable[[int, torch.Tensor], None]) -> list[Any]:
        """Listen where layer L passes: at the first block's input for 0, else behind block L-1.

        `hidden_states` of Hugging Face would hold every layer of every token, the last one normed.
        """
        blocks, hooks = self.model.blocks, []
        for layer in layers:
            if layer == 0:
                hooks.append(
                    blocks[0].register_forward_pre_hook(
                        lambda _m, args, kwargs: keep(0, _input_of(args, kwargs)), with_kwargs=True
                    )
                )
            else:
                hooks.append(
                    blocks[layer - 1].register_forward_hook(
                        lambda _m, _a, out, layer=layer: keep(layer, hidden_of(out))
                    )
                )
        return hooks


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return hidden_of(args[0] if args else kwargs["hidden_states"])


def _pad(prompts: Sequence[TokenizedPrompt], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, [B, T], padded on the right whatever the tokenizer prefers.

    On the right no real token of a causal model can see padding, and positions count from 0 with
    no position ids given, in every architecture.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), pad, dtype=np.int64)
    mask = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt.ids
        mask[row, : len(prompt)] = 1
    return ids, mask


def _selector(
    prompts: Sequence[TokenizedPrompt], padded: int, mean: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from [B, T, H] to the kept rows [K, H], or their means [B, H]."""
    import torch

    flat = torch.from_numpy(
        np.concatenate([row * padded + prompt.kept for row, prompt in enumerate(prompts)])
    ).long()
    counts = [len(prompt.kept) for prompt in prompts]

    def rows_of(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.flatten(0, 1).index_select(0, flat.to(hidden.device))

    def means_of(hidden: torch.Tensor) -> torch.Tensor:
        # A mean of long texts in bfloat16 loses the direction; mps has no float64.
        wide = torch.float32 if hidden.device.type == "mps" else torch.float64
        pieces = torch.split(rows_of(hidden), counts)
        return torch.stack([piece.to(wide).mean(0) for piece in pieces]).to(hidden.dtype)

    return means_of if mean else rows_of


def no_room(tokens: int) -> OutOfMemoryError:
    """The error for a prompt of so many tokens that does not fit even alone."""
    return OutOfMemoryError(
        f"expected room for a prompt of {tokens} tokens beside the weights, but memory ran out; "
        "use fewer layers, --truncate on shorter texts, another --dtype or --device-map auto"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU's and mps' allocators raise plain RuntimeErrors.
    return "out of memory" in str(error) or "can't allocate memory" in str(error)
