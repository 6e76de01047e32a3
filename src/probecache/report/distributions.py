"""Scores by class: a histogram for each of several layers, or for one.

Guarantees: each class has its colour of `classes`; scores of any size have readable axes; the bins
are those that `bin_edges` says, so that a page can count into the same.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from probecache.report.classes import ClassGroup, class_groups
from probecache.report.fields import shown
from probecache.report.saved import LayerResult, LayerScores, Validation
from probecache.report.style import INK, MUTED, framed, margined, name_of

__all__ = [
    "MOST_PANELS",
    "bin_edges",
    "exponent_of",
    "histograms",
    "layer_scores",
    "panel_layers",
    "score_distributions",
]

Floats = NDArray[np.float64]

MOST_PANELS = 12


def panel_layers(layers: list[int], best: int, most: int = MOST_PANELS) -> list[int]:
    """At most `most` layers, evenly spread over all of them, the best always among them."""
    if len(layers) <= most:
        return layers
    places = np.linspace(0, len(layers) - 1, most).round().astype(int)
    best_place = layers.index(best)
    places[np.abs(places - best_place).argmin()] = best_place
    return [layers[place] for place in places]


def score_distributions(validation: Validation, narrow: bool = False) -> Figure:
    layers = panel_layers(list(validation.results), validation.best_layer)
    groups = class_groups(validation)
    columns = min(2 if narrow else 3, len(layers))
    legend_columns = 1 if narrow else 2 if columns == 1 or len(groups) == 2 else 3
    legend_rows = math.ceil(len(groups) / legend_columns)
    figure, grid = _panels(len(layers), columns, legend_rows, narrow)
    for axes, layer in zip(grid, layers, strict=False):
        _score_panel(axes, validation.results[layer], validation.scores[layer], groups)
        _panel_title(axes, validation.results[layer], layer == validation.best_layer, narrow)
    for axes in grid[len(layers) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("prompts")
    joint = "\n" if narrow else " "
    title = f"Scores by layer, with AUROC;{joint}dashed = training threshold"
    _class_legend(figure, groups, legend_columns, title, narrow)
    _score_label(figure, validation, narrow)
    return figure


def layer_scores(validation: Validation) -> Figure:
    """The scores at the best layer alone, as large as the ROC curves beside them."""
    best = validation.best_layer
    groups = class_groups(validation)
    columns = 2
    legend_rows = math.ceil(len(groups) / columns)
    figure = margined(5.2, 4.7, (0.6, 0.2, 0.6, 0.55 + 0.2 * legend_rows))
    axes = framed(figure)
    _score_panel(axes, validation.results[best], validation.scores[best], groups)
    axes.set_ylabel("prompts")
    _class_legend(figure, groups, columns, "Scores by class; dashed = training threshold")
    _score_label(figure, validation, narrow=False)
    return figure


def _panels(count: int, columns: int, legend_rows: int, narrow: bool) -> tuple[Figure, Any]:
    """A figure with room for the legend above and the label below, and its axes in a row.

    A narrow figure breaks its heading and its label in two: a line more at either end.
    """
    rows = math.ceil(count / columns)
    width = 4.0 if narrow else 5.2 if columns == 1 else 7.4
    bottom, top = 0.6 + 0.17 * narrow, 0.8 + 0.17 * narrow + 0.2 * (legend_rows - 1)
    height = bottom + top - 0.25 + (2.9 if columns == 1 else 1.75) * rows
    sides = (0.5, 0.1) if narrow else (0.6, 0.15)
    figure = margined(width, height, (*sides, bottom, top))
    spaces = {"hspace": 0.55, "wspace": 0.22 if narrow else 0.2}
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=spaces).ravel()


def _score_label(figure: Figure, validation: Validation, narrow: bool) -> None:
    joint = "\n" if narrow else "; "
    label = f"{validation.score_meaning}{joint}higher = {name_of(validation.positive_class)}"
    figure.text(0.5, 0.15 / figure.get_size_inches()[1], label, ha="center", va="bottom")


def _score_panel(
    axes: Any, result: LayerResult, layer: LayerScores, groups: list[ClassGroup]
) -> None:
    exponent = exponent_of(layer.scores)
    scores = layer.scores / 10.0**exponent
    edges = bin_edges(scores, groups)
    for group, counts in zip(groups, histograms(scores, layer.classes, edges, groups), strict=True):
        _histogram(axes, counts, edges, group, groups)
    axes.set_xlim(edges[0], edges[-1])
    if result.threshold is not None:
        _threshold_line(axes, result.threshold / 10.0**exponent)
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=8.5)
    if exponent:
        axes.text(1, 1, f"× 1e{exponent}", transform=axes.transAxes, ha="right", va="top",
                  color=MUTED, fontsize=8)  # fmt: skip


def histograms(
    scores: Floats, classes: tuple[str, ...], edges: Floats, groups: list[ClassGroup]
) -> list[NDArray[Any]]:
    """How many scores of each group fall into each bin."""
    members = (np.array([name in group.members for name in classes]) for group in groups)
    return [np.histogram(scores[mask], edges)[0] for mask in members]


def _histogram(
    axes: Any, counts: NDArray[Any], edges: Floats, group: ClassGroup, groups: list[ClassGroup]
) -> None:
    """An outline; filled too if two classes are drawn. The fills of more would mix to one grey."""
    colour, two = group.colour, len(groups) == 2
    if two or group is groups[-1]:
        # Of several classes, the fill lies behind the others' outlines: it would tint them.
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.3, linewidth=0,
                    zorder=1 if two else 0.9)  # fmt: skip
    axes.stairs(counts, edges, color=colour, linewidth=1.3)


def exponent_of(scores: Floats) -> int:
    """The power of ten to take out of the axis, 0 for scores of a usual size."""
    largest = float(np.abs(scores).max())
    if largest == 0 or 1e-3 <= largest < 1e4:
        return 0
    return max(-300, math.floor(math.log10(largest)))


def bin_edges(scores: Floats, groups: list[ClassGroup]) -> Floats:
    """The bins of all groups; the more prompts the smaller class has, the finer."""
    smaller_class = min(groups[-1].size, max(group.size for group in groups[:-1]))
    low, high = float(scores.min()), float(scores.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    bins = min(28, max(9, round(2.2 * math.sqrt(smaller_class))))
    return np.linspace(low, high, bins + 1)


def _threshold_line(axes: Any, threshold: float) -> None:
    """The training threshold, or a note where it lies far from every score."""
    low, high = axes.get_xlim()
    if low - (high - low) <= threshold <= high + (high - low):
        axes.axvline(threshold, color=INK, linewidth=1.1, linestyle=(0, (3, 2)))
        room = 0.03 * (high - low)
        axes.set_xlim(min(low, threshold - room), max(high, threshold + room))
        return
    side, text = (0.0, "← threshold") if threshold < low else (1.0, "threshold →")
    axes.text(side, 0.88, text, transform=axes.transAxes, fontsize=8, color=INK,
              ha="right" if side else "left", va="top")  # fmt: skip


def _panel_title(axes: Any, result: LayerResult, best: bool, narrow: bool) -> None:
    title = f"layer {result.layer} · {result.auroc:.3f}" + (" · best" if best else "")
    size, weight = 8.5 if narrow else 9.5, "bold" if best else "normal"
    axes.set_title(title, fontsize=size, fontweight=weight, pad=4)


def _class_legend(
    figure: Figure, groups: list[ClassGroup], columns: int, heading: str, narrow: bool = False
) -> None:
    width, height = figure.get_size_inches()
    left = (0.5 if narrow else 0.6) / width
    handles = [Patch(color=group.colour, label=_legend_label(group, groups)) for group in groups]
    figure.text(left, 1 - 0.1 / height, heading, va="top", fontsize=10)
    figure.legend(handles=handles, loc="upper left", ncols=columns, borderaxespad=0, borderpad=0,
                  bbox_to_anchor=(left, 1 - (0.33 + 0.17 * narrow) / height))  # fmt: skip


def _legend_label(group: ClassGroup, groups: list[ClassGroup]) -> str:
    """Two classes are known by name; of several, how many prompts stand behind each matters."""
    return name_of(group.label) if len(groups) == 2 else f"{shown(group.label, 20)} ({group.size})"
