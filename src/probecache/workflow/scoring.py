"""A layer's rows to scores: of every token, and of every example.

Guarantee: a score is a real projection of a kept row, in float64; NaN and Inf are refused with the
class and the row; rows stream, what stays is one number per token of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from probecache.errors import NonFiniteError

if TYPE_CHECKING:
    from probecache.aggregate import Aggregate
    from probecache.store.rows import ExampleRows

__all__ = ["STATISTICS", "TokenScores", "score_tokens"]

Floats = NDArray[np.float64]
STATISTICS = ("mean_score", "max_score", "min_score", "std_score")


@dataclass(frozen=True)
class TokenScores:
    """Scores of a layer's rows in the order in which they are read.

    Attributes:
        owners: [rows], the example of each row, examples one after the other.
        scores: float64 [rows].
    """

    owners: NDArray[np.int64]
    scores: Floats

    @cached_property
    def starts(self) -> NDArray[np.intp]:
        """Where each example's rows begin."""
        return np.flatnonzero(np.diff(self.owners, prepend=-1))

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Rows of each example, in reading order."""
        return np.diff(self.starts, append=len(self.owners))

    def statistics(self) -> dict[str, Floats]:
        """Mean, maximum, minimum and spread over each example's tokens; [examples], data order."""
        mean = np.add.reduceat(self.scores, self.starts) / self.counts
        off = self.scores - np.repeat(mean, self.counts)
        spread = np.sqrt(np.add.reduceat(off * off, self.starts) / self.counts)
        highest = np.maximum.reduceat(self.scores, self.starts)
        lowest = np.minimum.reduceat(self.scores, self.starts)
        values = (mean, highest, lowest, spread)
        return {name: self._placed(v) for name, v in zip(STATISTICS, values, strict=True)}

    def aggregated(self, how: Aggregate) -> Floats:
        """One score per example, [examples] in data order."""
        return self._placed(how.over(self.scores, self.counts))

    def _placed(self, values: Floats) -> Floats:
        placed = np.empty(len(values))
        placed[self.owners[self.starts]] = values
        return placed


def score_tokens(rows: ExampleRows, layer: int, direction: NDArray[np.float32]) -> TokenScores:
    """Project every row of a layer on a direction [hidden].

    Raises:
        NonFiniteError: names the class, its row and the layer.
    """
    wide = direction.astype(np.float64)
    owners, scores = [], []
    for of_rows, values in rows.chunks(layer):
        owners.append(of_rows)
        scores.append(values.astype(np.float64) @ wide)
        if not np.isfinite(scores[-1]).all():
            _refuse(rows, layer, of_rows, int(np.flatnonzero(~np.isfinite(scores[-1]))[0]))
    return TokenScores(np.concatenate(owners), np.concatenate(scores))


def _refuse(rows: ExampleRows, layer: int, owners: NDArray[np.int64], bad: int) -> None:
    record = rows.cache.examples[int(owners[bad])]
    row = record.rows[0] + bad - int(np.searchsorted(owners, owners[bad]))
    raise NonFiniteError(
        f"expected finite activations, got NaN or Inf in row {row} of class {record.label!r} at "
        f"layer {layer} of {rows.cache.path}; extract again in bfloat16 or float32"
    )
