"""What the page's one script needs: its text, its hash for the policy, and numbers to draw from.

Guarantees: the policy allows this very script and no other; the numbers are numbers, so no text of
data can come near the script. Without scripts the page lacks nothing that it says.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from probecache.metrics import roc_curve
from probecache.report.classes import ClassGroup
from probecache.report.distributions import bin_edges, exponent_of, histograms
from probecache.report.layer_curve import curve_limits
from probecache.report.roc import operating_points, thinned
from probecache.report.saved import LayerScores, Validation

__all__ = ["layer_numbers", "page_script", "policy"]

SCRIPT = Path(__file__).parent / "templates" / "report.js"
# A curve of 300 pixels shows no more, and a hundred layers of them weigh 100 KB.
MOST_ROC_POINTS = 90
PER_MILLE = 1000


def page_script() -> str:
    """The script as it stands in the page."""
    return SCRIPT.read_text(encoding="utf-8")


def policy(script: str) -> str:
    """The content security policy: nothing is loaded, and no script runs but this one."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'"
    )


def layer_numbers(validation: Validation, groups: list[ClassGroup]) -> str:
    """JSON of nested lists of numbers and nulls: limits of the layer curve, then every layer.

    A layer is [layer, AUROC, low, high, cross-validated, accuracy, threshold, [fpr, tpr, ...] in
    thousandths, [[fpr, tpr], ...] of its operating points, [lowest edge, highest edge, [counts of
    each group] ...]].
    """
    (left, right), (bottom, top) = curve_limits(validation)
    layers = [_numbers_of(validation, layer, groups) for layer in validation.results]
    return json.dumps([[left, right, bottom, top], layers], separators=(",", ":"))


def _numbers_of(validation: Validation, layer: int, groups: list[ClassGroup]) -> list[Any]:
    result, evidence = validation.results[layer], validation.evidence.layers[layer]
    checked, scores = evidence.cross_validated, validation.scores[layer]
    return [
        layer,
        round(result.auroc, 4),
        round(result.auroc_low, 4),
        round(result.auroc_high, 4),
        None if checked is None else round(checked.value, 4),
        None if result.accuracy is None else round(result.accuracy, 4),
        None if result.threshold is None else _short(result.threshold),
        _roc(scores),
        [[fpr, round(tpr.value, 4)] for fpr, tpr in operating_points(validation, layer)],
        _histogram(scores, groups),
    ]


def _roc(scores: LayerScores) -> list[int]:
    """The curve in thousandths, its coordinates in turn."""
    fpr, tpr = thinned(*roc_curve(scores.scores, scores.is_positive), MOST_ROC_POINTS)
    points = np.stack([fpr, tpr], axis=1) * PER_MILLE
    return [round(value) for value in points.ravel().tolist()]


def _histogram(scores: LayerScores, groups: list[ClassGroup]) -> list[Any]:
    unit = 10.0 ** exponent_of(scores.scores)
    scaled = scores.scores / unit
    edges = bin_edges(scaled, groups)
    counts = histograms(scaled, scores.classes, edges, groups)
    ends = [_short(float(edge) * unit) for edge in (edges[0], edges[-1])]
    return [*ends, *(one.tolist() for one in counts)]


def _short(value: float) -> float:
    """Five digits, which a drawing shows no more of."""
    return float(f"{value:.5g}") if math.isfinite(value) else 0.0
