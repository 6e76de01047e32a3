"""DeLong's covariance and paired difference, against pROC's figures, brute force, simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from probecache.errors import EmptyClassError, FitError, ShapeError
from probecache.metrics import auroc, delong_covariance, paired_difference

# 113 patients with an aneurysmal subarachnoid haemorrhage, 41 with a poor outcome (first) and 72
# with a good one, three markers: Turck et al. 2010, Intensive Care Med. 36:107, the example that
# pROC documents (Robin et al. 2011, BMC Bioinformatics 12:77). AUROCs know only the order, so the
# markers are given by it (tied patients share a number), as it follows from the placement values
# in pROC's tests.
POOR = {
    "wfns": "2 1 3 4 4 4 4 1 4 1 0 1 4 3 3 1 4 4 4 1 4 1 4 1 3 4 3 3 0 3 3 1 1 4 4 1 1 4 4 4 4",
    "ndka": "37 24 28 35 3 9 18 43 47 43 43 14 32 39 5 7 30 1 51 39 16 18 22 30 41 26 39 7 49 34 "
    "3 12 39 3 11 43 20 32 45 18 35",
    "s100b": "8 5 11 7 25 30 28 2 19 4 2 23 21 27 30 15 30 30 30 2 30 17 0 4 13 30 15 30 3 15 8 5 "
    "6 13 30 9 30 18 30 30 25",
}
GOOD = {
    "wfns": "0 0 0 0 4 0 1 1 0 1 1 0 0 0 1 0 1 0 0 2 3 0 3 0 4 4 0 0 1 3 0 0 1 1 0 1 0 1 1 0 0 0 "
    "0 1 0 1 0 0 2 1 3 1 0 3 0 0 4 3 1 1 0 0 0 2 0 1 1 3 3 0 0 0",
    "ndka": "0 8 6 17 4 34 4 38 29 38 36 46 10 4 23 4 4 50 25 13 13 38 2 6 4 12 27 6 33 44 6 4 23 "
    "10 6 27 42 40 15 21 48 4 36 13 17 17 33 2 36 23 10 17 38 17 21 6 13 17 42 8 23 26 44 19 23 "
    "10 42 15 31 40 4 29",
    "s100b": "8 9 5 1 26 12 5 5 1 3 1 4 6 2 12 2 6 8 12 1 11 9 20 4 29 26 11 2 24 26 6 3 4 3 1 8 5 "
    "9 10 1 1 4 1 4 3 11 4 3 19 6 16 2 5 18 2 1 14 22 5 10 3 9 5 2 1 12 10 26 12 10 29 27",
}
IS_POOR = np.arange(113) < 41
# pROC 1.18, tests/testthat: helper-roc-expected.R, test-var.R, test-cov.R, test-roc.test.R.
AREAS = {"wfns": 0.823678861788618, "ndka": 0.611957994579946, "s100b": 0.731368563685637}
COVARIANCE = {
    ("wfns", "wfns"): 0.00146991470882363,
    ("ndka", "ndka"): 0.0031908105493913,
    ("s100b", "s100b"): 0.00266868245717244,
    ("wfns", "ndka"): -0.000532967856762438,
    ("ndka", "s100b"): -0.000756164938056579,
    ("s100b", "wfns"): 0.00119615567376754,
}
# p-value, low, high
TESTS = {
    ("wfns", "s100b"): (0.0271757822291882, 0.0104061769564846, 0.174214419249478),
    ("wfns", "ndka"): (0.00514557970691098, 0.0634011709339876, 0.3600405634833566),
    ("ndka", "s100b"): (0.164295175223054, -0.2876917446341914, 0.0488706064228094),
}


def marker(name):
    return np.array(f"{POOR[name]} {GOOD[name]}".split(), dtype=float)


def by_brute_force(rows, labels):
    """AUROCs and covariance as DeLong 1988 prints them: every positive against every negative."""
    above, below = rows[:, labels], rows[:, ~labels]
    wins = (above[:, :, None] > below[:, None]) + 0.5 * (above[:, :, None] == below[:, None])
    placements = wins.mean(axis=2), wins.mean(axis=1)
    covariance = sum(np.atleast_2d(np.cov(v)) / v.shape[1] for v in placements)
    return wins.mean(axis=(1, 2)), covariance


def correlated(seed, n_positive, n_negative, shifts, correlation, decimals=None):
    """Scores [2, n] of two binormal scorers, positives first."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n_positive + n_negative)
    own = rng.normal(size=(2, shared.size))
    rows = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    labels = np.arange(shared.size) < n_positive
    rows += np.where(labels, np.array(shifts)[:, None], 0.0)
    return (rows if decimals is None else rows.round(decimals)), labels


