"""ROC curves of every layer, with the operating points of the best.

Guarantees: a curve keeps its corners, so its area is the AUROC, unless it has hundreds of them; one
layer or a hundred stay readable.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from probecache.metrics import roc_curve
from probecache.report.fields import Interval
from probecache.report.saved import LayerResult, Validation
from probecache.report.style import (
    ACCENT,
    DASHES,
    INK,
    LAYERS,
    MUTED,
    SURFACE,
    framed,
    heading,
    margined,
    name_of,
)

__all__ = ["operating_points", "roc_curves", "thinned"]

Floats = NDArray[np.float64]

TICKS = (0, 0.25, 0.5, 0.75, 1)
MOST_LEGEND_ENTRIES = 10
MOST_CURVE_POINTS = 400


def roc_curves(validation: Validation) -> Figure:
    many = len(validation.results) > MOST_LEGEND_ENTRIES
    figure = margined(5.2, 4.7, (0.65, 0.95 if many else 0.2, 0.6, 0.75))
    axes = framed(figure)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=DASHES)
    colours = _layer_colours(list(validation.results))
    for layer, result in validation.results.items():
        _roc_line(axes, validation, result, colours.to_rgba(layer))
    _mark_operating_points(axes, validation)
    heading(axes, f"ROC curves, {name_of(validation.positive_class)} as positive")
    best = validation.best
    heavy = f"layer {best.layer}, {best.auroc:.3f}, the best" if many else "best layer"
    axes.text(0, 1.025, f"heavy = {heavy}; dashed = chance", transform=axes.transAxes, fontsize=9)
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xticks=TICKS, yticks=TICKS)
    if many:
        _layer_bar(figure, axes, colours)
    else:
        axes.legend(loc=_free_corner(validation), handlelength=1.6, labelspacing=0.35)
    return figure


def _roc_line(axes: Any, validation: Validation, result: LayerResult, colour: Any) -> None:
    scores = validation.scores[result.layer]
    chosen = result.layer == validation.best_layer
    label = f"layer {result.layer} · {result.auroc:.3f}" + (" · best" if chosen else "")
    few = len(validation.results) <= MOST_LEGEND_ENTRIES
    axes.plot(
        *thinned(*roc_curve(scores.scores, scores.is_positive)),
        color=INK if chosen else colour,
        linewidth=2.4 if chosen else 1.3 if few else 0.8,
        zorder=4 if chosen else 3,
        solid_joinstyle="round",
        label=label,
    )


def thinned(fpr: Floats, tpr: Floats, most: int = MOST_CURVE_POINTS) -> tuple[Floats, Floats]:
    """The corners of the curve, and of very many corners an even choice: nobody sees more."""
    cross = np.diff(fpr)[:-1] * np.diff(tpr)[1:] - np.diff(fpr)[1:] * np.diff(tpr)[:-1]
    corners = np.flatnonzero(np.concatenate([[True], np.abs(cross) > 1e-12, [True]]))
    if corners.size > most:
        kept = np.linspace(0, corners.size - 1, most).round().astype(int)
        corners = corners[kept]
    return fpr[corners], tpr[corners]


def operating_points(validation: Validation, layer: int) -> list[tuple[float, Interval]]:
    """False positive rates, and what true positive rate a layer has there."""
    evidence = validation.evidence.layers[layer]
    pairs = ((0.01, evidence.tpr_at_1), (0.05, evidence.tpr_at_5))
    return [(fpr, tpr) for fpr, tpr in pairs if tpr is not None]


def _mark_operating_points(axes: Any, validation: Validation) -> None:
    """What the best layer catches at few false alarms; labels keep clear of one another."""
    beneath = 0.0
    for fpr, tpr in operating_points(validation, validation.best_layer):
        if tpr.low is not None and tpr.high is not None:
            axes.vlines([fpr], tpr.low, tpr.high, color=ACCENT, linewidth=1.6, zorder=5)
        axes.plot([fpr], [tpr.value], marker="D", markersize=5.5, color=ACCENT, zorder=6,
                  markeredgecolor=SURFACE)  # fmt: skip
        place = min(0.97, max(beneath, tpr.value))
        axes.text(
            0.1,
            place,
            f"{tpr.value:.2f} at {fpr:.0%} false positives",
            color=ACCENT,
            fontsize=8.5,
            va="center",
            zorder=7,
            bbox={"facecolor": SURFACE, "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )
        beneath = place + 0.06


def _layer_colours(layers: list[int]) -> ScalarMappable:
    return ScalarMappable(Normalize(layers[0], max(layers[-1], layers[0] + 1)), LAYERS)


def _layer_bar(figure: Figure, axes: Any, colours: ScalarMappable) -> None:
    box = axes.get_position()
    place = figure.add_axes((box.x1 + 0.035, box.y0, 0.022, box.height))
    bar = figure.colorbar(colours, cax=place, ticks=MaxNLocator(6, integer=True))
    bar.outline.set_visible(False)
    bar.set_label("layer", color=INK)


def _free_corner(validation: Validation) -> str:
    """Curves bend away from the lower right, unless the sign of the scores is turned round."""
    mean = np.mean([result.auroc for result in validation.results.values()])
    return "lower right" if mean >= 0.5 else "upper left"
