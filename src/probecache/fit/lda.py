"""Shrinkage LDA from the Gram matrix, by way of ridge regression at a matching strength.

With the covariance within classes S, the direction is Sigma^-1 (m+ - m-), Sigma = (1 - g) S + g
tr(S)/d I. Ridge regression on the classes' signs has the same direction at alpha = n g/(1-g) tr(S)
/d, because the scatter between the classes, by which the two differ, lies along m+ - m- itself.
The threshold is the midpoint of the class means: equal priors.

Source: Ledoit & Wolf 2004, J. Multivariate Analysis 88:365, for g; Friedman 1989, JASA 84:165.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from probecache.fit.design import FoldSet
from probecache.fit.problem import DualFit, Problem

__all__ = ["fit_lda", "ledoit_wolf", "within_classes"]

Floats = NDArray[np.float64]


def fit_lda(problem: Problem, left_out: FoldSet, shrinkage: float | None) -> DualFit:
    """Shrinkage LDA; `shrinkage` None is Ledoit and Wolf's."""
    kept = problem.kept(left_out)
    signs = problem.signs[kept]
    gram = problem.kept_gram(left_out)
    within = within_classes(gram, signs)
    g = ledoit_wolf(within, problem.hidden_size) if shrinkage is None else shrinkage
    spread = float(np.trace(within)) / problem.hidden_size  # n times the mean variance
    rounding = len(signs) * np.finfo(np.float64).eps * float(np.trace(gram))
    if spread * problem.hidden_size <= rounding:  # of classes whose rows are alike, of either sign
        spread = 0.0
    if g < 1 and spread > 0:
        coefficients = problem.ridge_coefficients(left_out, g / (1 - g) * spread)
        coefficients = _whitened(problem, left_out, coefficients, 1 - g)
    else:
        # Nothing but the identity is left of Sigma.
        coefficients = np.zeros(len(problem.signs))
        coefficients[kept] = _mean_difference(signs) * (len(signs) / spread if spread else 1.0)
    return DualFit(coefficients, -problem.class_midpoint(left_out, coefficients), g)


def _whitened(problem: Problem, left_out: FoldSet, ridge: Floats, kept_share: float) -> Floats:
    """Coefficients of Sigma^-1 (m+ - m-) from ridge's, which are shorter."""
    kept = problem.kept(left_out)
    signs = problem.signs[kept]
    n, positives = len(signs), int((signs > 0).sum())
    between = positives * (n - positives) / n
    gap = _mean_difference(signs) @ (problem.gram(left_out)[kept] @ ridge)
    # Ridge pulls the gap of the fitted values, 2, together; what is missing tells by how much.
    missing = max(1 - float(gap) / 2, np.finfo(np.float64).eps)
    return np.asarray(ridge * (n / (2 * kept_share * between * missing)))


def _mean_difference(signs: Floats) -> Floats:
    positive = signs > 0
    return np.asarray(positive / positive.sum() - ~positive / (~positive).sum())


def within_classes(gram: Floats, signs: Floats) -> Floats:
    """The Gram matrix of rows minus their class's mean."""
    averages = np.stack([(signs == s) / (signs == s).sum() for s in (-1.0, 1.0)])
    side = (signs > 0).astype(np.intp)
    crossed = averages @ gram
    means = crossed @ averages.T
    return np.asarray(gram - crossed[side] - crossed[side].T + means[side][:, side])


def ledoit_wolf(within: Floats, hidden_size: int) -> float:
    """Shrinkage towards a multiple of the identity, of rows of mean zero.

    Equal to `sklearn.covariance.ledoit_wolf_shrinkage(rows, assume_centered=True)`: all it needs of
    the rows are inner products.

    Args:
        within: Gram matrix [n, n] of the rows.
        hidden_size: width of the rows.
    """
    n, squares = len(within), np.diag(within)
    mean_variance = float(squares.sum()) / (n * hidden_size)
    size = float(np.einsum("ij,ij->", within, within)) / n**2
    distance = size - hidden_size * mean_variance**2
    noise = (float(squares @ squares) / n - size) / n
    if noise <= 0 or distance <= 0:
        return 0.0
    return min(noise / distance, 1.0)
