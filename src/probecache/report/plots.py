"""The figures of a validation: ROC curves, AUROC by layer, score distributions.

Guarantees: the same results give the same bytes; each class has one colour in every figure; one
layer or a hundred stay readable; no text is read as mathematics. Draws through matplotlib's
objects, never pyplot, which costs 0.4 s to import and keeps figures alive. Does not supply fonts: a
script that DejaVu Sans lacks shows as boxes in the PNG, and as itself in the SVG and the report.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from probecache.metrics import roc_curve
from probecache.report.classes import VARIABLES, ClassGroup, class_groups
from probecache.report.saved import LayerResult, LayerScores, Validation, shown

__all__ = ["THEMED", "draw_figures", "draw_for_phones", "panel_layers"]

Floats = NDArray[np.float64]

INK, MUTED, GRID, SURFACE = "#20242b", "#68707c", "#e2e5ea", "#fefefe"
ACCENT = "#5b4bb5"
# Violet, teal, amber: ordered from blue to yellow, and readable on white and on black alike.
LAYERS = LinearSegmentedColormap.from_list("layers", ["#6a5acd", "#1b998b", "#d69a1e"], N=64)
# What the report may recolour for a dark page.
THEMED = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    SURFACE: "var(--surface)",
    ACCENT: "var(--accent)",
    **VARIABLES,
}
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": SURFACE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "figure.facecolor": SURFACE,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "probecache",
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$x^2$"
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
METADATA = {
    "png": {"Software": "probecache"},
    "svg": {"Creator": "probecache", "Date": None},
}
DPI = 130
TICKS = (0, 0.25, 0.5, 0.75, 1)
MOST_LEGEND_ENTRIES = 10
MOST_PANELS = 12
MOST_ERROR_BARS = 30
MOST_CURVE_POINTS = 400


def draw_figures(validation: Validation) -> dict[str, bytes]:
    """Draw every figure as PNG and SVG; keys are file names such as `roc_curves.png`."""
    with _style():
        figures = {
            "roc_curves": _roc_curves(validation),
            "auroc_by_layer": _auroc_by_layer(validation),
            "score_distributions": _score_distributions(validation),
        }
        return {
            f"{name}.{kind}": _rendered(figure, kind)
            for name, figure in figures.items()
            for kind in ("png", "svg")
        }


def draw_for_phones(validation: Validation) -> bytes:
    """The score distributions once more as SVG, readable at the width of a phone."""
    with _style():
        return _rendered(_score_distributions(validation, narrow=True), "svg")


def panel_layers(layers: list[int], best: int, most: int = MOST_PANELS) -> list[int]:
    """At most `most` layers, evenly spread over all of them, the best always among them."""
    if len(layers) <= most:
        return layers
    places = np.linspace(0, len(layers) - 1, most).round().astype(int)
    best_place = layers.index(best)
    places[np.abs(places - best_place).argmin()] = best_place
    return [layers[place] for place in places]


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support")
        yield


def _rendered(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=METADATA[kind])
    return buffer.getvalue()


def _figure(width: float, height: float, margins: tuple[float, float, float, float]) -> Figure:
    """A figure with margins (left, right, bottom, top) in inches; constrained layout is slow."""
    left, right, bottom, top = margins
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
    )
    return figure


def _heading(axes: Any, text: str) -> None:
    """A title that leaves room for one line between itself and the axes."""
    axes.set_title(text, pad=24)


# ROC curves


def _roc_curves(validation: Validation) -> Figure:
    many = len(validation.results) > MOST_LEGEND_ENTRIES
    figure = _figure(5.2, 4.7, (0.65, 0.95 if many else 0.2, 0.6, 0.75))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    colours = _layer_colours(list(validation.results))
    for layer, result in validation.results.items():
        _roc_line(axes, validation, result, colours.to_rgba(layer))
    _heading(axes, f"ROC curves, {_name(validation.positive_class)} as positive")
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
        *_thinned(*roc_curve(scores.scores, scores.is_positive)),
        color=INK if chosen else colour,
        linewidth=2.4 if chosen else 1.3 if few else 0.8,
        zorder=4 if chosen else 3,
        solid_joinstyle="round",
        label=label,
    )


def _thinned(fpr: Floats, tpr: Floats) -> tuple[Floats, Floats]:
    """The corners of the curve, and of very many corners an even choice: nobody sees more."""
    cross = np.diff(fpr)[:-1] * np.diff(tpr)[1:] - np.diff(fpr)[1:] * np.diff(tpr)[:-1]
    corners = np.flatnonzero(np.concatenate([[True], np.abs(cross) > 1e-12, [True]]))
    if corners.size > MOST_CURVE_POINTS:
        kept = np.linspace(0, corners.size - 1, MOST_CURVE_POINTS).round().astype(int)
        corners = corners[kept]
    return fpr[corners], tpr[corners]


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


# AUROC by layer


def _auroc_by_layer(validation: Validation) -> Figure:
    figure = _figure(5.2, 4.7, (0.65, 0.2, 0.6, 0.75))
    axes = figure.subplots()
    results = list(validation.results.values())
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    _intervals(axes, results)
    _mark_best(axes, validation.best)
    lowest = min(0.5, *(result.auroc_low for result in results))
    axes.set_ylim(max(-0.03, lowest - 0.05), 1.03)
    _layer_axis(axes, [result.layer for result in results])
    _chance_label(axes)
    axes.set_ylabel("AUROC (0.5 = chance)")
    _heading(axes, "AUROC by layer, 95% interval")
    return figure


def _intervals(axes: Any, results: list[LayerResult]) -> None:
    layers = [result.layer for result in results]
    areas = [result.auroc for result in results]
    lows = [result.auroc_low for result in results]
    highs = [result.auroc_high for result in results]
    few = len(results) <= MOST_ERROR_BARS
    if few:
        axes.vlines(layers, lows, highs, color=ACCENT, linewidth=1.6, alpha=0.55)
    else:
        axes.fill_between(layers, lows, highs, color=ACCENT, alpha=0.2, linewidth=0)
    size = 4.5 if few else 2.5
    axes.plot(layers, areas, color=ACCENT, linewidth=1.4, marker="o", markersize=size)


def _mark_best(axes: Any, best: LayerResult) -> None:
    axes.plot(
        [best.layer],
        [best.auroc],
        linestyle="none",
        marker="o",
        markersize=10,
        markerfacecolor="none",
        markeredgecolor=INK,
        markeredgewidth=1.6,
        label=f"best: layer {best.layer}, {best.auroc:.3f} "
        f"[{best.auroc_low:.3f}, {best.auroc_high:.3f}]",
    )
    # Above the axes: inside, no corner is out of every curve's reach.
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.985), handletextpad=0.3, borderpad=0.3)


def _layer_axis(axes: Any, layers: list[int]) -> None:
    pad = max(0.6, 0.03 * (layers[-1] - layers[0]))
    axes.set_xlim(layers[0] - pad, layers[-1] + pad)
    axes.set_xlabel("layer (0 = embeddings)")
    if len(layers) <= 12 and _apart(layers):
        axes.set_xticks(layers)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))


def _apart(layers: list[int]) -> bool:
    """Whether tick labels at every layer would not touch: 18 fit side by side."""
    gaps = np.diff(layers)
    return not gaps.size or bool(gaps.min() >= (layers[-1] - layers[0]) / 18)


def _chance_label(axes: Any) -> None:
    axes.text(
        axes.get_xlim()[1], 0.505, "chance", color=MUTED, ha="right", va="bottom", fontsize=8.5
    )


# Score distributions


def _score_distributions(validation: Validation, narrow: bool = False) -> Figure:
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
    _class_legend(figure, groups, legend_columns, narrow)
    _score_label(figure, validation, narrow)
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
    figure = _figure(width, height, (*sides, bottom, top))
    spaces = {"hspace": 0.55, "wspace": 0.22 if narrow else 0.2}
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=spaces).ravel()


def _score_label(figure: Figure, validation: Validation, narrow: bool) -> None:
    joint = "\n" if narrow else "; "
    label = f"{validation.score_meaning}{joint}higher = {_name(validation.positive_class)}"
    figure.text(0.5, 0.15 / figure.get_size_inches()[1], label, ha="center", va="bottom")


def _score_panel(
    axes: Any, result: LayerResult, layer: LayerScores, groups: list[ClassGroup]
) -> None:
    exponent = _exponent(layer.scores)
    scores = layer.scores / 10.0**exponent
    edges = _bin_edges(scores, min(result.n_positive, max(g.size for g in groups[:-1])))
    for group in groups:
        members = np.array([name in group.members for name in layer.classes])
        counts, _ = np.histogram(scores[members], edges)
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


def _exponent(scores: Floats) -> int:
    """The power of ten to take out of the axis, 0 for scores of a usual size."""
    largest = float(np.abs(scores).max())
    if largest == 0 or 1e-3 <= largest < 1e4:
        return 0
    return max(-300, math.floor(math.log10(largest)))


def _bin_edges(scores: Floats, smaller_class: int) -> Floats:
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


def _class_legend(figure: Figure, groups: list[ClassGroup], columns: int, narrow: bool) -> None:
    width, height = figure.get_size_inches()
    left = (0.5 if narrow else 0.6) / width
    handles = [Patch(color=group.colour, label=_legend_label(group, groups)) for group in groups]
    joint = "\n" if narrow else " "
    heading = f"Scores by layer, with AUROC;{joint}dashed = training threshold"
    figure.text(left, 1 - 0.1 / height, heading, va="top", fontsize=10)
    figure.legend(handles=handles, loc="upper left", ncols=columns, borderaxespad=0, borderpad=0,
                  bbox_to_anchor=(left, 1 - (0.33 + 0.17 * narrow) / height))  # fmt: skip


def _legend_label(group: ClassGroup, groups: list[ClassGroup]) -> str:
    """Two classes are known by name; of several, how many prompts stand behind each matters."""
    return _name(group.label) if len(groups) == 2 else f"{shown(group.label, 20)} ({group.size})"


def _name(label: str) -> str:
    """A class's name as it fits beside an axis."""
    return shown(label, 28)
