"""Controls that catch artefacts: what a score could be made of besides what it is taken for."""

from probecache.controls.baselines import (
    Baseline,
    answer_letter_baseline,
    best_baseline,
    estimated_baseline,
    length_baseline,
    random_directions_baseline,
    training_words_baseline,
    words_baseline,
)
from probecache.controls.cautions import (
    baseline_cautions,
    chance_caution,
    copies_of_training_caution,
    few_examples_caution,
    first_token_caution,
    pairs_caution,
    permutation_caution,
    repeated_prompts_caution,
    reversed_caution,
)
from probecache.controls.directions import RandomControl, random_auroc, random_directions
from probecache.controls.geometry import (
    PairAgreement,
    first_token_share,
    outlier_dimensions,
    pair_agreement,
    pair_cosine,
)
from probecache.controls.surface import (
    answer_letter_auroc,
    answer_letters,
    folded,
    length_auroc,
)
from probecache.controls.words import bag_of_words_auroc, cross_validated_bag_of_words_auroc

__all__ = [
    "Baseline",
    "PairAgreement",
    "RandomControl",
    "answer_letter_auroc",
    "answer_letter_baseline",
    "answer_letters",
    "bag_of_words_auroc",
    "baseline_cautions",
    "best_baseline",
    "chance_caution",
    "copies_of_training_caution",
    "cross_validated_bag_of_words_auroc",
    "estimated_baseline",
    "few_examples_caution",
    "first_token_caution",
    "first_token_share",
    "folded",
    "length_auroc",
    "length_baseline",
    "outlier_dimensions",
    "pair_agreement",
    "pair_cosine",
    "pairs_caution",
    "permutation_caution",
    "random_auroc",
    "random_directions",
    "random_directions_baseline",
    "repeated_prompts_caution",
    "reversed_caution",
    "training_words_baseline",
    "words_baseline",
]
