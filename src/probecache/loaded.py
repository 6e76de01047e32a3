"""A model in memory, cut behind its deepest wanted block, and where its blocks are.

Knows the names under which architectures keep their blocks, and what a block takes and returns. A
model arrives here from `models.py`; transformers is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from probecache.errors import ModelError, one_line

if TYPE_CHECKING:
    import torch

__all__ = [
    "NOT_TEXT",
    "LoadedModel",
    "find_blocks",
    "hidden_of",
    "input_of",
    "insert_pass_throughs",
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

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **more: Any
    ) -> Any:
        """The model's own forward, without KV cache."""
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **more
        )

    def plain_hidden_states(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """Residual stream of one prompt as Hugging Face itself hands it out, for comparison.

        Args:
            input_ids: [1, tokens].

        Returns:
            `depth` + 1 tensors [tokens, hidden]. The last is taken behind the last block, because
            Hugging Face norms that entry in most models.

        Raises:
            ModelError: the model keeps no single residual stream of the form [1, tokens, hidden].
        """
        caught: list[Any] = []
        handle = self.blocks[-1].register_forward_hook(lambda _m, _i, out: caught.append(out))
        try:
            states = self.forward(input_ids, None, output_hidden_states=True).hidden_states
        finally:
            handle.remove()
        stream = [*states[: self.depth], hidden_of(caught[-1])]
        for state in stream:
            if state.dim() != 3 or state.shape[:2] != input_ids.shape:
                raise ModelError(
                    f"expected {type(self.model).__name__} to keep one residual stream [1, tokens, "
                    f"hidden], got hidden states {list(state.shape)} for {input_ids.shape[1]} "
                    "tokens; this architecture is not supported"
                )
        return [state[0] for state in stream]


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
            last = loaded.forward(ids, None)[0]
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
