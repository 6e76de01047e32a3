"""Whether two sets of numbers may be used together, and in what they differ if not.

Knows the fields of `Identity` and which of them matter for what: all of them for adding layers to a
cache; for scoring a cache with vectors those that decide what a direction means.
"""

from __future__ import annotations

import re
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
    layers: Collection[int] | None = None,
    remedy: str | None = None,
) -> None:
    """Raise unless two identities agree in the compared fields.

    Args:
        expected, found: `weights` are compared on the layers that both know.
        what: who is compared, for the message: "cache and vectors".
        allowed: fields that may differ, as named by --allow-mismatch.
        layers: the only ones on which weights are compared; None: all.
        remedy: what to do about a difference; None: make both alike, or --allow-mismatch.

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
        for a, b in [_values(expected, found, name, layers)]
        if a != b
    ]
    if differences:
        names = " ".join(f"--allow-mismatch {line.split(':')[0]}" for line in differences)
        remedy = remedy or f"make both with the same model and options, or allow it with {names}"
        raise MismatchError(
            f"{what} do not belong together: {'; '.join(differences)} "
            f"(model {expected.model} against {found.model}); {remedy}"
        )


def _values(
    expected: Identity, found: Identity, name: str, layers: Collection[int] | None
) -> tuple[Any, Any]:
    a, b = getattr(expected, name), getattr(found, name)
    if name == "weights":
        shared = sorted(k for k in a.keys() & b.keys() if layers is None or k in layers)
        differing = [k for k in shared if a[k] != b[k]]
        return {k: a[k] for k in differing}, {k: b[k] for k in differing}
    return a, b


def _short(value: Any) -> str:
    """A value as it may stand in a message; of a hash its beginning."""
    if isinstance(value, dict):
        shown = [f"{k}: {_short(v)}" for k, v in list(value.items())[:4]]
        more = [f"and {len(value) - 4} more"] if len(value) > 4 else []
        return "{" + ", ".join([*shown, *more]) + "}"
    if isinstance(value, str):
        value = str(value)  # of a StrEnum the word, not the member
        if re.fullmatch(r"[0-9a-f]{64}", value):
            return f"content {value[:8]}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
