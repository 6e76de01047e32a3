"""Random directions as the data have them: how well would a direction do that knows no labels?

A direction with independent coordinates would be no fair rival, because activations vary a thousand
times more along some directions than along others. Ours are drawn with the covariance of the data,
so they point where the data vary. Where one dominating direction parts the classes by accident,
these find it too, and a probe that does no better has found nothing else.

Guarantee: memory is the directions and one chunk, whatever the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probecache.controls.streams import Chunks, example_means
from probecache.controls.surface import folded
from probecache.errors import NoDirectionError, UsageError
from probecache.metrics import auroc

__all__ = ["RandomControl", "random_auroc", "random_directions"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RandomControl:
    """What random directions achieve at one layer.

    Attributes:
        aurocs: float64 [count], each folded to 0.5 or more, as a direction has no sign. Without any
            effect they are above 0.5 by 0.8 standard errors on average.
    """

    aurocs: Floats

    @property
    def mean(self) -> float:
        """Mean of the folded AUROCs."""
        return float(self.aurocs.mean())

    @property
    def lowest(self) -> float:
        """Smallest of the folded AUROCs."""
        return float(self.aurocs.min())

    @property
    def highest(self) -> float:
        """Largest of the folded AUROCs."""
        return float(self.aurocs.max())


def random_directions(chunks: Chunks, n_examples: int, count: int = 10, seed: int = 0) -> Floats:
    """Draw directions whose covariance is that of the examples' mean rows.

    Direction k is sum_i g_ki (x_i - mean) for independent standard normal g, which is normal with
    the covariance of the x_i, divided by its norm.

    Args:
        chunks: gives the layer's rows [m, hidden] with the example that each is of, once per call;
            examples are numbered from 0 to n_examples - 1.
        n_examples: how many there are.
        count: directions.
        seed: of the draws.

    Returns:
        float64 [count, hidden], unit norm.

    Raises:
        UsageError: less than one direction.
        NoDirectionError: all examples are equal, or there is but one.
    """
    if count < 1:
        raise UsageError(f"expected at least 1 random direction, got {count}; try 10")
    draws = np.random.default_rng(seed).standard_normal((count, n_examples))
    # Draws that sum to zero take off the mean in the same passage.
    draws -= draws.mean(axis=1, keepdims=True)
    total: Floats | None = None
    size = 0.0
    for owners, means in example_means(chunks):
        part = draws[:, owners] @ means
        total = part if total is None else total + part
        size = max(size, float(np.abs(means).max()))
    norms = np.linalg.norm(total, axis=1) if total is not None else np.zeros(count)
    # What is left of equal rows is rounding.
    if total is None or not norms.min() > 1e-10 * size:
        raise NoDirectionError(
            f"expected examples that differ, got {n_examples} of which all are equal, so there is "
            "no direction to draw; at layer 0 the last token may be the same: use a deeper layer"
        )
    return np.asarray(total / norms[:, None], dtype=np.float64)


def random_auroc(
    chunks: Chunks, is_positive: ArrayLike, count: int = 10, seed: int = 0
) -> RandomControl:
    """Score the examples by random directions: two passages over the rows.

    Args:
        chunks: as for `random_directions`; what is scored is what they are drawn from.
        is_positive: [n] booleans, one per example.
        count: directions.
        seed: of the draws.

    Raises:
        UsageError, NoDirectionError: as `random_directions`.
        ShapeError, EmptyClassError, FitError: as `probecache.metrics.auroc`.
    """
    positive = np.asarray(is_positive)
    directions = random_directions(chunks, positive.size, count, seed)
    scores = np.empty((count, positive.size))
    for owners, means in example_means(chunks):
        scores[:, owners] = directions @ means.T
    return RandomControl(np.array([folded(auroc(one, positive)).auroc for one in scores]))
