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
from probecache.fit.problem import DualFit, Problem
from probecache.fit.ridge_path import centred

__all__ = ["fit_logistic", "newton"]

Floats = NDArray[np.float64]
_MOST_STEPS = 200
_TOLERANCE = 1e-11
# Weights p(1-p) of rows far from the boundary vanish; below this they no longer count as curvature.
_LEAST_WEIGHT = 1e-14


def fit_logistic(
    problem: Problem, left_out: FoldSet, c: float, start: DualFit | None = None
) -> DualFit:
    """Logistic regression, equal to scikit-learn's `LogisticRegression(C)`.

    Args:
        problem: the rows.
        left_out: folds that are not fitted.
        c: inverse strength of the penalty.
        start: a fit of more rows, near which the answer lies.
    """
    kept, gram = problem.kept(left_out), problem.kept_gram(left_out)
    coefficients = np.zeros(len(problem.signs))
    begin = (coefficients[kept], 0.0)
    if start is not None:
        near = start.coefficients[kept]
        begin = (near, start.intercept + float(np.mean(gram @ near)))
    # Centred for these rows: their mean would take digits from the intercept.
    found, intercept = newton(centred(gram), problem.signs[kept], c, *begin)
    coefficients[kept] = found
    return DualFit(coefficients, intercept - float(np.mean(gram @ found)), c)


def newton(
    gram: Floats, signs: Floats, c: float, coefficients: Floats, intercept: float
) -> tuple[Floats, float]:
    """Coefficients [n] and intercept of the optimum.

    Args:
        gram: [n, n], of centred rows.
        signs: +1 and -1, [n], both.
        c: inverse strength.
        coefficients, intercept: where to begin.

    Raises:
        FitError: no convergence, which rows of very unequal scale can cause.
    """
    a, b = coefficients, intercept
    projections = gram @ a
    if not _better_than_nothing(a, projections, signs * (projections + b), c):
        # From a start where all is saturated on the wrong side there is no way back.
        a, b, projections = np.zeros(len(signs)), 0.0, np.zeros(len(signs))
    for _ in range(_MOST_STEPS):
        margins = signs * (projections + b)
        missing = _logistic(-margins)  # probability of the other class
        excess = c * signs * missing - a
        settled = max(float(np.abs(a).max()), np.finfo(np.float64).tiny)
        if np.abs(excess).max() <= _TOLERANCE * settled and abs(a.sum()) <= settled * 1e-9:
            return a, b
        step_a, step_b = _step(gram, c * missing * (1 - missing), excess, a.sum())
        moved = gram @ step_a
        size = _step_size(a, step_a, projections, moved, signs, margins, step_b, c)
        if size == 0.0:  # at the limit of rounding nothing improves any more
            break
        a, b = a + size * step_a, b + size * step_b
        projections = projections + size * moved
    if np.abs(excess).max() > 1e-5 * settled:
        raise FitError(
            "expected logistic regression to converge, got no improvement of the fit any more; "
            "standardize the dimensions, or take a smaller strength (C)"
        )
    return a, b


def _better_than_nothing(a: Floats, projections: Floats, margins: Floats, c: float) -> bool:
    objective = a @ projections / 2 + c * np.logaddexp(0, -margins).sum()
    return bool(objective < c * len(margins) * np.log(2))


def _step(gram: Floats, weights: Floats, excess: Floats, total: float) -> tuple[Floats, float]:
    """Newton's step for coefficients and intercept; coefficients sum to zero after it."""
    root = np.sqrt(np.maximum(weights, _LEAST_WEIGHT * max(float(weights.max()), 1e-300)))
    system = root[:, None] * gram * root
    system.flat[:: len(root) + 1] += 1.0
    solved = np.linalg.solve(system, np.stack([excess / root, root], axis=1))
    towards, uniform = root * solved[:, 0], root * solved[:, 1]
    shift = float((towards.sum() + total) / uniform.sum())
    return towards - shift * uniform, shift


def _step_size(
    a: Floats,
    step_a: Floats,
    projections: Floats,
    moved: Floats,
    signs: Floats,
    margins: Floats,
    step_b: float,
    c: float,
) -> float:
    """The first of 1, 1/2, 1/4 ... that improves the objective as its slope promises; or 0."""
    along, across = float(a @ moved), float(step_a @ moved)
    turned = signs * (moved + step_b)
    slope = along - c * float(_logistic(-margins) @ turned)
    before = c * float(np.logaddexp(0, -margins).sum())
    size = 1.0
    rounding = 1e-14 * (abs(before) + abs(float(a @ projections)))
    while size > 1e-10:
        after = c * float(np.logaddexp(0, -margins - size * turned).sum())
        change = after - before + size * along + size**2 * across / 2
        if change <= 1e-4 * size * slope + rounding:
            return size
        size /= 2
    return 0.0


def _logistic(values: Floats) -> Floats:
    # By tanh: exp of a large number would overflow.
    return np.asarray(0.5 * (1 + np.tanh(0.5 * values)))
