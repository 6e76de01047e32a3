"""How prompts are cut into steps of one forward pass each, before any weight is read.

Two ways: padded batches, and stretches of the prefix tree (see `prefixes.py`). Guarantee: every
prompt comes out of exactly one step; a step keeps the token budget unless one prompt of a padded
batch alone exceeds it. Knows token ids and lengths, neither model nor disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np

from probecache.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = [
    "Batch",
    "Step",
    "Stretch",
    "estimate_working_set",
    "plan_batches",
    "plan_stretches",
]


class Step(Protocol):
    """What goes through the model in one forward pass."""

    @property
    def first(self) -> int:
        """A number that no other step of the same work has, however often it is planned."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        ...

    @property
    def divisible(self) -> bool:
        """Whether there is less than this to try when it does not fit."""
        ...

    def halves(self) -> tuple[Step, Step]:
        """The step cut in two, tokens in the same order."""
        ...


_TOGETHER = 1024  # tokens in one call of attention, roughly


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts padded to one length, as indices into the run's prompts."""

    prompts: tuple[int, ...]
    padded_length: int

    @property
    def first(self) -> int:
        """The first prompt."""
        return self.prompts[0]

    @property
    def tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        return len(self.prompts) * self.padded_length

    @property
    def divisible(self) -> bool:
        """Whether it holds more than one prompt."""
        return len(self.prompts) > 1

    def halves(self) -> tuple[Batch, Batch]:
        """The batch cut in two; each half keeps the padding, so its numbers stay the same."""
        middle = len(self.prompts) // 2
        return (
            Batch(self.prompts[:middle], self.padded_length),
            Batch(self.prompts[middle:], self.padded_length),
        )


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens start..stop of the walk through a prefix tree."""

    start: int
    stop: int

    @property
    def first(self) -> int:
        """The first token."""
        return self.start

    @property
    def tokens(self) -> int:
        """Tokens that the model computes."""
        return self.stop - self.start

    @property
    def divisible(self) -> bool:
        """Whether it holds more than one token."""
        return self.tokens > 1

    def halves(self) -> tuple[Stretch, Stretch]:
        """The stretch cut in two."""
        middle = (self.start + self.stop) // 2
        return Stretch(self.start, middle), Stretch(middle, self.stop)


def plan_batches(lengths: Sequence[int], token_budget: int, *, mixed: bool = True) -> list[Batch]:
    """Group prompts of like length, longest first, so that the first batch is the largest.

    Args:
        lengths: tokens of each prompt.
        token_budget: most tokens per batch, padding included.
        mixed: whether prompts of different lengths may share a batch.
    """
    _check_budget(token_budget)
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[Batch] = []
    group: list[int] = []
    for index in order:
        longest = lengths[group[0]] if group else lengths[index]
        full = (len(group) + 1) * longest > token_budget
        if group and (full or not (mixed or lengths[index] == longest)):
            batches.append(Batch(tuple(group), longest))
            group = []
        group.append(index)
    if group:
        batches.append(Batch(tuple(group), lengths[group[0]]))
    return batches


def plan_stretches(
    begins: NDArray[np.int64], branches: NDArray[np.int64], token_budget: int
) -> list[Stretch]:
    """Cut a walk through a prefix tree into stretches within the budget.

    Each ends where, within the last quarter of the budget, a prompt branches off highest: what
    stands there under few tokens needs few earlier stretches to be computed again when a run goes
    on from it.

    Args:
        begins: int64 [prompts + 1], where each prompt's own tokens begin, and the walk's end.
        branches: int64 [prompts], how deep each prompt branches off.
        token_budget: most tokens per stretch.
    """
    _check_budget(token_budget)
    tokens, bounds = int(begins[-1]), [0]
    while tokens - bounds[-1] > token_budget:
        latest = bounds[-1] + token_budget
        first, last = np.searchsorted(begins[:-1], [latest - token_budget // 4, latest + 1])
        if last > first:
            window = branches[first:last][::-1]
            latest = int(begins[last - 1 - int(window.argmin())])
        bounds.append(latest)
    return [Stretch(start, stop) for start, stop in pairwise([*bounds, tokens])]


def _check_budget(token_budget: int) -> None:
    if token_budget < 1:
        raise UsageError(f"expected a token budget of at least 1, got {token_budget}")


def estimate_working_set(
    tokens: int, attended: int, hidden_size: int, intermediate_size: int, heads: int, itemsize: int
) -> int:
    """Rough bytes that a step of so many tokens needs beside the weights.

    Counts one block's live tensors: residual, its normed copy, attention's projections and output
    (six of hidden width) and the MLP's two inner ones; and for attention written out in full, the
    scores of every head over the `attended` tokens, of so many tokens at a time.
    """
    rows = tokens * (6 * hidden_size + 2 * intermediate_size)
    return (rows + min(tokens, _TOGETHER) * attended * heads) * itemsize
