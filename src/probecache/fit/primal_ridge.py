"""Ridge for several training sets and strengths at once, by passes; and the strength's choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probecache.errors import FitError
from probecache.fit.primal_rows import Floats, Ints, RowPasses, TrainingSets
from probecache.fit.primal_scatter import Scatter
from probecache.fit.primal_solve import conjugate_gradients

__all__ = ["GRID", "Columns", "RidgeSolver", "choose_ratios", "grouped"]

# Strengths that are tried, as shares of the mean eigenvalue of a set's scatter, greatest first:
# each is solved from the one before.
GRID = tuple(10.0**power for power in range(1, -6, -1))

# A choice among decades is safe long before the answer is exact; these passes run in float32.
_ROUGH, _ROUGH_PASSES = 2e-3, 30
_MOST_PASSES = 400
# The residual tells the error to within a factor of 2 or so, by which folds' scatters differ.
_EXACT = 1e-9
# One factor serves strengths this far apart: convergence depends on the root of the ratio.
_FACTOR_SERVES = 20.0


@dataclass(frozen=True, eq=False)
class Columns:
    """Several problems that are solved in the same passes.

    Attributes:
        sets: int [columns], the training set of each.
        alphas: float64 [columns], scikit-learn's `Ridge(alpha)`, times the set's penalty.
    """

    sets: Ints
    alphas: Floats

    def __getitem__(self, chosen: Any) -> Columns:
        return Columns(self.sets[chosen], self.alphas[chosen])


def grouped(columns: Columns) -> list[Ints]:
    """Columns that one factor serves, the greatest strengths first."""
    order = np.argsort(-columns.alphas, kind="stable")
    groups: list[list[int]] = []
    for column in order.tolist():
        if groups and columns.alphas[groups[-1][0]] <= _FACTOR_SERVES * columns.alphas[column]:
            groups[-1].append(column)
        else:
            groups.append([column])
    return [np.array(group, dtype=np.intp) for group in groups]


@dataclass(frozen=True, eq=False)
class RidgeSolver:
    """Minimises sum (y - b - x w)^2 + alpha sum p w^2 over each column's training set.

    Attributes:
        rows, sets, scatter: the scatter holds the sum over all rows.
        penalty: p, float64 [sets, hidden]: 1, or each dimension's variance where it is as if
            all had been divided by their standard deviations.
    """

    rows: RowPasses
    sets: TrainingSets
    scatter: Scatter
    penalty: Floats

    def mean_eigenvalues(self) -> Floats:
        """Of each set's scatter matrix in units of the penalty, float64 [sets]."""
        return np.asarray(self.sets.sizes * (self.sets.spreads / self.penalty).mean(axis=1))

    def factor(self, columns: Columns) -> None:
        """Make the scatter a preconditioner for these columns."""
        self.scatter.factor(np.exp(np.log(columns.alphas).mean()) * self.penalty[0])

    def solve(self, columns: Columns, start: Floats | None = None) -> Floats:
        """Weights [hidden, columns], to 1e-8 of their length.

        Raises:
            FitError: not so near after hundreds of passes.
        """
        weights = self._start(columns) if start is None else start.copy()
        for group in grouped(columns):
            some = columns[group]
            self.factor(some)
            weights[:, group], passes, done = self._descend(some, weights[:, group], _EXACT)
            if not done:
                raise FitError(
                    f"expected ridge to converge, got no solution in {passes} passes at strength "
                    f"{some.alphas.min():.3g}; give a greater strength"
                )
        return weights

    def solve_roughly(self, columns: Columns, start: Floats) -> Floats:
        """Weights [hidden, columns] as good as a choice among strengths needs them."""
        self.factor(columns)
        return self._descend(columns, start, _ROUGH, np.float32, _ROUGH_PASSES)[0]

    def intercepts(self, columns: Columns, weights: Floats) -> Floats:
        """b for centred rows, with labels +1 and -1; float64 [columns]."""
        labels = (self.sets.counts @ [-1.0, 1.0] / self.sets.sizes)[columns.sets]
        return np.asarray(labels - np.einsum("hc,hc->c", self._centres(columns), weights))

    def _start(self, columns: Columns) -> Floats:
        return np.zeros((self.rows.hidden_size, len(columns.sets)))

    def _centres(self, columns: Columns) -> Floats:
        return self.sets.centres[:, columns.sets]

    def _right(self, columns: Columns) -> Floats:
        """Centred rows times labels: 2 n+ n- / n times the difference of means."""
        counts, means = self.sets.counts[columns.sets], self.sets.means[columns.sets]
        scale = 2 * counts.prod(axis=1) / counts.sum(axis=1)
        return np.asarray((scale[:, None] * (means[:, 1] - means[:, 0])).T)

    def _descend(
        self,
        columns: Columns,
        start: Floats,
        tolerance: float,
        dtype: type[np.floating[Any]] = np.float64,
        most: int = _MOST_PASSES,
    ) -> tuple[Floats, int, bool]:
        def product(vectors: Floats, which: Ints) -> Floats:
            return self._product(vectors, columns[which], dtype)

        right = self._right(columns)
        return conjugate_gradients(product, self.scatter.solve, right, start, tolerance, most)

    def _product(self, vectors: Floats, columns: Columns, dtype: type[np.floating[Any]]) -> Floats:
        """Each column's (scatter + alpha p) times its vector, in one pass."""
        used = self.sets.used[columns.sets].T.astype(dtype)
        narrow, total = vectors.astype(dtype), np.zeros_like(vectors)
        for batch in self.rows.batches(dtype):
            total += batch.rows.T @ (batch.rows @ narrow * used[batch.folds])
        centres, sizes = self._centres(columns), self.sets.sizes[columns.sets]
        total -= centres * (sizes * np.einsum("hc,hc->c", centres, vectors))
        total += columns.alphas * self.penalty[columns.sets].T * vectors
        return total


