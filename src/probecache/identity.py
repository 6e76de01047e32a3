"""Whether two sets of numbers may be used together, and in what they differ if not.

Knows the fields of `Identity` and which of them matter for what: all of them for adding layers to a
cache or taking them out of it again; for scoring a cache with vectors all but what the two are
meant to differ in. The names of model and revision are never compared: weights and tokenizer are,
by content.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from probecache.errors import MismatchError, UsageError
from probecache.positions import may_keep_special
from probecache.types import Identity
from probecache.unrecorded import is_recorded

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["EXTENDING", "SCORING", "merged_weights", "require_fields", "require_same"]

_TOLD_NOT_COMPARED = {"model", "revision"}
_PART_OF_WEIGHTS = {"weight_samples"}

EXTENDING: tuple[str, ...] = tuple(
    field.name
    for field in fields(Identity)
    if field.name not in _TOLD_NOT_COMPARED | _PART_OF_WEIGHTS
)
# Vectors come from other prompts and other positions than those they score.
SCORING: tuple[str, ...] = tuple(
    name for name in EXTENDING if name not in ("data", "token_ids", "positions")
)
_ABSENT = "no such setting"
# What no flag allows, and why: vectors and rows, or rows and rows, would not fit one another.
_NEVER = {"hidden_size": "rows of another width fit nowhere"}
_NEVER_EXTENDING = _NEVER | {
    "num_hidden_layers": "the layers of one cache are counted in one model",
    "dtype": "a cache stores all rows in one dtype",
    "data": "rows of other prompts do not line up with those that are cached",
    "token_ids": "rows of other tokens do not line up with those that are cached",
    "positions": "rows of other positions do not line up with those that are cached",
    "layer_convention": "a cache counts its layers in one way",
}


def require_same(
    expected: Identity,
    found: Identity,
    compared: Collection[str],
    *,
    what: str,
    allowed: Collection[str] | None = (),
    layers: Collection[int] | None = None,
    remedy: str = "make both with the same model and options",
) -> list[str]:
    """Raise unless two identities agree in the compared fields.

    Args:
        expected, found: `weights` are compared on the layers that both know, by content and by
            samples.
        compared: `EXTENDING` or `SCORING`.
        what: who is compared, for the message: "cache and vectors".
        allowed: fields that may differ, as named by --allow-mismatch; None: none may, and no flag
            is offered.
        layers: the only ones on which weights are compared; None: all.
        remedy: what to do about a difference.

    Returns:
        The differences that were allowed, each as "field: expected ..., got ...".

    Raises:
        MismatchError: shows every field that differs.
        UsageError: an allowed field does not exist.
    """
    require_fields(allowed or (), compared)
    differences = {
        name: f"{name}: expected {_short(a)}, got {_short(b)}"
        for name in compared
        for a, b in [_values(expected, found, name, layers)]
        if a != b
    }
    never = _NEVER_EXTENDING if "positions" in compared else _NEVER
    refused = [name for name in differences if name not in (allowed or ()) or name in never]
    if refused:
        offered = [] if allowed is None else refused
        raise MismatchError(
            f"{what} do not belong together: {'; '.join(differences[name] for name in refused)} "
            f"(model {expected.model} against {found.model}); "
            f"{_remedy(refused, offered, never, remedy, expected)}"
        )
    return list(differences.values())


def require_fields(allowed: Collection[str], compared: Collection[str]) -> None:
    """Raise UsageError unless what --allow-mismatch names is compared at all."""
    unknown = sorted(set(allowed) - set(compared))
    if unknown:
        raise UsageError(
            f"expected --allow-mismatch to name one of {', '.join(compared)}, got {unknown[0]!r}"
        )


def _remedy(
    refused: Collection[str],
    offered: Collection[str],
    never: Mapping[str, str],
    remedy: str,
    expected: Identity,
) -> str:
    date = expected.template_date
    if "template_date" in refused and date and is_recorded(date):
        remedy += f" (--template-date {date})"
    fast = [f"{name} cannot be allowed: {never[name]}" for name in offered if name in never]
    flags = " ".join(f"--allow-mismatch {name}" for name in offered if name not in never)
    allow = [f"or, if you know that it does not matter, allow it with {flags}"] if flags else []
    return ", ".join([remedy, *(allow if not fast else [])]) + "".join(f"; {one}" for one in fast)


def merged_weights(
    old: Mapping[int, str], new: Mapping[int, str], cached: Collection[int], added: Collection[int]
) -> dict[int, str]:
    """What names the weights of a cache that gains layers: each layer's are those it was made by.

    Args:
        old, new: names by layer, of the cache and of the run that adds layers.
        cached, added: the layers of each; where weights may differ, no layer between them is named.
    """
    agreed = {layer: name for layer, name in {**old, **new}.items() if old.get(layer, name) == name}
    made = {layer: old[layer] for layer in cached if layer in old}
    made |= {layer: new[layer] for layer in added if layer in new}
    return dict(sorted({**agreed, **made}.items()))


def _values(
    expected: Identity, found: Identity, name: str, layers: Collection[int] | None
) -> tuple[Any, Any]:
    a, b = getattr(expected, name), getattr(found, name)
    if name == "weights":
        differing = _differing(a, b, layers)
        if differing[0]:
            return differing
        unread = (k for k in a.keys() - b.keys() if layers is None or k in layers)
        unknown = {k: a[k] for k in sorted(unread) if not is_recorded(a[k])}
        if unknown:  # nothing that will be read can equal it
            return unknown, "not read yet"
        return _differing(expected.weight_samples, found.weight_samples, layers)
    if name == "config":
        nothing = dict.fromkeys([*a, *b], _ABSENT)
        return _differing(nothing | {**a}, nothing | {**b})
    if name == "special_tokens_kept" and expected.positions != found.positions:
        both = may_keep_special(expected.positions) and may_keep_special(found.positions)
        return (a, b) if both else (None, None)  # it says something of some positions alone
    return a, b


def _differing(
    a: Mapping[Any, Any], b: Mapping[Any, Any], only: Collection[Any] | None = None
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Both values of what both know, where they differ."""
    shared = sorted(k for k in a.keys() & b.keys() if only is None or k in only)
    differing = [k for k in shared if a[k] != b[k]]
    return {k: a[k] for k in differing}, {k: b[k] for k in differing}


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
