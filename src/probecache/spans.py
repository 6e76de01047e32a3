"""Which tokens of a rendered prompt are the example's text, and which the template's.

    spans_between(...)   where the messages stand in the rendering, by characters
    locate_tokens(...)   which tokens lie there, and where
    message_places(...)  the same by messages
    characters_of(...)   which characters tokens of a text that is nothing but text stand for
    special_ids(...)     which ids never stand for text

Knows characters and the tokenizer's offsets, no templates.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "ASIDE",
    "NO_SPAN",
    "Shown",
    "Span",
    "characters_of",
    "locate_tokens",
    "message_places",
    "spans_between",
    "special_ids",
]

Span = tuple[int, int]  # characters [start, stop)
NO_SPAN, ASIDE = -1, -2
_Number = TypeVar("_Number", np.int32, np.int64)


def spans_between(text: str, literals: Sequence[str], contents: Sequence[str]) -> list[Span] | None:
    """Where each content stands in `text` = literal content literal ... literal, or None.

    A template may strip a content's white space on one side or both.
    """
    if not text.startswith(literals[0]):
        return None
    spans, at = [], len(literals[0])
    for number, (content, literal) in enumerate(zip(contents, literals[1:], strict=True)):
        is_last = number == len(contents) - 1
        for variant in (content, content.strip(), content.rstrip(), content.lstrip()):
            stop = at + len(variant)
            if not text.startswith(variant, at) or not text.startswith(literal, stop):
                continue
            if not is_last or stop + len(literal) == len(text):
                spans.append((at, stop))
                at = stop + len(literal)
                break
        else:
            return None
    return spans


def characters_of(
    offsets: Iterable[Sequence[Span]], counts: Sequence[int], texts: Sequence[str]
) -> list[NDArray[np.int64]]:
    """The characters that each token of some texts stands for; [tokens, 2] of each text.

    Args:
        offsets: per text and token the characters that the tokenizer tells.
        counts: tokens of each text.
    """
    places, _ = _end_to_end(offsets, counts, texts)
    shifts = accumulate(map(len, texts), initial=0)
    of_texts = zip(_cut(places, counts), shifts, texts, strict=False)
    # Offsets are what a tokenizer says; the places that are stored lie in the text.
    return [_ordered(np.clip(found - shift, 0, len(text))) for found, shift, text in of_texts]


@dataclass(frozen=True, slots=True)
class Shown:
    """Where a message stands in a rendering.

    Attributes:
        number: of the message; -1 of a system prompt that is put before the example's own.
        cut: characters that the template has stripped from its beginning.
    """

    span: Span
    number: int
    cut: int


def message_places(
    offsets: Iterable[Sequence[Span]],
    counts: Sequence[int],
    shown: Sequence[Sequence[Shown]],
    texts: Sequence[str],
) -> list[NDArray[np.int32]]:
    """Message and characters of it that every token of some renderings stands for; [tokens, 3].

    `NO_SPAN`, 0, 0 for tokens of the template; `ASIDE` and its characters for those of the system
    prompt put first.

    Args:
        offsets: per text and token the characters that it stands for.
        counts: tokens of each text.
        shown: per text its messages, in the order in which they stand there.
    """
    own = [[one for one in of_text if one.number >= 0] for of_text in shown]
    asides = [one for of_text in shown for one in of_text if one.number < 0]
    spans = [[one.span for one in of_text] for of_text in own]
    found = locate_tokens(offsets, counts, spans, texts, [one.span for one in asides])
    for place, of_text in enumerate(own):
        _count_in_messages(found[place], of_text)
        if asides:
            found[place][found[place][:, 0] == ASIDE, 1:] += asides[place].cut
    return found


def _count_in_messages(places: NDArray[np.int32], shown: Sequence[Shown]) -> None:
    """Turn numbers of spans into those of messages, and characters into theirs, in place."""
    numbers, cuts = [one.number for one in shown], [one.cut for one in shown]
    if any(cuts) or numbers != list(range(len(numbers))):
        inside = places[:, 0] >= 0
        of_span = places[inside, 0]
        places[inside, 1:] += np.array(cuts, dtype=np.int32)[of_span, None]
        places[inside, 0] = np.array(numbers, dtype=np.int32)[of_span]


def locate_tokens(
    offsets: Iterable[Sequence[Span]],
    counts: Sequence[int],
    spans: Sequence[Sequence[Span]],
    texts: Sequence[str],
    asides: Sequence[Span] = (),
) -> list[NDArray[np.int32]]:
    """In which of its text's spans each token lies, if only in part; [tokens, 3] of each text.

    The number of the first span that it overlaps, and the characters of that span, counted from
    its beginning; `NO_SPAN`, 0, 0 for tokens that lie in none.

    Args:
        offsets: per text and token the characters that it stands for.
        counts: tokens of each text.
        spans: per text, rising, none of them empty.
        asides: one more span per text, or none at all; its tokens, where they are in no other, have
            the number `ASIDE`.
    """
    places, shifts = _end_to_end(offsets, counts, texts)
    found = np.zeros((len(places), 3), dtype=np.int32)
    found[:, 0] = NO_SPAN
    if asides:
        _locate(found, places, _shifted(shifts, [[span] for span in asides]))
        found[found[:, 0] >= 0, 0] = ASIDE
    befores = np.array([*accumulate(map(len, spans), initial=0)])
    owners = np.repeat(np.arange(len(texts)), counts)
    inside = _locate(found, places, _shifted(shifts, spans))
    found[inside, 0] -= befores[owners[inside]].astype(np.int32)
    return _cut(found, counts)


def _locate(
    found: NDArray[np.int32], places: NDArray[np.int64], spans: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Fill in the tokens that lie in a span; returns which they are, bool [tokens]."""
    starts, stops = spans.T
    # A span that starts before the token's end, and does not stop by its start, overlaps it.
    started = np.searchsorted(starts, places[:, 1], side="left")
    stopped = np.searchsorted(stops, places[:, 0], side="right")
    inside: NDArray[np.bool_] = started > stopped
    number = stopped[inside]
    start, length = starts[number], stops[number] - starts[number]
    found[inside, 0] = number
    relative = np.clip(places[inside] - start[:, None], 0, length[:, None])
    found[inside, 1:] = _ordered(relative)
    return inside


