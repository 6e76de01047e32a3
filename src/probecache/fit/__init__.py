"""Fitters: rows of one layer in, a frozen `Probe` per method out."""

from probecache.fit.means import MeanDifferenceFitter, fit_difference_of_means

__all__ = ["MeanDifferenceFitter", "fit_difference_of_means"]
