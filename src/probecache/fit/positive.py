"""Solving with symmetric positive matrices, which takes half of what a general solver takes.

scipy is imported at the first call: a quarter of a second, which the first few layers bring in
again. The difference of means, the default, never comes here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["principal", "solve_positive"]

Floats = NDArray[np.float64]


def solve_positive(matrix: Floats, right: Floats) -> Floats:
    """x [n, ...] of `matrix` [n, n] x = `right` [n, ...].

    Raises:
        numpy.linalg.LinAlgError: a singular matrix.
    """
    from scipy.linalg.lapack import dposv

    # LAPACK counts in columns; the transpose of a symmetric matrix is handed over as it lies.
    _, found, failed = dposv(matrix.T, right)
    # Rounding can make a matrix just not positive.
    return np.asarray(np.linalg.solve(matrix, right) if failed else found)


def principal(matrix: Floats) -> Floats:
    """The eigenvector [n] of a symmetric matrix's largest eigenvalue."""
    from scipy.linalg import eigh

    last = len(matrix) - 1
    vectors = eigh(matrix, subset_by_index=[last, last], check_finite=False)[1]
    return np.asarray(vectors[:, 0])
