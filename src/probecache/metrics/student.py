"""Student's t, for intervals whose variance comes from few groups. Exact sums, no SciPy."""

from __future__ import annotations

import math

import numpy as np

from probecache.metrics.auroc import normal_quantile

__all__ = ["NORMAL_FROM", "t_quantile", "t_two_sided"]

# From here on the normal distribution is nearer than 1 part in 10,000.
NORMAL_FROM = 10_000


def t_two_sided(t: float, freedom: int) -> float:
    """The chance that Student's t is further from 0 than `t`, to 1e-14 absolute.

    Source: Abramowitz & Stegun 1964, 26.7.3 and 26.7.4.
    """
    t = abs(t)
    if freedom >= NORMAL_FROM:
        return math.erfc(t / math.sqrt(2))
    angle = math.atan2(t, math.sqrt(freedom))
    odd, cosine = freedom % 2, math.cos(angle)
    i = np.arange(1, (freedom - 2 - odd) // 2 + 1)
    ratios = (2 * i / (2 * i + 1) if odd else (2 * i - 1) / (2 * i)) * cosine**2
    terms = 1 + float(np.cumprod(ratios).sum())
    if not odd:
        inside = math.sin(angle) * terms
    else:
        inside = 2 / math.pi * (angle + (freedom > 1) * math.sin(angle) * cosine * terms)
    return max(0.0, 1 - inside)


def t_quantile(p: float, freedom: int) -> float:
    """The value below which a share `p` > 1/2 of Student's t lies."""
    if freedom >= NORMAL_FROM:
        return normal_quantile(p)
    low, high = 0.0, 1.0
    while t_two_sided(high, freedom) > 2 * (1 - p):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        above = t_two_sided(middle, freedom) > 2 * (1 - p)
        low, high = (middle, high) if above else (low, middle)
    return (low + high) / 2
