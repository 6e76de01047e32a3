"""What a summary says beside its AUROCs: honest estimates, baselines, calibration, categories.

Guarantees: every field is optional, because older validations lack them; what is there has the
kind and the range that it must have, or is refused with a ValueError. Texts are as they stand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from probecache.report.fields import (
    Interval,
    count,
    flag,
    interval,
    listed,
    number,
    optional,
    probability,
    text,
)

__all__ = [
    "Artefacts",
    "Baseline",
    "BelowBest",
    "BestOfAll",
    "CalibrationBin",
    "Category",
    "Evidence",
    "LayerEvidence",
    "Training",
    "layer_evidence",
    "read_evidence",
]


@dataclass(frozen=True)
class BelowBest:
    """The difference of AUROCs between a layer and the best one, paired on the same prompts."""

    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class LayerEvidence:
    """What else is known of one layer; None where it was not measured."""

    cross_validated: Interval | None
    below_best: BelowBest | None
    tpr_at_1: Interval | None
    tpr_at_5: Interval | None
    brier: float | None
    calibration_slope: float | None
    calibration_intercept: float | None
    calibration_error: float | None
    random_mean: float | None
    random_high: float | None


@dataclass(frozen=True)
class Training:
    """The prompts behind the vectors; `nested` chooses the layer inside the folds."""

    n_positive: int
    n_negative: int
    folds: int | None
    groups: int | None
    best_layer: int | None
    nested: Interval | None


@dataclass(frozen=True)
class BestOfAll:
    """The permutation test that pays for having looked at every layer."""

    p_value: float
    permutations: int
    null_median: float | None
    null_95: float | None


@dataclass(frozen=True)
class Category:
    """The prompts of one category at the best layer."""

    name: str
    n_positive: int
    n_negative: int
    auroc: Interval | None
    accuracy: float | None
    mean_score: float | None


@dataclass(frozen=True)
class CalibrationBin:
    """Prompts whose probability lies from `low` to `high`: what was predicted and what was so.

    Both are None where no prompt fell into it.
    """

    low: float
    high: float
    n: int
    predicted: float | None
    observed: float | None


@dataclass(frozen=True)
class Baseline:
    """What something other than the probe achieves; `how` says what was done or why nothing."""

    name: str
    title: str
    estimate: Interval | None
    how: str


@dataclass(frozen=True)
class Artefacts:
    """What else could explain the scores.

    `first_token_share` is of the variance of the prompts' scores; a covariance, it may lie outside
    0 to 1.
    """

    baselines: tuple[Baseline, ...]
    best_baseline: str | None
    gain: float | None
    balance: tuple[int, int] | None
    pair_agreement: float | None
    outlier_dimensions: tuple[int, ...]
    outlier_share: float | None
    first_token_share: float | None
    rendered_alike: bool | None
    rendering_differences: tuple[str, ...]

    @property
    def best(self) -> Baseline | None:
        """The baseline that does best, where there is one."""
        named = (one for one in self.baselines if one.name == self.best_baseline)
        return next(named, None)


@dataclass(frozen=True)
class Evidence:
    """All that a summary says beside what every validation has said from the first."""

    aggregate: str
    interval_method: str | None
    best_of_all: BestOfAll | None
    chosen_in_training: int | None
    training: Training | None
    layers: dict[int, LayerEvidence]
    categories: tuple[Category, ...]
    calibration_bins: tuple[CalibrationBin, ...]
    artefacts: Artefacts | None


def read_evidence(summary: dict[str, Any], layers: Iterable[int]) -> Evidence:
    """The optional fields of a summary whose layers have been read already.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: a field is of the wrong kind or range.
    """
    rows = {row["layer"]: row for row in summary["layers"]}
    return Evidence(
        aggregate=optional(summary.get("aggregate"), text) or "mean",
        interval_method=optional(summary.get("interval"), text),
        best_of_all=optional(summary.get("best_of_all"), _best_of_all),
        chosen_in_training=optional(summary.get("chosen_in_training"), count),
        training=optional(summary.get("training"), _training),
        layers={layer: layer_evidence(rows[layer]) for layer in layers},
        categories=listed(summary.get("categories"), _category),
        calibration_bins=listed(summary.get("calibration_bins"), _calibration_bin),
        artefacts=optional(summary.get("artefacts"), _artefacts),
    )


def layer_evidence(row: dict[str, Any]) -> LayerEvidence:
    """The optional fields of one layer's row."""
    return LayerEvidence(
        cross_validated=interval(row, "cv_auroc", "cv_low", "cv_high"),
        below_best=optional(row.get("below_best"), _below_best),
        tpr_at_1=optional(row.get("tpr_at_1"), _tpr),
        tpr_at_5=optional(row.get("tpr_at_5"), _tpr),
        brier=optional(row.get("brier"), probability),
        calibration_slope=optional(row.get("calibration_slope"), number),
        calibration_intercept=optional(row.get("calibration_intercept"), number),
        calibration_error=optional(row.get("ece"), probability),
        random_mean=optional(row.get("random_mean"), probability),
        random_high=optional(row.get("random_high"), probability),
    )


