"""The prompts at the ends of the scores, cut into tokens with a score each.

Guarantees: `read_token_scores` gives finite scores and texts as they stand, or refuses the file in
one line; a shade is a whole number from -4 to 4, even about the middle of the scale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from probecache.report.fields import count, listed, number, optional, text

__all__ = ["TOKEN_SCORES", "Piece", "ScoredPrompt", "TokenScores", "token_scores"]

TOKEN_SCORES = "token_scores.json"
MOST_SHADE = 4
ENDS = ("highest", "lowest")


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt's text; the score is None where no scored token covers it."""

    text: str
    score: float | None


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt at one end of the scores, its text in pieces in order."""

    id: str
    label: str
    score: float
    end: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class TokenScores:
    """Token scores at one layer; `low` and `high` are the least and most of any token."""

    layer: int
    low: float
    high: float
    prompts: tuple[ScoredPrompt, ...]

    @cached_property
    def scale(self) -> tuple[float, float]:
        """The score without colour, and how far from it the strongest colour is.

        The median of the tokens shown, and the deviation that 95 in 100 of them keep within: `low`
        and `high` may be those of a single token that is like no other.
        """
        scores = [piece.score for one in self.prompts for piece in one.pieces]
        known = np.array([score for score in scores if score is not None], dtype=np.float64)
        if not known.size:
            return self.low / 2 + self.high / 2, self.high / 2 - self.low / 2
        with np.errstate(over="ignore"):
            middle = float(np.median(known / 2) * 2)
            half = float(np.quantile(np.abs(known / 2 - middle / 2), 0.95) * 2)
        return middle, min(half, sys.float_info.max)

    def shade(self, score: float) -> int:
        """From -4 far below the middle of the scale to 4 far above; scores beyond are as those."""
        middle, half = self.scale
        if half <= 0:
            return 0
        place = max(-1.0, min(1.0, (score / 2 - middle / 2) / (half / 2)))
        return round(place * MOST_SHADE)

    def at(self, end: str) -> Iterator[ScoredPrompt]:
        """The prompts of one end, as the file orders them."""
        return (prompt for prompt in self.prompts if prompt.end == end)


def token_scores(record: Any) -> TokenScores:
    """What `token_scores.json` says.

    Raises:
        ValueError, TypeError, KeyError: a field is missing, or of the wrong kind.
    """
    low, high = number(record["low"]), number(record["high"])
    if low > high:
        raise ValueError(f"expected low up to high, got {low} and {high}")
    prompts = listed(record["prompts"], _prompt)
    return TokenScores(count(record["layer"]), low, high, prompts)


def _prompt(record: Any) -> ScoredPrompt:
    end = text(record["end"])
    if end not in ENDS:
        raise ValueError(f"expected an end of {' or '.join(ENDS)}, got {end[:60]!r}")
    return ScoredPrompt(
        id=text(record["id"]),
        label=text(record["class"]),
        score=number(record["score"]),
        end=end,
        pieces=listed(record["pieces"], _piece),
    )


def _piece(record: Any) -> Piece:
    return Piece(text(record["text"]), optional(record.get("score"), number))
