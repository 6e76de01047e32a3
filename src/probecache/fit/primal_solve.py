"""Preconditioned conjugate gradients on several linear systems that share their passes.

Guarantee: answers are as exact as the products (float64), whatever the preconditioner is worth; a
poor one costs passes, not digits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["conjugate_gradients"]

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


def conjugate_gradients(
    product: Callable[[Floats, Ints], Floats],
    precondition: Callable[[Floats], Floats],
    right: Floats,
    start: Floats | None,
    tolerance: float | Floats,
    most: int,
) -> tuple[Floats, int, bool]:
    """Solve A_c x_c = b_c for every column c, each with its own positive definite matrix.

    Args:
        product: (vectors [hidden, some], which columns they are of [some]) -> A_c times each;
            one pass over the rows, however many columns.
        precondition: residuals [hidden, some] -> roughly A^-1 times each.
        right: b, [hidden, columns].
        start: first guess, [hidden, columns]; None begins at 0.
        tolerance: a column is done when the preconditioned residual, which estimates the error,
            is less than this share of the solution, in length and in the matrix's own norm
            (errors along great dimensions are short and still move every score); one number or
            one per column. From None the share is of the first residual, which holds for a
            preconditioner of any size.
        most: products at most.

    Returns:
        Solutions [hidden, columns], the products taken, and whether all columns were done.

    Source: Hestenes & Stiefel 1952; the Polak-Ribiere form of Golub & Ye 1999 (SIAM J. Sci. Comput.
    21), which stands a preconditioner that is only roughly symmetric.
    """
    x = np.zeros_like(right) if start is None else start.copy()
    limits = np.broadcast_to(np.asarray(tolerance, dtype=np.float64), x.shape[1:])
    everything = np.arange(x.shape[1])
    residual = right - product(x, everything) if x.any() else right.copy()
    z = precondition(residual)
    direction, taken = z.copy(), int(x.any())
    gain = _dots(residual, z)
    sizes = np.stack(_sizes(z, residual))
    active = everything[gain > 0]
    while active.size and taken < most:
        moved = product(direction[:, active], active)
        taken += 1
        step = gain[active] / _dots(direction[:, active], moved)
        x[:, active] += step * direction[:, active]
        before = residual[:, active]
        residual[:, active] = before - step * moved
        z = precondition(residual[:, active])
        gained = _dots(z, residual[:, active])
        turn = np.maximum((gained - _dots(z, before)) / gain[active], 0)
        direction[:, active] = z + turn * direction[:, active]
        gain[active] = gained
        if start is not None:
            length, energy = _sizes(x[:, active], right[:, active])
            sizes[:, active] = length, energy
        left = np.stack(_sizes(z, residual[:, active])) > limits[active] * sizes[:, active]
        active = active[left.any(axis=0)]
    return x, taken, not active.size


def _dots(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.einsum("hc,hc->c", a, b))


def _sizes(vectors: Floats, images: Floats) -> tuple[Floats, Floats]:
    """Lengths, and square roots of the products with the images, of every column."""
    energies = np.sqrt(np.abs(_dots(vectors, images)))
    return np.asarray(np.linalg.norm(vectors, axis=0)), np.asarray(energies)
