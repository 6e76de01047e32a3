"""Which rows of a cache of `all` positions other positions keep, and what each row stands for.

    require_choice(...)  refuses what a cache cannot tell
    choose_rows(...)     the rows, class by class
    checked_spans(...)   the spans of some examples' rows, no stranger's numbers among them

Guarantee: the rows of the tokens that an extraction with these positions keeps, or a refusal.
Not covered: special tokens that an appended answer begins with. `all` leaves them out, `answer`
does not, and a cache does not tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from probecache.errors import MismatchError, StoreError, UsageError
from probecache.selection import SYSTEM_PROMPT, last_tokens, select_tokens
from probecache.store.layout import SPANS, ExampleRecord
from probecache.store.reader import Cache
from probecache.types import Positions

__all__ = ["checked_spans", "choose_rows", "require_choice"]

_BATCH_ROWS = 1 << 18  # looked at together, or a single example's


@dataclass(frozen=True)
class _Batch:
    """Examples of one class that follow one another.

    Attributes:
        owners: int64 [rows], which of the examples each row is of.
        spans: int32 [rows, 4] as in spans.pt, or None where nobody asks.
    """

    cache: Cache
    records: Sequence[ExampleRecord]
    owners: NDArray[np.int64]
    spans: NDArray[np.int32] | None

    @property
    def first(self) -> int:
        """Number of the first row in the class's files."""
        return self.records[0].rows[0]

    def ends(self) -> NDArray[np.int64]:
        """The last row of each example; int64 [examples]."""
        return np.searchsorted(self.owners, np.arange(len(self.records)), side="right") - 1

    def places_of_ends(self) -> NDArray[np.int64]:
        """Where the input of each example ends; int64 [examples]."""
        return np.array([record.input_tokens - 1 for record in self.records])


def require_choice(cache: Cache, positions: Positions) -> None:
    """Refuse positions whose rows cannot be told among those of a cache of `all` positions.

    Raises:
        MismatchError, UsageError: say why, and what to extract.
    """
    if positions == Positions.MEAN or positions.last_count is not None:
        return  # these ask for nothing but the order of rows
    advice = f"extract with --positions {positions}"
    if SPANS not in cache.info.files:
        raise MismatchError(
            f"expected a cache that tells what its tokens stand for to take {positions} from, got "
            f"{cache.path}, which has no {SPANS}: it was imported, or made by an earlier version "
            f"or with a tokenizer that does not tell; {advice}"
        )
    identity = cache.identity
    if positions.role == "system" and identity.system_prompt and not identity.special_tokens_kept:
        raise MismatchError(
            f"expected the system prompt's tokens to take {positions} from, got {cache.path}, "
            f"whose all positions leave them out; {advice}, or all with --keep-special-tokens"
        )
    if positions == Positions.ANSWER and all(one.answer is None for one in cache.examples):
        raise UsageError(
            f"expected pairs for --positions answer, got {cache.path} of labelled data, which has "
            "no answers; use last, mean, all or role:assistant"
        )


def choose_rows(cache: Cache, positions: Positions) -> dict[str, NDArray[np.int64]]:
    """Numbers of the chosen rows in each class's files, rising; some examples may have none.

    Args:
        positions: any but `all` and `mean`, which choose every row.

    Raises:
        MismatchError: an example's token that is wanted is not in the cache; names the example.
        StoreError: spans that lie in no text.
    """
    found = {}
    for label in cache.classes:
        chosen = (
            batch.first + np.flatnonzero(_chosen(batch, positions))
            for batch in _batches(cache, label, with_spans=positions.last_count is None)
        )
        found[label] = np.concatenate(list(chosen))
    return found


def _batches(cache: Cache, label: str, *, with_spans: bool) -> Iterator[_Batch]:
    members = [record for record in cache.examples if record.label == label]
    start = 0
    while start < len(members):
        stop, first = start + 1, members[start].rows[0]
        while stop < len(members) and members[stop].rows[1] - first <= _BATCH_ROWS:
            stop += 1
        records = members[start:stop]
        sizes = [record.rows[1] - record.rows[0] for record in records]
        owners = np.repeat(np.arange(len(records)), sizes)
        spans = checked_spans(cache, records) if with_spans else None
        yield _Batch(cache, records, owners, spans)
        start = stop


def _chosen(batch: _Batch, positions: Positions) -> NDArray[np.bool_]:
    """Which of a batch's rows are chosen; bool [rows]."""
    if positions.last_count is not None:
        return last_tokens(batch.owners, positions.last_count)
    assert batch.spans is not None
    if positions == Positions.LAST:
        return _ends(batch, batch.spans)
    conversations = [record.conversation for record in batch.records]
    chosen = select_tokens(positions, batch.spans[:, 1:], batch.owners, conversations)
    if positions == Positions.ANSWER:
        _require_whole_answers(batch, batch.spans, chosen)
    return chosen


