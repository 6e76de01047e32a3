"""L2 logistic regression for several training sets and strengths at once, by passes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probecache.errors import FitError
from probecache.fit.primal_ridge import Columns, RidgeSolver, grouped
from probecache.fit.primal_rows import Batch, Floats, Ints
from probecache.fit.primal_solve import conjugate_gradients

__all__ = ["solve_logistic"]

_MOST_STEPS, _MOST_INNER = 60, 200
# Steps that take more passes than this pay for a preconditioner of their own.
_SLOW_STEP, _MOST_REFILLS = 12, 4
# A step this short, relative to the weights, is the last one: Newton's next would be its square.
_LAST_STEP, _PRECISION = 1e-6, 1e-10


@dataclass(eq=False)
class _Point:
    """Weights [hidden, columns] and intercepts [columns] with what one pass says about them.

    `loss`, gradients by weights and intercept, `mixed` [hidden, columns] and `curved` [columns]
    (second derivatives by the intercept and the weights, and by the intercept twice).
    """

    weights: Floats
    intercepts: Floats
    loss: Floats
    by_weights: Floats
    by_intercept: Floats
    mixed: Floats
    curved: Floats

    def put(self, which: Ints, other: _Point) -> None:
        for name in ("loss", "by_intercept", "curved", "intercepts"):
            getattr(self, name)[which] = getattr(other, name)
        for name in ("weights", "by_weights", "mixed"):
            getattr(self, name)[:, which] = getattr(other, name)

    def some(self, which: Ints) -> _Point:
        return _Point(
            self.weights[:, which],
            self.intercepts[which],
            self.loss[which],
            self.by_weights[:, which],
            self.by_intercept[which],
            self.mixed[:, which],
            self.curved[which],
        )


def solve_logistic(ridge: RidgeSolver, columns: Columns) -> tuple[Floats, Floats]:
    """Minimise sum log(1 + exp(-y (x w + b))) + alpha / 8 sum p w^2, that is C = 4 / alpha.

    At p = 1/2 logistic regression is ridge with weights of 1/4, so ridge's answer is the start and
    ridge's factor the first preconditioner; Newton's steps are solved by conjugate gradients. The
    scatter is overwritten with one weighted as logistic regression weighs the rows, where that
    saves passes.

    Args:
        ridge: the rows, training sets and scatter; the scatter is spoilt for ridge afterwards.
        columns: training sets and ridge's alphas.

    Returns:
        Weights [hidden, columns] and intercepts [columns] for centred rows, near to 1e-9.

    Raises:
        FitError: not converged.
    """
    weights = np.zeros((ridge.rows.hidden_size, len(columns.sets)))
    groups = grouped(columns)
    for group in groups:
        weights[:, group] = 2 * ridge.solve_roughly(columns[group], weights[:, group])
    intercepts = 2 * ridge.intercepts(columns, weights / 2)
    refilled = False
    for group in groups:
        newton = _Newton(ridge, columns[group], refilled)
        weights[:, group], intercepts[group] = newton.solve(weights[:, group], intercepts[group])
        refilled = newton.refilled
    return weights, intercepts


class _Newton:
    """Damped Newton steps of one group of columns."""

    def __init__(self, ridge: RidgeSolver, columns: Columns, refilled: bool) -> None:
        self.columns, self.rows, self.scatter = columns, ridge.rows, ridge.scatter
        self.used = ridge.sets.used[columns.sets].T.astype(np.float64)
        self.decay = columns.alphas / 4 * ridge.penalty[columns.sets].T
        # The Hessian is a quarter of the plain scatter at the start, and the weighted one itself.
        self.share, self.refills = (1.0, 0) if refilled else (0.25, 0)
        self.scatter.factor(self.decay.mean(axis=1) / self.share)

    @property
    def refilled(self) -> bool:
        """Whether the scatter is a weighted one by now."""
        return self.share == 1

    def solve(self, weights: Floats, intercepts: Floats) -> tuple[Floats, Floats]:
        """Weights and intercepts at the minimum; raises FitError as `solve_logistic`."""
        everything = np.arange(len(self.columns.sets))
        point = self._look(weights, intercepts, everything)
        lengths, active = np.full(len(everything), 0.3), everything
        for _ in range(_MOST_STEPS):
            precision = np.clip(lengths[active], _PRECISION, 0.1)
            step, by, passes = self._step(point, active, precision)
            moved = self._damped(point, step, by, active)
            lengths[active] = _lengths(step, point.weights[:, active])
            sure = moved & (lengths[active] <= _LAST_STEP)
            sure &= lengths[active] * np.maximum(precision, lengths[active]) <= _PRECISION
            active = active[~sure]
            if not active.size:
                return point.weights, point.intercepts
            if passes > _SLOW_STEP and self.refills < _MOST_REFILLS:
                self._refill(point)
        raise FitError(
            f"expected logistic regression to converge, got no solution in {_MOST_STEPS} steps at "
            f"C = {4 / self.columns.alphas.min():.3g}; give a smaller strength"
        )

    def _look(self, weights: Floats, intercepts: Floats, which: Ints) -> _Point:
        """Loss, gradient and the intercept's part of the Hessian; one pass."""
        used, count = self.used[:, which], len(which)
        loss, by_intercept, curved = (np.zeros(count) for _ in range(3))
        products = np.zeros((len(weights), 2 * count))
        for batch in self.rows.batches():
            score = batch.rows @ weights + intercepts
            seen, side = used[batch.folds], batch.sides[:, None]
            chance = _expit(score)
            # Of the score against the row's own class: exact also where that is almost sure.
            loss += (seen * np.logaddexp(0, (1 - 2 * side) * score)).sum(axis=0)
            pull, curve = seen * (chance - side), seen * chance * (1 - chance)
            by_intercept += pull.sum(axis=0)
            curved += curve.sum(axis=0)
            products += batch.rows.T @ np.concatenate([pull, curve], axis=1)
        decay = self.decay[:, which] * weights
        loss += np.einsum("hc,hc->c", decay, weights) / 2
        return _Point(
            weights=weights,
            intercepts=intercepts,
            loss=loss,
            by_weights=products[:, :count] + decay,
            by_intercept=by_intercept,
            mixed=products[:, count:],
            curved=np.maximum(curved, np.finfo(np.float64).tiny),
        )

    def _step(self, point: _Point, active: Ints, precision: Floats) -> tuple[Floats, Floats, int]:
        """Newton's step of weights and intercepts, the intercept eliminated; and its passes."""
        here = point.some(active)
        right = here.mixed * (here.by_intercept / here.curved) - here.by_weights

        def product(vectors: Floats, which: Ints) -> Floats:
            return self._curve_along(here.some(which), vectors, active[which])

        def precondition(residual: Floats) -> Floats:
            return self.scatter.solve(residual) / self.share

        step, passes, _ = conjugate_gradients(
            product, precondition, right, None, precision, _MOST_INNER
        )
        along = np.einsum("hc,hc->c", here.mixed, step)
        return step, -(here.by_intercept + along) / here.curved, passes

    def _curve_along(self, here: _Point, vectors: Floats, which: Ints) -> Floats:
        """The Hessian, intercept eliminated, times vectors [hidden, columns]; one pass."""
        used, count = self.used[:, which], len(which)
        both = np.concatenate([here.weights, vectors], axis=1)
        total = self.decay[:, which] * vectors
        for batch in self.rows.batches():
            products = batch.rows @ both
            chance = _expit(products[:, :count] + here.intercepts)
            curve = used[batch.folds] * chance * (1 - chance)
            total += batch.rows.T @ (curve * products[:, count:])
        total -= here.mixed * (np.einsum("hc,hc->c", here.mixed, vectors) / here.curved)
        return total

    def _damped(self, point: _Point, step: Floats, by: Floats, active: Ints) -> NDArray[np.bool_]:
        """Go along the steps, halved until the loss falls; which columns went all the way."""
        here = point.some(active)
        slope = np.einsum("hc,hc->c", here.by_weights, step) + here.by_intercept * by
        share, left = np.ones(len(active)), np.arange(len(active))
        for _ in range(30):
            weights = here.weights[:, left] + share[left] * step[:, left]
            trial = self._look(
                weights, here.intercepts[left] + share[left] * by[left], active[left]
            )
            allowed = here.loss[left] * (1 + 1e-11) + 1e-4 * share[left] * slope[left]
            fine = trial.loss <= allowed
            point.put(active[left[fine]], trial.some(np.flatnonzero(fine)))
            left = left[~fine]
            if not left.size:
                break
            share[left] /= 2
        return np.asarray(share == 1)

    def _refill(self, point: _Point) -> None:
        """A scatter of rows weighted as at this point; one pass and a factor."""
        weights = point.weights.astype(np.float32)

        def weigh(batch: Batch) -> Floats:
            chance = _expit(batch.rows @ weights + point.intercepts)
            used = self.used[batch.folds]
            return np.asarray((used * chance * (1 - chance)).sum(axis=1) / used.sum(axis=1).clip(1))

        self.scatter.gather(self.rows, weigh)
        self.scatter.factor(self.decay.mean(axis=1))
        self.share = 1.0
        self.refills += 1


def _expit(score: Floats) -> Floats:
    # Of -|score|, which cannot overflow; written with tanh, NumPy's fastest of the kind.
    return np.asarray(0.5 * (1 + np.tanh(0.5 * score)))


def _lengths(step: Floats, weights: Floats) -> Floats:
    size = np.linalg.norm(weights, axis=0)
    return np.asarray(np.linalg.norm(step, axis=0) / np.where(size > 0, size, 1))
