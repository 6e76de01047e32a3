"""Fitters: rows in, one chunk at a time, a frozen `Probe` out.

Guarantee: sums are kept in float64 whatever the rows' dtype, because a mean of many rows in
bfloat16 loses the direction; memory is one row per class and one number per row. NaN and Inf are
refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from probecache.errors import EmptyClassError, NoDirectionError, NonFiniteError, ShapeError
from probecache.probe import Probe

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["MeanDifferenceFitter", "fit_difference_of_means"]


@dataclass
class MeanDifferenceFitter:
    """Gathers what the difference of means needs; `finish` gives the probe."""

    hidden_size: int
    _sums: dict[bool, np.ndarray] = field(init=False)
    _counts: dict[bool, int] = field(init=False)
    _norms: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self._sums = {side: np.zeros(self.hidden_size) for side in (True, False)}
        self._counts = {True: 0, False: 0}
        self._norms = []

    def update(self, rows: np.ndarray, *, positive: bool) -> None:
        """Take rows [n, hidden] of one side.

        Raises:
            ShapeError: another width.
            NonFiniteError: names the side and the row, counted from 0 over all updates.
        """
        if rows.ndim != 2 or rows.shape[1] != self.hidden_size:
            raise ShapeError(
                f"expected rows of width {self.hidden_size}, got {list(rows.shape)}; were both "
                "classes read from the same model?"
            )
        wide = np.asarray(rows, dtype=np.float64)
        norms = np.sqrt(np.einsum("nh,nh->n", wide, wide))
        if not np.isfinite(norms).all():
            first = self._counts[positive] + int(np.flatnonzero(~np.isfinite(norms))[0])
            raise NonFiniteError(
                f"expected finite activations, got NaN or Inf in row {first} of the "
                f"{'positive' if positive else 'negative'} class; extract in bfloat16 or float32"
            )
        self._sums[positive] += wide.sum(axis=0)
        self._counts[positive] += len(wide)
        self._norms.append(norms)

    def finish(self) -> Probe:
        """The probe of everything taken so far.

        Raises:
            EmptyClassError: a side got no rows.
            NoDirectionError: both means are equal.
        """
        for side, name in ((True, "positive"), (False, "negative")):
            if not self._counts[side]:
                raise EmptyClassError(f"expected rows of the {name} class, got none")
        mean_positive, mean_negative = (self._sums[s] / self._counts[s] for s in (True, False))
        raw = mean_positive - mean_negative
        norm = float(np.linalg.norm(raw))
        if not norm > 0:
            raise NoDirectionError(
                "expected the classes' means to differ, got equal ones, so there is no direction; "
                "at layer 0 the last token of both classes may be the same: use a deeper layer"
            )
        unit = raw / norm
        return Probe(
            direction=unit.astype(np.float32),
            raw_norm=norm,
            threshold=float(unit @ (mean_positive + mean_negative)) / 2,
            typical_norm=float(np.median(np.concatenate(self._norms))),
            n_positive=self._counts[True],
            n_negative=self._counts[False],
        )


def fit_difference_of_means(positive: ArrayLike, negative: ArrayLike) -> Probe:
    """Fit the direction from the negative class's mean to the positive class's.

    With means m+ and m-, the direction is (m+ - m-) / |m+ - m-| and the threshold the projection of
    their midpoint. Classes weigh equally whatever their sizes. Optimal for Gaussian classes with
    one isotropic covariance; a baseline otherwise.

    Args:
        positive: rows of the positive class at one layer, [n_pos, hidden], any float dtype, in the
            residual stream's own units. A torch tensor on the CPU will do.
        negative: the same for the other class, [n_neg, hidden].

    Returns:
        A probe with a float32 unit direction. Means are accumulated in float64.

    Raises:
        ShapeError: widths differ.
        EmptyClassError: a class has no rows.
        NonFiniteError: names the class and the first bad row.
        NoDirectionError: the means are equal.

    Source: mass-mean probe, Marks & Tegmark 2023, arXiv:2310.06824.
    """
    sides = {True: _as_array(positive), False: _as_array(negative)}
    fitter = MeanDifferenceFitter(hidden_size=sides[True].shape[-1])
    for side, rows in sides.items():
        fitter.update(rows, positive=side)
    return fitter.finish()


def _as_array(rows: Any) -> np.ndarray:
    # NumPy has no bfloat16, which most caches are kept in; float32 holds its numbers exactly.
    if str(getattr(rows, "dtype", "")) == "torch.bfloat16":
        rows = rows.float()
    return np.asarray(rows)
