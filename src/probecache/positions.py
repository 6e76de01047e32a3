"""Which tokens of an example are kept: the words of `--positions`, read and checked.

    last             the last token: of the answer for pairs, of the rendered prompt otherwise
    mean             one row, the mean over what `all` keeps
    all              every token of the text; BOS, special and template tokens left out
    answer           every token of the appended answer
    last-K           the last K of the tokens that `all` keeps, fewer where there are fewer
    role:ROLE        text tokens of the messages of a role: user, assistant (the appended answer is
                     one of its own) or system (a system prompt put before the example, too)
    match:REGEX      text tokens that overlap a match of a Python regular expression in a message or
                     the answer; where the expression has a group, the first group's span
    chars:START-STOP text tokens that overlap these characters of the shown text (the question, then
                     the answer): half-open, negative from the end, either side may be left out

Which tokens that are in a given example stands in `selection.py`.
"""

from __future__ import annotations

import re
from typing import ClassVar

from probecache.errors import UsageError

__all__ = ["POSITIONS_GRAMMAR", "Positions", "may_keep_special"]

_ROLES = ("user", "assistant", "system")
POSITIONS_GRAMMAR = (
    "last, mean, all, answer, last-K (such as last-5), role:user, role:assistant, role:system, "
    "match:REGEX (a Python regular expression) or chars:START-STOP (such as chars:0-20, chars:-20-)"
)
_WORDS = ("last", "mean", "all", "answer")
_LAST_K = re.compile(r"last-([1-9][0-9]{0,8})")
_CHARS = re.compile(r"chars:(-?[0-9]{1,9})?-(-?[0-9]{1,9})?")
_LONGEST = 2000  # of an expression: one that a manifest brings is compiled, too


class Positions(str):
    """One of these, as it is written; equal to its text.

    Raises:
        UsageError: it is none of these; says which there are.
    """

    __slots__ = ()
    LAST: ClassVar[Positions]
    MEAN: ClassVar[Positions]
    ALL: ClassVar[Positions]
    ANSWER: ClassVar[Positions]

    def __new__(cls, text: str) -> Positions:
        return cls.parse(text)

    @classmethod
    def parse(cls, text: str, name: str = "--positions") -> Positions:
        """The same, with the option's name for the message."""
        fault = _fault(text)
        if fault is not None:
            raise UsageError(f"expected {name} to be {POSITIONS_GRAMMAR}, got {text!r}{fault}")
        return str.__new__(cls, text)

    @property
    def one_row(self) -> bool:
        """Whether an example gives exactly one row."""
        return self in (Positions.LAST, Positions.MEAN)

    @property
    def by_place(self) -> bool:
        """Whether it matters which message, or which characters, a token stands for."""
        return self.partition(":")[0] in ("role", "match", "chars")

    @property
    def last_count(self) -> int | None:
        """K of `last-K`."""
        found = _LAST_K.fullmatch(self)
        return int(found[1]) if found else None

    @property
    def role(self) -> str | None:
        """The role of `role:ROLE`."""
        return self.partition(":")[2] if self.startswith("role:") else None

    @property
    def pattern(self) -> re.Pattern[str] | None:
        """The expression of `match:REGEX`."""
        return re.compile(self.partition(":")[2]) if self.startswith("match:") else None

    @property
    def characters(self) -> tuple[int | None, int | None] | None:
        """START and STOP of `chars:START-STOP`."""
        found = _CHARS.fullmatch(self)
        if found is None:
            return None
        start, stop = (None if side is None else int(side) for side in found.groups())
        return start, stop


def may_keep_special(positions: str) -> bool:
    """Whether BOS, special and template tokens are among the kept ones where that is asked."""
    return positions in (Positions.ALL, Positions.MEAN) or bool(_LAST_K.fullmatch(positions))


def _fault(text: object) -> str | None:
    """What is wrong, to be put behind the text; None where nothing is."""
    if not isinstance(text, str):
        return ""
    kind, colon, rest = text.partition(":")
    if kind == "match" and colon:
        return _fault_of_pattern(rest)
    if kind == "chars" and colon:
        return _fault_of_characters(text)
    known = text in _WORDS or _LAST_K.fullmatch(text) or text in [f"role:{r}" for r in _ROLES]
    return None if known else ""


def _fault_of_pattern(pattern: str) -> str | None:
    if not pattern:
        return ", an empty expression"
    if len(pattern) > _LONGEST:
        return f", more than {_LONGEST} characters"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f": {error}"
    return None


def _fault_of_characters(text: str) -> str | None:
    found = _CHARS.fullmatch(text)
    if found is None or found.groups() == (None, None):
        return ""
    start, stop = (None if side is None else int(side) for side in found.groups())
    one_end = start is not None and stop is not None and (start < 0) == (stop < 0)
    if stop == 0 or (one_end and start >= stop):  # type: ignore[operator]
        return ", which no character lies between"
    return None


Positions.LAST = Positions("last")
Positions.MEAN = Positions("mean")
Positions.ALL = Positions("all")
Positions.ANSWER = Positions("answer")
