"""A validation as summary.json holds it.

Guarantee: plain JSON values; a field that does not apply is null, and every row has every field.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from probecache.workflow.results import FORMAT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from probecache.dataset import Dataset
    from probecache.metrics import TprEstimate
    from probecache.store.rows import ExampleRows
    from probecache.store.vectors import SavedVectors
    from probecache.workflow.judging import Category, Judged, LayerResult
    from probecache.workflow.panel import Panel

__all__ = ["about", "findings"]


def about(
    rows: ExampleRows,
    vectors: SavedVectors,
    aggregate: str,
    dataset: Dataset | None,
    source: str | None,
) -> dict[str, Any]:
    """What was scored with what."""
    info, cache = vectors.info, rows.cache
    return {
        "format": FORMAT,
        "format_version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "positive_class": info.positive_class,
        "negative_class": " + ".join(c for c in cache.classes if c != info.positive_class),
        "positions": str(rows.positions),
        "aggregate": aggregate,
        "layer_convention": info.layer_convention,
        "model": cache.identity.model,
        "dtype": str(cache.info.dtype),
        "data": dataset.source if dataset else None,
        "cache": source or str(cache.path),
        "vectors": str(vectors.path),
        "normalized": info.normalized,
        "method": info.method,
        "num_examples": cache.info.num_examples,
        "classes": {label: record.examples for label, record in cache.info.classes.items()},
    }


def findings(
    judged: Judged, vectors: SavedVectors, categories: Sequence[Category], panel: Panel
) -> dict[str, Any]:
    """What came out."""
    best, test = judged.best, judged.permutation
    return {
        "best_layer": best.layer,
        "chosen_in_training": fixed.layer if (fixed := judged.chosen_in_training) else None,
        "interval": judged.interval,
        "best_of_all": {
            "p_value": test.p_value,
            "permutations": len(test.maxima),
            "null_median": float(np.median(test.maxima)),
            "null_95": float(np.quantile(test.maxima, 0.95)),
        },
        "training": _training(vectors, best.layer),
        "layers": [_layer_row(result) for result in judged.layers],
        "categories": [_category_row(category) for category in categories],
        "calibration_bins": [
            {name: getattr(one, name) for name in ("low", "high", "n", "predicted", "observed")}
            for one in (best.calibration.bins if best.calibration else ())
        ],
        "artefacts": panel.record(),
    }


def _training(vectors: SavedVectors, layer: int) -> dict[str, Any]:
    record, validated = vectors.info.layers[layer], vectors.info.cross_validation
    return {
        "n_positive": record.n_positive,
        "n_negative": record.n_negative,
        "positions": vectors.info.positions,
        "cross_validation": None
        if validated is None
        else validated.model_dump(mode="json", include={"folds", "groups", "best_layer", "nested"}),
    }


def _layer_row(result: LayerResult) -> dict[str, Any]:
    positive, negative = result.scores[result.is_positive], result.scores[~result.is_positive]
    trained, calibrated = result.trained.cross_validation, result.calibration
    below = result.below_best
    return {
        "layer": result.layer,
        "auroc": result.auroc.auroc,
        "auroc_low": result.auroc.low,
        "auroc_high": result.auroc.high,
        "n_positive": result.auroc.n_positive,
        "n_negative": result.auroc.n_negative,
        "threshold": result.threshold,
        "accuracy": result.accuracy,
        "mean_positive": float(positive.mean()),
        "mean_negative": float(negative.mean()),
        "std_positive": float(positive.std()),
        "std_negative": float(negative.std()),
        "cv_auroc": trained.auroc if trained else None,
        "cv_low": trained.low if trained else None,
        "cv_high": trained.high if trained else None,
        "below_best": below
        and {n: getattr(below, n) for n in ("difference", "low", "high", "p_value")},
        **{f"tpr_at_{round(100 * rate)}": _tpr_row(found) for rate, found in result.tpr.items()},
        "brier": calibrated.brier if calibrated else None,
        "ece": calibrated.ece if calibrated else None,
        "calibration_slope": calibrated.slope if calibrated else None,
        "calibration_intercept": calibrated.intercept if calibrated else None,
        "random_mean": result.random.mean if result.random else None,
        "random_high": result.random.highest if result.random else None,
    }


def _tpr_row(found: TprEstimate | None) -> dict[str, float] | None:
    return None if found is None else {"tpr": found.tpr, "low": found.low, "high": found.high}


def _category_row(category: Category) -> dict[str, Any]:
    area = category.auroc
    return {
        "category": category.name,
        "n_positive": category.n_positive,
        "n_negative": category.n_negative,
        "auroc": area.auroc if area else None,
        "auroc_low": area.low if area else None,
        "auroc_high": area.high if area else None,
        "accuracy": category.accuracy,
        "mean_score": category.mean_score,
    }
