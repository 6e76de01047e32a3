"""A model's config: how it is read, and what it says of what a token sees and depends on.

Imports transformers, as `models.py`, `loading.py` and `attention.py` do.
"""

from __future__ import annotations

import json
import math
import re
import stat
from typing import TYPE_CHECKING, Any

from probecache.errors import ModelError, one_line
from probecache.foreign import read_text_bytes, require_sane_density

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "context_length",
    "depends_on_length",
    "is_causal",
    "place_limit",
    "quiet_transformers",
    "read_config",
]


# What is read of a folder before its weights; the largest vocabularies have 35 MB.
_SETTINGS = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_MOST_BYTES = 256 << 20
# Transformers makes many times its size of it; names of 20,000 classes take 2 MB, all else little.
_CONFIG, _MOST_CONFIG_BYTES = "config.json", 4 << 20
# Every one is built, empty or as a name, before weights are looked at; no model has nearly as many.
_COUNTS = (
    (re.compile(r"(^|_)(layer|block|expert)s?$|^depth$"), 10_000),
    (re.compile(r"^num_(labels|classes)$"), 100_000),
)
# Transformers would compile others, or fetch and run them.
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


def quiet_transformers() -> None:
    """Drop reports on weights that were left out on purpose."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def read_config(folder: Path, name: str) -> Any:
    """The config of the model in a folder.

    Raises:
        ModelError: not a model's folder, or one that is not safe to go on with.
    """
    from transformers import AutoConfig

    try:
        _require_files(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a folder that is no model
        raise ModelError(
            f"expected a Hugging Face model at {name}, got: {one_line(error)}"
        ) from error
    for part in _parts(config):
        attention = getattr(part, "_attn_implementation", None)
        if attention is not None and attention not in _ATTENTIONS:
            raise ModelError(
                f"expected the config of {name} to ask for the attention {', '.join(_ATTENTIONS)} "
                f"or none, got {attention!r}; remove attn_implementation from its config.json"
            )
    return config


def _parts(config: Any) -> Iterator[Any]:
    """A config and all that are nested in it: of the language model, of towers for images."""
    from transformers import PretrainedConfig

    yield config
    for inner in vars(config).values():
        if isinstance(inner, PretrainedConfig):
            yield from _parts(inner)


def _require_files(folder: Path) -> None:
    """Raise ValueError over a file that transformers would read and that has no end."""
    for path in sorted(folder.iterdir()):
        if path.suffix in _SETTINGS and path.exists():
            found = path.stat()
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                raise ValueError(f"{path.name} is no regular file")
            most = _MOST_CONFIG_BYTES if path.name == _CONFIG else _MOST_BYTES
            if found.st_size > most:
                raise ValueError(f"{path.name} has {found.st_size} bytes, more than {most}")
    if not (folder / _CONFIG).is_file():
        raise ValueError(f"a folder without {_CONFIG}")
    content = read_text_bytes(folder / _CONFIG, _MOST_CONFIG_BYTES)
    require_sane_density(content)
    for name, count in _integers(json.loads(content)):
        for pattern, most in _COUNTS:
            if pattern.search(name) and count > most:
                raise ValueError(f"{name} is {count}, more than {most}, in {_CONFIG}")


def _integers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every integer of nested JSON with the name of its field."""
    if isinstance(value, int):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _integers(inner, key)


def context_length(config: Any) -> int | None:
    """Most tokens that a model takes; None: no limit."""
    text = config.get_text_config()
    context = _whole(text, "max_position_embeddings")
    if context < 1:  # below 1 is XLNet's way of saying that there is no limit
        return None
    if "roberta" in str(config.model_type):
        context -= _whole(text, "pad_token_id") + 1  # its positions start behind padding's
    return context


def _whole(settings: Any, name: str) -> int:
    """A whole number of a config or of a dictionary in one; 0 where it is not given."""
    given = settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)
    value = given or 0
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(
            f"expected {name} in {_CONFIG} to be a number, got {value!r}; the config is damaged: "
            "download the model again"
        )
    return int(value)


def is_causal(config: Any) -> bool:
    """Whether a token sees only those before it."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if getattr(config, "is_decoder", False):
        return True
    # BERT and its family have a causal head too, but are encoders unless the config says so.
    kinds = {str(config.model_type), config.get_text_config().model_type}
    if kinds & MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys():
        return False
    return bool(kinds & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys())


def place_limit(config: Any) -> int | None:
    """Tokens of a row up to which a token's place in it does not matter beside its depth.

    Llama 4 scales attention by the place in the row, in steps of `floor_scale`, where it counts
    positions otherwise in every other respect. None: no limit.
    """
    text = config.get_text_config()
    if not getattr(text, "attn_temperature_tuning", None):
        return None
    return max(_whole(text, "floor_scale") - 1, 1)


def depends_on_length(config: Any, longest: int) -> bool:
    """Whether in a prompt of so many tokens a token's numbers depend on how many follow it.

    Rotary embeddings that change with the longest position of a forward pass: with "dynamic" and
    "longrope" scaling beyond the length that the model was first trained on.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for one in nested or [parameters]:
        if one.get("rope_type") in ("dynamic", "longrope"):
            original = "original_max_position_embeddings"
            trained = _whole(one, original) or _whole(text, original)
            if longest > (trained or _whole(text, "max_position_embeddings")):
                return True
    return False
