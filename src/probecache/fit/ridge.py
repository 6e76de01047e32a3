"""Ridge regression on labels of +1 and -1, and the choice of its strength.

Guarantee: a strength chosen for a fit without a fold has not seen that fold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from probecache.errors import FitError
from probecache.fit.design import FoldSet
from probecache.fit.problem import DualFit, Problem
from probecache.fit.ridge_path import RidgePath, alpha_grid

__all__ = ["AlphaChoice", "blocks_of", "fit_ridge"]

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


def fit_ridge(problem: Problem, left_out: FoldSet, alpha: float) -> DualFit:
    """Ridge regression on +1 and -1, equal to scikit-learn's `Ridge(alpha)`."""
    coefficients = problem.ridge_coefficients(left_out, alpha)
    kept = problem.kept(left_out)
    projections = problem.gram(left_out)[kept] @ coefficients
    # The residuals sum to zero: that is what the intercept is for.
    return DualFit(coefficients, float(np.mean(problem.signs[kept] - projections)), alpha)


@dataclass(eq=False)
class AlphaChoice:
    """Chooses alpha by the squared error at left-out folds; groups, where fewer than two remain."""

    problem: Problem
    _errors: dict[float, dict[FoldSet, Floats]] = field(init=False, default_factory=dict)

    def without(self, fold: FoldSet) -> float:
        """The alpha of least error, for fits without `fold` (one fold, or none).

        Raises:
            FitError: neither two folds nor two groups remain.
        """
        grid = alpha_grid(self.problem.kept_gram(fold))
        remaining = [g for g in range(self.problem.n_folds) if g not in fold]
        if self.problem.sums is None and len(remaining) > 1:
            errors = [self._shared(alpha, fold, remaining) for alpha in grid]
        else:
            errors = self._alone(grid, fold, remaining)
        return grid[int(np.argmin(errors))]

    def _shared(self, alpha: float, fold: FoldSet, remaining: list[int]) -> float:
        """Squared errors at each remaining fold of the fit without it and without `fold`."""
        if alpha not in self._errors:
            self._errors[alpha] = self._fold_errors(alpha)
        found = self._errors[alpha]
        return float(sum(found[tuple(sorted((*fold, g)))][g] for g in remaining))

    def _fold_errors(self, alpha: float) -> dict[FoldSet, Floats]:
        """Squared errors by fold, [folds], for each fold, and each two folds, left out."""
        folds, count = self.problem.folds, self.problem.n_folds
        sets: list[FoldSet] = [(f,) for f in range(count)]
        sets += combinations(range(count), 2) if count > 2 else ()
        blocks = [self.problem.left(s) for s in sets]
        errors = self.problem.shared_path().left_out_errors(alpha, self.problem.signs, blocks)
        return {
            s: np.bincount(folds[block], error**2, count).astype(np.float64)
            for s, block, error in zip(sets, blocks, errors, strict=True)
        }

    def _alone(self, grid: tuple[float, ...], fold: FoldSet, remaining: list[int]) -> list[float]:
        """Squared errors of each alpha, by a path of the kept rows' own."""
        kept = self.problem.kept(fold)
        which = (self.problem.folds if len(remaining) > 1 else self.problem.groups)[kept]
        blocks = blocks_of(which)
        if len(blocks) < 2:
            raise FitError(
                "expected two or more groups to choose a strength by leaving each out, got "
                f"{len(blocks)}; name a strength, or divide the groups more finely"
            )
        path, signs = RidgePath(self.problem.kept_gram(fold)), self.problem.signs[kept]
        return [
            float(sum(e @ e for e in path.left_out_errors(alpha, signs, blocks))) for alpha in grid
        ]


def blocks_of(numbers: Ints) -> list[Ints]:
    """Places of each number."""
    _, inverse = np.unique(numbers, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    return np.split(order, np.cumsum(np.bincount(inverse))[:-1])
