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
from probecache.metrics.operating import TprEstimate, negatives_needed, tpr_at_fpr
from probecache.metrics.permutation import PermutationTest, permutation_test
from probecache.metrics.resampling import (
    grouped_difference,
    grouped_differences,
    grouped_interval,
)

__all__ = [
    "AurocDifference",
    "AurocEstimate",
    "Bin",
    "Calibration",
    "PermutationTest",
    "Platt",
    "TprEstimate",
    "accuracy_at",
    "auroc",
    "auroc_within_folds",
    "calibration",
    "delong_covariance",
    "fit_platt",
    "grouped_difference",
    "grouped_differences",
    "grouped_interval",
    "logit_interval",
    "negatives_needed",
    "normal_quantile",
    "paired_difference",
    "permutation_test",
    "roc_curve",
    "tpr_at_fpr",
    "widest_interval",
]
