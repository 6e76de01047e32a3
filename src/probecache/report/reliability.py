"""The reliability diagram: how often what was given a probability came true.

Guarantees: every bin shows its 95% interval, so that a bin of three prompts does not look like one
of three hundred; empty bins are left out.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from probecache.metrics import normal_quantile, widest_interval
from probecache.report.evidence import CalibrationBin
from probecache.report.saved import Validation
from probecache.report.style import ACCENT, DASHES, MUTED, framed, heading, margined, name_of

__all__ = ["reliability"]

LEVEL = 0.95
# The bars of the bins' sizes stand at the foot of the axes, in this share of them.
FOOT = 0.12


def reliability(validation: Validation) -> Figure:
    """Predicted against observed share of the positive class, at the best layer."""
    bins = [one for one in validation.evidence.calibration_bins if one.n]
    figure = margined(5.2, 4.7, (0.65, 0.2, 0.6, 0.75))
    axes = framed(figure)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=DASHES)
    _sizes(axes, bins)
    _points(axes, bins)
    heading(axes, f"Reliability at layer {validation.best_layer}")
    axes.text(0, 1.025, "dashed = as predicted; bars = prompts", transform=axes.transAxes,
              fontsize=9)  # fmt: skip
    axes.set_xlabel(f"predicted probability of {name_of(validation.positive_class)}")
    axes.set_ylabel("share observed")
    ticks = (0, 0.25, 0.5, 0.75, 1)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xticks=ticks, yticks=ticks)
    return figure


def _sizes(axes: Any, bins: list[CalibrationBin]) -> None:
    most = max((one.n for one in bins), default=1)
    axes.bar(
        [one.low for one in bins],
        [FOOT * one.n / most for one in bins],
        width=[0.92 * (one.high - one.low) for one in bins],
        bottom=-0.01,
        align="edge",
        color=MUTED,
        alpha=0.3,
        linewidth=0,
    )


def _points(axes: Any, bins: list[CalibrationBin]) -> None:
    known = [
        (one.predicted, one.observed, _interval(one.observed, one.n))
        for one in bins
        if one.predicted is not None and one.observed is not None
    ]
    if not known:
        return
    predicted, observed, intervals = (list(column) for column in zip(*known, strict=True))
    lows, highs = (list(side) for side in zip(*intervals, strict=True))
    axes.vlines(predicted, lows, highs, color=ACCENT, linewidth=1.6, alpha=0.55)
    axes.plot(predicted, observed, color=ACCENT, linewidth=1.4, marker="o", markersize=5)


def _interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's, at 0 and 1 Clopper and Pearson's."""
    return widest_interval(share, n, normal_quantile((1 + LEVEL) / 2), LEVEL)
