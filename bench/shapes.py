"""Llama shapes with random weights: the options that describe one, and the folder on disk.

The tokenizer is that of models/tiny-llama. Torch and transformers are imported only where weights
are made.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parents[1] / "models" / "tiny-llama"
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_NOTE = "shape.json"


@dataclass(frozen=True)
class Shape:
    """A Llama: sizes under transformers' names, and the dtype its weights are stored in."""

    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int = 3072
    tied: bool = True
    context: int = 8192
    dtype: str = "float32"

    @property
    def block_parameters(self) -> int:
        """Parameters of one block's matrices: what its matmuls multiply each token with."""
        kv = self.hidden // self.heads * self.kv_heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * kv
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """All parameters of the model with its head."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        norms = (2 * self.blocks + 1) * self.hidden
        return self.blocks * self.block_parameters + embeddings + norms

    def config(self) -> Any:
        """The shape as a LlamaConfig."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=self.context,
            bos_token_id=0,
            eos_token_id=3,
            pad_token_id=4,
        )

    def __str__(self) -> str:
        size = self.parameters
        count = f"{size / 1e9:.1f}B" if size >= 1e9 else f"{size / 1e6:.1f}M"
        return (
            f"Llama, {count} parameters: hidden {self.hidden}, {self.blocks} blocks, {self.heads} "
            f"heads ({self.kv_heads} for keys and values), intermediate {self.intermediate}, "
            f"vocabulary {self.vocab}, {self.dtype}"
        )


SMALL = Shape(hidden=768, blocks=12, heads=12, kv_heads=12, intermediate=2080)  # 88M
MEDIUM = Shape(hidden=1536, blocks=24, heads=16, kv_heads=8, intermediate=4096)  # 628M
LLAMA_8B = Shape(4096, 32, 32, 8, 14336, vocab=128256, tied=False, dtype="bfloat16")
LLAMA_70B = Shape(8192, 80, 64, 8, 28672, vocab=128256, tied=False, dtype="bfloat16")
_SIZES = ("hidden", "blocks", "heads", "kv_heads", "intermediate", "vocab")


def add_shape_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Options for each size; what is left out is the default shape's."""
    group = parser.add_argument_group("shape of the model", f"default: {default}")
    for name in _SIZES:
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))


def shape_of(options: argparse.Namespace, default: Shape) -> Shape:
    """The default shape with what the options say otherwise."""
    given = {name: getattr(options, name) for name in (*_SIZES, "dtype")}
    return replace(default, **{name: value for name, value in given.items() if value is not None})


def layer_numbers(text: str) -> tuple[int, ...]:
    """`2,4,6,8` as rising numbers, for argparse."""
    return tuple(sorted({int(word) for word in text.split(",")}))


def is_written(folder: Path, shape: Shape) -> bool:
    """Whether a folder holds a finished model of this shape."""
    note = folder / _NOTE
    return note.is_file() and json.loads(note.read_text()) == asdict(shape)


def write_llama(folder: Path, shape: Shape, device: str = "cpu") -> Path:
    """Write weights, config and tokenizer, or leave a folder of the same shape as it is."""
    if is_written(folder, shape):
        return folder
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=getattr(torch, shape.dtype))
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / _NOTE
    note.unlink(missing_ok=True)
    model.save_pretrained(folder)
    for name in _FILES:
        shutil.copyfile(TOKENIZER / name, folder / name)
    note.write_text(json.dumps(asdict(shape)))  # last: a folder without it is not reused
    return folder
