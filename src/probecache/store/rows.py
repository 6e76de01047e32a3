"""A cache's rows with the example that each of them is of: what is fitted and what is scored.

    ExampleRows(...)   the rows that positions keep
    pieces_of(...)     an example's texts, cut by the tokens of its rows

Guarantee: classes follow one another, examples within a class in data order, at most 8 MB of rows
at a time; the same rows in the same order at every layer and in every passage. Of a cache of `all`
positions the rows that other positions keep can be chosen, as `choice.py` says.
Not covered: a mean over a cache's rows is one of numbers that were rounded to the cache's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from probecache.errors import MismatchError, PromptError
from probecache.store.choice import checked_spans, choose_rows, require_choice
from probecache.store.layout import ExampleRecord
from probecache.store.reader import Cache
from probecache.types import Positions

__all__ = ["ExampleRows", "pieces_of"]

_Chunk = tuple[NDArray[np.int64], NDArray[np.float32]]


class ExampleRows:
    """The rows of a cache that positions keep.

    Args:
        cache: where they are.
        positions: which, of a cache of `all` positions; None, or the cache's own: all that it has.

    Attributes:
        positions: those that the rows are of.

    Raises:
        UsageError: the positions make no sense, or not for this data.
        MismatchError: the cache does not hold their rows; says what to extract.
        PromptError: an example is left with no row; names it. Raised where rows or counts are first
            asked for, as are a MismatchError over an example's token that is not in the cache and
            a StoreError over spans that no extraction wrote.
    """

    def __init__(self, cache: Cache, positions: str | None = None) -> None:
        own = cache.info.positions
        self.cache = cache
        self.positions = own if positions is None else Positions(positions)
        if self.positions == own:
            return
        if own != Positions.ALL:
            raise MismatchError(
                f"expected a cache of all positions to take {self.positions} from, got "
                f"{cache.path}, which keeps {own}; leave --positions out, or extract with "
                f"--positions {self.positions}"
            )
        require_choice(cache, self.positions)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Rows of each example, in data order; int64 [examples]."""
        return np.ones_like(self._chosen_counts) if self._averages else self._chosen_counts

    def chunks(self, layer: int) -> Iterator[_Chunk]:
        """Rows [m, hidden] of a layer and the example that each is of, [m], as its place in data.

        An example's rows may be divided among two chunks.
        """
        chunks = self._chunks(layer)
        return _means(chunks, self._chosen_counts) if self._averages else chunks

    def spans(self) -> NDArray[np.int32] | None:
        """What each row's token stands for, in the order of the chunks; int32 [rows, 4].

        Place of the token in the input, its message, first character and end in that message, as
        in spans.pt. None where a row stands for no single token, or the cache does not tell.
        """
        of_classes = [
            checked_spans(self.cache, [r for r in self.cache.examples if r.label == label])
            for label in self.cache.classes
        ]
        found = [spans for spans in of_classes if spans is not None]
        if self._averages or not found:
            return None
        if self._chosen is not None:
            chosen = (self._chosen[label] for label in self.cache.classes)
            found = [spans[rows] for spans, rows in zip(found, chosen, strict=True)]
        return np.concatenate(found)

    def pieces(self, example: int) -> list[tuple[str, int | None]]:
        """`pieces_of` an example, with numbers that count its chosen rows, from 0.

        Text of tokens whose rows are not chosen has no number.

        Args:
            example: its place in data.
        """
        record = self.cache.examples[example]
        rows = np.arange(*record.rows)
        if self._averages:
            rows = rows[:0]
        elif self._chosen is not None:
            chosen = self._chosen[record.label]
            rows = chosen[slice(*np.searchsorted(chosen, record.rows))]
        numbers = {int(row): number for number, row in enumerate(rows)}
        pieces = pieces_of(self.cache, record)
        return [(text, None if row is None else numbers.get(row)) for text, row in pieces]

    # -- what is chosen

    @property
    def _averages(self) -> bool:
        """Whether a row is the mean over an example's rows."""
        return self.positions == Positions.MEAN != self.cache.info.positions

    @cached_property
    def _chosen(self) -> dict[str, NDArray[np.int64]] | None:
        """Numbers of the rows of each class, rising; None: all."""
        if self._averages or self.positions == self.cache.info.positions:
            return None
        return choose_rows(self.cache, self.positions)

    @cached_property
    def _chosen_counts(self) -> NDArray[np.int64]:
        """Chosen rows of each example; int64 [examples]."""
        examples = self.cache.examples
        bounds = np.array([record.rows for record in examples], dtype=np.int64)
        if self._chosen is None:
            return bounds[:, 1] - bounds[:, 0]
        counts = np.zeros(len(examples), dtype=np.int64)
        for label, members in self._members.items():
            ends = np.searchsorted(self._chosen[label], bounds[members])
            counts[members] = ends[:, 1] - ends[:, 0]
        if not counts.all():
            record = examples[int(counts.argmin())]
            raise PromptError(
                f"expected every example of {self.cache.path} to have tokens that --positions "
                f"{self.positions} keeps, got none in example {record.id!r} of class "
                f"{record.label!r}; choose other positions, or leave the example out of the data"
            )
        return counts

    @cached_property
    def _members(self) -> dict[str, NDArray[np.int64]]:
        """Examples of each class, as places in data."""
        labels = [record.label for record in self.cache.examples]
        return {
            label: np.array([n for n, other in enumerate(labels) if other == label])
            for label in self.cache.classes
        }

    def _chunks(self, layer: int) -> Iterator[_Chunk]:
        """Chosen rows, before any mean is taken."""
        for label, members in self._members.items():
            owners = np.repeat(members, self._chosen_counts[members])
            chosen = None if self._chosen is None else self._chosen[label]
            for start, rows in self.cache.chunks(label, layer, chosen):
                yield owners[start : start + len(rows)], rows


