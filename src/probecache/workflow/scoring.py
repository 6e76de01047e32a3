"""A layer's rows to scores: of every token, and of every example.

Guarantee: a score is a real projection of a kept row, in float64; NaN and Inf are refused with the
class and the row; rows stream, what stays is one number per token of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from probecache.errors import NonFiniteError

if TYPE_CHECKING:
    from probecache.aggregate import Aggregate
    from probecache.store.rows import ExampleRows

__all__ = ["STATISTICS", "ScoredLayer", "TokenScores", "bytes_of_scoring", "score_layer"]

Floats = NDArray[np.float64]
_CHUNK = 2 << 20  # numbers of a chunk of rows
_MOST_HELD = 16 << 20  # numbers of mean rows that are held
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


@dataclass(frozen=True)
class ScoredLayer:
    """A layer's token scores, and its examples' mean rows for whoever looks at the activations.

    `means` gives (examples [k], their mean rows [k, hidden]) each time it is called; where they
    take too much memory, (owners, rows) of all rows instead.
    """

    tokens: TokenScores
    means: Callable[[], Iterable[tuple[NDArray[np.int64], NDArray[np.floating[Any]]]]]


def score_layer(rows: ExampleRows, layer: int, direction: NDArray[np.float32]) -> ScoredLayer:
    """Project every row of a layer on a direction [hidden], in one passage.

    Raises:
        NonFiniteError: names the class, its row and the layer; where rows were chosen, the example.
    """
    wide_direction = direction.astype(np.float64)
    examples, hidden = len(rows.counts), len(direction)
    sums = np.zeros((examples, hidden)) if examples * hidden <= _MOST_HELD else None
    owners, scores = [], []
    for of_rows, values in rows.chunks(layer):
        wide = values.astype(np.float64)
        owners.append(of_rows)
        scores.append(wide @ wide_direction)
        if not np.isfinite(scores[-1]).all():
            _refuse(rows, layer, owners, int(np.flatnonzero(~np.isfinite(scores[-1]))[0]))
        if sums is not None:
            _add(sums, of_rows, wide)
    tokens = TokenScores(np.concatenate(owners), np.concatenate(scores))
    if sums is None:
        return ScoredLayer(tokens, partial(rows.chunks, layer))
    sums /= rows.counts[:, None]
    return ScoredLayer(tokens, lambda: [(np.arange(examples), sums)])


def bytes_of_scoring(rows: ExampleRows) -> int:
    """Memory that scoring a layer takes: a chunk as it is and wide, and what is held."""
    hidden = rows.cache.hidden_size
    chunk = min(int(rows.counts.sum()) * hidden, _CHUNK)
    return 12 * chunk + 2 * 8 * min(len(rows.counts) * hidden, _MOST_HELD)


def _add(sums: Floats, owners: NDArray[np.int64], wide: Floats) -> None:
    """Add rows to their examples' sums. Not with reduceat: that took six times as long."""
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    if len(starts) == len(owners):
        sums[owners] += wide
        return
    for start, stop in pairwise([*starts.tolist(), len(owners)]):
        sums[owners[start]] += wide[start:stop].sum(axis=0)


def _refuse(
    rows: ExampleRows, layer: int, owners: Sequence[NDArray[np.int64]], bad: int
) -> NoReturn:
    """Name the row `bad` of the last of these chunks; by its example where rows were chosen."""
    example = int(owners[-1][bad])
    record = rows.cache.examples[example]
    # An example's rows may be divided among chunks.
    before = sum(int((one == example).sum()) for one in owners[:-1])
    row = record.rows[0] + before + int((owners[-1][:bad] == example).sum())
    all_rows = rows.positions == rows.cache.info.positions
    raise NonFiniteError(
        f"expected finite activations, got NaN or Inf in "
        f"{f'row {row}' if all_rows else f'example {record.id!r}'} of class {record.label!r} at "
        f"layer {layer} of {rows.cache.path}; extract again in bfloat16 or float32"
    )
