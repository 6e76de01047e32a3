"""A linear probe: one direction at one layer, and where on it the classes part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Probe"]


@dataclass(frozen=True, eq=False)
class Probe:
    """The frozen answer of a fitter.

    Attributes:
        direction: float32 [hidden], unit norm; a higher projection means the positive class.
        raw_norm: norm of the direction before normalising: of the difference of means in the
            residual stream's units, of the coefficients of logistic, ridge and LDA, so that
            raw_norm * (score - threshold) is their decision function; for PCA the root mean
            square of the differences' projections.
        threshold: projection at which the method decides for neither class.
        typical_norm: median norm of the rows that it was fitted on.
        n_positive, n_negative: rows it was fitted on.
        strength: of the regularisation, in scikit-learn's units (ridge's alpha, logistic
            regression's C, LDA's shrinkage); None for methods without.
    """

    direction: np.ndarray
    raw_norm: float
    threshold: float
    typical_norm: float
    n_positive: int
    n_negative: int
    strength: float | None = None

    def score(self, rows: np.ndarray) -> np.ndarray:
        """Projections of rows [n, hidden] on the direction: float64 [n]."""
        return np.asarray(rows, dtype=np.float64) @ self.direction.astype(np.float64)
