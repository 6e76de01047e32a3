"""Fits of many rows: every method by passes over them, where a Gram matrix has no room.

Guarantees: memory stays under 1 GB at 8192 dimensions however many rows there are: one float32
scatter matrix, factored in place as a preconditioner, and one batch of rows. The answers are those
of float64: ridge and logistic regression to 1e-8, the leading pair difference to its residual. All
training sets (everything, all but one fold, all but two) share their passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from probecache.errors import NoDirectionError
from probecache.fit.design import Chunks, Design, Method, MethodFit
from probecache.fit.primal_logistic import solve_logistic
from probecache.fit.primal_pairs import pair_directions
from probecache.fit.primal_ridge import GRID, Columns, RidgeSolver, choose_ratios
from probecache.fit.primal_rows import (
    Floats,
    Ints,
    Moments,
    RowPasses,
    TrainingSets,
    gather_moments,
    training_sets,
)
from probecache.fit.primal_scatter import Scatter, ledoit_wolf
from probecache.probe import Probe

__all__ = ["DEFAULT_RATIO", "GRID", "fit_many_rows"]

# Ridge's strength where nothing can choose it, as a share of the scatter's mean eigenvalue.
DEFAULT_RATIO = 1e-2


def fit_many_rows(
    chunks: Chunks,
    hidden_size: int,
    design: Design,
    methods: Iterable[Method],
    strengths: Mapping[Method, float | None] | None = None,
    *,
    standardize: bool = False,
) -> dict[Method, MethodFit]:
    """Fit methods at one layer by passes over its rows.

    Takes what `fit_layer` takes and gives what it gives. Strengths that are not given: ridge's is
    the one of `GRID` (shares of the mean eigenvalue of the scatter that is fitted) with the least
    squared error on left-out folds, and inside a fold on the others alone; without folds it is
    `DEFAULT_RATIO`. Logistic regression follows with C = 4 / alpha, LDA by Ledoit and Wolf.

    Args:
        chunks: gives (examples [m], rows [m, hidden]) in the same order each time it is called.
        hidden_size: width of the rows.
        design: classes, groups and folds of the examples.
        methods: which to fit.
        strengths: alpha, C and shrinkage, in activation units (after division, if that is asked).
        standardize: as if each dimension were divided by its standard deviation over the rows that
            are fitted on; directions and thresholds are of activations all the same.

    Raises:
        ShapeError, EmptyClassError, NonFiniteError, NoDirectionError: as `fit_layer`.
        FitError: no convergence; says which strength to change.
    """
    problem = _Problem.read(chunks, hidden_size, design, standardize, dict(strengths or {}))
    # What LDA gathers serves all; logistic regression spoils it.
    last = {Method.LDA: -1, Method.LOGISTIC: 1}
    order = sorted(methods, key=lambda method: last.get(method, 0))
    fitted = {method: problem.fit(method) for method in order}
    scores = _held_out_scores(problem, list(fitted.values()))
    return {
        method: MethodFit(problem.probe(fitted[method]), *scores[order.index(method)])
        for method in methods
    }


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A method's answer for every training set.

    `weights` [hidden, columns], `intercepts` [columns] for centred rows, `table` [folds, folds]:
    the column that scores fold g on behalf of fold f, `strength` of column 0, which is fitted on
    everything, `scale` of its raw norm.
    """

    weights: Floats
    intercepts: Floats
    table: Ints
    strength: float | None = None
    scale: float = 1.0


