"""Layers as a user writes them, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from operator import index
from typing import TYPE_CHECKING, SupportsIndex

from probecache.errors import LayerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["format_layers", "parse_layers"]

_RANGE = re.compile(r"(-?\d{1,9})-(-?\d{1,9})(?::(\d{1,9}))?")


def parse_layers(text: str | int | Sequence[int], num_hidden_layers: int) -> tuple[int, ...]:
    """Layers from `10,20,23`, `all`, `10-70:10` (both ends included), a number or a list; negatives
    from the end, -1 being `num_hidden_layers`. Rising, without doubles.

    Raises:
        LayerError: a layer that the model does not have; names the range.
        UsageError: text of another form.
    """
    if isinstance(text, str):
        parts = text.split(",")
    else:
        parts = [_digits(n) for n in (text if isinstance(text, Iterable) else [text])]
    layers: set[int] = set()
    for part in map(str.strip, parts):
        layers.update(_expand(part, num_hidden_layers))
    if not layers:
        raise UsageError("expected at least one layer, got none; try --layers all")
    return tuple(sorted(layers))


def format_layers(layers: Sequence[int]) -> str:
    """Rising layers as `parse_layers` takes them, three or more in a row as a range."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs
    )


def _digits(number: object) -> str:
    """A layer given as a number, of Python or of NumPy."""
    if isinstance(number, bool) or not isinstance(number, SupportsIndex):
        raise UsageError(f"expected layers as whole numbers, got {number!r}")
    return str(index(number))


def _expand(part: str, num_hidden_layers: int) -> Sequence[int]:
    if part == "all":
        return range(num_hidden_layers + 1)
    if re.fullmatch(r"-?\d{1,9}", part):
        return [_existing(int(part), num_hidden_layers)]
    match = _RANGE.fullmatch(part)
    if not match:
        raise UsageError(
            f"expected --layers like 10,20,23 or 10-70:10 or all, got {part!r} among them"
        )
    first, last = (_existing(int(match[group]), num_hidden_layers) for group in (1, 2))
    step = int(match[3] or 1)
    if step < 1 or first > last:
        raise UsageError(f"expected a rising range such as 10-70:10 for --layers, got {part!r}")
    return range(first, last + 1, step)


def _existing(layer: int, num_hidden_layers: int) -> int:
    resolved = layer if layer >= 0 else num_hidden_layers + 1 + layer
    if not 0 <= resolved <= num_hidden_layers:
        raise LayerError(
            f"expected layers from 0 (embeddings) to {num_hidden_layers} (after the last block), "
            f"got {layer}; the model has {num_hidden_layers} blocks",
            layer,
        )
    return resolved
