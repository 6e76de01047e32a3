"""The page of a comparison: every run's curve in one figure, its figures in one table.

Guarantees: self-contained, without any script; every text escaped; the same runs give the same
bytes; runs are told apart by colour and by the pattern of their line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from probecache.report.classes import COLOURS
from probecache.report.compared import ComparedRun
from probecache.report.fields import shown
from probecache.report.html import inlined, page_environment
from probecache.report.layer_curve import MOST_ERROR_BARS, layer_axis
from probecache.report.style import DASHES, INK, MUTED, framed, heading, margined, rendered, styled

__all__ = ["render_comparison"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
LINES = ("negative", "positive", "class-3", "class-5", "class-4", "class-6")
PATTERNS: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 3)))
FACTS = ("model", "method", "positions", "aggregate", "data")


def render_comparison(
    runs: Sequence[ComparedRun], pairs: Sequence[tuple[str, str]], remarks: Sequence[str]
) -> str:
    """The page as HTML text.

    Args:
        runs: in the order of their letters.
        pairs: names of two runs and what is said of them.
        remarks: plain sentences.
    """
    with styled():
        drawings = {
            "comparison": rendered(_curves(runs), "svg"),
            "comparison_narrow": rendered(_curves(runs, narrow=True), "svg"),
        }
    return (
        page_environment()
        .get_template("comparison.html.j2")
        .render(
            policy=POLICY,
            runs=runs,
            styles={run.letter: LINES[place % len(LINES)] for place, run in enumerate(runs)},
            layers=sorted({layer for run in runs for layer in run.layers}),
            facts=[name for name in FACTS if any(run.facts[name] for run in runs)],
            pairs=pairs,
            remarks=remarks,
            figures={name: inlined(f"{name}.svg", data) for name, data in drawings.items()},
        )
    )


def _curves(runs: Sequence[ComparedRun], narrow: bool = False) -> Figure:
    columns = 1 if narrow else 3
    entries = -(-len(runs) // columns)
    top = 0.55 + 0.2 * entries
    width, left = (4.0, 0.4) if narrow else (8.4, 0.65)
    figure = margined(width, 3.35 + top, (left, 0.2, 0.6, top))
    axes = framed(figure)
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=DASHES)
    for place, run in enumerate(runs):
        _curve(axes, run, place)
    layers = sorted({layer for run in runs for layer in run.layers})
    pad = max(0.6, 0.02 * (layers[-1] - layers[0]))
    axes.set_xlim(layers[0] - pad, layers[-1] + pad)
    axes.set_ylim(max(-0.03, axes.get_ylim()[0]), 1.03)
    layer_axis(axes, layers)
    if not narrow:
        axes.set_ylabel("AUROC (0.5 = chance)")
    heading(axes, "AUROC by layer, 95% interval")
    axes.set_title(axes.get_title(loc="left"), pad=9 + 14.5 * entries)
    axes.legend(loc="lower left", ncols=columns, bbox_to_anchor=(-0.02, 0.985), handlelength=2.2,
                columnspacing=1.3, borderpad=0.3, labelspacing=0.25)  # fmt: skip
    return figure


def _curve(axes: Any, run: ComparedRun, place: int) -> None:
    """One run's estimates; those of a training are hollow."""
    colour = COLOURS[LINES[place % len(LINES)]]
    of_training = run.validation is None
    points = [
        (layer, estimate)
        for layer, figures in run.layers.items()
        if (estimate := figures.cross_validated if of_training else figures.validated)
    ]
    layers = [layer for layer, _ in points]
    areas = [estimate.value for _, estimate in points]
    known = [(layer, e.low, e.high) for layer, e in points if None not in (e.low, e.high)]
    if known:
        axes.fill_between(*zip(*known, strict=True), color=colour, alpha=0.1, linewidth=0)
    name = f"{run.letter}: {shown(run.facts['method'], 22)}"
    few = len(layers) <= MOST_ERROR_BARS
    axes.plot(
        layers,
        areas,
        color=colour,
        linewidth=1.6,
        linestyle=PATTERNS[(place // len(LINES) + place) % len(PATTERNS)],
        marker="o",
        markersize=4 if few else 0,
        markerfacecolor="none" if of_training else colour,
        label=name + (" (training)" if of_training else ""),
    )
    if run.best_layer is not None and run.best is not None:
        axes.plot([run.best_layer], [run.best.value], marker="o", markersize=9, linestyle="none",
                  markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.3)  # fmt: skip
