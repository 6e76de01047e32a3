"""One page that tells what was run on what, how each layer did, and what to doubt.

Guarantees: self-contained (no network; a content security policy in the page forbids it, and every
script but the page's own), complete without scripts, every text from outside escaped, light and
dark, readable on a phone and in print. Does not interpret beyond what the numbers say: where a
layer cannot be told from chance, or was chosen on the same prompts, it says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from probecache.report import panels
from probecache.report.classes import ClassGroup, class_groups
from probecache.report.distributions import MOST_PANELS
from probecache.report.fields import shown
from probecache.report.interactive import layer_numbers, page_script, policy
from probecache.report.plots import draw_for_page
from probecache.report.roc import operating_points
from probecache.report.saved import Validation
from probecache.report.style import THEMED
from probecache.report.tokens import ENDS, TOKEN_SCORES

__all__ = ["inlined", "page_environment", "render_page"]

TEMPLATES = Path(__file__).parent / "templates"
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
AGGREGATES = {"mean": "averaged over", "max": "the highest of", "last": "the last of"}


def render_page(validation: Validation, figures: dict[str, bytes]) -> str:
    """The report as HTML text; `figures` are those of `draw_figures`, whose SVGs are set in."""
    groups, script = class_groups(validation), page_script()
    drawings = {name: data for name, data in figures.items() if name.endswith(".svg")}
    drawings |= draw_for_page(validation)
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            v=validation,
            best=validation.best,
            evidence=validation.evidence,
            artefacts=validation.evidence.artefacts,
            positive=groups[-1],
            groups=groups,
            others=groups[:-1],
            numbers=layer_numbers(validation, groups),
            policy=policy(script),
            script=Markup(script),
            columns=_columns(validation),
            best_points=operating_points(validation, validation.best_layer),
            calibration=panels.calibration_text(validation),
            facts=_facts(validation),
            files=_files(validation, figures),
            figures={name: inlined(name, data) for name, data in drawings.items()},
            most_panels=MOST_PANELS,
            score_meaning=_score_meaning(validation),
            **_panels(validation, groups),
        )
    )


def page_environment() -> Environment:
    """Where the templates are, with everything escaped that they are given."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    environment.filters["score"] = panels.score_text
    environment.filters["signed"] = panels.signed
    return environment


def inlined(name: str, data: bytes) -> Markup:
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


def _panels(validation: Validation, groups: list[ClassGroup]) -> dict[str, Any]:
    """What the panels say, by the template's names."""
    artefacts, tokens = validation.evidence.artefacts, validation.tokens
    highest, lowest = panels.extremes(validation, groups)
    ends = {} if tokens is None else {e: panels.token_prompts(tokens, e, groups) for e in ENDS}
    return {
        "verdict": panels.verdict(validation),
        "tiles": panels.tiles(validation),
        "baselines": panels.baseline_rows(validation),
        "artefact_facts": panels.artefact_facts(artefacts) if artefacts else [],
        "highest": highest,
        "lowest": lowest,
        "tabled": panels.prompt_table(validation, groups),
        "token_ends": ends,
    }


def _facts(validation: Validation) -> list[panels.Fact]:
    facts = [
        (title, shown(value))
        for name, title in FACT_NAMES.items()
        if (value := validation.facts[name])
    ]
    return facts + panels.training_facts(validation)


def _columns(validation: Validation) -> set[str]:
    """Which of a layer's optional figures at least one layer has."""
    layers = validation.evidence.layers.values()
    names = ("cross_validated", "below_best", "tpr_at_1", "tpr_at_5", "random_mean", "brier")
    return {name for name in names if any(getattr(one, name) is not None for one in layers)}


def _score_meaning(validation: Validation) -> str:
    aggregate = shown(validation.evidence.aggregate, 20)
    how = AGGREGATES.get(aggregate, f"{aggregate} of")
    return f"{validation.score_meaning}, {how} the kept tokens of a prompt"


def _files(validation: Validation, figures: dict[str, bytes]) -> list[str]:
    """Files beside the report, as links relative to it; the scores are linked from the table."""
    tables = ["summary.json", "summary.csv", TOKEN_SCORES]
    found = [name for name in tables if (validation.folder / name).exists()]
    return found + [f"visualizations/{name}" for name in sorted(figures)]
