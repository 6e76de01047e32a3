"""Fitters: rows of one layer in, a frozen `Probe` per method out."""

from probecache.fit.leave_out import leave_group_out_scores
from probecache.fit.means import MeanDifferenceFitter, fit_difference_of_means
from probecache.fit.methods import (
    Design,
    Method,
    MethodFit,
    fit_layer,
    parse_methods,
    parse_strengths,
)

__all__ = [
    "Design",
    "MeanDifferenceFitter",
    "Method",
    "MethodFit",
    "fit_difference_of_means",
    "fit_layer",
    "leave_group_out_scores",
    "parse_methods",
    "parse_strengths",
]
