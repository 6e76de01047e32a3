"""Whether two sets of numbers may be used together, and in what they differ if not.

Knows the fields of `Identity` and which of them matter for what: all of them for adding layers to a
cache; for scoring a cache with vectors those that decide what a direction means.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from probecache.errors import MismatchError, UsageError
from probecache.types import Identity

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["EXTENDING", "SCORING", "require_same"]

_TOLD_NOT_COMPARED = {"model", "revision"}

EXTENDING: tuple[str, ...] = tuple(
    field.name for field in fields(Identity) if field.name not in _TOLD_NOT_COMPARED
)
# Vectors come from other prompts and other positions than those they score.
SCORING: tuple[str, ...] = (
    "layer_convention",
    "architecture",
    "num_hidden_layers",
    "hidden_size",
    "weights",
    "adapter",
    "quantization",
    "dtype",
    "tokenizer",
    "chat_template",
    "system_prompt",
)


def require_same(
    expected: Identity,
    found: Identity,
    compared: Collection[str],
    *,
    what: str,
    allowed: Collection[str] = (),
) -> None:
    """Raise unless two identities agree in the compared fields.

    Args:
        expected, found: `weights` are compared on the layers that both know.
        what: who is compared, for the message: "cache and vectors".
        allowed: fields that may differ, as named by --allow-mismatch.

    Raises:
        MismatchError: shows every field that differs.
        UsageError: an allowed field does not exist.
    """
    unknown = sorted(set(allowed) - set(compared))
    if unknown:
        raise UsageError(
            f"expected --allow-mismatch to name one of {', '.join(compared)}, got {unknown[0]!r}"
        )
    differences = [
        f"{name}: expected {_short(a)}, got {_short(b)}"
        for name in compared
        if name not in allowed
        for a, b in [_values(expected, found, name)]
        if a != b
    ]
    if differences:
        names = " ".join(f"--allow-mismatch {line.split(':')[0]}" for line in differences)
        raise MismatchError(
            f"{what} do not belong together: {'; '.join(differences)} "
            f"(model {expected.model} against {found.model}); make both with the same model and "
            f"options, or allow it with {names}"
        )


def _values(expected: Identity, found: Identity, name: str) -> tuple[Any, Any]:
    a, b = getattr(expected, name), getattr(found, name)
    if name == "weights":
        shared = sorted(a.keys() & b.keys())
        return {k: a[k] for k in shared}, {k: b[k] for k in shared}
    return a, b


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {str(v)[:10]}" for k, v in value.items()) + "}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