def _below_best(record: Any) -> BelowBest:
    return BelowBest(
        difference=_difference(record["difference"]),
        low=_difference(record["low"]),
        high=_difference(record["high"]),
        p_value=probability(record["p_value"]),
    )


def _difference(value: Any) -> float:
    if abs(number(value)) > 1:
        raise ValueError(f"expected a difference of AUROCs from -1 to 1, got {value}")
    return float(value)


def _tpr(record: Any) -> Interval | None:
    return interval(record, "tpr")


def _best_of_all(record: Any) -> BestOfAll:
    return BestOfAll(
        p_value=probability(record["p_value"]),
        permutations=count(record["permutations"]),
        null_median=optional(record.get("null_median"), probability),
        null_95=optional(record.get("null_95"), probability),
    )


def _training(record: Any) -> Training:
    validated = record.get("cross_validation")
    found = {} if validated is None else validated
    return Training(
        n_positive=count(record["n_positive"]),
        n_negative=count(record["n_negative"]),
        folds=optional(found.get("folds"), count),
        groups=optional(found.get("groups"), count),
        best_layer=optional(found.get("best_layer"), count),
        nested=optional(found.get("nested"), lambda nested: interval(nested, "auroc")),
    )


def _category(record: Any) -> Category:
    return Category(
        name=text(record["category"]),
        n_positive=count(record["n_positive"]),
        n_negative=count(record["n_negative"]),
        auroc=interval(record, "auroc", "auroc_low", "auroc_high"),
        accuracy=optional(record.get("accuracy"), probability),
        mean_score=optional(record.get("mean_score"), number),
    )


def _calibration_bin(record: Any) -> CalibrationBin:
    return CalibrationBin(
        low=probability(record["low"]),
        high=probability(record["high"]),
        n=count(record["n"]),
        predicted=optional(record["predicted"], probability),
        observed=optional(record["observed"], probability),
    )


def _baseline(record: Any) -> Baseline:
    return Baseline(
        name=text(record["name"]),
        title=text(record["title"]),
        estimate=interval(record, "auroc"),
        how=text(record["how"]),
    )


def _artefacts(record: Any) -> Artefacts:
    outliers = record.get("outlier_dimensions") or {}
    rendering = record.get("rendered_alike") or {}
    return Artefacts(
        baselines=listed(record.get("baselines"), _baseline),
        best_baseline=optional(record.get("best_baseline"), text),
        gain=optional(record.get("gain"), _difference),
        balance=optional(record.get("class_balance"), _balance),
        pair_agreement=optional(record.get("pair_agreement"), _cosine),
        outlier_dimensions=listed(outliers.get("dimensions"), count),
        outlier_share=optional(outliers.get("share_of_norm"), probability),
        first_token_share=optional(record.get("first_token_share"), number),
        rendered_alike=optional(rendering.get("alike"), flag),
        rendering_differences=listed(rendering.get("differences"), text),
    )


def _balance(record: Any) -> tuple[int, int]:
    return count(record["positive"]), count(record["negative"])


def _cosine(value: Any) -> float:
    # The mean of cosines may come out a rounding beyond one.
    if abs(number(value)) > 1 + 1e-6:
        raise ValueError(f"expected a cosine from -1 to 1, got {value}")
    return float(value)
