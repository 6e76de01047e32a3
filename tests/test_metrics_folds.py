"""AUROC of cross-validated scores: within folds, by brute force, with groups, under the null."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from probecache.errors import EmptyClassError, FitError, ShapeError
from probecache.folds import assign_folds
from probecache.metrics import auroc_within_folds


def scored(seed, n=60, shift=1.0, decimals=None):
    """Scores, labels, folds and groups, pairs staying together."""
    rng = np.random.default_rng(seed)
    labels, groups = np.arange(n) % 2 == 0, np.arange(n) // 2
    scores = rng.normal(size=n) + shift * labels
    scores = scores if decimals is None else scores.round(decimals)
    return scores, labels, assign_folds(labels, groups, 5, seed), groups


def by_brute_force(scores, labels, folds, groups):
    """Won pairs of one fold, and the interval from the influence of each group."""
    won, pairs = np.zeros(scores.size), np.zeros(scores.size)
    for i in np.flatnonzero(labels):
        for j in np.flatnonzero(~labels):
            if folds[i] == folds[j]:
                win = float(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
                won[[i, j]] += win
                pairs[[i, j]] += 1
    total = pairs[labels].sum()
    area = won[labels].sum() / total
    influence = [(won - area * pairs)[groups == g].sum() / total for g in np.unique(groups)]
    count, fits = len(influence), np.unique(folds).size
    variance = np.square(influence).sum() * count / (count - 1) * (1 + fits / (fits - 1))
    spread = 1.959963984540054 * math.sqrt(variance) / (area * (1 - area))
    logit = math.log(area / (1 - area))
    return area, 1 / (1 + math.exp(spread - logit)), 1 / (1 + math.exp(-spread - logit))


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("shift", [0.0, 1.0, -2.0])
def test_area_and_interval_equal_brute_force(shift, decimals):
    case = scored(2, 40, shift, decimals)
    found = auroc_within_folds(*case)
    assert (found.auroc, found.low, found.high) == pytest.approx(by_brute_force(*case), abs=1e-12)
    assert (found.n_positive, found.n_negative, found.level) == (20, 20, 0.95)


def test_it_is_the_mean_of_the_folds_aurocs_weighted_by_their_pairs():
    scores, labels, folds, groups = scored(3)
    areas = [roc_auc_score(labels[folds == f], scores[folds == f]) for f in range(5)]
    pairs = [(labels & (folds == f)).sum() * (~labels & (folds == f)).sum() for f in range(5)]
    found = auroc_within_folds(scores, labels, folds, groups)
    assert found.auroc == pytest.approx(np.average(areas, weights=pairs), abs=1e-12)


def test_offset_and_scale_of_each_fold_are_of_no_account():
    scores, labels, folds, groups = scored(4)
    shifted = scores * np.array([1, 5, 0.1, 2, 1])[folds] + np.array([0, 90, -40, 3, 1])[folds]
    found = auroc_within_folds(shifted, labels, folds, groups)
    assert found == auroc_within_folds(scores, labels, folds, groups)
    assert roc_auc_score(labels, shifted) < found.auroc - 0.1


@pytest.mark.parametrize("decimals", [None, 0])
@pytest.mark.parametrize("seed", range(20))
def test_swapped_labels_give_exactly_one_minus_auroc_and_the_mirrored_interval(seed, decimals):
    scores, labels, folds, groups = scored(seed, 30, 0.7, decimals)
    one, other = (auroc_within_folds(scores, side, folds, groups) for side in (labels, ~labels))
    assert other.auroc == 1 - one.auroc
    assert one.auroc == 1 - other.auroc
    assert (other.low, other.high) == pytest.approx((1 - one.high, 1 - one.low), abs=1e-12)


def test_names_will_do_for_folds_and_groups():
    scores, labels, folds, groups = scored(5)
    named = auroc_within_folds(
        scores, labels, [f"fold {f}" for f in folds], [("pair", int(g)) for g in groups]
    )
    assert named == auroc_within_folds(scores, labels, folds, groups)


def test_copies_in_a_group_do_not_make_the_interval_narrower():
    scores, labels, folds, groups = scored(6)
    copied = auroc_within_folds(*(np.repeat(part, 4) for part in (scores, labels, folds, groups)))
    once = auroc_within_folds(scores, labels, folds, groups)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_perfect_scores_have_an_interval_for_the_number_of_groups(sign):
    _, labels, folds, groups = scored(7)
    found = auroc_within_folds(sign * labels, labels, folds, groups)
    assert found.auroc == (1.0 if sign > 0 else 0.0)
    assert 0.08 < found.high - found.low < 0.2


def test_a_fold_of_one_class_counts_for_nothing():
    scores, labels, folds, groups = scored(8)
    more = [*scores, 9.0, 9.0], [*labels, False, False], [*folds, 5, 5], [*groups, 98, 99]
    found = auroc_within_folds(more[0], np.array(more[1]), *more[2:])
    assert found.auroc == auroc_within_folds(scores, labels, folds, groups).auroc


class TestRefused:
    def test_a_single_fold(self):
        with pytest.raises(FitError, match="2 folds"):
            auroc_within_folds([1.0, 2.0], [True, False], [0, 0], [0, 1])

    def test_folds_of_one_class_each(self):
        with pytest.raises(EmptyClassError, match="a fold that holds both"):
            auroc_within_folds([1.0, 2.0], [True, False], [0, 1], [0, 1])

    @pytest.mark.parametrize("lengths", [(3, 4), (4, 3)])
    def test_folds_or_groups_of_another_number(self, lengths):
        folds, groups = (np.arange(n) % 2 for n in lengths)
        with pytest.raises(ShapeError, match="for each example"):
            auroc_within_folds(np.arange(4.0), np.arange(4) < 2, folds, groups)
