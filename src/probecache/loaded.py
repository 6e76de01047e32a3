"""A model in memory, cut behind its deepest wanted block, and where its blocks are.

Knows the names under which architectures keep their blocks, and what a block takes and returns. A
model arrives here from `models.py`; transformers is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from probecache.errors import ModelError, one_line

if TYPE_CHECKING:
    import torch

__all__ = [
    "NOT_TEXT",
    "Leftovers",
    "LoadedModel",
    "find_blocks",
    "hidden_of",
    "input_of",
    "insert_pass_throughs",
    "with_hidden",
]

# Names under which architectures keep the list of their blocks.
_BLOCK_LISTS = ("layers", "h", "layer", "blocks", "block")
NOT_TEXT = ("vision", "visual", "audio", "image", "speech")


@dataclass(frozen=True)
class LoadedModel:
    """A model cut behind its first `depth` blocks, without head."""

    model: Any
    depth: int

    @cached_property
    def blocks(self) -> Any:
        """The blocks, as a list of modules; one that is assigned takes its place in the model."""
        return find_blocks(self.model, self.depth)[1]

    @property
    def input_device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def attention(self) -> str:
        """The attention implementation that transformers chose."""
        return str(getattr(self.model.config, "_attn_implementation", None))

    @cached_property
    def has_experts(self) -> bool:
        """Whether tokens are routed to experts, where rounding can change a token's route."""
        return any("expert" in name for name, _ in self.model.named_modules())

    @property
    def pad_token_id(self) -> int:
        """Some id to fill a batch with; the model's own, because RoBERTa counts positions by it."""
        value = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return value if isinstance(value, int) and value >= 0 else 0

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model has an embedding for."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def forward(self, **inputs: Any) -> Any:
        """The model's own forward, without KV cache."""
        return self.model(use_cache=False, **inputs)

    def feed_block(self, index: int, hidden: torch.Tensor) -> Any:
        """A hook that gives a block this residual stream [B, tokens, hidden]; remove it after."""
        return self.blocks[index].register_forward_pre_hook(
            lambda _m, args, kwargs: with_hidden(args, kwargs, hidden), with_kwargs=True
        )

    def plain_hidden_states(
        self, input_ids: torch.Tensor, layer: int = 0, known: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Residual stream of one prompt as Hugging Face itself hands it out, for comparison.

        Args:
            input_ids: [1, tokens].
            layer: where `known` goes in; what is returned of layers up to it is of no use then.
            known: [1, tokens, hidden], the residual stream there; None: run from the tokens.

        Returns:
            `depth` + 1 tensors [tokens, hidden]. The last is taken behind the last block, because
            Hugging Face norms that entry in most models.

        Raises:
            ModelError: the model keeps no single residual stream of the form [1, tokens, hidden].
        """
        caught: list[Any] = []
        with ExitStack() as hooks:
            last = self.blocks[-1].register_forward_hook(lambda _m, _i, out: caught.append(out))
            hooks.callback(last.remove)
            if known is not None:
                hooks.callback(self.feed_block(layer, known).remove)
            states = self.forward(input_ids=input_ids, output_hidden_states=True).hidden_states
        stream = [*states[: self.depth], hidden_of(caught[-1])]
        for state in stream:
            if state.dim() != 3 or state.shape[:2] != input_ids.shape:
                raise ModelError(
                    f"expected {type(self.model).__name__} to keep one residual stream [1, tokens, "
                    f"hidden], got hidden states {list(state.shape)} for {input_ids.shape[1]} "
                    "tokens; this architecture is not supported"
                )
        return [state[0] for state in stream]

    def run_block(
        self, index: int, inputs: Mapping[str, Any], known: torch.Tensor | None, left: Leftovers
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one block, all others being pass-throughs.

        The whole model runs as far as that block, so it gets masks, positions and whatever else an
        architecture hands to its blocks from the architecture itself.

        Args:
            inputs: what the model's forward takes.
            known: the residual stream [B, tokens, hidden] to give it; None: what comes from below.
            left: what lower blocks left for this one; its own is added.

        Returns:
            The residual stream before and behind the block.
        """
        caught: list[torch.Tensor] = []

        def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            left.give(kwargs)
            if known is not None:
                args, kwargs = with_hidden(args, kwargs, known)
            caught.append(input_of(args, kwargs))
            return args, kwargs

        def leave(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            left.take(kwargs)
            caught.append(hidden_of(output))
            raise _Reached

        block = self.blocks[index]
        self._run_until(
            inputs,
            block.register_forward_pre_hook(enter, with_kwargs=True),
            block.register_forward_hook(leave, with_kwargs=True),
        )
        return caught[0], caught[1]

    def embed(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The residual stream [B, tokens, hidden] that the first block is given."""
        caught: list[torch.Tensor] = []

        def stop(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(input_of(args, kwargs))
            raise _Reached

        self._run_until(inputs, self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True))
        return caught[0]

    def _run_until(self, inputs: Mapping[str, Any], *hooks: Any) -> None:
        """The model's forward, until a hook says that the rest is of no use."""
        try:
            self.forward(**inputs)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    def check_layer_convention(self) -> None:
        """Let pass-throughs number the stream, and see where Hugging Face finds which number.

        Raises:
            ModelError: `hidden_states[L]` of Hugging Face is not the stream after L blocks.
        """
        import torch

        ids = torch.arange(6, device=self.input_device).view(2, 3) % self.vocab_size
        forwards = [block.forward for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.forward = partial(_numbered, forwards[index], index + 1)
        try:
            with torch.inference_mode():
                first = self.embed({"input_ids": ids})
                states = self.forward(input_ids=ids, output_hidden_states=True).hidden_states
        finally:
            for block, forward in zip(self.blocks, forwards, strict=True):
                block.forward = forward
        # The last may be normed.
        expected = [first, *(torch.full_like(first, layer) for layer in range(1, self.depth))]
        if len(states) <= self.depth or not all(map(torch.equal, states, expected)):
            raise ModelError(
                f"expected hidden_states[L] of {type(self.model).__name__} to be the residual "
                "stream after L blocks, got another count; this architecture is not supported"
            )


class _Reached(Exception):
    """A forward has come to where its result is known."""


@dataclass
class Leftovers:
    """What blocks leave for later ones in mappings that all of them are given.

    Gemma 4 shares keys and values between blocks that way.
    """

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)

    def give(self, kwargs: Mapping[str, Any]) -> None:
        """Put in, before a block runs, what lower ones left."""
        self._sizes = {name: len(mapping) for name, mapping in _mappings(kwargs)}
        for name, entries in self.entries.items():
            kwargs[name].update(entries)

    def take(self, kwargs: Mapping[str, Any]) -> None:
        """Keep, after a block ran, what mappings hold beyond what they came with."""
        for name, mapping in _mappings(kwargs):
            if len(mapping) > self._sizes[name]:
                self.entries[name] = dict(mapping)


def _mappings(kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in kwargs.items() if isinstance(value, MutableMapping)]


# ---------------------------------------------------------------- blocks that are not there


def insert_pass_throughs(loaded: LoadedModel, blocks: Sequence[Any]) -> None:
    """Put blocks without weights in the first places of a model; they hand on what they are given.

    They stay the modules of the architecture, because its loop reads off them what kind of block
    comes next, but on the meta device and with another forward. Whether that loop expects a tensor
    or a tuple is tried out on two short rows of tokens.

    Raises:
        ModelError: the architecture passes on something else from block to block.
    """
    for index, block in enumerate(blocks):
        loaded.blocks[index] = block
    error: Exception | None = None
    for as_tuple in (False, True):
        for block in blocks:
            block.forward = partial(_pass_on, as_tuple=as_tuple)
        try:
            if not blocks or _hands_on(loaded, len(blocks)):
                return
        except Exception as caught:  # whatever an architecture makes of a wrong form
            error = error or caught
    raise ModelError(
        f"expected {type(loaded.model).__name__} to hand one residual stream [batch, tokens, "
        f"hidden] from block to block, got {one_line(error) if error else 'another form'}; this "
        "architecture cannot be streamed or continued from a cached layer"
    )


def _pass_on(*arguments: Any, as_tuple: bool, **options: Any) -> Any:
    hidden = input_of(arguments, options)
    return (hidden,) if as_tuple else hidden


def _numbered(forward: Any, number: int, *arguments: Any, **options: Any) -> Any:
    output = forward(*arguments, **options)
    stream = hidden_of(output).new_full(hidden_of(output).shape, number)
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def _hands_on(loaded: LoadedModel, count: int) -> bool:
    """Whether what `count` pass-throughs return arrives unchanged at the next block, and behind."""
    import torch

    # With two rows a tensor that is taken for a tuple loses a dimension that no view gives back.
    ids = torch.arange(6, device=loaded.input_device).view(2, 3) % loaded.vocab_size
    seen: list[Any] = []
    handles = [
        block.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for block in loaded.blocks[: count + 1]
    ]
    try:
        with torch.inference_mode():
            last = loaded.forward(input_ids=ids)[0]
    finally:
        for handle in handles:
            handle.remove()
    expected = seen[0].shape
    return (
        expected[:2] == ids.shape
        and last.shape[:2] == ids.shape
        and len(seen) == len(handles)
        and all(isinstance(x, torch.Tensor) and x.shape == expected for x in seen)
        and all(x is seen[0] or torch.equal(x.cpu(), seen[0].cpu()) for x in seen[1:])
    )


# ---------------------------------------------------------------- what blocks take and return


def input_of(arguments: Sequence[Any], options: Mapping[str, Any]) -> torch.Tensor:
    """The residual stream among what a block is called with."""
    return hidden_of(arguments[0] if arguments else options["hidden_states"])


def hidden_of(output: Any) -> torch.Tensor:
    """The residual stream in what a block was given or returned: a tensor, or first of a tuple."""
    tensor: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return tensor


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with another residual stream, on the device of the one they had."""
    moved = hidden.to(input_of(args, kwargs).device)
    if args:
        return (moved, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": moved}


def find_blocks(model: Any, depth: int) -> tuple[str, Any]:
    """Path and list of a model's blocks.

    Raises:
        ModelError: no list of `depth` modules under a name that architectures use.
    """
    import torch

    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == depth
        and path.rsplit(".", 1)[-1] in _BLOCK_LISTS
        and not any(word in path for word in NOT_TEXT)
    ]
    if not found:
        raise ModelError(
            f"expected {type(model).__name__} to keep its {depth} blocks in one list, found none; "
            "this architecture is not supported"
        )
    return min(found, key=lambda pair: pair[0].count("."))
