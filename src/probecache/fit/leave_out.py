"""Leave-group-out scores in closed form: what as many refits as there are groups would give."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from probecache.errors import EmptyClassError, ShapeError, UsageError
from probecache.fit.design import Method, parse_strengths
from probecache.fit.ridge import blocks_of
from probecache.fit.ridge_path import RidgePath

__all__ = ["leave_group_out_scores"]

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]


def leave_group_out_scores(
    rows: NDArray[Any],
    is_positive: Bools,
    groups: Ints,
    method: Method = Method.DIFFERENCE_OF_MEANS,
    strength: float | None = None,
) -> Floats:
    """Each row's score by the probe fitted without the row's group.

    One Gram matrix, and for ridge one eigendecomposition, serve all groups: with n rows, n^2
    operations a group in place of n^2 times the width.

    Args:
        rows: [n, hidden] activations of one layer.
        is_positive: bool [n].
        groups: int [n]; without any one of them both classes must remain.
        method: difference of means or ridge.
        strength: ridge's alpha.

    Returns:
        float64 [n]: projections on the unit direction minus the threshold.

    Raises:
        ShapeError: not of one length.
        UsageError: another method, or ridge without a strength.
        EmptyClassError: a class has no rows without some group.
    """
    wide, positive = np.asarray(rows, dtype=np.float64), np.asarray(is_positive, dtype=np.bool_)
    if not len(wide) == len(positive) == len(groups):
        raise ShapeError(
            f"expected a class and a group for each of {len(wide)} rows, got {len(positive)} "
            f"and {len(groups)}"
        )
    wide = wide - wide.mean(axis=0)
    gram, found = wide @ wide.T, np.empty(len(wide))
    leaver = _leaver(gram, positive, method, strength)
    for block in blocks_of(np.asarray(groups)):
        kept = np.ones(len(wide), dtype=np.bool_)
        kept[block] = False
        if not positive[kept].any() or positive[kept].all():
            raise EmptyClassError(
                f"expected rows of both classes without group {groups[block[0]]}, got those of "
                "one; divide the groups more finely"
            )
        coefficients, intercept = leaver(block, kept)
        projections = gram @ coefficients
        norm = np.sqrt(max(float(coefficients @ projections), 0.0)) or 1.0
        found[block] = (projections[block] + intercept(projections)) / norm
    return found


def _leaver(gram: Floats, positive: Bools, method: Method, strength: float | None) -> Any:
    """What gives coefficients, and the intercept from projections, without a block of rows."""
    alpha = parse_strengths([method], strength)[method]
    signs = np.where(positive, 1.0, -1.0)
    if method is Method.RIDGE and alpha is not None:
        path = RidgePath(gram)

        def ridge(block: Ints, kept: Bools) -> Any:
            found = path.coefficients(alpha, signs, block)
            return found, lambda projections: np.mean((signs - projections)[kept])

        return ridge
    if method is Method.DIFFERENCE_OF_MEANS:

        def means(block: Ints, kept: Bools) -> Any:
            averages = [kept & (positive == side) for side in (True, False)]
            first, second = (a / a.sum() for a in averages)
            return first - second, lambda projections: -(first + second) @ projections / 2

        return means
    raise UsageError(
        "expected the difference of means, or ridge with a strength, got "
        f"{method}; only these have leave-out scores in closed form"
    )
