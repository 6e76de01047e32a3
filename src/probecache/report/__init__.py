"""Figures and the HTML report of a saved validation.

Guarantees: reads saved results only, never a model, a cache or vectors; the same results give the
same bytes; every file appears whole or not at all, and nothing is written unless all of it could
be drawn. Does not recompute what the summary states: it refuses a summary that its scores deny.
"""

from __future__ import annotations

from pathlib import Path

from probecache.atomic import disk_errors_named, write_bytes
from probecache.errors import OutputError
from probecache.report.html import render_page
from probecache.report.plots import draw_figures
from probecache.report.saved import read_validation

__all__ = ["draw_report", "write_report"]


def draw_report(folder: Path) -> dict[str, bytes]:
    """What `write_report` writes, by name in the folder."""
    validation = read_validation(folder)
    figures = draw_figures(validation)
    page = render_page(validation, figures)
    contents = {f"visualizations/{name}": data for name, data in figures.items()}
    return {**contents, "report.html": page.encode("utf-8")}


def write_report(folder: Path) -> list[Path]:
    """Draw a validation folder's figures and its `report.html`.

    Args:
        folder: holds `summary.json`, one `probe_stats_layer<N>.csv` per layer, and for caches of
            several tokens `token_scores.json`.

    Returns:
        The files written: `visualizations/{roc_curves,auroc_by_layer,score_distributions}` and,
        where the vectors are calibrated, `visualizations/calibration`, each as .png and .svg, then
        `report.html`. Older ones are replaced.

    Raises:
        StoreError: a saved file is missing, malformed, or disagrees with the others.
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    contents = {folder / name: data for name, data in draw_report(folder).items()}
    drawings = folder / "visualizations"
    if drawings.is_symlink():
        raise OutputError(
            f"expected {drawings} to be a folder, got a link, and nothing is written through links "
            "inside a result; remove it"
        )
    with disk_errors_named(folder, sum(map(len, contents.values()))):
        drawings.mkdir(exist_ok=True)
        for path, data in contents.items():
            write_bytes(path, data)
    return list(contents)
