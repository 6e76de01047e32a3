"""How well scores separate two classes, and how sure of that one may be."""

from probecache.metrics.auroc import (
    AurocEstimate,
    accuracy_at,
    auroc,
    logit_interval,
    normal_quantile,
    roc_curve,
    widest_interval,
)

__all__ = [
    "AurocEstimate",
    "accuracy_at",
    "auroc",
    "logit_interval",
    "normal_quantile",
    "roc_curve",
    "widest_interval",
]
