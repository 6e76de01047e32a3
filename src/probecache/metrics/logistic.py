"""Logistic regression on one number, by Newton's method: what Platt scaling and recalibration fit.

Guarantees: NumPy only, deterministic, converges for any finite input to a finite line.
"""

from __future__ import annotations

import numpy as np

from probecache.metrics.inputs import Floats

__all__ = ["bias_reduced_line", "likeliest_line", "sigmoid"]

STEPS = 100
# A step shorter than this in the standardised predictor changes nothing that is printed.
SETTLED = 1e-12


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + e^-x), without overflow."""
    small = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1.0, small) / (1 + small), dtype=np.float64)


def likeliest_line(values: Floats, targets: Floats) -> tuple[float, float]:
    """Slope and intercept of the likeliest logit = slope * value + intercept.

    Args:
        values: [n], finite. All alike, they give slope 0.
        targets: [n] probabilities, both kinds strictly inside (0, 1), which is what keeps the line
            finite where the values separate them.
    """
    return _newton(values, targets, bias_reduced=False)


def bias_reduced_line(values: Floats, targets: Floats) -> tuple[float, float]:
    """The same with the likelihood weighed by Jeffreys' prior: finite for labels of 0 and 1.

    Source: Firth 1993, Biometrika 80:27; for separation, Heinze & Schemper 2002, Stat. Med.
    21:2409.
    """
    return _newton(values, targets, bias_reduced=True)


def _newton(values: Floats, targets: Floats, bias_reduced: bool) -> tuple[float, float]:
    peak = float(np.abs(values).max()) or 1.0
    unit = values / peak  # so that no square overflows
    centre, scale = float(unit.mean()), float(unit.std())
    if scale <= 1e-14:
        mean = float((targets.sum() + bias_reduced / 2) / (targets.size + bias_reduced))
        return 0.0, float(np.log(mean / (1 - mean)))
    design = np.stack([(unit - centre) / scale, np.ones(values.size)], axis=1)
    line = np.zeros(2)
    best = _fit(design, targets, line, bias_reduced)
    for _ in range(STEPS):
        step = _step(design, targets, line, bias_reduced)
        # Halved while it overshoots: far from the answer the curvature promises too much.
        while np.abs(step).max() > SETTLED:
            found = _fit(design, targets, line + step, bias_reduced)
            if found >= best:
                break
            step = step / 2
        else:
            break
        line, best = line + step, found
    slope = float(line[0]) / scale
    return slope / peak, float(line[1]) - slope * centre


def _step(design: Floats, targets: Floats, line: Floats, bias_reduced: bool) -> Floats:
    p = sigmoid(design @ line)
    weights = np.maximum(p * (1 - p), 1e-300)
    information = design.T @ (design * weights[:, None])
    residual = targets - p
    if bias_reduced:
        leverage = weights * np.einsum(
            "ij,ij->i", design @ np.linalg.inv(information), design, optimize=False
        )
        residual = residual + leverage * (0.5 - p)
    return np.asarray(np.linalg.solve(information, design.T @ residual), dtype=np.float64)


def _fit(design: Floats, targets: Floats, line: Floats, bias_reduced: bool) -> float:
    """Log-likelihood, with half the logarithm of the information's determinant if reduced."""
    logits = design @ line
    found = float((targets * logits - np.logaddexp(0, logits)).sum())
    if not bias_reduced:
        return found
    p = sigmoid(logits)
    information = design.T @ (design * (p * (1 - p))[:, None])
    return found + float(np.linalg.slogdet(information)[1]) / 2