def _ordered(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """No token ends before it starts, whatever a tokenizer says."""
    places[:, 1] = np.maximum(places[:, 0], places[:, 1])
    return places


def _shifted(shifts: Sequence[int], spans: Sequence[Sequence[Span]]) -> NDArray[np.int64]:
    """Spans of texts in the one text that they are end to end, in which they rise as there."""
    shifted = [
        (shift + start, shift + stop)
        for shift, of_text in zip(shifts, spans, strict=False)
        for start, stop in of_text
    ]
    return np.array(shifted, dtype=np.int64).reshape(-1, 2)


def _end_to_end(
    offsets: Iterable[Sequence[Span]], counts: Sequence[int], texts: Sequence[str]
) -> tuple[NDArray[np.int64], list[int]]:
    """Characters of all tokens in the one text that the texts are, and where each text begins."""
    flat = chain.from_iterable(chain.from_iterable(offsets))
    places = np.fromiter(flat, dtype=np.int64, count=2 * sum(counts)).reshape(-1, 2)
    owners = np.repeat(np.arange(len(texts)), counts)
    shifts = list(accumulate(map(len, texts), initial=0))
    return _widened(places, np.diff(owners, prepend=-1) > 0) + np.array(shifts)[
        owners, None
    ], shifts


def _cut(values: NDArray[_Number], counts: Sequence[int]) -> list[NDArray[_Number]]:
    """The part of each text."""
    return [values[a:b] for a, b in pairwise(accumulate(counts, initial=0))]


def _widened(offsets: np.ndarray, opens: np.ndarray) -> np.ndarray:
    """Offsets with their width given back to tokens of spaces alone.

    Llama 3's tokenizer among others leaves spaces out of offsets, and such tokens nothing.
    A token of no width reaches from its neighbour before to its neighbour after.

    Args:
        offsets: int64 [tokens, 2], of several texts end to end.
        opens: bool [tokens], True where a text begins.
    """
    starts, stops = offsets[:, 0], offsets[:, 1]
    closes = np.roll(opens, -1)
    narrow = starts == stops
    wide = offsets.copy()
    # The first of each run of narrow tokens, then the second of each: a token needs the one before.
    now = np.flatnonzero(narrow & (opens | ~np.roll(narrow, 1)))
    while len(now):
        wide[now, 0] = np.where(opens[now], 0, wide[now - 1, 1])
        growing = now[(wide[now, 0] == stops[now]) & ~closes[now]]
        wide[growing, 1] = np.maximum(stops[growing], starts[growing + 1])
        following = now[~closes[now]] + 1
        now = following[narrow[following]]
    return wide


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that stand for no text. UNK does stand for text, unless it also opens or closes."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    special = set(tokenizer.all_special_ids)
    return special - ({unknown} - {tokenizer.bos_token_id, tokenizer.eos_token_id})
