"""A PEFT adapter on top of a cut model; sole importer of peft.

Guarantee: an adapter is applied whole or refused. Not covered: adapters that act outside the blocks
and embeddings (prompt and prefix tuning), or that the input switches on; they are refused too.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from probecache.checkpoint import folder_of, read_header
from probecache.errors import ModelError, one_line

__all__ = ["Adapter", "find_adapter"]

_SETTINGS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and what the user called it."""

    name: str
    folder: Path

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of its settings and weights."""
        digest = hashlib.sha256()
        for name in (_SETTINGS, _WEIGHTS):
            digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()

    def apply(self, shell: Any, block_of: Callable[[str], int | None], blocks: int) -> None:
        """Put the adapter into a model, in place.

        Args:
            shell: the model with its head, whose names the adapter's weights bear.
            block_of: the block that a weight belongs to, by its name.
            blocks: how many blocks the whole model has.

        Raises:
            ModelError: the adapter is not one of this model.
        """
        self._put(shell, block_of, blocks)

    def reach(
        self, shell: Any, block_of: Callable[[str], int | None], blocks: int
    ) -> frozenset[int | None]:
        """The blocks that the adapter changes; None stands for something outside.

        Args:
            shell: the whole model without weights; of no use afterwards.
            block_of, blocks: as in `apply`.

        Raises:
            ModelError: as `apply`.
        """
        # Some initial values are worked out of the model's weights, which are not there.
        wanted = self._put(shell, block_of, blocks, init_lora_weights=True)
        return frozenset(map(block_of, wanted))

    def _put(
        self, shell: Any, block_of: Callable[[str], int | None], blocks: int, **settings: Any
    ) -> set[str]:
        """Put the adapter into a model under other settings; names of its weights there."""
        from peft import PeftConfig, PeftModel

        try:
            # Peft warns of what is refused below, and of its own future.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = PeftConfig.from_pretrained(str(self.folder))
                if getattr(config, "megatron_config", None):
                    raise ValueError("one that names a module to import, megatron_core")
                for name in settings.keys() & vars(config).keys():
                    setattr(config, name, settings[name])
                # On the CPU the file is mapped, so what a part of the model lacks is not read.
                adapted = PeftModel.from_pretrained(
                    shell, str(self.folder), config=config, is_trainable=False, torch_device="cpu"
                )
                return self._require_whole(adapted, block_of, blocks)
        except Exception as error:  # peft raises many kinds for an adapter that does not fit
            raise ModelError(
                f"expected an adapter for this model in {self.name}, got: {one_line(error)}"
            ) from error

    def _require_whole(
        self, adapted: Any, block_of: Callable[[str], int | None], blocks: int
    ) -> set[str]:
        """Peft skips what does not fit with a warning at most; half an adapter is another model."""
        from peft import get_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTuner

        config = adapted.active_peft_config
        by_tokens = getattr(config, "alora_invocation_tokens", None)  # switched on by the input
        if (
            not isinstance(adapted.base_model, BaseTuner)
            or config.peft_type == "XLORA"
            or by_tokens
        ):
            raise ValueError(f"one of the type {config.peft_type.value}, not inside the blocks")
        stored = {tensor.name for tensor in read_header(self.folder / _WEIGHTS)}
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        missing = wanted - stored
        if missing:
            raise ValueError(f"one without the weights {min(missing)}")
        if any((block_of(name) or 0) >= blocks for name in stored):
            raise ValueError("one of a deeper model")
        return set(wanted)


def find_adapter(name: str, settings: Sequence[str]) -> Adapter:
    """The adapter in a folder, or fetched from the hub with the files of these patterns.

    Raises:
        ModelError: no such adapter, one not in safetensors, or peft is missing.
    """
    if find_spec("peft") is None:
        raise ModelError(
            "expected the package peft for --adapter, got none; "
            "install it with: pip install 'probecache[adapter]'"
        )
    folder = folder_of(name, None, [*settings, _WEIGHTS])
    for file in (_SETTINGS, _WEIGHTS):
        if not (folder / file).is_file():
            raise ModelError(
                f"expected {file} in {name}, got none; save the adapter with peft's save_pretrained"
            )
    return Adapter(name, folder)
