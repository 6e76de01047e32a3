"""Tiny models of many families, with weights drawn large enough to matter, and their tokenizers.

build(family, folder)        weights and tokenizer, as a user would have them on disk
plain_layers(family, ...)    the answer that the tests compare with: Hugging Face, prompt by prompt
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

BLOCKS = 4
HIDDEN = 32
VOCAB = 264
WINDOW = 6  # tokens that a sliding window sees: fewer than most prompts have

# Lengths differ so that every batch pads; the last one is a single token beside BOS.
TEXTS = [
    "The quick brown fox jumps over the lazy dog",
    "Is this a test?",
    "Deploy it now, please",
    "a much longer text that fills a batch all alone, ä ö ü",
    "hello world",
    "Hm",
    "x",
]
RECORDS = [
    {"text": text, "type": "testing" if number % 2 else "deployment"}
    for number, text in enumerate(TEXTS)
]

# Opens with BOS itself and puts words of its own around every turn.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A model family: its config, where its blocks are, how its tokenizer opens and closes."""

    name: str
    kind: str
    settings: dict[str, Any]
    blocks: str = "model.layers"
    masked: bool = False
    specials: tuple[str, ...] = ("<pad>", "<s>", "</s>")
    attention: str | None = "eager"
    tolerance: float = 1e-5  # relative difference that rounding in float32 explains

    @cached_property
    def config(self) -> Any:
        return getattr(transformers, self.kind)(**self.settings)

    @property
    def head(self) -> Any:
        return AutoModelForMaskedLM if self.masked else AutoModelForCausalLM


_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_LLAMA = {**_GROUPED, "head_dim": 8}
_BERT_SPECIALS = ("[PAD]", "[CLS]", "[SEP]")
_OLD_SIZES = {k: v for k, v in _SIZES.items() if k not in ("intermediate_size", "hidden_size")}

