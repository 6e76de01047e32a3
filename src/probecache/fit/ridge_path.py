"""Ridge regression from a Gram matrix: every strength and everything left out, in closed form.

With centred Gram matrix K, M = H (H K H + alpha I)^-1 H (H takes off the mean) gives the
coefficients a = M y of ridge regression with an intercept that is not penalised. Rows b left out,
the others' coefficients are a - M_:b (M_bb)^-1 a_b and the errors at the rows left out are
(M_bb)^-1 a_b: what refits would give, to rounding.

Source: the block form of Allen's PRESS; Golub, Heath & Wahba 1979, Technometrics 21:215; Rasmussen
& Williams 2006, section 5.4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from probecache.fit.positive import solve_positive

__all__ = ["RidgePath", "alpha_grid", "centred"]

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
# Ten strengths over seven decades, from ten thousandth of the mean eigenvalue to a thousand times.
_DECADES, _STRENGTHS, _BELOW = 7, 10, 4
# Blocks up to this size are solved all at once: calls would take longer than what they do.
_SMALL = 24
# A smaller strength beside the mean eigenvalue drowns in the rounding of the Gram matrix.
_LEAST = 1e-10


class RidgePath:
    """Ridge regressions on one set of rows, given by their Gram matrix [n, n]."""

    def __init__(self, gram: Floats) -> None:
        self._gram = gram
        self._weighted: tuple[float, Floats] | None = None

    @cached_property
    def _spectrum(self) -> tuple[Floats, Floats]:
        values, vectors = np.linalg.eigh(centred(self._gram))
        return np.maximum(values, 0.0), vectors - vectors.mean(axis=0)

    def _root(self, alpha: float) -> Floats:
        """R with M = R R', [n, n]."""
        if self._weighted is None or self._weighted[0] != alpha:
            values, vectors = self._spectrum
            floor = _LEAST * float(values.mean()) or np.finfo(np.float64).tiny
            self._weighted = alpha, vectors / np.sqrt(values + max(alpha, floor))
        return self._weighted[1]

    def coefficients(self, alpha: float, labels: Floats, left_out: Ints | None = None) -> Floats:
        """Coefficients [n] without some rows; theirs are 0."""
        root = self._root(alpha)
        found = root @ (labels @ root)
        if left_out is not None and len(left_out):
            part = root[left_out]
            errors = solve_positive(part @ part.T, found[left_out])
            found -= root @ (errors @ part)
            found[left_out] = 0.0
        return found

    def left_out_errors(self, alpha: float, labels: Floats, blocks: Sequence[Ints]) -> list[Floats]:
        """For each block of rows, label minus prediction by the fit without the block.

        Args:
            alpha: of scikit-learn's Ridge.
            labels: [n].
            blocks: row numbers; a block must leave rows.
        """
        root = self._root(alpha)
        inverse = root @ root.T
        found, errors = inverse @ labels, [np.empty(0)] * len(blocks)
        for same in _by_size(blocks):
            if len(blocks[same[0]]) > _SMALL:
                for k in same:
                    block = blocks[k]
                    errors[k] = solve_positive(inverse[np.ix_(block, block)], found[block])
                continue
            rows = np.stack([blocks[k] for k in same])
            squares = inverse[rows[:, :, None], rows[:, None, :]]
            solved = np.linalg.solve(squares, found[rows][:, :, None])[:, :, 0]
            for k, error in zip(same, solved, strict=True):
                errors[k] = error
        return errors


def _by_size(blocks: Sequence[Ints]) -> list[list[int]]:
    """Places of blocks of one size together: NumPy solves them in one call."""
    sizes: dict[int, list[int]] = {}
    for k, block in enumerate(blocks):
        sizes.setdefault(len(block), []).append(k)
    return list(sizes.values())


def centred(gram: Floats) -> Floats:
    """The Gram matrix of rows minus their mean."""
    means = gram.mean(axis=0)
    return np.asarray(gram - means - means[:, None] + means.mean())


def alpha_grid(gram: Floats) -> tuple[float, ...]:
    """Ten strengths around the mean eigenvalue of the centred Gram matrix.

    They are powers of 10^(7/9), so that fits of nearly the same rows try the same ones.
    """
    step = _DECADES / (_STRENGTHS - 1)
    mean = float(np.trace(gram) / len(gram) - gram.mean())
    first = round((np.log10(max(mean, np.finfo(np.float64).tiny)) - _BELOW) / step)
    return tuple(float(10.0 ** (step * (first + k))) for k in range(_STRENGTHS))