def true_area(shift):
    return 0.5 * math.erfc(-shift / 2)  # Phi(shift / sqrt 2)


@st.composite
def two_scorers(draw):
    n = draw(st.integers(4, 20))
    row = st.lists(st.integers(-4, 4), min_size=n, max_size=n)
    labels = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda x: 0 < sum(x) < n))
    return np.array([draw(row), draw(row)], float), np.array(labels)


def test_aurocs_and_covariance_equal_those_of_proc():
    names = list(AREAS)
    areas, covariance = delong_covariance([marker(name) for name in names], IS_POOR)
    np.testing.assert_allclose(areas, list(AREAS.values()), rtol=0, atol=1e-14)
    for (one, other), expected in COVARIANCE.items():
        pair = names.index(one), names.index(other)
        assert covariance[pair] == covariance[pair[::-1]] == pytest.approx(expected, abs=1e-16)


@pytest.mark.parametrize("pair", TESTS)
def test_paired_difference_equals_that_of_proc(pair):
    found = paired_difference(marker(pair[0]), marker(pair[1]), IS_POOR)
    assert found.difference == pytest.approx(AREAS[pair[0]] - AREAS[pair[1]], abs=1e-14)
    assert (found.p_value, found.low, found.high) == pytest.approx(TESTS[pair], abs=1e-13)


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 40), (60, 25)])
def test_covariance_equals_brute_force_with_and_without_ties(sizes, decimals):
    rng = np.random.default_rng(5)
    labels = rng.permutation(np.repeat([True, False], sizes))
    rows = rng.normal(size=(7, labels.size)) + labels * rng.normal(size=(7, 1))
    rows = rows if decimals is None else rows.round(decimals)
    areas, covariance = delong_covariance(rows, labels)
    expected = by_brute_force(rows, labels)
    np.testing.assert_allclose(areas, expected[0], atol=1e-14)
    np.testing.assert_allclose(covariance, expected[1], atol=1e-14)
    np.testing.assert_allclose(areas, [roc_auc_score(labels, row) for row in rows], atol=1e-14)


@pytest.mark.parametrize("decimals", [None, 0])
def test_variance_of_the_difference_is_that_of_the_covariance(decimals):
    rows, labels = correlated(4, 30, 50, (1.0, 0.4), 0.5, decimals)
    areas, covariance = delong_covariance(rows, labels)
    found = paired_difference(*rows, labels)
    error = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert found.difference == pytest.approx(areas[0] - areas[1], abs=1e-15)
    assert found.high - found.difference == pytest.approx(1.959963984540054 * error, abs=1e-12)


@given(two_scorers())
def test_swapped_labels_give_exactly_the_mirrored_answer(case):
    rows, labels = case
    areas, covariance = delong_covariance(rows, labels)
    mirrored, same = delong_covariance(rows, ~labels)
    assert (mirrored == 1 - areas).all()
    np.testing.assert_allclose(same, covariance, atol=1e-15, equal_nan=True)
    one, other = paired_difference(*rows, labels), paired_difference(*rows, ~labels)
    assert other.difference == -one.difference
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), abs=1e-12)


@given(two_scorers())
def test_swapped_scorers_give_the_mirrored_answer(case):
    rows, labels = case
    one, other = paired_difference(*rows, labels), paired_difference(*rows[::-1], labels)
    assert (other.difference, other.p_value) == (-one.difference, one.p_value)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), abs=1e-15)


