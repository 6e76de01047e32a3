"""How well scores separate two classes, and how sure of that one may be."""

from probecache.metrics.auroc import (
    AurocEstimate,
    accuracy_at,
    auroc,
    auroc_within_folds,
    logit_interval,
    normal_quantile,
    roc_curve,
    widest_interval,
)
from probecache.metrics.calibration import Bin, Calibration, Platt, calibration, fit_platt
from probecache.metrics.delong import AurocDifference, delong_covariance, paired_difference
from probecache.metrics.permutation import PermutationTest, permutation_test

__all__ = [
    "AurocDifference",
    "AurocEstimate",
    "Bin",
    "Calibration",
    "PermutationTest",
    "Platt",
    "accuracy_at",
    "auroc",
    "auroc_within_folds",
    "calibration",
    "delong_covariance",
    "fit_platt",
    "logit_interval",
    "normal_quantile",
    "paired_difference",
    "permutation_test",
    "roc_curve",
    "widest_interval",
]
