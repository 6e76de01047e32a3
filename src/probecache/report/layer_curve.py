"""AUROC by layer, with its interval and with what the probe has to beat.

Guarantees: baselines are lines with their names beside them, which never lie on one another; the
limits of the axes are those that `curve_limits` says, so that a page can place what it adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probecache.report.evidence import Baseline
from probecache.report.fields import shown
from probecache.report.saved import LayerResult, Validation
from probecache.report.style import (
    ACCENT,
    CHECKED,
    DASHES,
    INK,
    MUTED,
    framed,
    heading,
    margined,
)

__all__ = ["auroc_by_layer", "baseline_lines", "curve_limits", "layer_axis", "spread_labels"]

MOST_ERROR_BARS = 30
SHORT = {
    "length": "length",
    "answer-letter": "letter",
    "words": "words",
    "words-from-training": "words, training",
    "layer-0": "layer 0",
    "random-directions": "random",
}
# Lines of one kind are told apart by their labels; the pattern helps where they cross a curve.
PATTERNS = ((0, (1, 1.5)), (0, (5, 2)), (0, (5, 2, 1, 2)), (0, (8, 3)), (0, (2, 2, 6, 2)))


def auroc_by_layer(validation: Validation, narrow: bool = False) -> Figure:
    """The figure; `narrow` is for a phone's width."""
    lines = baseline_lines(validation)
    figure = _figure(validation, bool(lines), narrow)
    axes = framed(figure)
    results = list(validation.results.values())
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=DASHES)
    _random_band(axes, validation)
    _baselines(axes, validation, lines)
    _cross_validated(axes, validation)
    _intervals(axes, results)
    _mark_best(axes, validation.best)
    x, y = curve_limits(validation)
    axes.set(xlim=x, ylim=y)
    layer_axis(axes, [result.layer for result in results])
    _names_of_lines(axes, lines, validation)
    if not narrow:
        axes.set_ylabel("AUROC (0.5 = chance)")
    _legend(axes, narrow)
    return figure


def curve_limits(validation: Validation) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of the layers and of the AUROC: (left, right) and (bottom, top)."""
    layers = list(validation.results)
    pad = max(0.6, 0.02 * (layers[-1] - layers[0]))
    lows = [result.auroc_low for result in validation.results.values()]
    for evidence in validation.evidence.layers.values():
        if evidence.cross_validated is not None:
            lows.append(evidence.cross_validated.value)
        if evidence.random_mean is not None:
            lows.append(evidence.random_mean)
    lows += [line.estimate.value for line in baseline_lines(validation) if line.estimate]
    bottom = max(-0.03, min(0.5, *lows) - 0.05)
    return (layers[0] - pad, layers[-1] + pad), (bottom, 1.03)


def baseline_lines(validation: Validation) -> list[Baseline]:
    """The baselines that are drawn as lines: those that do not depend on the layer."""
    artefacts, layers = validation.evidence.artefacts, validation.evidence.layers.values()
    hidden = {"shuffled-labels"}
    if any(one.random_mean is not None for one in layers):
        hidden.add("random-directions")
    found = artefacts.baselines if artefacts else ()
    return [one for one in found if one.estimate is not None and one.name not in hidden][:8]


def spread_labels(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near as possible to those wanted, in their order, `gap` apart within the limits.

    Where there is no room for all, they are spread evenly.
    """
    if not places:
        return []
    order = np.argsort(places, kind="stable")
    room = (high - low) / max(1, len(places) - 1)
    step = min(gap, room)
    steps = step * np.arange(len(places))
    # In coordinates without the gaps, places only have to be ascending: pool those that are not.
    wanted = _ascending(np.asarray(places, dtype=np.float64)[order] - steps)
    fitted = np.clip(wanted, low, high - steps[-1]) + steps
    spread = np.empty(len(places))
    spread[order] = fitted
    return [float(place) for place in spread]


