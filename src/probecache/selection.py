"""Which tokens of an example positions by role, text or number choose.

    Conversation        what an example's tokens stand for
    select_tokens(...)  by role, expression, characters, or the answer
    last_tokens(...)    the last so many

One and the same code chooses among the tokens of a prompt and among the rows of a cache, so both
choose alike. A token's place is three numbers: its message (the appended answer counts as one more
behind the messages; `NO_MESSAGE` for template and special tokens, `SYSTEM_PROMPT` for the text that
a system prompt puts before the example), and the characters [first, end) of that message that it
stands for. Tokens that share a character, as those of one emoji may, are chosen together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from probecache.spans import ASIDE, NO_SPAN
from probecache.types import Message, Positions

__all__ = ["NO_MESSAGE", "SYSTEM_PROMPT", "Conversation", "last_tokens", "select_tokens"]

NO_MESSAGE, SYSTEM_PROMPT = NO_SPAN, ASIDE


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of an example, and the answer that is appended to them."""

    messages: tuple[Message, ...]
    answer: str | None = None

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages, then the answer as the assistant's."""
        if self.answer is None:
            return self.messages
        return (*self.messages, Message("assistant", self.answer))

    @property
    def shown(self) -> tuple[int, ...]:
        """Numbers of the turns that a reader is shown: the question, then the answer."""
        users = [n for n, message in enumerate(self.messages) if message.role == "user"]
        question = users[-1] if users else len(self.messages) - 1
        return (question,) if self.answer is None else (question, len(self.messages))


def select_tokens(
    positions: Positions,
    places: NDArray[np.int32],
    owners: NDArray[np.int64],
    conversations: Sequence[Conversation],
) -> NDArray[np.bool_]:
    """Which tokens `answer`, `role:`, `match:` or `chars:` choose; bool [tokens].

    Args:
        places: [tokens, 3], message and characters of each token; no message beyond the last turn.
        owners: [tokens], rising: the example that each token is of.
    """
    message = places[:, 0]
    inside = message >= 0
    chosen = np.zeros(len(places), dtype=np.bool_)
    if positions == Positions.ANSWER:
        answers = np.array([len(one.messages) for one in conversations])
        chosen[inside] = message[inside] == answers[owners[inside]]
        return chosen
    turns = [conversation.turns for conversation in conversations]
    firsts = np.array([*accumulate(map(len, turns), initial=0)])
    number = firsts[owners[inside]] + message[inside]  # of the turn among those of all examples
    if positions.role is not None:
        speaks = np.array([turn.role == positions.role for talk in turns for turn in talk])
        chosen[inside] = speaks[number]
        return chosen | (message == SYSTEM_PROMPT) if positions.role == "system" else chosen
    # Turns put end to end are one text, in which every token and every wanted span has its place.
    lengths = [len(turn.content) for talk in turns for turn in talk]
    shifts = np.array([*accumulate(lengths, initial=0)])
    wanted = [
        (shifts[firsts[example] + turn] + start, shifts[firsts[example] + turn] + stop)
        for example, conversation in enumerate(conversations)
        for turn, start, stop in _wanted(positions, conversation)
    ]
    chosen[inside] = _overlap(places[inside, 1:] + shifts[number][:, None], wanted)
    return chosen


def last_tokens(owners: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """The last tokens of each example, at most so many; bool [tokens].

    Args:
        owners: [tokens], rising: the example that each token is of.
    """
    ends = np.searchsorted(owners, owners, side="right")
    chosen: NDArray[np.bool_] = np.arange(len(owners)) >= ends - count
    return chosen


def _overlap(places: NDArray[np.int64], wanted: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which tokens [first, end) share a character with one of the spans; bool [tokens]."""
    spans = np.array(wanted, dtype=np.int64).reshape(-1, 2)
    # More spans begin before a token's end than stop by its start: one of them overlaps it.
    begun = np.searchsorted(np.sort(spans[:, 0]), places[:, 1], side="left")
    stopped = np.searchsorted(np.sort(spans[:, 1]), places[:, 0], side="right")
    found: NDArray[np.bool_] = begun > stopped
    return found


def _wanted(positions: Positions, one: Conversation) -> Iterator[tuple[int, int, int]]:
    """Turn and characters [start, stop), never empty, that a selector asks for."""
    if positions.pattern is not None:
        for number, turn in enumerate(one.turns):
            for start, stop in _matches(positions.pattern, turn.content):
                yield number, start, stop
    elif positions.characters is not None:
        yield from _characters(*positions.characters, one)


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    group = min(pattern.groups, 1)
    for match in pattern.finditer(text):
        start, stop = match.span(group)  # -1, -1 of a group that took no part
        if start < stop:
            yield start, stop


def _characters(
    start: int | None, stop: int | None, one: Conversation
) -> Iterator[tuple[int, int, int]]:
    """The part of each shown turn that lies in the slice of all of them."""
    turns, at = one.turns, 0
    total = sum(len(turns[number].content) for number in one.shown)
    first, end, _ = slice(start, stop).indices(total)
    for number in one.shown:
        length = len(turns[number].content)
        a, b = max(first - at, 0), min(end - at, length)
        if a < b:
            yield number, a, b
        at += length
