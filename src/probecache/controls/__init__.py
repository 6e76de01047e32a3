"""Baselines that catch artefacts: what a score could be made of besides what it is taken for."""

from probecache.controls.words import bag_of_words_auroc, cross_validated_bag_of_words_auroc

__all__ = ["bag_of_words_auroc", "cross_validated_bag_of_words_auroc"]
