"""A model in memory, cut behind its deepest wanted block, and where its blocks are.

Knows the names under which architectures keep their blocks, and what a block takes and returns. A
model arrives here from `models.py`; transformers is not imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from probecache.errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["NOT_TEXT", "LoadedModel", "find_blocks", "hidden_of"]

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
        """The blocks, as a list of modules."""
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
