"""A layer's rows, chunk by chunk, brought together to one mean row per example.

Guarantee: memory is one chunk and one row. Assumes what `ExampleRows` guarantees, that the rows of
an example follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["Chunks", "example_means"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
# Called once per passage; yields (the example that each row is of [m], rows [m, hidden]).
Chunks = Callable[[], Iterable[tuple[Ints, NDArray[np.float32]]]]


def example_means(chunks: Chunks) -> Iterator[tuple[Ints, Floats]]:
    """The examples [k] and their mean rows, float64 [k, hidden], in the order of the chunks."""
    waiting: Floats | None = None
    owner, taken = -1, 0
    for owners, rows in chunks():
        if not owners.size:
            continue
        starts = np.append(0, np.flatnonzero(np.diff(owners)) + 1)
        found, counts = owners[starts], np.diff(np.append(starts, owners.size)).astype(np.float64)
        sums = np.asarray(rows, dtype=np.float64)
        if starts.size < owners.size:
            sums = np.add.reduceat(sums, starts, axis=0)
        if waiting is not None and found[0] == owner:
            sums[0] += waiting
            counts[0] += taken
        elif waiting is not None:
            yield np.array([owner]), waiting[None] / taken
        # The last one may go on in the next chunk.
        owner, taken, waiting = int(found[-1]), counts[-1], sums[-1].copy()
        if found.size > 1:
            sums /= counts[:, None]
            yield found[:-1], sums[:-1]
    if waiting is not None:
        yield np.array([owner]), waiting[None] / taken
