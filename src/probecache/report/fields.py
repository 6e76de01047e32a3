"""Values of a stranger's JSON, checked as they are taken out.

Guarantees: what is returned has the kind and the range that its name says; anything else raises a
ValueError (or TypeError, KeyError) whose message quotes it cut and cleaned. Naming the file, and
making a StoreError of it, is left to the reader of the file.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = [
    "Interval",
    "count",
    "flag",
    "interval",
    "listed",
    "number",
    "optional",
    "probability",
    "shown",
    "shown_lines",
    "text",
]

Value = TypeVar("Value")
# Marks that turn the reading direction of what follows: a text must not rearrange its neighbours.
TURNING = {"LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
MOST_ITEMS = 100_000


@dataclass(frozen=True)
class Interval:
    """An estimate from 0 to 1 with its 95% interval; `low`, `high` None where it has none."""

    value: float
    low: float | None
    high: float | None


def shown(words: str, limit: int = 240) -> str:
    """Text on one line cut to `limit`, without control characters, direction marks, surrogates."""
    # Only the head is looked at: a prompt may be a whole document.
    head = "".join(_visible(c) for c in words[: 4 * limit])
    line = " ".join(head.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def shown_lines(words: str, limit: int) -> str:
    """As `shown`, but spaces and line ends stay as they are; what is cut ends in an ellipsis."""
    head = "".join(c if c == "\n" else _visible(c) for c in words[: 2 * limit])
    return head if len(head) <= limit else head[: limit - 1] + "…"


def _visible(character: str) -> str:
    if unicodedata.bidirectional(character) in TURNING:
        return ""
    category = unicodedata.category(character)
    if category == "Cc":
        return " "
    unwritable = category == "Cs" or ord(character) & 0xFFFE == 0xFFFE  # XML has none of these
    return "\N{REPLACEMENT CHARACTER}" if unwritable else character


def number(value: Any) -> float:
    """A finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Not math.isfinite: it fails over an integer of hundreds of digits.
    if not (is_number and -sys.float_info.max <= value <= sys.float_info.max):
        raise ValueError(f"expected a finite number, got {shown(repr(value), 60)}")
    return float(value)


def probability(value: Any) -> float:
    """A number from 0 to 1."""
    if not 0 <= number(value) <= 1:
        raise ValueError(f"expected a number from 0 to 1, got {shown(repr(value), 60)}")
    return float(value)


def count(value: Any) -> int:
    """A whole number from 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected a whole number from 0, got {shown(repr(value), 60)}")
    return value


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {shown(repr(value), 60)}")
    return value


def text(value: Any) -> str:
    """A text, as it stands: whoever shows it cleans it with `shown`."""
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {shown(repr(value), 60)}")
    return value


def listed(value: Any, one: Callable[[Any], Value]) -> tuple[Value, ...]:
    """A list of what `one` reads; None is an empty one."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {shown(repr(value), 60)}")
    if len(value) > MOST_ITEMS:
        raise ValueError(f"expected a list of at most {MOST_ITEMS}, got {len(value)}")
    return tuple(one(item) for item in value)


def optional(value: Any, one: Callable[[Any], Value]) -> Value | None:
    """What `one` reads, or None where there is nothing."""
    return None if value is None else one(value)


def interval(record: Any, value: str, low: str = "low", high: str = "high") -> Interval | None:
    """An estimate and its bounds from three fields of a record; None where there is none."""
    if record.get(value) is None:
        return None
    found = Interval(
        probability(record[value]),
        optional(record.get(low), probability),
        optional(record.get(high), probability),
    )
    if found.low is not None and found.high is not None and found.low > found.high:
        raise ValueError(f"expected {low} up to {high}, got {found.low} and {found.high}")
    return found
