"""Rows in the dual form: every direction is a sum of rows, and rows meet in their Gram matrix only.

With centred rows x_i and K_ij = x_i . x_j, a direction w = sum_i a_i x_i has projections K a and
the squared norm a' K a, so that n coefficients stand for d, and what is fitted without some folds
has zeros there. Coefficients sum to zero, as an intercept that is not penalised makes them, so the
centre does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from probecache.fit.ridge_path import RidgePath

if TYPE_CHECKING:
    from probecache.fit.design import Design, FoldSet
    from probecache.fit.gram import HeldRows
    from probecache.fit.sums import FoldSums

__all__ = ["DualFit", "Problem"]

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class DualFit:
    """A fit in the dual form: decision(x) = sum_i coefficients_i (x_i - c) . (x - c) + intercept.

    Attributes:
        coefficients: float64 [n], zero for rows that were left out.
        intercept: of the decision function for centred rows.
        strength: as in `Probe`.
    """

    coefficients: Floats
    intercept: float
    strength: float | None = None


@dataclass(eq=False)
class Problem:
    """The rows that are fitted, and what all methods make of them.

    Attributes:
        held: the rows.
        signs: float64 [n], +1 for rows of the positive class, -1 for the others.
        groups, folds: int [n]; folds are all 0 where nothing is held out.
        n_folds: 0 where nothing is held out.
        sums: where rows are standardised, what they are divided by; None otherwise.
    """

    held: HeldRows
    signs: Floats
    groups: Ints
    folds: Ints
    n_folds: int
    sums: FoldSums | None = None
    _gram: tuple[FoldSet, Floats] | None = field(init=False, default=None)
    _kept_gram: tuple[FoldSet, Floats] | None = field(init=False, default=None)
    _divided: dict[FoldSet, tuple[Ints, Ints]] = field(init=False, default_factory=dict)
    _path: tuple[FoldSet, RidgePath] | None = field(init=False, default=None)

    @classmethod
    def of(cls, held: HeldRows, design: Design, sums: FoldSums | None = None) -> Problem:
        """The problem of the rows of a design; with `sums` rows are standardised."""
        signs = np.where(design.is_positive[held.owners], 1.0, -1.0)
        folds = np.zeros_like(design.groups) if design.folds is None else design.folds
        return cls(
            held, signs, design.groups[held.owners], folds[held.owners], design.n_folds, sums
        )

    @property
    def hidden_size(self) -> int:
        """Width of the rows."""
        return int(self.held.rows.shape[1])

    def kept(self, left_out: FoldSet) -> Ints:
        """Rows that are fitted without some folds."""
        return self._parts(left_out)[0]

    def left(self, left_out: FoldSet) -> Ints:
        """Rows of some folds."""
        return self._parts(left_out)[1]

    def _parts(self, left_out: FoldSet) -> tuple[Ints, Ints]:
        if left_out not in self._divided:
            left = np.zeros(len(self.signs), dtype=np.bool_)
            for fold in left_out:
                left |= self.folds == fold
            self._divided[left_out] = np.flatnonzero(~left), np.flatnonzero(left)
        return self._divided[left_out]

    def scale(self, left_out: FoldSet) -> Floats | None:
        """What rows are divided by, [hidden]."""
        return None if self.sums is None else self.sums.deviations(left_out)

    def gram(self, left_out: FoldSet) -> Floats:
        """The Gram matrix [n, n] of all rows, scaled as those that are kept tell."""
        key = left_out if self.sums is not None else ()
        if self._gram is None or self._gram[0] != key:
            self._gram = None  # two of them at a time may be too many
            self._gram = key, self.held.gram(self.scale(key))
        return self._gram[1]

    def kept_gram(self, left_out: FoldSet) -> Floats:
        """The Gram matrix of the rows that are kept."""
        if not left_out:
            return self.gram(left_out)
        if self._kept_gram is None or self._kept_gram[0] != left_out:
            kept = self.kept(left_out)
            self._kept_gram = left_out, self.gram(left_out)[np.ix_(kept, kept)]
        return self._kept_gram[1]

    def shared_path(self) -> RidgePath:
        """Ridge on all rows, from which folds are left out in closed form."""
        return self._path_of(())

    def ridge_coefficients(self, left_out: FoldSet, alpha: float) -> Floats:
        """Coefficients [n] of ridge regression on the signs without some folds."""
        if self.sums is None:
            return self.shared_path().coefficients(alpha, self.signs, self.left(left_out))
        kept, found = self.kept(left_out), np.zeros(len(self.signs))
        found[kept] = self._path_of(left_out).coefficients(alpha, self.signs[kept])
        return found

    def _path_of(self, left_out: FoldSet) -> RidgePath:
        if self._path is None or self._path[0] != left_out:
            self._path = left_out, RidgePath(self.kept_gram(left_out))
        return self._path[1]

    def class_midpoint(self, left_out: FoldSet, coefficients: Floats) -> float:
        """Half-way between the classes' mean projections, of the rows that are kept."""
        kept = self.kept(left_out)
        projections, signs = (self.gram(left_out) @ coefficients)[kept], self.signs[kept]
        return float(projections[signs > 0].mean() + projections[signs < 0].mean()) / 2
