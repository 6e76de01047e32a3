"""Intervals for grouped examples, against Obuchowski's variance, refits by hand and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from probecache.errors import EmptyClassError, FitError, ShapeError
from probecache.metrics import (
    auroc,
    grouped_difference,
    grouped_differences,
    grouped_interval,
    paired_difference,
)
from probecache.metrics.resampling import group_resamples
from probecache.metrics.student import t_quantile, t_two_sided


def pairs(rng, count):
    """Groups that hold one of each class."""
    return np.tile([True, False], count), np.repeat(np.arange(count), 2)


def clusters(rng, count):
    """Groups of one class, of 1 to 5."""
    groups = np.repeat(np.arange(count), rng.integers(1, 6, count))
    return groups % 2 == 0, groups


def clustered(rng, design, count, shifts, shared=0.5):
    """Binormal scores [k, n] that are alike within a group, labels and groups."""
    labels, groups = design(rng, count)
    k = len(shifts)
    rows = math.sqrt(shared) * rng.normal(size=(k, count))[:, groups]
    rows += math.sqrt(1 - shared) * rng.normal(size=(k, groups.size))
    return rows + np.array(shifts)[:, None] * labels, labels, groups


def true_area(shift, design, count, shared=0.5):
    """The expected AUROC: of pairs, one comparison in `count` is within a group."""
    apart = 0.5 * math.erfc(-shift / 2)
    together = 0.5 * math.erfc(-shift / math.sqrt(1 - shared) / 2)
    return apart + (together - apart) / count if design is pairs else apart


def obuchowski(row, labels, groups):
    """The clustered variance of Obuchowski 1997, as printed there."""
    above, below = row[labels], row[~labels]
    wins = (above[:, None] > below) + 0.5 * (above[:, None] == below)
    area, m, n = wins.mean(), above.size, below.size
    names = np.unique(groups)
    x = np.array([wins.mean(axis=1)[groups[labels] == g].sum() for g in names])
    y = np.array([wins.mean(axis=0)[groups[~labels] == g].sum() for g in names])
    mg = np.array([(labels & (groups == g)).sum() for g in names])
    ng = np.array([(~labels & (groups == g)).sum() for g in names])
    i10, i01, i = (mg > 0).sum(), (ng > 0).sum(), names.size
    s10 = i10 / ((i10 - 1) * m) * ((x - mg * area)[mg > 0] ** 2).sum()
    s01 = i01 / ((i01 - 1) * n) * ((y - ng * area)[ng > 0] ** 2).sum()
    s11 = i / (i - 1) * ((x - mg * area) * (y - ng * area)).sum()
    return s10 / m + s01 / n + 2 * s11 / (m * n)


def logit_error(estimate, quantile):
    """The standard error of the AUROC that an interval was made of."""
    logits = np.log([estimate.low / (1 - estimate.low), estimate.high / (1 - estimate.high)])
    return (logits[1] - logits[0]) / 2 / quantile * estimate.auroc * (1 - estimate.auroc)


@pytest.mark.parametrize("design", [pairs, clusters])
@pytest.mark.parametrize("decimals", [None, 0])
def test_the_standard_error_is_obuchowskis(design, decimals):
    rows, labels, groups = clustered(np.random.default_rng(3), design, 60, (0.0, 1.0, 1.5))
    rows = rows if decimals is None else rows.round(decimals)
    fewest = 60 if design is pairs else 30
    for row, found in zip(rows, grouped_interval(rows, labels, groups), strict=True):
        assert found.auroc == pytest.approx(roc_auc_score(labels, row), abs=1e-14)
        error = logit_error(found, scipy.stats.t.ppf(0.975, fewest - 1))
        assert error == pytest.approx(math.sqrt(obuchowski(row, labels, groups)), rel=0.06)


def test_single_examples_give_delongs_interval_but_for_students_t():
    rows, labels, _ = clustered(np.random.default_rng(1), pairs, 200, (1.0,), shared=0.0)
    found = grouped_interval(rows, labels, range(400))[0]
    expected = auroc(rows[0], labels)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.004)


def test_a_resample_is_the_auroc_of_the_examples_drawn():
    rng = np.random.default_rng(8)
    rows, labels, groups = clustered(rng, clusters, 7, (0.5, 1.0))
    rows = rows.round(1)
    seen = {tuple(found.round(10)) for found in group_resamples(rows, labels, groups, 4000, 0)}
    drawn = []
    for _ in range(60):
        taken = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(0, 7, 7)])
        if 0 < labels[taken].sum() < taken.size:
            drawn.append(tuple(round(roc_auc_score(labels[taken], r[taken]), 10) for r in rows))
    # 1,716 different resamples there are; nearly all of them are among 4,000.
    assert np.mean([areas in seen for areas in drawn]) > 0.8


@pytest.mark.parametrize("design", [pairs, clusters])
@pytest.mark.parametrize(("count", "shift"), [(20, 0.0), (40, 1.5), (100, 2.0)])
def test_the_interval_covers_the_true_auroc_of_clustered_scores(design, count, shift):
    rng, truth = np.random.default_rng(5), true_area(shift, design, count)
    rows, labels, groups = clustered(rng, design, count, [shift] * 600)
    found = grouped_interval(rows, labels, groups, 300)
    assert 0.92 <= np.mean([f.low <= truth <= f.high for f in found]) <= 0.98


def test_an_interval_that_ignores_clusters_does_not_cover():
    rng, hits = np.random.default_rng(5), []
    for _ in range(300):
        labels, groups = np.arange(200) % 40 < 20, np.arange(200) // 20
        rows = rng.normal(size=10)[groups] + rng.normal(size=200)
        found = auroc(rows, labels)
        hits.append(found.low <= 0.5 <= found.high)
    assert np.mean(hits) < 0.8


@pytest.mark.parametrize("design", [pairs, clusters])
@pytest.mark.parametrize(("count", "shifts"), [(20, (0.0, 0.0)), (40, (1.5, 0.5))])
def test_the_interval_covers_the_true_difference_of_clustered_scores(design, count, shifts):
    rng = np.random.default_rng(6)
    truth = true_area(shifts[0], design, count) - true_area(shifts[1], design, count)
    found = []
    for seed in range(250):
        rows, labels, groups = clustered(rng, design, count, shifts)
        found.append(grouped_difference(*rows, labels, groups, 100, seed))
    # The standard error of 250 simulations is 1.4 %.
    assert 0.91 <= np.mean([f.low <= truth <= f.high for f in found]) <= 0.99
    assert (np.mean([f.p_value < 0.05 for f in found]) <= 0.09) == (truth == 0)


def test_the_difference_of_single_examples_is_delongs():
    rows, labels, _ = clustered(np.random.default_rng(2), pairs, 200, (1.0, 0.7), shared=0.0)
    found = grouped_difference(*rows, labels, range(400))
    expected = paired_difference(*rows, labels)
    assert found.difference == expected.difference
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.006)
    assert found.p_value == pytest.approx(expected.p_value, abs=0.03)


def test_all_differences_from_one_are_those_of_each_pair():
    rows, labels, groups = clustered(np.random.default_rng(7), clusters, 30, (1.0, 0.5, 0.0))
    found = grouped_differences(rows, 1, labels, groups, 100)
    expected = [grouped_difference(row, rows[1], labels, groups, 100) for row in rows]
    for one, other in zip(found, expected, strict=True):
        assert one.difference == other.difference
        assert (one.low, one.high, one.p_value) == pytest.approx(
            (other.low, other.high, other.p_value), abs=1e-12
        )
    assert (found[1].difference, found[1].p_value) == (0.0, 1.0)


def test_perfect_scorers_are_bounded_by_the_number_of_groups_not_of_examples():
    groups = np.arange(120) // 6
    labels = groups < 10
    rows = np.stack([labels * 1.0, labels * -1.0])
    perfect, reversed_ = grouped_interval(rows, labels, groups)
    exact = scipy.stats.beta.ppf(0.025, 10, 1)
    assert (perfect.auroc, perfect.high) == (1.0, 1.0)
    assert perfect.low == pytest.approx(exact, abs=0.04)
    assert (reversed_.auroc, reversed_.low) == (0.0, 0.0)
    assert reversed_.high == pytest.approx(1 - perfect.low, abs=1e-12)
    same = grouped_difference(rows[0], rows[0] * 2, labels, groups)
    assert (same.difference, same.p_value) == (0.0, 1.0)
    assert same.high == pytest.approx(1 - exact, abs=1e-12)


def test_swapped_labels_give_exactly_one_minus_auroc_and_the_mirrored_interval():
    rows, labels, groups = clustered(np.random.default_rng(4), clusters, 30, (0.8, 0.2))
    for decimals in (1, 8):
        tied = rows.round(decimals)
        straight = grouped_interval(tied, labels, groups, 100)
        turned = grouped_interval(tied, ~labels, groups, 100)
        for one, other in zip(straight, turned, strict=True):
            assert other.auroc == 1 - one.auroc
            assert (other.low, other.high) == pytest.approx((1 - one.high, 1 - one.low), abs=1e-12)
        one, other = (grouped_difference(*tied, side, groups, 100) for side in (labels, ~labels))
        assert other.difference == -one.difference
        assert other.p_value == pytest.approx(one.p_value, abs=1e-12)


def test_resamples_that_lack_a_class_are_drawn_again():
    labels = np.arange(12) < 2
    areas = group_resamples(np.arange(12.0)[None], labels, np.arange(12) // 2, 500, 0)
    assert areas.shape == (500, 1)
    assert np.isfinite(areas).all()


def test_one_group_of_a_class_gives_a_wide_interval_instead_of_none():
    labels, groups = np.arange(60) < 10, np.maximum(np.arange(60) - 9, 0)
    row = np.random.default_rng(0).normal(size=60) + labels
    found = grouped_interval([row], labels, groups, 50)[0]
    assert found.high - found.low > 0.7


def test_the_same_seed_gives_the_same_bits_and_each_scorer_its_own_answer():
    rows, labels, groups = clustered(np.random.default_rng(9), clusters, 30, (0.8, 0.2))
    both = grouped_interval(rows, labels, groups, 100, seed=3)
    assert both == grouped_interval(rows, labels, groups, 100, seed=3)
    assert both != grouped_interval(rows, labels, groups, 100, seed=4)
    assert both[1:] == grouped_interval(rows[1:], labels, groups, 100, seed=3)


def test_large_data_get_fewer_resamples():
    labels = np.arange(60_000) % 2 == 0
    areas = group_resamples(np.zeros((1, 60_000)), labels, np.arange(60_000) // 2, 2000, 0)
    assert len(areas) == 200


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 31, 400, 20_000])
def test_students_t_is_scipys(freedom):
    for t in (0.0, 0.3, -2.0, 12.0):
        expected = 2 * scipy.stats.t.sf(abs(t), freedom)
        assert t_two_sided(t, freedom) == pytest.approx(
            expected, abs=2e-5 * (freedom > 9999) + 1e-13
        )
    for p in (0.6, 0.975, 0.9995):
        assert t_quantile(p, freedom) == pytest.approx(scipy.stats.t.ppf(p, freedom), rel=2e-4)


class TestRefused:
    @pytest.mark.parametrize("count", [0, 1])
    def test_too_few_resamples_for_a_standard_deviation(self, count):
        with pytest.raises(FitError, match="at least 2 resamples"):
            grouped_interval([[1.0, 2.0]], [True, False], [0, 1], count)

    def test_groups_of_another_number(self):
        with pytest.raises(ShapeError, match="one group for each example"):
            grouped_difference([1.0, 2.0], [1.0, 2.0], [True, False], [0, 1, 2])

    def test_a_single_class(self):
        with pytest.raises(EmptyClassError):
            grouped_interval([[1.0, 2.0]], [True, True], [0, 1])
