"""The max-statistic permutation test: exact where all can be listed, calibrated under the null."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from probecache.errors import EmptyClassError, FitError, ShapeError
from probecache.metrics import permutation_test


def singles(n):
    return np.arange(n) % 2 == 0, np.arange(n)


def pairs(n):
    return np.arange(n) % 2 == 0, np.arange(n) // 2


def clusters(n, size=4):
    """Groups of one class each, of `size`."""
    groups = np.arange(n) // size
    return groups % 2 == 0, groups


def correlated_layers(rng, k, groups, signal=0.0, shared_by_group=0.7):
    """Scores [k, n]: a walk over layers, so that neighbours are alike, and alike within groups."""
    n = groups.size
    steps = rng.normal(size=(k, n)) * (1 - shared_by_group)
    steps += shared_by_group * rng.normal(size=(k, groups.max() + 1))[:, groups]
    rows = np.empty((k, n))
    rows[0] = steps[0]
    for layer in range(1, k):
        rows[layer] = 0.9 * rows[layer - 1] + 0.44 * steps[layer]
    return rows


@pytest.mark.parametrize("design", [singles, pairs, clusters])
def test_of_200_null_data_sets_of_80_layers_two_to_nine_percent_are_below_a_twentieth(design):
    rng = np.random.default_rng(11)
    labels, groups = design(60)
    below = [
        permutation_test(correlated_layers(rng, 80, groups), labels, groups, 199, seed).p_value
        < 0.05
        for seed in range(200)
    ]
    assert 0.02 <= np.mean(below) <= 0.09


def test_labels_that_ignore_clusters_would_find_what_is_not_there():
    """The clustered null is only held by exchanging whole clusters: the test above has power."""
    rng = np.random.default_rng(11)
    labels, groups = clusters(60)
    below = [
        permutation_test(correlated_layers(rng, 20, groups), labels, range(60), 199, seed).p_value
        < 0.05
        for seed in range(50)
    ]
    assert np.mean(below) > 0.2


@pytest.mark.parametrize("design", [singles, pairs, clusters])
def test_a_planted_layer_is_found_with_the_smallest_p_value_there_is(design):
    labels, groups = design(80)
    rows = correlated_layers(np.random.default_rng(3), 80, groups)
    rows[37] = np.random.default_rng(4).normal(size=80) + 4 * labels
    found = permutation_test(rows, labels, groups, 499)
    assert found.best == 37
    assert found.observed == pytest.approx(roc_auc_score(labels, rows[37]), abs=1e-15)
    assert found.p_value == 1 / 500
    assert found.observed > found.maxima.max()
    assert 0.5 < found.null_median < found.null_95 < found.observed


def test_searching_more_layers_costs():
    labels, groups = singles(100)
    rng = np.random.default_rng(0)
    rows = np.vstack([rng.normal(size=100) + 0.55 * labels, rng.normal(size=(79, 100))])
    alone = permutation_test(rows[:1], labels, groups, 999)
    among = permutation_test(rows, labels, groups, 999)
    assert alone.p_value < 0.05 < 0.3 < among.p_value
    assert among.null_median > alone.null_median + 0.08


def test_copies_of_one_layer_cost_nothing():
    labels, groups = singles(60)
    row = np.random.default_rng(2).normal(size=60) + 0.5 * labels
    one, many = (permutation_test([row] * k, labels, groups, 300) for k in (1, 40))
    assert (one.p_value, one.observed) == (many.p_value, many.observed)
    assert (one.maxima == many.maxima).all()


def exact_p_value(rows, labels, arrangements):
    """Share of all arrangements whose largest AUROC is at least the observed."""
    observed = max(roc_auc_score(labels, row) for row in rows)
    maxima = [max(roc_auc_score(a, row) for row in rows) for a in arrangements]
    return np.mean([m >= observed - 1e-12 for m in maxima])


def test_pairs_swap_and_singles_move_as_in_the_list_of_all_arrangements():
    rng = np.random.default_rng(9)
    labels = np.array([1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0], bool)
    groups = [0, 0, 1, 1, 2, 2, 3, 3, "x", "y", "z"]
    rows = (rng.normal(size=(3, 11)) + 0.8 * labels).round(1)
    swaps = itertools.product([[True, False], [False, True]], repeat=4)
    frees = [[i == one for i in range(3)] for one in range(3)]
    listed = [[*itertools.chain(*swap), *free] for swap in swaps for free in frees]
    found = permutation_test(rows, labels, groups, 20_000)
    expected = exact_p_value(rows, labels, listed)
    assert found.p_value == pytest.approx(expected, abs=4 * np.sqrt(expected / 20_000))
    assert len({round(m, 12) for m in found.maxima}) <= len(listed)


def test_groups_of_unequal_size_exchange_labels_whole():
    labels = np.array([1, 1, 1, 0, 0, 1, 0], bool)
    groups = np.array([0, 0, 0, 1, 1, 2, 3])
    row = np.array([5.0, 4.0, 6.0, 1.0, 2.0, 3.5, 4.5])
    listed = [np.isin(groups, chosen) for chosen in itertools.combinations(range(4), 2)]
    found = permutation_test([row], labels, groups, 5000)
    expected = {roc_auc_score(a, row) for a in listed}
    assert set(found.maxima.round(12)) == {round(e, 12) for e in expected}


def test_tied_scores_all_alike_are_never_a_finding():
    labels, groups = singles(20)
    found = permutation_test(np.zeros((3, 20)), labels, groups, 50)
    assert (found.observed, found.p_value, found.best) == (0.5, 1.0, 0)


def test_swapped_labels_turn_every_auroc_round():
    labels, groups = pairs(40)
    row = np.random.default_rng(1).normal(size=(1, 40)).round(1)
    one, other = (permutation_test(row, side, groups, 100) for side in (labels, ~labels))
    assert other.observed == 1 - one.observed


def test_the_same_seed_gives_the_same_bits_and_memory_is_cut_in_pieces(monkeypatch):
    labels, groups = pairs(60)
    rows = correlated_layers(np.random.default_rng(6), 5, groups)
    one, same, other = (permutation_test(rows, labels, groups, 64, s) for s in (0, 0, 1))
    assert (one.maxima == same.maxima).all()
    assert (one.maxima != other.maxima).any()
    monkeypatch.setattr("probecache.metrics.permutation.LABELS_AT_ONCE", 600)
    assert (permutation_test(rows, labels, groups, 64).maxima == one.maxima).all()


class TestRefused:
    def test_a_single_class(self):
        with pytest.raises(EmptyClassError, match="both classes"):
            permutation_test([[1.0, 2.0]], [True, True], [0, 1])

    def test_fewer_groups_than_examples(self):
        with pytest.raises(ShapeError, match="1 groups and 2 examples"):
            permutation_test([[1.0, 2.0]], [True, False], [0])

    def test_no_permutations(self):
        with pytest.raises(FitError, match="permutations"):
            permutation_test([[1.0, 2.0]], [True, False], [0, 1], count=0)