def _ascending(values: Any) -> Any:
    """The ascending sequence nearest to the values in least squares."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, n), (last, m) = blocks[-2], blocks[-1]
            blocks[-2:] = [((n * mean + m * last) / (n + m), n + m)]
    return np.repeat([mean for mean, _ in blocks], [n for _, n in blocks])


def layer_axis(axes: Any, layers: list[int]) -> None:
    """Ticks at every layer where they fit, else at round numbers."""
    axes.set_xlabel("layer (0 = embeddings)")
    if len(layers) <= 12 and _apart(layers):
        axes.set_xticks(layers)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))


def _apart(layers: list[int]) -> bool:
    """Whether tick labels at every layer would not touch: 18 fit side by side."""
    gaps = np.diff(layers)
    return not gaps.size or bool(gaps.min() >= (layers[-1] - layers[0]) / 18)


def _figure(validation: Validation, labelled: bool, narrow: bool) -> Figure:
    right = 1.5 if labelled else 0.7
    if narrow:
        return margined(4.0, 4.6, (0.4, right - 0.05, 0.6, 1.15))
    return margined(8.4, 4.3, (0.65, right, 0.6, 0.75))


def _random_band(axes: Any, validation: Validation) -> None:
    """From the mean to the highest of the random directions, layer by layer."""
    known = [
        (layer, one.random_mean, one.random_high)
        for layer, one in validation.evidence.layers.items()
        if one.random_mean is not None and one.random_high is not None
    ]
    if not known:
        return
    layers, means, highs = (list(column) for column in zip(*known, strict=True))
    label = "random directions, mean to highest"
    if len(layers) == 1:
        axes.vlines(layers, means, highs, color=MUTED, linewidth=9, alpha=0.3, label=label)
    else:
        axes.fill_between(layers, means, highs, color=MUTED, alpha=0.22, linewidth=0, label=label)


def _baselines(axes: Any, validation: Validation, lines: list[Baseline]) -> None:
    for place, line in enumerate(lines):
        assert line.estimate is not None
        axes.axhline(
            line.estimate.value,
            color=INK if _is_best(line, validation) else MUTED,
            linewidth=1.3 if _is_best(line, validation) else 1,
            linestyle=PATTERNS[place % len(PATTERNS)],
            zorder=1.5,
        )


def _is_best(line: Baseline, validation: Validation) -> bool:
    artefacts = validation.evidence.artefacts
    return artefacts is not None and line.name == artefacts.best_baseline


def _names_of_lines(axes: Any, lines: list[Baseline], validation: Validation) -> None:
    """Beside the axes, each at the height of its line or as near as the others let it."""
    entries = [(0.5, "chance", False)]
    for line in lines:
        assert line.estimate is not None
        name = SHORT.get(line.name, shown(line.title, 16))
        value = line.estimate.value
        entries.append((value, f"{name} {value:.2f}", _is_best(line, validation)))
    bottom, top = axes.get_ylim()
    height = axes.get_position().height * axes.figure.get_size_inches()[1]
    gap = (top - bottom) * 0.155 / height
    places = spread_labels([value for value, _, _ in entries], gap, bottom, top)
    for (value, name, best), place in zip(entries, places, strict=True):
        _name_of_line(axes, (value, place), name, best)


def _name_of_line(axes: Any, heights: tuple[float, float], name: str, best: bool) -> None:
    value, place = heights
    ends = axes.get_yaxis_transform()
    colour = INK if best else MUTED
    axes.plot([1, 1.022], [value, place], transform=ends, color=colour, linewidth=0.7,
              clip_on=False)  # fmt: skip
    axes.text(1.03, place, name, transform=ends, color=colour, fontsize=8.5, va="center",
              fontweight="bold" if best else "normal")  # fmt: skip


def _cross_validated(axes: Any, validation: Validation) -> None:
    known = [
        (layer, one.cross_validated.value)
        for layer, one in validation.evidence.layers.items()
        if one.cross_validated is not None
    ]
    if not known:
        return
    layers, areas = (list(column) for column in zip(*known, strict=True))
    size = 3.5 if len(layers) <= MOST_ERROR_BARS else 0
    axes.plot(
        layers,
        areas,
        color=CHECKED,
        linewidth=1.3,
        linestyle=(0, (3.5, 1.5)),
        marker="o",
        markersize=size,
        markerfacecolor="none",
        label="training prompts, cross-validated",
    )


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
    axes.plot(layers, areas, color=ACCENT, linewidth=1.6, marker="o", markersize=size)


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


def _legend(axes: Any, narrow: bool) -> None:
    """Above the axes: inside, no corner is out of every curve's reach."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if narrow else 3
    axes.legend(
        handles[::-1],
        labels[::-1],
        loc="lower left",
        ncols=columns,
        bbox_to_anchor=(-0.02, 0.985),
        handletextpad=0.4,
        columnspacing=1.2,
        handlelength=1.6,
        borderpad=0.3,
        labelspacing=0.25,
    )
    heading(axes, "AUROC by layer, 95% interval")
    if narrow:
        axes.set_title(axes.get_title(loc="left"), pad=12 + 13.5 * len(handles))
