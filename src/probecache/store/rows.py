"""A cache's rows with the example that each of them is of: what is fitted and what is scored.

Guarantee: classes follow one another, examples within a class in data order, at most 64 MB of rows
at a time; the same rows in the same order at every layer and in every passage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from probecache.store.reader import Cache

__all__ = ["ExampleRows"]


@dataclass(frozen=True)
class ExampleRows:
    """All rows that a cache keeps."""

    cache: Cache

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Rows of each example, in data order; int64 [examples]."""
        return np.array([r.rows[1] - r.rows[0] for r in self.cache.examples], dtype=np.int64)

    def chunks(self, layer: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Rows [m, hidden] of a layer and the example that each is of, [m], as its place in data.

        An example's rows may be divided among two chunks.
        """
        for label in self.cache.classes:
            members = [r.idx for r in self.cache.examples if r.label == label]
            owners = np.repeat(members, self.counts[members])
            for start, rows in self.cache.chunks(label, layer):
                yield owners[start : start + len(rows)], rows
