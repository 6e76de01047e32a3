"""How every figure looks: colours, type, margins, and how one becomes a file.

Guarantees: the same figure gives the same bytes; no text is read as mathematics. Draws through
matplotlib's objects, never pyplot, which costs 0.4 s to import and keeps figures alive.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from probecache.report.classes import VARIABLES
from probecache.report.fields import shown

__all__ = [
    "ACCENT",
    "CHECKED",
    "DASHES",
    "INK",
    "LAYERS",
    "MUTED",
    "SURFACE",
    "THEMED",
    "framed",
    "heading",
    "margined",
    "name_of",
    "rendered",
    "styled",
]

INK, MUTED, GRID, SURFACE = "#20242b", "#68707c", "#e2e5ea", "#fefefe"
ACCENT = "#5b4bb5"
# Cross-validated estimates: beside the accent they are dashed and hollow too.
CHECKED = "#0f7f86"
# Of the chance line.
DASHES = (0, (4, 3))
# Violet, teal, amber: ordered from blue to yellow, and readable on white and on black alike.
LAYERS = LinearSegmentedColormap.from_list("layers", ["#6a5acd", "#1b998b", "#d69a1e"], N=64)
# What the report may recolour for a dark page.
THEMED = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    SURFACE: "var(--surface)",
    ACCENT: "var(--accent)",
    CHECKED: "var(--checked)",
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


@contextmanager
def styled() -> Iterator[None]:
    """Within, figures are drawn as this module says, whatever the user's own settings."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support")
        yield


def rendered(figure: Figure, kind: str) -> bytes:
    """The file of a figure; `kind` is png or svg."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=METADATA[kind])
    return buffer.getvalue()


def margined(width: float, height: float, margins: tuple[float, float, float, float]) -> Figure:
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


def framed(figure: Figure) -> Any:
    """The figure's one pair of axes, whose ground is named so that the page's script finds it."""
    axes = figure.subplots()
    axes.patch.set_gid("frame")
    return axes


def heading(axes: Any, text: str) -> None:
    """A title that leaves room for one line between itself and the axes."""
    axes.set_title(text, pad=24)


def name_of(label: str) -> str:
    """A class's name as it fits beside an axis."""
    return shown(label, 28)
