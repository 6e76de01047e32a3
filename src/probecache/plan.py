"""What a run will cost, and in which batches it goes, before any weight is read.

Guarantee: every prompt is in exactly one batch; a batch's padded size keeps the token budget unless
one prompt alone exceeds it. Counts are exact. Knows token ids and lengths, neither model nor disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probecache.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from probecache.types import TokenizedPrompt

__all__ = [
    "Batch",
    "count_distinct_prefixes",
    "estimate_working_set",
    "plan_batches",
]


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts that go through the model together, as indices into the run's prompts."""

    prompts: tuple[int, ...]
    padded_length: int

    @property
    def padded_tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        return len(self.prompts) * self.padded_length

    def halves(self) -> tuple[Batch, Batch]:
        """The batch cut in two; each half keeps the padding, so its numbers stay the same."""
        middle = len(self.prompts) // 2
        return (
            Batch(self.prompts[:middle], self.padded_length),
            Batch(self.prompts[middle:], self.padded_length),
        )


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[Batch]:
    """Group prompts of like length, longest first, so that the first batch is the largest.

    Args:
        lengths: tokens of each prompt.
        token_budget: most tokens per batch, padding included.
    """
    if token_budget < 1:
        raise UsageError(f"expected a token budget of at least 1, got {token_budget}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[Batch] = []
    group: list[int] = []
    for index in order:
        longest = lengths[group[0]] if group else lengths[index]
        if group and (len(group) + 1) * longest > token_budget:
            batches.append(Batch(tuple(group), longest))
            group = []
        group.append(index)
    if group:
        batches.append(Batch(tuple(group), lengths[group[0]]))
    return batches


def count_distinct_prefixes(prompts: Sequence[TokenizedPrompt]) -> int:
    """Number of different prefixes among all prompts: the tokens that a causal model must compute.

    Sorted, a prompt shares with the ones before it exactly what it shares with its neighbour.
    """
    # Big-endian bytes sort as the ids themselves do.
    ordered = sorted(prompt.ids.astype(">i4").tobytes() for prompt in prompts)
    total, before = 0, np.empty(0, dtype=">i4")
    for key in ordered:
        ids = np.frombuffer(key, dtype=">i4")
        shared = min(len(ids), len(before))
        differing = np.flatnonzero(ids[:shared] != before[:shared])
        total += len(ids) - (int(differing[0]) if len(differing) else shared)
        before = ids
    return total


def estimate_working_set(
    batches: Sequence[Batch], hidden_size: int, intermediate_size: int, heads: int, itemsize: int
) -> int:
    """Rough bytes that the largest batch needs beside the weights.

    Counts one block's live tensors: residual, its normed copy, attention's projections and output
    (six of hidden width) and the MLP's two inner ones; and for attention written out in full, the
    scores of every head.
    """
    most = 0
    for batch in batches:
        rows = batch.padded_tokens * (6 * hidden_size + 2 * intermediate_size)
        scores = batch.padded_tokens * batch.padded_length * heads
        most = max(most, (rows + scores) * itemsize)
    return most