def _means(chunks: Iterable[_Chunk], counts: NDArray[np.int64]) -> Iterator[_Chunk]:
    """The mean over each example's rows, accumulated in float64.

    Args:
        counts: rows of each example, of which a chunk may hold some and the next one the others.
    """
    begun, seen = None, 0  # of an example whose rows have not all come
    for owners, rows in chunks:
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        # NumPy's reduceat takes 15 times as long.
        sums = np.stack([part.sum(axis=0, dtype=np.float64) for part in np.split(rows, starts[1:])])
        if begun is not None:
            sums[0] += begun
        seen = len(owners) - int(starts[-1]) + (seen if len(starts) == 1 else 0)
        whole = seen == counts[owners[-1]]
        begun, seen = (None, 0) if whole else (sums[-1], seen)
        done = owners[starts if whole else starts[:-1]]
        if len(done):
            yield done, (sums[: len(done)] / counts[done, None]).astype(np.float32)


def pieces_of(cache: Cache, example: ExampleRecord) -> list[tuple[str, int | None]]:
    """An example's texts cut by the tokens of its rows, in order; put together they are the texts.

    The texts are the messages and then the answer, none cut across two of them. With the text of a
    token stands the number of its row in the class's files, with text that no row stands for None.
    Every row of a token of the texts is there once: where tokens share a character, as those of one
    emoji may, the first one has it, and a token that is left with none an empty text.
    A cache that does not tell what its rows stand for gives whole texts with None.

    Raises:
        StoreError: spans that no extraction wrote.
    """
    spans = checked_spans(cache, [example])
    turns = example.conversation.turns
    if spans is None:
        return [(turn.content, None) for turn in turns]
    pieces: list[tuple[str, int | None]] = []
    for number, turn in enumerate(turns):
        at = 0
        for row in np.flatnonzero(spans[:, 1] == number).tolist():
            first, stop = (max(at, end) for end in spans[row, 2:].tolist())
            if first > at:
                pieces.append((turn.content[at:first], None))
            pieces.append((turn.content[first:stop], example.rows[0] + row))
            at = stop
        if at < len(turn.content):
            pieces.append((turn.content[at:], None))
    return pieces
