"""Which tokens of a rendered prompt are the example's text, and which the template's.

    spans_between(...)   where the messages stand in the rendering, by characters
    text_tokens(...)     which tokens lie there
    special_ids(...)     which ids never stand for text

Knows characters and the tokenizer's offsets, no templates.
"""

from __future__ import annotations

from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Span", "spans_between", "special_ids", "text_tokens"]

Span = tuple[int, int]  # characters [start, stop)


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


def text_tokens(
    offsets: Iterable[Sequence[Span]],
    counts: Sequence[int],
    spans: Sequence[Sequence[Span]],
    texts: Sequence[str],
) -> list[np.ndarray]:
    """For each of some texts, which of its tokens lie in its spans, if only in part; bool [tokens].

    Args:
        offsets: per text and token the characters that it stands for.
        counts: tokens of each text.
        spans: per text, rising, none of them empty.
    """
    flat = chain.from_iterable(chain.from_iterable(offsets))
    places = np.fromiter(flat, dtype=np.int64, count=2 * sum(counts)).reshape(-1, 2)
    owners = np.repeat(np.arange(len(texts)), counts)
    # Put end to end, the texts are one text, whose spans rise as theirs do.
    shifts = list(accumulate(map(len, texts), initial=0))
    places = _widened(places, np.diff(owners, prepend=-1) > 0) + np.array(shifts)[owners, None]
    shifted = [
        (shift + start, shift + stop)
        for shift, of_text in zip(shifts, spans, strict=False)
        for start, stop in of_text
    ]
    starts, stops = np.array(shifted, dtype=np.int64).reshape(-1, 2).T
    # A span that starts before the token's end, and does not stop by its start, overlaps it.
    started = np.searchsorted(starts, places[:, 1], side="left")
    stopped = np.searchsorted(stops, places[:, 0], side="right")
    is_text = started > stopped
    return [is_text[a:b] for a, b in pairwise(accumulate(counts, initial=0))]


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
