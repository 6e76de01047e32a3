"""How a run goes: which engine, in steps of how many tokens, from which layer, in which memory.

Decided before a weight is read, from sizes alone. The default path is the fast one: the whole model
stays in memory where it fits, else it is streamed block by block.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from probecache.devices import device_kind, free_device_bytes
from probecache.errors import UsageError
from probecache.memory import available_bytes, resident_bytes
from probecache.plan import estimate_working_set

if TYPE_CHECKING:
    from probecache.models import ModelSource

__all__ = ["EngineName", "Execution", "Passage", "choose_execution", "find_passages"]

# Tokens per step. On a CPU larger steps gain nothing (docs/lab-notes.md); on an accelerator small
# ones leave it idle.
_TOKENS = {"cpu": 1024, "cuda": 16384, "mps": 4096}
_FEWEST_TOKENS = 64
# Memory that is said to be free may not be had to the last byte.
_SHARE = 0.9


class EngineName(StrEnum):
    """Which engine runs."""

    AUTO = "auto"
    RESIDENT = "resident"
    STREAM = "stream"


@dataclass(frozen=True)
class Passage:
    """Blocks start..max(layers) that give some layers, from a cached layer or from the tokens (0).

    Attributes:
        layers: rising.
        start: the layer whose rows are known; 0 with `cached` False: the tokens.
        cached: whether the rows of `start` come from the cache.
    """

    layers: tuple[int, ...]
    start: int = 0
    cached: bool = False

    @property
    def blocks(self) -> range:
        """The blocks that run; at least one, because without any there is no model to hook."""
        return range(self.start, max(self.layers[-1], self.start + 1))


def find_passages(wanted: Sequence[int], cached: Collection[int]) -> list[Passage]:
    """Share out the wanted layers among the nearest lower cached ones, or the tokens.

    Args:
        wanted: layers to compute, rising.
        cached: layers of which every token of every prompt is known.
    """
    groups: dict[int | None, list[int]] = {}
    for layer in wanted:
        below = [known for known in cached if known < layer]
        groups.setdefault(max(below, default=None), []).append(layer)
    return [
        Passage(tuple(layers)) if start is None else Passage(tuple(layers), start, cached=True)
        for start, layers in groups.items()
    ]


@dataclass(frozen=True)
class Execution:
    """How a run goes.

    Attributes:
        engine: resident or stream.
        batch_tokens: most tokens per step.
        hidden_on_disk: whether hidden states between streamed blocks go to a file.
        memory_bytes: estimate of what weights and working set take at most, Python itself apart.
        limit_bytes: what there is for that; None where nobody says.
    """

    engine: EngineName
    batch_tokens: int
    hidden_on_disk: bool
    memory_bytes: int
    limit_bytes: int | None


def choose_execution(
    source: ModelSource,
    passages: list[Passage],
    *,
    tokens: int,
    longest: int,
    engine: EngineName = EngineName.AUTO,
    memory: int | None = None,
    batch_tokens: int | None = None,
) -> Execution:
    """Decide how to run.

    Args:
        source: the model.
        passages: what to run; at least one.
        tokens: how many the run computes in all.
        longest: tokens of the longest prompt.
        engine: what the user asked for.
        memory: bytes that the run may take, Python itself included; None: what there is.
        batch_tokens: tokens per step as asked for; None: what suits device and memory.

    Raises:
        UsageError: what was asked for does not go together, or not into `memory`.
    """
    device = device_kind(source.options.device)
    if engine is EngineName.STREAM and source.options.device_map is not None:
        raise UsageError(
            "expected --engine stream on one device, got --device-map; leave one of them out"
        )
    sizes = _Sizes.of(source, passages, tokens, longest)
    limit = _limit(source, device, memory)
    if engine is EngineName.AUTO:
        few = sizes.step(min(batch_tokens or _FEWEST_TOKENS, tokens))
        fits = limit is None or sizes.resident + few <= limit
        whole = source.options.device_map is not None or source.why_not_streamed
        engine = EngineName.RESIDENT if fits or whole else EngineName.STREAM
    weights = sizes.resident if engine is EngineName.RESIDENT else sizes.streamed
    least = weights + sizes.step(min(_FEWEST_TOKENS, tokens))
    if memory is not None and limit is not None and least > limit:
        streams = engine is EngineName.RESIDENT and sizes.streamed + least - weights <= limit
        raise UsageError(
            f"expected --memory of at least {_size(least + memory - limit)} for this model with "
            f"--engine {engine}, got {_size(memory)}; give more"
            + (", or use --engine stream" if streams else "")
        )
    room = None if limit is None else limit - weights
    step = _tokens_within(room, sizes, batch_tokens or _TOKENS.get(device, _TOKENS["cuda"]))
    working = sizes.step(min(step, tokens))
    on_disk = room is not None and sizes.hidden > room - working
    streamed = engine is EngineName.STREAM
    return Execution(
        engine=engine,
        batch_tokens=step,
        hidden_on_disk=streamed and on_disk,
        memory_bytes=weights + working + (sizes.hidden if streamed and not on_disk else 0),
        limit_bytes=limit,
    )


def _limit(source: ModelSource, device: str, memory: int | None) -> int | None:
    """Bytes that weights and working set may take."""
    if device == "cuda":
        limits = [memory, free_device_bytes(source.options.device)]
        return min((limit for limit in limits if limit is not None), default=None)
    if memory is not None:
        return memory - resident_bytes()
    available = available_bytes()
    return None if available is None else int(available * _SHARE)


def _size(count: int) -> str:
    """Bytes as --memory takes them, rounded up."""
    unit, name = (10**9, "GB") if count >= 10**9 else (10**6, "MB")
    return f"{-(-count * 100 // unit) / 100:g}{name}"


def _tokens_within(room: int | None, sizes: _Sizes, tokens: int) -> int:
    while room is not None and tokens > _FEWEST_TOKENS and sizes.step(tokens) > room // 2:
        tokens //= 2
    return tokens


@dataclass(frozen=True)
class _Sizes:
    """Bytes in memory.

    Attributes:
        resident: all needed weights, and keys and values of the longest prompt.
        streamed: weights outside the blocks, the largest block and the one that is read meanwhile.
        hidden: residual stream of all tokens.
    """

    resident: int
    streamed: int
    hidden: int
    width: int
    intermediate: int
    heads: int
    itemsize: int
    longest: int

    @classmethod
    def of(cls, source: ModelSource, passages: list[Passage], tokens: int, longest: int) -> _Sizes:
        config, itemsize = source.text_config, source.dtype.itemsize
        heads = _largest(config, "num_attention_heads") or 1
        shared = (_largest(config, "num_key_value_heads") or heads) / heads
        context = int(2 * longest * source.hidden_size * shared * itemsize)
        outside = source.loaded_bytes(1, 1)
        largest = 0
        for block in {block for passage in passages for block in passage.blocks}:
            stored, loaded = source.block_bytes(block), source.loaded_bytes(block + 1, block)
            # Cast to another dtype, a block is there twice for a moment.
            cast = 0 if loaded - outside == stored else loaded - outside
            largest = max(largest, 2 * stored + cast)
        return cls(
            resident=max(
                source.loaded_bytes(one.blocks.stop, one.blocks.start) + context * len(one.blocks)
                for one in passages
            ),
            streamed=outside + largest + context,
            hidden=tokens * source.hidden_size * itemsize,
            width=source.hidden_size,
            intermediate=_largest(config, "intermediate_size") or 4 * source.hidden_size,
            heads=heads,
            itemsize=itemsize,
            longest=longest,
        )

    def step(self, tokens: int) -> int:
        """Working set of a step of so many tokens."""
        return estimate_working_set(
            tokens, self.longest, self.width, self.intermediate, self.heads, self.itemsize
        )


def _largest(config: Any, name: str) -> int:
    """A size from a config, which some architectures state per block; 0 where there is none."""
    value = getattr(config, name, None) or 0
    return int(max(value)) if isinstance(value, (list, tuple)) else int(value)
