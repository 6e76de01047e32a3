"""Scores of tokens to the score of their example.

    mean        the mean over the tokens
    max         the highest token
    last        the last token
    top-5       the mean of the 5 highest (any number; `top-k` means top-5)
    rolling-8   the highest mean over 8 neighbouring tokens (any number; `rolling` means rolling-8)

Guarantee: an example with fewer tokens than asked for is the mean of those that it has. The mean
grows with no token's number; `max`, and less so `top-k` and `rolling`, grow with an example's
length even where no token means anything: compare with the length baseline.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probecache.errors import UsageError

__all__ = ["MEAN", "Aggregate", "parse_aggregate"]

Floats = NDArray[np.float64]
_DEFAULTS = {"top-k": "top-5", "rolling": "rolling-8"}
_FORM = re.compile(r"(mean|max|last)|(top|rolling)-([1-9]\d{0,8})")


@dataclass(frozen=True)
class Aggregate:
    """How token scores become one; `width` is of `top` and `rolling`."""

    kind: str
    width: int = 0

    def __str__(self) -> str:
        return f"{self.kind}-{self.width}" if self.width else self.kind

    def over(self, scores: Floats, counts: NDArray[np.int64]) -> Floats:
        """Scores of examples [n] from those of their tokens, which stand example after example.

        Args:
            scores: [sum of counts], finite.
            counts: [n] tokens of each example, at least 1.
        """
        stops = np.cumsum(counts)
        starts = stops - counts
        if self.kind == "last":
            return scores[stops - 1]
        if self.kind == "max":
            return np.maximum.reduceat(scores, starts)
        if self.kind == "mean":
            return np.add.reduceat(scores, starts) / counts
        one = _mean_of_highest if self.kind == "top" else _highest_window
        pieces = zip(starts.tolist(), stops.tolist(), strict=True)
        return np.array([one(scores[a:b], self.width) for a, b in pieces], dtype=np.float64)


MEAN = Aggregate("mean")


def parse_aggregate(text: str) -> Aggregate:
    """Read `mean`, `max`, `last`, `top-5`, `rolling-8` and the like.

    Raises:
        UsageError: something else.
    """
    match = _FORM.fullmatch(_DEFAULTS.get(text, text))
    if match is None:
        raise UsageError(
            f"expected --aggregate to be mean, max, last, top-5 or rolling-8 (with any number), "
            f"got {text!r}"
        )
    plain, kind, width = match.groups()
    return Aggregate(plain) if plain else Aggregate(kind, int(width))


def _mean_of_highest(scores: Floats, width: int) -> float:
    if len(scores) > width:
        scores = np.partition(scores, len(scores) - width)[-width:]
    return float(scores.mean())


def _highest_window(scores: Floats, width: int) -> float:
    if len(scores) <= width:
        return float(scores.mean())
    return float(np.lib.stride_tricks.sliding_window_view(scores, width).mean(axis=1).max())