def _ends(batch: _Batch, spans: NDArray[np.int32]) -> NDArray[np.bool_]:
    """The last row of each example, which must be its last token's."""
    ends = batch.ends()
    is_last = spans[ends, 0] == batch.places_of_ends()
    if not batch.cache.identity.chat_template:
        # Behind raw text a tokenizer may put a special token, which `last` does not mean.
        is_last &= spans[ends, 1] >= 0
    if not is_last.all():
        raise _left_out(batch, is_last, "the last token of every prompt", "last")
    chosen = np.zeros(len(spans), dtype=np.bool_)
    chosen[ends] = True
    return chosen


def _require_whole_answers(
    batch: _Batch, spans: NDArray[np.int32], chosen: NDArray[np.bool_]
) -> None:
    """Raise where special tokens are missing that stand in an answer or end it."""
    owners, places = batch.owners[chosen], spans[chosen, 0]
    numbers = np.arange(len(batch.records))
    first, stop = (np.searchsorted(owners, numbers, side=side) for side in ("left", "right"))
    there = first < stop
    whole = np.ones(len(numbers), dtype=np.bool_)
    last = places[stop[there] - 1]
    whole[there] = last - places[first[there]] + 1 == (stop - first)[there]
    if batch.cache.identity.chat_template:
        whole[there] &= last == batch.places_of_ends()[there]
    if not whole.all():
        raise _left_out(batch, whole, "every token of every answer", "answer")


def _left_out(batch: _Batch, there: NDArray[np.bool_], what: str, positions: str) -> MismatchError:
    record = batch.records[int(there.argmin())]
    return MismatchError(
        f"expected {what} in {batch.cache.path} to take {positions} from, got example "
        f"{record.id!r} of class {record.label!r} without it, for it is the template's or a "
        f"special token: extract with --positions {positions}"
        + (", or all with --keep-special-tokens" if positions == "last" else "")
    )


def checked_spans(cache: Cache, records: Sequence[ExampleRecord]) -> NDArray[np.int32] | None:
    """What the rows of some examples stand for, int32 [rows, 4]; None where a cache does not tell.

    Args:
        records: of one class, following one another.

    Raises:
        StoreError: places that are in no input, or characters in no text.
    """
    spans = cache.spans(records[0].label)
    if spans is None:
        return None
    start = records[0].rows[0]
    found = np.array(spans[start : records[-1].rows[1]])
    owners = np.repeat(np.arange(len(records)), [r.rows[1] - r.rows[0] for r in records])
    good = _in_inputs(found, owners, records) & _in_texts(cache, found, owners, records)
    if not good.all():
        row = int(good.argmin())
        raise StoreError(
            f"expected {cache.path / SPANS} to hold places in the texts of its examples, got "
            f"{found[row].tolist()} for row {start + row} of class {records[0].label!r}; the cache "
            "is damaged: probecache verify tells what of it, with --repair it is made again"
        )
    return found


def _in_inputs(
    spans: NDArray[np.int32], owners: NDArray[np.int64], records: Sequence[ExampleRecord]
) -> NDArray[np.bool_]:
    """Whether places rise within each example, from 0 to what the model was fed."""
    places = spans[:, 0].astype(np.int64)
    longest = np.iinfo(np.int32).max  # a forged entry may tell of more
    fed = np.array([min(record.input_tokens, longest) for record in records])
    first = np.diff(owners, prepend=-1) > 0
    rising = first | (np.diff(places, prepend=-1) > 0)
    good: NDArray[np.bool_] = (places >= 0) & (places < fed[owners]) & rising
    return good


def _in_texts(
    cache: Cache,
    spans: NDArray[np.int32],
    owners: NDArray[np.int64],
    records: Sequence[ExampleRecord],
) -> NDArray[np.bool_]:
    """Whether messages and characters are there, and none are told of tokens without a message."""
    turns = [record.conversation.turns for record in records]
    firsts = np.array([*accumulate(map(len, turns), initial=0)])
    lengths = np.array([len(turn.content) for talk in turns for turn in talk], dtype=np.int64)
    message, start, stop = spans.T.astype(np.int64)[1:]
    spoken = (message >= 0) & (message < np.diff(firsts)[owners])
    most = np.zeros(len(spans), dtype=np.int64)
    most[spoken] = lengths[firsts[owners[spoken]] + message[spoken]]
    most[message == SYSTEM_PROMPT] = len(cache.identity.system_prompt or "")
    known = spoken | ((message < 0) & (message >= SYSTEM_PROMPT))
    good: NDArray[np.bool_] = known & (start >= 0) & (start <= stop) & (stop <= most)
    return good