FAMILIES = {
    family.name: family
    for family in [
        Family("llama", "LlamaConfig", _LLAMA),
        Family("mistral", "MistralConfig", {**_LLAMA, "sliding_window": WINDOW}),
        Family(
            "qwen2",
            "Qwen2Config",
            {**_GROUPED, "use_sliding_window": True, "sliding_window": WINDOW}
            | {"max_window_layers": 2},
        ),
        Family("qwen3", "Qwen3Config", _LLAMA),
        Family(
            "qwen3_moe",
            "Qwen3MoeConfig",
            {**_LLAMA, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
        ),
        Family("mixtral", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
        Family("gemma2", "Gemma2Config", {**_LLAMA, "sliding_window": WINDOW}),
        Family("gemma3", "Gemma3TextConfig", {**_LLAMA, "sliding_window": WINDOW}),
        Family(
            "gemma3_images",
            "Gemma3Config",
            {
                "text_config": {**_LLAMA, "sliding_window": WINDOW},
                "vision_config": {
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 28,
                    "patch_size": 14,
                },
                # Their ids mark images in the input; outside the vocabulary none occurs.
                "image_token_index": VOCAB - 1,
                "boi_token_index": VOCAB - 2,
                "eoi_token_index": VOCAB - 3,
                "mm_tokens_per_image": 4,
            },
            blocks="model.language_model.layers",
        ),
        Family("gpt2", "GPT2Config", {**_OLD_SIZES, "n_embd": HIDDEN}, blocks="transformer.h"),
        Family("gpt_neox", "GPTNeoXConfig", _SIZES, blocks="gpt_neox.layers"),
        Family(
            # An embedding per block, keys and values shared among the last blocks.
            "gemma4",
            "Gemma4TextConfig",
            {**_LLAMA, "sliding_window": WINDOW, "hidden_size_per_layer_input": 8}
            | {"vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 2}
            | {
                "use_double_wide_mlp": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            # Attention without scaling: plain float32 and float64 differ by 1.4e-5 here themselves.
            tolerance=5e-5,
        ),
        Family(
            # The last block attends to everything, whatever its turn: a cut model must not.
            "gemma4_dense",
            "Gemma4TextConfig",
            {**_LLAMA, "sliding_window": WINDOW, "hidden_size_per_layer_input": 0}
            | {"global_head_dim": 8},
        ),
        Family("phi3", "Phi3Config", _GROUPED),
        Family("glm4", "Glm4Config", _LLAMA),
        Family("granite", "GraniteConfig", _GROUPED),
        Family("stablelm", "StableLmConfig", _GROUPED),
        Family("smollm3", "SmolLM3Config", _GROUPED),
        Family("starcoder2", "Starcoder2Config", {**_GROUPED, "sliding_window": WINDOW}),
        Family(
            "llama4",
            "Llama4TextConfig",
            {**_LLAMA, "num_local_experts": 2, "intermediate_size_mlp": 48}
            | {"attention_chunk_size": 8},
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3Config",
            {**_SIZES, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2}
            | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16}
            | {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
            | {"num_key_value_heads": 4},
        ),
        Family("olmo2", "Olmo2Config", _GROUPED),
        Family("cohere2", "Cohere2Config", {**_GROUPED, "sliding_window": WINDOW}),
        Family(
            "gpt_oss",
            "GptOssConfig",
            {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
        ),
        Family(
            "opt",
            "OPTConfig",
            {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN},
            blocks="model.decoder.layers",
        ),
        Family(
            "falcon", "FalconConfig", {**_OLD_SIZES, "hidden_size": HIDDEN}, blocks="transformer.h"
        ),
        Family(
            "bloom", "BloomConfig", {**_OLD_SIZES, "hidden_size": HIDDEN}, blocks="transformer.h"
        ),
        Family(
            "bert",
            "BertConfig",
            _SIZES,
            blocks="bert.encoder.layer",
            masked=True,
            specials=_BERT_SPECIALS,
        ),
        Family(
            "roberta",
            "RobertaConfig",
            {**_SIZES, "bos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 130},
            blocks="roberta.encoder.layer",
            masked=True,
            specials=("<s>", "<pad>", "</s>"),
        ),
        Family(
            "modernbert",
            "ModernBertConfig",
            {**_SIZES, "local_attention": WINDOW, "cls_token_id": 1, "sep_token_id": 2},
            masked=True,
            specials=_BERT_SPECIALS,
        ),
        Family(
            "distilbert",
            "DistilBertConfig",
            {"vocab_size": VOCAB, "dim": HIDDEN, "n_layers": BLOCKS, "n_heads": 4}
            | {"hidden_dim": 48, "max_position_embeddings": 128, "pad_token_id": 0},
            blocks="distilbert.transformer.layer",
            masked=True,
            specials=_BERT_SPECIALS,
        ),
    ]
}
# A state-space model: Hugging Face numbers its hidden states otherwise.
MAMBA = Family(
    "mamba",
    "MambaConfig",
    {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS},
    blocks="backbone.layers",
    attention=None,
)


def build(
    family: Family, folder: Path, *, chat: bool = False, seed: int = 0, shard: str = "5GB"
) -> Path:
    """Write a model of random weights, head included, and its tokenizer."""
    torch.manual_seed(seed)
    model = family.head.from_config(family.config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:  # biases near 0 and norms near 1 stay there, but not exactly
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer(family, chat=chat).save_pretrained(folder)
    return folder


def tokenizer(family: Family, *, chat: bool = False, side: str = "right") -> Any:
    """Bytes as tokens behind BOS; for BERT's family, letters between [CLS] and [SEP]."""
    opens = next(s for s in family.specials if s in ("<s>", "[CLS]"))
    closes = next(s for s in family.specials if s in ("</s>", "[SEP]"))
    pads = next(s for s in family.specials if "pad" in s.lower())
    backend = _letters(family) if "[CLS]" in family.specials else _bytes(family)
    around = f"{opens} $A {closes}" if family.masked else f"{opens} $A"
    backend.post_processor = processors.TemplateProcessing(
        single=around,
        special_tokens=[(s, family.specials.index(s)) for s in (opens, closes)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=opens,
        eos_token=closes,
        pad_token=pads,
        padding_side=side,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def _bytes(family: Family) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*family.specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _letters(family: Family) -> Tokenizer:
    letters = [chr(number) for number in range(33, 127)]
    pieces = [*family.specials, "[UNK]", *letters, *(f"##{letter}" for letter in letters)]
    vocab = {token: number for number, token in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def token_ids(folder: Path, text: str) -> list[int]:
    """What Hugging Face's tokenizer makes of a text, special tokens included."""
    return transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def full_model(family: Family, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model with its head, attention written out where the family has it."""
    more = {"attn_implementation": family.attention} if family.attention else {}
    return family.head.from_pretrained(folder, dtype=dtype, **more).eval()


def plain_layers(family: Family, model: Any, ids: list[int]) -> list[torch.Tensor]:
    """Residual stream of one prompt run alone, [tokens, hidden] per layer, the last not normed."""
    caught = []
    last = model.get_submodule(family.blocks)[-1]
    handle = last.register_forward_hook(lambda _m, _i, out: caught.append(out))
    try:
        with torch.inference_mode():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    final = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    return [state[0] for state in states[:-1]] + [final[0]]


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest |found - expected| / |expected| over rows."""
    a, b = found.double(), expected.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())