def choose_ratios(solver: RidgeSolver) -> tuple[float, NDArray[np.float64]]:
    """The strength that predicts held-out rows best, as a share of the mean eigenvalue.

    Least squared error on rows left out, labels +1 and -1: for all rows, over the folds; for
    what is left without fold f, over its own folds, so the choice never sees fold f.

    Returns:
        The choice for all rows, and those without each fold, float64 [folds]. With two folds, what
        one of them leaves cannot be divided, and takes the middle of the grid.
    """
    sets = solver.sets
    folds = len(sets.without)
    everything = np.arange(1, len(sets.used))
    weights, columns = _over_the_grid(solver, everything)
    errors = _held_out_errors(solver, columns, weights).reshape(folds, len(GRID), -1)
    each = np.arange(folds)
    whole = errors[each, :, sets.without[each, each] - 1].sum(axis=0)
    chosen = np.full(folds, float(GRID[len(GRID) // 2]))
    for fold in range(folds if folds > 2 else 0):
        others = each[each != fold]
        inside = errors[others, :, sets.without[fold, others] - 1].sum(axis=0)
        chosen[fold] = GRID[int(inside.argmin())]
    return GRID[int(whole.argmin())], chosen


def _over_the_grid(solver: RidgeSolver, which: Ints) -> tuple[Floats, Columns]:
    """Rough weights [hidden, strengths x sets] of the sets, and their columns."""
    found, columns = [], []
    weights = np.zeros((solver.rows.hidden_size, len(which)))
    eigenvalues = solver.mean_eigenvalues()[which]
    for ratio in GRID:
        columns.append(Columns(which, ratio * eigenvalues))
        weights = solver.solve_roughly(columns[-1], weights)
        found.append(weights)
    sets, alphas = (np.concatenate([getattr(c, n) for c in columns]) for n in ("sets", "alphas"))
    return np.concatenate(found, axis=1), Columns(sets, alphas)


def _held_out_errors(solver: RidgeSolver, columns: Columns, weights: Floats) -> Floats:
    """Sum of squared errors of each column on each fold, float64 [folds, columns]; one pass."""
    intercepts = solver.intercepts(columns, weights)
    errors = np.zeros((solver.sets.used.shape[1], len(columns.sets)))
    narrow = weights.astype(np.float32)
    for batch in solver.rows.batches(np.float32):
        labels = 2.0 * batch.sides - 1
        squared = (batch.rows @ narrow + intercepts - labels[:, None]) ** 2
        for fold in np.unique(batch.folds):
            errors[fold] += squared[batch.folds == fold].sum(axis=0)
    return errors
