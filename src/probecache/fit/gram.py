"""A layer's rows in memory, and their Gram matrix.

Guarantees: products in float64 of rows minus their mean (a residual stream's mean is large beside
what varies, and would take the last digits). Rows are kept in their own dtype and made wide a block
of columns at a time.

Memory, with n rows of width d: the rows as they come (n d 4 bytes from a cache), at most
`HELD_BYTES`; a block of columns in float64, `_BLOCK_BYTES`; the matrix and what is made of it, a
handful of arrays of n^2 8 bytes. 408 rows of 8192 take 13 + 64 + 10 MB, 2048 rows of 2048 took 260
MB and 4096 rows of 4096 930 MB in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probecache.fit.design import Chunks
from probecache.fit.sums import FoldSums

__all__ = ["HELD_BYTES", "MOST_ROWS", "HeldRows", "hold_rows", "may_be_held"]

Floats = NDArray[np.float64]
# Beyond these, passages over the rows cost less: eigenvectors and systems take n^3. Four methods
# with five folds took 28 s of one core at 2048 rows and 109 s at 4096; by passages 13 s at 2048.
MOST_ROWS = 2048
HELD_BYTES = 512 * 2**20
_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class HeldRows:
    """Rows of a layer.

    Attributes:
        rows: [n, hidden], in the dtype that they came in.
        owners: int [n], the example that each is of.
        centre: float64 [hidden], taken off every row.
    """

    rows: NDArray[Any]
    owners: NDArray[np.int64]
    centre: Floats

    def gram(self, scale: Floats | None = None) -> Floats:
        """Inner products [n, n] of the centred rows, divided by `scale` [hidden] where given."""
        found = np.zeros((len(self.rows), len(self.rows)))
        for columns, block in self._blocks():
            if scale is not None:
                block /= scale[columns]
            found += block @ block.T
        return found

    def combine(self, coefficients: Floats) -> Floats:
        """Sums of centred rows: coefficients [k, n] give float64 [k, hidden]."""
        found = np.empty((len(coefficients), self.rows.shape[1]))
        for columns, block in self._blocks():
            found[:, columns] = coefficients @ block
        return found

    def _blocks(self) -> Iterator[tuple[slice, Floats]]:
        step = max(_BLOCK_BYTES // (8 * max(len(self.rows), 1)), 1)
        for start in range(0, self.rows.shape[1], step):
            columns = slice(start, start + step)
            yield columns, self.rows[:, columns] - self.centre[columns]


def may_be_held(n_rows: int, hidden_size: int, itemsize: int = 4) -> bool:
    """Whether the rows are few enough for a Gram matrix."""
    return n_rows <= MOST_ROWS and n_rows * hidden_size * itemsize <= HELD_BYTES


def hold_rows(chunks: Chunks, sums: FoldSums) -> HeldRows:
    """The rows in memory, in another passage.

    Args:
        chunks: the rows.
        sums: of the same rows.
    """
    rows, owners = None, np.empty(sums.n_rows, dtype=np.int64)
    start = 0
    for own, chunk in chunks():
        if rows is None:
            rows = np.empty((sums.n_rows, sums.hidden_size), dtype=_float_of(chunk))
        stop = start + len(chunk)
        rows[start:stop], owners[start:stop] = chunk, own
        start = stop
    return HeldRows(np.empty((0, sums.hidden_size)) if rows is None else rows, owners, sums.mean)


def _float_of(chunk: NDArray[Any]) -> np.dtype[Any]:
    """What holds the chunk's numbers exactly: its own dtype, if that is of floats."""
    return chunk.dtype if chunk.dtype.kind == "f" else np.dtype(np.float64)
