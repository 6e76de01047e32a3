"""All methods of the dual form at one layer, on everything and without each and each two folds.

Guarantee: every strength is chosen before the fold is seen that it is judged on; a fit that two
questions share is made once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from probecache.errors import NoDirectionError
from probecache.fit.design import Design, FoldSet, Method, MethodFit, held_out_and_inner
from probecache.fit.lda import fit_lda
from probecache.fit.logistic import fit_logistic
from probecache.fit.pca import fit_pca
from probecache.fit.problem import DualFit, Problem
from probecache.fit.ridge import AlphaChoice, fit_ridge
from probecache.fit.sums import FoldSums
from probecache.probe import Probe

__all__ = ["fit_dual"]

Floats = NDArray[np.float64]


def fit_dual(
    problem: Problem,
    design: Design,
    sums: FoldSums,
    strengths: Mapping[Method, float | None],
) -> dict[Method, MethodFit]:
    """Fit the methods, by name with their strengths, None where it is to be chosen.

    Raises:
        FitError: a strength cannot be chosen, or logistic regression does not converge.
        NoDirectionError: a method finds the classes' means equal.
    """
    fits = _Fits(problem, strengths)
    scores: dict[Method, dict[FoldSet, Floats]] = {method: {} for method in strengths}
    probes: dict[Method, Probe] = {}
    for left_out in ((), *design.fold_sets):
        made = fits.of(left_out)
        if not left_out:
            probes = _probes(problem, sums, {m: made[m, ()] for m in strengths})
            continue
        decisions = _scores(problem, left_out, made.values())
        for (method, key), found in zip(made, decisions, strict=True):
            scores[method][key] = _by_example(found, problem.held.owners, len(design.groups))
    return {m: MethodFit(probes[m], *held_out_and_inner(design, scores[m])) for m in strengths}


@dataclass(eq=False)
class _Fits:
    """The fits without folds, in the order in which one helps the next."""

    problem: Problem
    strengths: Mapping[Method, float | None]
    _choice: AlphaChoice = field(init=False)
    _alphas: dict[FoldSet, float] = field(init=False, default_factory=dict)
    _decisions: dict[FoldSet, Floats] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._choice = AlphaChoice(self.problem)

    def of(self, left_out: FoldSet) -> dict[tuple[Method, FoldSet], DualFit]:
        """By method and folds left out, the outer first: both orders, where they are fitted apart.

        Two folds left out are two questions: either may be the one that no choice has seen.
        """
        if len(left_out) < 2:
            self._choose(left_out)
        found: dict[tuple[Method, FoldSet], DualFit] = {}
        for method in self.strengths:
            made: dict[float | None, DualFit] = {}
            for order in dict.fromkeys((left_out, left_out[::-1])):
                strength = self._strength(method, order[:1])
                if strength not in made:
                    made[strength] = self._fit(method, left_out, strength)
                    found[method, order] = made[strength]
        return found

    def _choose(self, fold: FoldSet) -> None:
        wanting = [m for m in (Method.RIDGE, Method.LOGISTIC) if m in self.strengths]
        if any(self.strengths[m] is None for m in wanting):
            self._alphas[fold] = self._choice.without(fold)

    def _strength(self, method: Method, outer: FoldSet) -> float | None:
        given = self.strengths[method]
        if given is not None or method not in (Method.RIDGE, Method.LOGISTIC):
            return given
        # Where p = 1/2, logistic regression is ridge on labels of +2 and -2 with weights of 1/4.
        return self._alphas[outer] if method is Method.RIDGE else 4 / self._alphas[outer]

    def _fit(self, method: Method, left_out: FoldSet, strength: float | None) -> DualFit:
        if method is Method.PCA:
            return fit_pca(self.problem, left_out)
        if method is Method.LDA or strength is None:
            return fit_lda(self.problem, left_out, strength)
        if method is Method.RIDGE:
            return fit_ridge(self.problem, left_out, strength)
        return self._fit_logistic(left_out, strength)

    def _fit_logistic(self, left_out: FoldSet, c: float) -> DualFit:
        # Without the last fold the optimum moves little: four steps instead of seven.
        found = fit_logistic(self.problem, left_out, c, self._decisions.get(left_out[:-1]))
        if len(left_out) < 2:
            projections = self.problem.gram(left_out) @ found.coefficients
            self._decisions[left_out] = projections + found.intercept
        return found


def _scores(problem: Problem, left_out: FoldSet, fits: Iterable[DualFit]) -> Floats:
    """Decisions over the direction's norm, of all rows: [fits, n]."""
    fits = list(fits)
    coefficients = np.stack([f.coefficients for f in fits])
    projections = coefficients @ problem.gram(left_out)
    scale = problem.scale(left_out)
    if scale is None:
        squares = np.einsum("fn,fn->f", coefficients, projections)
    else:
        squares = ((problem.held.combine(coefficients) / scale**2) ** 2).sum(axis=1)
    norms = np.sqrt(np.where(squares > 0, squares, 1.0))
    intercepts = np.array([f.intercept for f in fits])
    return np.asarray((projections + intercepts[:, None]) / norms[:, None])


def _by_example(scores: Floats, owners: NDArray[np.int64], n_examples: int) -> Floats:
    """Means over each example's rows; NaN for an example without."""
    with np.errstate(invalid="ignore"):
        return np.asarray(
            np.bincount(owners, scores, n_examples) / np.bincount(owners, minlength=n_examples)
        )


def _probes(
    problem: Problem, sums: FoldSums, fits: Mapping[Method, DualFit]
) -> dict[Method, Probe]:
    raw = problem.held.combine(np.stack([f.coefficients for f in fits.values()]))
    scale = problem.scale(())
    if scale is not None:
        raw /= scale**2
    return {
        method: _probe(direction, fit, problem.held.centre, sums)
        for (method, fit), direction in zip(fits.items(), raw, strict=True)
    }


def _probe(raw: Floats, fit: DualFit, centre: Floats, sums: FoldSums) -> Probe:
    norm = float(np.linalg.norm(raw))
    if not norm > 0:
        raise NoDirectionError("expected the classes to differ, got no direction that parts them")
    unit = raw / norm
    return Probe(
        direction=unit.astype(np.float32),
        raw_norm=norm,
        threshold=float(unit @ centre) - fit.intercept / norm,
        typical_norm=sums.typical_norm,
        n_positive=int(sums.counts[:, 1].sum()),
        n_negative=int(sums.counts[:, 0].sum()),
        strength=fit.strength,
    )
