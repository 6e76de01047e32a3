"""L2 logistic regression by Newton's method on the Gram matrix.

The optimum of |w|^2 / 2 + C sum log(1 + exp(-y_i f_i)), f = K a + b, which is scikit-learn's. A
step solves a system of n rows whatever the width, in the form whose matrix I + S K S, S^2 = C p
(1 - p), has no eigenvalue below 1. Steps are halved until they improve the objective, so that
separable classes converge too: the penalty keeps their optimum finite.

Source: Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, section 3.4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from probecache.errors import FitError
from probecache.fit.design import FoldSet
from probecache.fit.positive import solve_positive
from probecache.fit.problem import DualFit, Problem
from probecache.fit.ridge_path import centred

__all__ = ["fit_logistic", "newton"]

Floats = NDArray[np.float64]
_MOST_STEPS = 200
_TOLERANCE = 1e-11
# Weights p(1-p) of rows far from the boundary vanish; below this they no longer count as curvature.
_LEAST_WEIGHT = 1e-14


def fit_logistic(
    problem: Problem, left_out: FoldSet, c: float, start: Floats | None = None
) -> DualFit:
    """Logistic regression, equal to scikit-learn's `LogisticRegression(C)`.

    Args:
        problem: the rows.
        left_out: folds that are not fitted.
        c: inverse strength of the penalty.
        start: [n], decisions of a fit near which the answer lies.

    Raises:
        FitError: no convergence.
    """
    kept, gram = problem.kept(left_out), problem.kept_gram(left_out)
    coefficients = np.zeros(len(problem.signs))
    # Centred for these rows: their mean would take digits from the intercept.
    begin = None if start is None else start[kept]
    found, intercept = newton(centred(gram), problem.signs[kept], c, begin)
    coefficients[kept] = found
    return DualFit(coefficients, intercept - float(np.mean(gram @ found)), c)


def newton(
    gram: Floats, signs: Floats, c: float, start: Floats | None = None
) -> tuple[Floats, float]:
    """Coefficients [n] and intercept of the optimum.

    Args:
        gram: [n, n], of centred rows.
        signs: +1 and -1, [n], both.
        c: inverse strength.
        start: decisions [n] of a fit near by.

    Raises:
        FitError: no convergence, which rows of very unequal scale can cause.
    """
    state = _State(gram, signs, c)
    if start is None or not state.begin(start):
        state.begin(np.zeros(len(signs)))
    for _ in range(_MOST_STEPS):
        error = state.error
        if error <= _TOLERANCE or not state.step():
            break
    if error > 1e-5:
        raise FitError(
            "expected logistic regression to converge, got no improvement of the fit any more; "
            "standardize the dimensions, or take a smaller strength (C)"
        )
    return state.coefficients, state.intercept


class _State:
    """Where Newton's method stands; C (t - p) = a where it has arrived."""

    def __init__(self, gram: Floats, signs: Floats, c: float) -> None:
        self._gram, self._signs, self._c = gram, signs, c
        self._move(np.zeros(len(signs)), 0.0)

    def begin(self, decisions: Floats) -> bool:
        """Go where a step from these decisions leads, if that is better than no direction."""
        pulls, weights = self._pulls_and_weights(self._signs * decisions)
        # Coefficients of 0 do not have these decisions: the step makes up for them, too.
        self._move(*self._solve(weights, pulls + weights * decisions))
        return self._objective() < self._c * len(self._signs) * float(np.log(2))

    @property
    def error(self) -> float:
        """How far coefficients are from C (t - p), beside the largest of them."""
        pulls, _ = self._pulls_and_weights(self._margins)
        largest = max(float(np.abs(self.coefficients).max()), np.finfo(np.float64).tiny)
        return float(np.abs(pulls - self.coefficients).max()) / largest

    def step(self) -> bool:
        """One step, halved until it improves the objective; False where none does."""
        pulls, weights = self._pulls_and_weights(self._margins)
        towards, shift = self._solve(weights, pulls - self.coefficients)
        along = self._gram @ towards
        slope = float(self.coefficients @ along - pulls @ (along + shift))
        before, size = (self.coefficients, self.intercept, self._objective()), 1.0
        rounding = 1e-14 * abs(before[2])
        while size > 1e-10:
            self._move(before[0] + size * towards, before[1] + size * shift)
            if self._objective() <= before[2] + 1e-4 * size * slope + rounding:
                return True
            size /= 2
        self._move(*before[:2])
        return False

    def _move(self, coefficients: Floats, intercept: float) -> None:
        self.coefficients, self.intercept = coefficients, intercept
        self._projections = self._gram @ coefficients
        self._margins = self._signs * (self._projections + intercept)

    def _objective(self) -> float:
        penalty = self.coefficients @ self._projections / 2
        return float(penalty + self._c * np.logaddexp(0, -self._margins).sum())

    def _pulls_and_weights(self, margins: Floats) -> tuple[Floats, Floats]:
        """C (t - p) and C p (1 - p), [n] each."""
        other = 0.5 * (1 - np.tanh(0.5 * margins))  # by tanh: exp of large numbers overflows
        weights = self._c * other * (1 - other)
        return self._c * self._signs * other, np.maximum(weights, _LEAST_WEIGHT * self._c)

    def _solve(self, weights: Floats, pulls: Floats) -> tuple[Floats, float]:
        """a and b of (K + 1/weights) a + b = pulls/weights where the a sum to zero."""
        root = np.sqrt(weights)
        system = root[:, None] * self._gram * root
        system.flat[:: len(root) + 1] += 1.0
        solved = solve_positive(system, np.stack([pulls / root, root], axis=1))
        towards, uniform = root * solved[:, 0], root * solved[:, 1]
        shift = float(towards.sum() / uniform.sum())
        return towards - shift * uniform, shift
