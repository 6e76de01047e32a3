"""One page that tells what was run on what, how each layer did, and what to doubt.

Guarantees: self-contained (no network, no script; a content security policy in the page forbids
both), every text from outside escaped, light and dark, readable on a phone. Does not interpret
beyond what the numbers say: where a layer cannot be told from chance, or was chosen on the same
prompts, it says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from probecache.report.classes import ClassGroup, class_groups
from probecache.report.distributions import MOST_PANELS
from probecache.report.plots import draw_for_page
from probecache.report.saved import LayerResult, Validation, shown
from probecache.report.style import THEMED

__all__ = ["render_page"]

TEMPLATES = Path(__file__).parent / "templates"
MOST_PROMPTS = 5
FACT_NAMES = {
    "model": "Model",
    "dtype": "Number format",
    "data": "Data",
    "cache": "Cache",
    "vectors": "Vectors",
    "method": "Method",
    "positions": "Token positions",
    "layer_convention": "Layer numbers",
    "created": "Validated",
}


@dataclass(frozen=True)
class Prompt:
    """A prompt as the page shows it."""

    score: str
    label: str
    style: str
    question: str


def render_page(validation: Validation, figures: dict[str, bytes]) -> str:
    """The report as HTML text; `figures` are those of `draw_figures`, whose SVGs are set in."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    environment.filters["score"] = _score
    groups = class_groups(validation)
    highest, lowest = _extremes(validation, groups)
    drawings = {name: data for name, data in figures.items() if name.endswith(".svg")}
    drawings.update(draw_for_page(validation))
    return environment.get_template("report.html.j2").render(
        v=validation,
        best=validation.best,
        positive=groups[-1],
        others=groups[:-1],
        facts=_facts(validation),
        verdict=_verdict(validation.best),
        highest=highest,
        lowest=lowest,
        figures={name: _inlined(name, data) for name, data in drawings.items()},
        most_panels=MOST_PANELS,
        files=_files(validation, figures),
    )


def _facts(validation: Validation) -> list[tuple[str, str]]:
    return [
        (title, shown(value))
        for name, title in FACT_NAMES.items()
        if (value := validation.facts[name])
    ]


def _verdict(best: LayerResult) -> str:
    """What the best layer's interval allows to say."""
    if best.auroc_low > 0.5:
        return "above chance"
    if best.auroc_high < 0.5:
        return "below chance: the direction points the other way"
    return "not told apart from chance (the interval holds 0.5)"


def _score(value: float | None) -> str:
    """Three decimals for usual sizes, an exponent for others, a real minus sign in front."""
    if value is None:
        return "–"
    usual = value == 0 or 5e-4 <= abs(value) < 1e4
    size = f"{abs(value):.3f}" if usual else f"{abs(value):.2e}"
    return f"−{size}" if value < 0 else size


def _extremes(
    validation: Validation, groups: list[ClassGroup]
) -> tuple[list[Prompt], list[Prompt]]:
    """The best layer's highest and lowest scoring prompts; the two lists share none."""
    layer = validation.scores[validation.best_layer]
    styles = {name: group.style for group in groups for name in group.members}
    order = np.argsort(layer.scores, kind="stable")
    count = min(MOST_PROMPTS, order.size // 2)

    def prompt(row: int) -> Prompt:
        return Prompt(
            score=_score(float(layer.scores[row])),
            label=shown(layer.classes[row], 28),
            style=styles[layer.classes[row]],
            question=shown(layer.questions[row]) or "(empty)",
        )

    return [prompt(row) for row in order[::-1][:count]], [prompt(row) for row in order[:count]]


def _files(validation: Validation, figures: dict[str, bytes]) -> list[str]:
    """Files beside the report, as links relative to it; the scores are linked from the table."""
    tables = ["summary.json", "summary.csv"]
    found = [name for name in tables if (validation.folder / name).exists()]
    return found + [f"visualizations/{name}" for name in sorted(figures)]


def _inlined(name: str, data: bytes) -> Markup:
    """An SVG file's drawing as it may stand inside the page.

    The page's colours take the place of the figure's, so that it follows light and dark; ids get
    the figure's name in front, since several figures share one page. A narrow drawing is described
    by the caption of the figure that it stands for.
    """
    stem = name.removesuffix(".svg")
    caption = f"{stem.removesuffix('_narrow')}-caption"
    svg = data.decode("utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-labelledby="{caption}"', 1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{stem}-", svg)
    for colour, variable in THEMED.items():
        svg = re.sub(rf"(fill|stroke): {colour}", rf"\1: {variable}", svg)
    return Markup(svg)
