"""Attention over packs of a prefix tree, under the models' own attention functions.

Transformers lets a model's attention be replaced by a registered function. Ours cuts a pack into
tiles, gives each tile's tokens the keys and values of their ancestors, and hands both to the
function that the model had before, with a mask. The rule which earlier positions a layer sees
(causal, sliding window, chunks) is the model's own: it is asked about depths in the tree.

Guarantee: a model whose attention does not come through here once per block is told apart
(`PackPass.calls`). Imports transformers, because it registers itself there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from probecache.prefixes import Pack, Tile

__all__ = ["KeyValues", "PackPass", "attend_to_ancestors", "columns_on"]

_PREFIX = "prefix_tree_"
_MANY = 1 << 40
_current: ContextVar[PackPass] = ContextVar("pass of a pack through a model")

# Keys and values of a context, [1, heads, context or more, width] each, by the order of the
# attentions.
KeyValues = dict[int, tuple["torch.Tensor", "torch.Tensor"]]


@dataclass
class PackPass:
    """One pack on its way through a model, or through one block.

    Attributes:
        pack: what is computed.
        context: keys and values of the pack's context.
        carried: keys and values of the next pack's context, as far as attention has come.
        calls: how many attentions have come through.
    """

    pack: Pack
    context: KeyValues
    carried: KeyValues = field(default_factory=dict)
    calls: int = 0
    _places: dict[torch.device, _Places] = field(default_factory=dict)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let attention know which pack it is about."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def attend(
        self,
        attention: Callable[..., Any],
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: _TreeMask,
        **options: Any,
    ) -> torch.Tensor:
        """[1, heads, T, width] each to [1, T, heads, width]."""
        import torch

        number, self.calls = self.calls, self.calls + 1
        places = self._places_on(query.device)
        if self.pack.context:
            keys, values = self.context[number]
            key, value = self._behind(keys, key), self._behind(values, value)
        pieces = [
            attention(
                module,
                query[:, :, tile.start : tile.stop],
                _at(key, columns),
                _at(value, columns),
                sees,
                **options,
            )[0]
            for tile, columns, sees in zip(
                self.pack.tiles, places.columns, mask.on(query.device, query.dtype), strict=True
            )
        ]
        if self.pack.context and isinstance(places.carried, slice) and places.carried.start == 0:
            # As they are, with room behind them. Not those of a first pack: they are the model's,
            # which may need them again for later blocks.
            self.carried[number] = (key, value)
        elif places.carried is not None:
            self.carried[number] = (_at(key, places.carried), _at(value, places.carried))
        return torch.cat(pieces, dim=1)

    def _behind(self, context: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The context with the pack's own behind it, and room for the packs of a long prompt.

        They could copy the whole context each time; that cost 8 % of a run over long prompts.
        """
        start, stop = self.pack.context, self.pack.context + own.shape[2]
        if context.shape[2] < stop:
            shape = (own.shape[0], own.shape[1], stop + stop // 2, own.shape[3])
            grown = own.new_empty(shape)
            grown[:, :, :start] = context[:, :, :start]
            context = grown
        context[:, :, start:stop] = own
        return context

    def _places_on(self, device: torch.device) -> _Places:
        # Blocks may be spread over several devices.

        if device not in self._places:
            self._places[device] = _Places(
                [columns_on(tile.columns, device) for tile in self.pack.tiles],
                columns_on(self.pack.carried, device) if len(self.pack.carried) else None,
            )
        return self._places[device]


@dataclass(frozen=True)
class _Places:
    """A pack's coordinates on a device."""

    columns: list[torch.Tensor | slice]
    carried: torch.Tensor | slice | None


def columns_on(columns: NDArray[np.int64], device: torch.device) -> torch.Tensor | slice:
    """Coordinates to take, at least one: a slice where there are no gaps, which needs no copy."""
    import torch

    first, last = int(columns[0]), int(columns[-1])
    if last - first + 1 == len(columns):
        return slice(first, last + 1)
    return torch.from_numpy(columns).to(device)


def _at(tensor: torch.Tensor, columns: torch.Tensor | slice) -> torch.Tensor:
    return tensor[:, :, columns] if isinstance(columns, slice) else tensor.index_select(2, columns)


@dataclass
class _TreeMask:
    """What goes through a model in place of a mask: per tile, [1, 1, tokens, columns], to add.

    Numbers to add and not booleans: attention would turn those into these in every block again.
    """

    tiles: list[torch.Tensor]

    def on(self, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        """The tiles as a block's attention wants them; most often as they are."""
        self.tiles = [tile.to(device, dtype) for tile in self.tiles]
        return self.tiles

    def __getitem__(self, index: tuple[slice, ...]) -> _TreeMask:
        # Gemma 4 cuts masks down to the tokens it keeps, which are all of them here.
        if any(part.indices(_MANY) != (0, _MANY, 1) for part in index):
            raise TypeError(f"a mask cut to {index}")
        return self


@contextmanager
def attend_to_ancestors(modules: Iterator[Any] | list[Any]) -> Iterator[None]:
    """Put this attention in the place of the models' own meanwhile.

    Args:
        modules: the models and blocks that will run, which may each have a config of their own.
    """
    configs = {
        id(module.config): module.config
        for root in modules
        for module in root.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for key, config in configs.items():
            config._attn_implementation = _registered(before[key])
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _registered(implementation: str) -> str:
    """The name of the tree's form of an attention implementation."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if implementation.startswith(_PREFIX):
        return implementation
    name = _PREFIX + implementation
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, _attention_over(implementation))
        AttentionMaskInterface.register(name, _mask_over(implementation))
    return name


def _attention_over(implementation: str) -> Callable[..., Any]:
    from transformers import AttentionInterface

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        # Eager attention is each model's own function, in the module of its attention.
        written_out = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        own = AttentionInterface().get_interface(implementation, written_out)
        if not isinstance(attention_mask, _TreeMask):
            raise TypeError(f"a mask of type {type(attention_mask).__name__}")
        running = _current.get()
        return running.attend(own, module, query, key, value, attention_mask, **options), None

    return attention


def _mask_over(implementation: str) -> Callable[..., Any]:
    def mask(
        mask_function: Callable[..., torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
        **_options: Any,
    ) -> _TreeMask:
        import torch
        from transformers.masking_utils import causal_mask_function

        # Attention written out takes the least number for nothing, as it has no infinity in mind.
        nothing = torch.finfo(dtype).min if implementation == "eager" else -torch.inf
        rule = None if mask_function is causal_mask_function else mask_function
        tiles = _current.get().pack.tiles
        return _TreeMask([_tile_mask(tile, rule, nothing, device, dtype) for tile in tiles])

    return mask


def _tile_mask(
    tile: Tile,
    rule: Callable[..., torch.Tensor] | None,
    nothing: float,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[1, 1, tokens, columns]: 0 where a token sees a column, `nothing` where it does not.

    Args:
        rule: the model's, of depths; None: any ancestor is seen.
    """
    import torch

    count = tile.stop - tile.start
    added = torch.zeros((count, len(tile.columns)), dtype=dtype, device=device)
    if rule is not None:
        depths = torch.from_numpy(tile.depths).to(device)
        zero = torch.zeros((), dtype=torch.long, device=device)
        allowed = rule(zero, zero, depths[-count:, None], depths[None, :])
        added.masked_fill_(~allowed, nothing)
    if tile.is_chain:
        later = torch.ones((count, count), dtype=torch.bool, device=device).triu(1)
        added[:, -count:].masked_fill_(later, nothing)
    else:
        added.masked_fill_(~torch.from_numpy(tile.sees).to(device), nothing)
    return added[None, None]
