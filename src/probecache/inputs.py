"""The inputs of some examples end to end, before it is chosen which tokens are kept.

Many examples are checked and cut in a few array operations; what a token is part of, and which
characters of which message it stands for, goes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

__all__ = ["ANSWER", "AROUND", "END", "TEXT", "Inputs", "Piece", "join_inputs"]

AROUND, TEXT, ANSWER, END = range(4)  # what a token is part of


def _nowhere(count: int) -> NDArray[np.int32]:
    """Places of tokens that stand for no text."""
    return np.tile(np.array([-1, 0, 0], dtype=np.int32), (count, 1))


@dataclass(frozen=True)
class Piece:
    """Tokens of a prompt, or of an answer.

    Attributes:
        ids: of the tokens.
        places: int32 [tokens, 3], the message and the characters of it that each token stands for,
            as in `selection.py`; characters 0, 0 where the tokenizer cannot tell or nobody asks.
    """

    ids: list[int]
    places: NDArray[np.int32]

    @classmethod
    def of_no_text(cls, ids: list[int]) -> Piece:
        """Tokens that stand for no text."""
        return cls(ids, _nowhere(len(ids)))

    def behind(self, ids: list[int]) -> Piece:
        """The same behind tokens that stand for no text."""
        if not ids:
            return self
        return Piece(ids + self.ids, np.concatenate([_nowhere(len(ids)), self.places]))


@dataclass(frozen=True)
class Inputs:
    """The inputs of some examples.

    Attributes:
        ids: int32 [tokens].
        parts: int8 [tokens]: template and BOS, text, answer, or what the tokenizer puts last.
        places: int32 [tokens, 3], as of a piece.
        owners: int64 [tokens], index of the token's example, rising.
        count: number of examples.
    """

    ids: NDArray[np.int32]
    parts: NDArray[np.int8]
    places: NDArray[np.int32]
    owners: NDArray[np.int64]
    count: int

    def per_example(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of each example's tokens a mask holds; int64 [count]."""
        return np.bincount(self.owners[mask], minlength=self.count)

    def only(self, keep: NDArray[np.bool_]) -> Inputs:
        """Some of the tokens."""
        return Inputs(
            self.ids[keep], self.parts[keep], self.places[keep], self.owners[keep], self.count
        )

    @cached_property
    def inside(self) -> NDArray[np.bool_]:
        """Tokens of the text or the answer; bool [tokens]."""
        found: NDArray[np.bool_] = (self.parts == TEXT) | (self.parts == ANSWER)
        return found

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """Where each example starts, and the end of the last one; int64 [count + 1]."""
        return np.searchsorted(self.owners, np.arange(self.count + 1))


def join_inputs(bodies: Sequence[Piece], answers: Sequence[Piece], tail: list[int]) -> Inputs:
    """Each body, its answer and the tail, end to end."""
    end = Piece.of_no_text(tail)
    pieces = [one for both in zip(bodies, answers, strict=True) for one in (*both, end)]
    lengths = np.array([len(one.ids) for one in pieces])
    ids = np.array(list(chain.from_iterable(one.ids for one in pieces)), dtype=np.int32)
    places = np.concatenate([one.places for one in pieces])
    kinds = np.array([TEXT, ANSWER, END], dtype=np.int8)
    parts = np.repeat(np.tile(kinds, len(bodies)), lengths)
    parts[(parts == TEXT) & (places[:, 0] < 0)] = AROUND
    owners = np.repeat(np.arange(len(bodies)), lengths.reshape(-1, 3).sum(axis=1))
    return Inputs(ids, parts, places, owners, len(bodies))