@dataclass(eq=False)
class _Problem:
    """One layer's rows, what is known of them, and the solver that the methods share."""

    rows: RowPasses
    design: Design
    moments: Moments
    sets: TrainingSets
    penalty: Floats
    strengths: Mapping[Method, float | None]
    _solver: RidgeSolver | None = None

    @classmethod
    def read(
        cls,
        chunks: Chunks,
        hidden_size: int,
        design: Design,
        standardize: bool,
        strengths: Mapping[Method, float | None],
    ) -> _Problem:
        sides = design.is_positive.astype(np.intp)
        folds = np.zeros_like(sides) if design.folds is None else design.folds
        start = RowPasses(chunks, hidden_size, sides, folds, np.zeros(hidden_size))
        rows, moments = gather_moments(start)
        sets = training_sets(moments, folded=design.folds is not None)
        if not (sets.means[0, 1] != sets.means[0, 0]).any():
            raise NoDirectionError(
                "expected the classes' means to differ, got equal ones, so there is no direction; "
                "at layer 0 the last token of both classes may be the same: use a deeper layer"
            )
        constant = sets.spreads == 0
        penalty = np.where(constant | (not standardize), 1.0, sets.spreads)
        return cls(rows, design, moments, sets, penalty, strengths)

    @property
    def ridge(self) -> RidgeSolver:
        """The solver that ridge, logistic regression and LDA share, its scatter gathered."""
        if self._solver is None:
            scatter = Scatter(self.rows.hidden_size)
            scatter.gather(self.rows)
            self._solver = RidgeSolver(self.rows, self.sets, scatter, self.penalty)
        return self._solver

    @cached_property
    def ratios(self) -> tuple[float, Floats]:
        """Ridge's strengths as shares of mean eigenvalues: of everything, and without each fold."""
        if not len(self.sets.without):
            return DEFAULT_RATIO, np.empty(0)
        return choose_ratios(self.ridge)

    def fit(self, method: Method) -> _Fitted:
        """One method on every training set."""
        if method is Method.PCA:
            return self._pca()
        if method is Method.DIFFERENCE_OF_MEANS:
            return self._midway(self._apart / self.penalty.T, self.sets.without)
        if method is Method.LDA:
            return self._lda()
        return self._ridge() if method is Method.RIDGE else self._logistic()

    def probe(self, fitted: _Fitted) -> Probe:
        """The probe that was fitted on everything."""
        weights = fitted.weights[:, 0]
        norm = float(np.linalg.norm(weights))
        direction = (weights / norm).astype(np.float32)
        # Of the direction as it is stored: rounding it moves the projection of a huge mean.
        centre = float(self.rows.centre @ direction.astype(np.float64))
        negative, positive = self.sets.counts[0]
        return Probe(
            direction=direction,
            raw_norm=norm * fitted.scale,
            threshold=centre - float(fitted.intercepts[0]) / norm,
            typical_norm=float(np.median(self.moments.norms)),
            n_positive=int(positive),
            n_negative=int(negative),
            strength=fitted.strength,
        )

    @property
    def _apart(self) -> Floats:
        """Differences of the sets' means, [hidden, sets]."""
        return np.asarray((self.sets.means[:, 1] - self.sets.means[:, 0]).T)

    def _columns(self, method: Method) -> tuple[Columns, Ints]:
        """What ridge and logistic regression solve, alphas in ridge's units, and the table."""
        given = self.strengths.get(method)
        if given is not None:
            alpha = given if method is Method.RIDGE else 4 / given
            every = np.arange(len(self.sets.used))
            return Columns(every, np.full(len(every), alpha)), self.sets.without
        whole, inside = self.ratios
        wanted: dict[tuple[int, float], int] = {(0, whole): 0}
        table = np.full(self.sets.without.shape, -1)
        for (f, g), number in np.ndenumerate(self.sets.without):
            if number >= 0:
                table[f, g] = wanted.setdefault((int(number), float(inside[f])), len(wanted))
        sets = np.array([number for number, _ in wanted])
        ratios = np.array([ratio for _, ratio in wanted])
        return Columns(sets, ratios * self.ridge.mean_eigenvalues()[sets]), table

    def _ridge(self) -> _Fitted:
        columns, table = self._columns(Method.RIDGE)
        weights = self.ridge.solve(columns)
        intercepts = self.ridge.intercepts(columns, weights)
        return _Fitted(weights, intercepts, table, float(columns.alphas[0]))

    def _logistic(self) -> _Fitted:
        columns, table = self._columns(Method.LOGISTIC)
        weights, intercepts = solve_logistic(self.ridge, columns)
        return _Fitted(weights, intercepts, table, float(4 / columns.alphas[0]))

    def _lda(self) -> _Fitted:
        """Ridge at alpha = n g / (1 - g) tr(S) / d, S the within-class covariance."""
        shrinkage = self._shrinkage()
        trace = (self.sets.within / self.penalty).mean(axis=1)
        rounding = self.sets.sizes * np.finfo(np.float64).eps
        flat = trace <= rounding * (self.sets.spreads / self.penalty).mean(axis=1)
        trace[flat], shrinkage[flat] = 1, 1  # classes without any spread: whatever the length
        weights = self._apart / self.penalty.T / trace
        some = np.flatnonzero(shrinkage < 1)
        share = shrinkage[some]
        alphas = self.sets.sizes[some] * trace[some] * np.maximum(share, 1e-9) / (1 - share)
        columns = Columns(some, alphas)
        if some.size:
            solved = self.ridge.solve(columns)
            weights[:, some] = solved * self._lda_scale(solved, some, share)
        return self._midway(weights, self.sets.without, float(shrinkage[0]))

    def _lda_scale(self, ridge: Floats, some: Ints, share: Floats) -> Floats:
        """What makes ridge's weights the inverse covariance times the difference of means.

        With c = n+ n- / n and the difference d, ridge's matrix is LDA's plus c d d', which by
        Sherman and Morrison changes only the length.
        """
        counts, sizes = self.sets.counts[some], self.sets.sizes[some]
        apart = np.einsum("hs,hs->s", self._apart[:, some], ridge)
        return np.asarray(sizes**2 / counts.prod(axis=1) / (1 - share) / (2 - apart))

    def _shrinkage(self) -> Floats:
        given = self.strengths.get(Method.LDA)
        if given is not None:
            return np.full(len(self.sets.used), given)
        scales = np.sqrt(self.penalty)
        scatter = Scatter(self.rows.hidden_size)
        norms = scatter.gather_by_folds(self.rows, self.sets, scales)
        # The scatter that ridge wants is made on the way.
        self._solver = RidgeSolver(self.rows, self.sets, scatter, self.penalty)
        return ledoit_wolf(self.rows, self.sets, scales, norms)

    def _pca(self) -> _Fitted:
        scales = np.sqrt(self.penalty)
        weights, spread = pair_directions(self.rows, self.sets, self.design.groups, scales)
        return self._midway(weights, self.sets.without, scale=float(spread[0]))

    def _midway(
        self, weights: Floats, table: Ints, strength: float | None = None, scale: float = 1.0
    ) -> _Fitted:
        """With the threshold half-way between the projected means of the classes."""
        between = self.sets.means.sum(axis=1).T / 2
        return _Fitted(weights, -np.einsum("hs,hs->s", between, weights), table, strength, scale)