@given(two_scorers())
def test_interval_holds_the_difference_and_has_width(case):
    found = paired_difference(*case[0], case[1])
    assert -1 <= found.low <= found.difference <= found.high <= 1
    assert found.high - found.low > 0
    assert 0 <= found.p_value <= 1


def test_equal_scores_differ_by_nothing_with_p_of_one():
    rows, labels = correlated(1, 40, 60, (1.0, 1.0), 0.5)
    found = paired_difference(rows[0], np.exp(rows[0]), labels)
    assert (found.difference, found.p_value) == (0.0, 1.0)


def test_two_perfect_scorers_are_bounded_as_if_no_disagreement_was_seen_in_independent_pairs():
    labels = np.arange(50) < 20
    found = paired_difference(labels * 1.0, labels * 9.0 + np.arange(50) / 50, labels)
    assert (found.difference, found.p_value) == (0.0, 1.0)
    # Clopper-Pearson for none of 20.
    assert (-found.low, found.high) == pytest.approx((0.168433, 0.168433), abs=1e-6)


@pytest.mark.parametrize("size", [3, 10, 100])
def test_a_perfect_scorer_against_a_reversed_one_is_a_sign_test(size):
    labels = np.arange(2 * size) < size
    found = paired_difference(labels * 1.0, labels * -1.0, labels)
    assert (found.difference, found.high) == (1.0, 1.0)
    assert found.p_value >= 2 * 0.5**size
    assert (found.low > 0) == (found.p_value < 0.05)


def test_one_example_of_a_class_gives_a_wide_interval_instead_of_none():
    scores = np.linspace(0, 1, 51)
    found = paired_difference(scores, scores[::-1].copy(), np.arange(51) == 40)
    assert found.difference == pytest.approx(0.6)
    assert found.high - found.low > 0.7
    assert np.isnan(delong_covariance([scores], np.arange(51) == 40)[1]).all()


@pytest.mark.parametrize(
    ("sizes", "shifts", "correlation"),
    [((60, 60), (1.0, 1.0), 0.6), ((100, 50), (1.5, 0.8), 0.3), ((40, 80), (0.0, 0.0), 0.0)],
)
def test_the_paired_interval_covers_the_true_binormal_difference(sizes, shifts, correlation):
    truth = true_area(shifts[0]) - true_area(shifts[1])
    cases = (correlated(seed, *sizes, shifts, correlation) for seed in range(1500))
    found = [paired_difference(*rows, labels) for rows, labels in cases]
    assert 0.93 <= np.mean([f.low <= truth <= f.high for f in found]) <= 0.97
    if truth == 0:
        assert 0.03 <= np.mean([f.p_value < 0.05 for f in found]) <= 0.07


@pytest.mark.parametrize(("sizes", "shift"), [((60, 60), 1.0), ((40, 100), 0.0), ((80, 80), 2.0)])
def test_the_interval_of_one_covers_the_true_binormal_auroc(sizes, shift):
    cases = (correlated(seed, *sizes, (shift, shift), 0.0) for seed in range(1500))
    found = [auroc(rows[0], labels) for rows, labels in cases]
    assert 0.93 <= np.mean([f.low <= true_area(shift) <= f.high for f in found]) <= 0.97


class TestRefused:
    def test_one_row_without_its_scorer(self):
        with pytest.raises(ShapeError, match=r"scores\[None\]"):
            delong_covariance([1.0, 2.0], [True, False])

    def test_scorers_of_different_examples(self):
        with pytest.raises(ShapeError, match="one label for each score"):
            paired_difference([1.0, 2.0, 3.0], [1.0, 2.0], [True, False, True])

    def test_a_single_class(self):
        with pytest.raises(EmptyClassError, match="2 positive and 0 negative"):
            delong_covariance([[1.0, 2.0]], [True, True])

    def test_nan_with_its_row_and_scorer(self):
        with pytest.raises(FitError, match="row 1 of scorer 2"):
            delong_covariance([[1, 2], [1, 2], [1, math.nan]], [True, False])

    def test_a_level_of_one(self):
        with pytest.raises(FitError, match="level"):
            paired_difference([1.0, 2.0], [1.0, 2.0], [True, False], level=1)
