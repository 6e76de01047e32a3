"""True positive rate at a fixed false positive rate, by hand, by refits and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from probecache.errors import EmptyClassError, FitError, ShapeError
from probecache.metrics import negatives_needed, tpr_at_fpr


def binormal(rng, n_positive, n_negative, shift, groups_of=1, shared=0.0):
    """Scores, labels and groups, positives first; groups are of one class."""
    n = n_positive + n_negative
    groups = np.arange(n) // groups_of
    scores = math.sqrt(shared) * rng.normal(size=n)[groups]
    scores += math.sqrt(1 - shared) * rng.normal(size=n)
    labels = np.arange(n) < n_positive
    return scores + shift * labels, labels, groups


def true_rate(shift, fpr):
    return float(scipy.stats.norm.sf(scipy.stats.norm.isf(fpr) - shift))


@pytest.mark.parametrize(("fpr", "n_negative", "allowed"), [(0.01, 300, 3), (0.05, 70, 3)])
def test_by_hand(fpr, n_negative, allowed):
    below = np.arange(n_negative, dtype=float)
    above = np.array([0.0, n_negative - allowed - 1, n_negative - allowed - 0.5, n_negative + 9])
    found = tpr_at_fpr([*below, *above], np.arange(n_negative + 4) >= n_negative, fpr)
    assert found.threshold == n_negative - allowed - 1
    assert found.tpr == 0.5
    assert (found.n_positive, found.n_negative, found.fpr) == (4, n_negative, fpr)


@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.07, 0.1, 0.29]), st.booleans())
def test_the_threshold_is_the_smallest_that_keeps_the_rate_and_the_curves_point(seed, fpr, tied):
    rng = np.random.default_rng(seed)
    scores, labels, _ = binormal(rng, 30, int(rng.integers(60, 130)), 1.0)
    scores = scores.round(1) if tied else scores
    found = tpr_at_fpr(scores, labels, fpr, count=2)
    rates = {t: np.mean(scores[~labels] > t) for t in scores[~labels]}
    keeping = [t for t, rate in rates.items() if rate <= fpr + 1e-12]
    assert found.threshold == min(keeping)
    curve = roc_curve(labels, scores, drop_intermediate=False)
    assert found.tpr == pytest.approx(max(curve[1][curve[0] <= fpr + 1e-12]), abs=1e-12)


@pytest.mark.parametrize(
    ("sizes", "shift", "fpr"),
    [
        ((100, 300), 2.0, 0.01),
        ((100, 300), 2.0, 0.05),
        ((60, 60), 1.5, 0.05),
        ((300, 2000), 3, 0.01),
    ],
)
def test_the_interval_covers_the_true_rate(sizes, shift, fpr):
    rng, truth = np.random.default_rng(3), true_rate(shift, fpr)
    found = [tpr_at_fpr(*binormal(rng, *sizes, shift)[:2], fpr, count=400) for _ in range(400)]
    assert 0.93 <= np.mean([f.low <= truth <= f.high for f in found]) <= 0.99


def test_an_interval_for_a_threshold_taken_as_known_does_not_cover():
    rng, truth = np.random.default_rng(3), true_rate(2.0, 0.01)
    found = [tpr_at_fpr(*binormal(rng, 300, 300, 2.0)[:2], 0.01, count=2) for _ in range(300)]
    hits = np.array([f.tpr * 300 for f in found]).round()
    low, high = (
        scipy.stats.beta(hits + i, 301 - hits - i).ppf(q) for i, q in ((0, 0.025), (1, 0.975))
    )
    assert np.mean((low <= truth) & (truth <= high)) < 0.7


def test_the_interval_covers_the_true_rate_of_clustered_scores():
    rng, truth = np.random.default_rng(4), true_rate(2.0, 0.05)
    hits, alone = [], []
    for seed in range(100):
        scores, labels, groups = binormal(rng, 150, 300, 2.0, groups_of=5, shared=0.7)
        found = tpr_at_fpr(scores, labels, 0.05, groups=groups, count=100, seed=seed)
        hits.append(found.low <= truth <= found.high)
        found = tpr_at_fpr(scores, labels, 0.05, count=100, seed=seed)
        alone.append(found.low <= truth <= found.high)
    assert np.mean(hits) >= 0.9
    assert np.mean(alone) < np.mean(hits) - 0.05


def test_groups_of_one_agree_with_none():
    scores, labels, _ = binormal(np.random.default_rng(5), 200, 1000, 2.0)
    alone, grouped = (tpr_at_fpr(scores, labels, 0.05, groups=g) for g in (None, range(1200)))
    assert (grouped.tpr, grouped.threshold) == (alone.tpr, alone.threshold)
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high), abs=0.03)


def test_perfect_and_useless_scores_have_intervals_of_some_width():
    labels = np.arange(600) < 100
    perfect, useless = (tpr_at_fpr(sign * labels, labels, 0.01) for sign in (1.0, -1.0))
    assert (perfect.tpr, perfect.high) == (1.0, 1.0)
    assert 0.95 < perfect.low <= scipy.stats.beta.ppf(0.025, 100, 1) + 0.01
    assert (useless.tpr, useless.low) == (0.0, 0.0)
    assert 0.01 < useless.high < 0.06


def test_the_low_end_says_that_too_few_negatives_cannot_tell_how_high_they_reach():
    few, enough = (np.arange(100 + n) < 100 for n in (300, 380))
    assert tpr_at_fpr(few * 1.0, few, 0.01).low < 0.7
    assert tpr_at_fpr(enough * 1.0, enough, 0.01, count=20_000).low > 0.9


def test_scores_all_alike_call_nothing_positive():
    found = tpr_at_fpr(np.zeros(400), np.arange(400) < 100, 0.05)
    assert (found.tpr, found.threshold) == (0.0, 0.0)


def test_the_same_seed_gives_the_same_bits():
    scores, labels, groups = binormal(np.random.default_rng(0), 50, 100, 1.0, groups_of=2)
    for given_groups in (None, groups):
        one, same, other = (
            tpr_at_fpr(scores, labels, 0.05, groups=given_groups, count=50, seed=seed)
            for seed in (0, 0, 1)
        )
        assert one == same != other


class TestRefused:
    @pytest.mark.parametrize(("fpr", "needed"), [(0.01, 300), (0.05, 60), (0.1, 30), (0.07, 43)])
    def test_too_few_negatives_with_how_many_it_takes(self, fpr, needed):
        assert negatives_needed(fpr) == needed
        labels = np.arange(needed + 10) < 10
        tpr_at_fpr(labels * 1.0, labels, fpr, count=2)
        with pytest.raises(FitError, match=f"at least {needed} negatives .* got {needed - 1}"):
            tpr_at_fpr(labels[:-1] * 1.0, labels[:-1], fpr)

    @pytest.mark.parametrize("fpr", [0.0, 1.0, -0.1, math.nan])
    def test_rates_outside_zero_to_one(self, fpr):
        with pytest.raises(FitError, match="false positive rate"):
            tpr_at_fpr([1.0, 2.0], [True, False], fpr)

    def test_a_single_class_and_groups_of_another_number(self):
        with pytest.raises(EmptyClassError):
            tpr_at_fpr([1.0, 2.0], [True, True], 0.05)
        with pytest.raises(ShapeError):
            tpr_at_fpr(np.zeros(100), np.arange(100) < 10, 0.05, groups=[1])