def _held_out_scores(
    problem: _Problem, fitted: list[_Fitted]
) -> list[tuple[Floats | None, Floats | None]]:
    """Held-out and inner scores of every method, in one pass for all of them."""
    if problem.design.folds is None:
        return [(None, None)] * len(fitted)
    norms = [np.linalg.norm(one.weights, axis=0) for one in fitted]
    units = np.concatenate(
        [o.weights / np.where(n > 0, n, 1) for o, n in zip(fitted, norms, strict=True)], axis=1
    )
    offsets = [o.intercepts / np.where(n > 0, n, 1) for o, n in zip(fitted, norms, strict=True)]
    starts = np.cumsum([0, *(len(n) for n in norms)])
    # For every example the column that each fold asks, method after method: [folds, methods, folds]
    asked = np.stack([o.table + s for o, s in zip(fitted, starts[:-1], strict=True)], axis=1)
    means = _mean_scores(problem, units, np.concatenate(offsets), asked)
    return [_as_held_out(problem, means[:, number]) for number in range(len(fitted))]


def _mean_scores(problem: _Problem, units: Floats, offsets: Floats, asked: Ints) -> Floats:
    """Scores of examples, averaged over their rows: float64 [folds, methods, examples]."""
    examples, folds = len(problem.design.groups), asked.shape[-1]
    totals = np.zeros((examples, *asked.shape[:-1]))
    counts = np.zeros(examples)
    for batch in problem.rows.batches():
        scores = batch.rows @ units + offsets
        counts += np.bincount(batch.owners, minlength=examples)
        for fold in range(folds):
            here = np.flatnonzero(batch.folds == fold)
            if not here.size:
                continue
            starts = np.flatnonzero(np.diff(batch.owners[here], prepend=-1))
            some = scores[here][:, asked[..., fold]]
            np.add.at(totals, batch.owners[here][starts], np.add.reduceat(some, starts, axis=0))
    with np.errstate(invalid="ignore"):
        return np.asarray((totals / counts[:, None, None]).transpose(1, 2, 0))


def _as_held_out(problem: _Problem, means: Floats) -> tuple[Floats, Floats | None]:
    """From scores on behalf of every fold, [folds, examples]."""
    folds = problem.rows.folds
    inner = means.copy()
    own = folds, np.arange(len(folds))
    held_out = means[own]
    inner[own] = np.nan
    return held_out, inner if len(means) > 2 else None
