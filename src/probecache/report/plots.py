"""The figures of a validation, as files and as drawings for the page.

Guarantees: the same results give the same bytes; each class has one colour in every figure; one
layer or a hundred stay readable. Does not supply fonts: a script that DejaVu Sans lacks shows as
boxes in the PNG, and as itself in the SVG and the report.
"""

from __future__ import annotations

from probecache.report.distributions import layer_scores, score_distributions
from probecache.report.layer_curve import auroc_by_layer
from probecache.report.reliability import reliability
from probecache.report.roc import roc_curves
from probecache.report.saved import Validation
from probecache.report.style import rendered, styled

__all__ = ["draw_figures", "draw_for_page"]


def draw_figures(validation: Validation) -> dict[str, bytes]:
    """Draw every figure as PNG and SVG; keys are file names such as `roc_curves.png`."""
    with styled():
        figures = {
            "roc_curves": roc_curves(validation),
            "auroc_by_layer": auroc_by_layer(validation),
            "score_distributions": score_distributions(validation),
        }
        if validation.evidence.calibration_bins:
            figures["calibration"] = reliability(validation)
        return {
            f"{name}.{kind}": rendered(figure, kind)
            for name, figure in figures.items()
            for kind in ("png", "svg")
        }


def draw_for_page(validation: Validation) -> dict[str, bytes]:
    """SVGs that only the page shows: the best layer's scores, and drawings for phones."""
    with styled():
        figures = {
            "auroc_by_layer_narrow": auroc_by_layer(validation, narrow=True),
            "layer_scores": layer_scores(validation),
            "score_distributions_narrow": score_distributions(validation, narrow=True),
        }
        return {f"{name}.svg": rendered(figure, "svg") for name, figure in figures.items()}
