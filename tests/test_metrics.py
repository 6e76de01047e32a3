"""AUROC, its interval and the ROC curve, against scikit-learn, brute force and simulation."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from probecache import metrics
from probecache.errors import EmptyClassError, FitError, ShapeError
from probecache.metrics import accuracy_at, auroc, roc_curve


def binormal(seed, n_positive=40, n_negative=60, shift=1.0, decimals=None):
    """Scores of two unit normals `shift` apart; few decimals make ties."""
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(shift, 1, n_positive), rng.normal(0, 1, n_negative)])
    labels = np.arange(scores.size) < n_positive
    order = rng.permutation(scores.size)
    scores = scores if decimals is None else scores.round(decimals)
    return scores[order], labels[order]


def delong_by_brute_force(scores, labels, z=1.959963984540054):
    """DeLong 1988 as printed: every positive against every negative."""
    above, below = scores[labels], scores[~labels]
    wins = (above[:, None] > below).astype(float) + 0.5 * (above[:, None] == below)
    area, v10, v01 = wins.mean(), wins.mean(axis=1), wins.mean(axis=0)
    s10 = sum((v - area) ** 2 for v in v10) / (len(v10) - 1)
    s01 = sum((v - area) ** 2 for v in v01) / (len(v01) - 1)
    spread = z * math.sqrt(s10 / len(v10) + s01 / len(v01)) / (area * (1 - area))
    logit = math.log(area / (1 - area))
    return area, 1 / (1 + math.exp(spread - logit)), 1 / (1 + math.exp(-spread - logit))


@st.composite
def scored_labels(draw):
    """A few scores, often tied, with at least one of each class."""
    n = draw(st.integers(2, 25))
    scores = draw(st.lists(st.integers(-6, 6), min_size=n, max_size=n))
    labels = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda x: 0 < sum(x) < n))
    return np.array(scores, float), np.array(labels)


@given(scored_labels())
def test_auroc_equals_scikit_learn_with_and_without_ties(case):
    scores, labels = case
    assert auroc(scores, labels).auroc == pytest.approx(
        sklearn_metrics.roc_auc_score(labels, scores), abs=1e-15
    )


@given(scored_labels())
def test_roc_curve_equals_scikit_learn_point_by_point(case):
    scores, labels = case
    fpr, tpr = roc_curve(scores, labels)
    expected = sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(fpr, expected[0], atol=1e-15)
    np.testing.assert_allclose(tpr, expected[1], atol=1e-15)


@given(scored_labels())
def test_the_area_under_the_curve_is_the_auroc(case):
    scores, labels = case
    assert np.trapezoid(*roc_curve(scores, labels)[::-1]) == pytest.approx(
        auroc(scores, labels).auroc, abs=1e-12
    )


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("shift", [-1.5, 0.0, 0.3, 2.5])
def test_interval_equals_delong_by_brute_force(shift, decimals):
    scores, labels = binormal(3, shift=shift, decimals=decimals)
    estimate = auroc(scores, labels)
    got = (estimate.auroc, estimate.low, estimate.high)
    assert got == pytest.approx(delong_by_brute_force(scores, labels), abs=1e-12)


@given(scored_labels())
def test_swapped_labels_give_exactly_one_minus_auroc_and_the_mirrored_interval(case):
    scores, labels = case
    one, other = auroc(scores, labels), auroc(scores, ~labels)
    assert other.auroc == 1 - one.auroc
    assert one.auroc == 1 - other.auroc
    assert (other.low, other.high) == pytest.approx((1 - one.high, 1 - one.low), abs=1e-12)
    assert (other.n_positive, other.n_negative) == (one.n_negative, one.n_positive)


@given(scored_labels(), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_increasing_transforms_change_nothing(case, scale, offset):
    scores, labels = case
    expected = auroc(scores, labels)
    for same_order in (scores * scale + offset, np.sinh(scores), scores**3):
        assert auroc(same_order, labels) == expected


@given(scored_labels())
def test_interval_holds_the_estimate_stays_in_the_unit_interval_and_has_width(case):
    estimate = auroc(*case)
    assert 0 <= estimate.low <= estimate.auroc <= estimate.high <= 1
    assert estimate.high - estimate.low > 0


@pytest.mark.parametrize(
    ("shift", "n_positive", "n_negative"), [(0.0, 30, 30), (1.0, 60, 25), (2.0, 80, 80)]
)
def test_interval_covers_the_true_binormal_auroc(shift, n_positive, n_negative):
    truth = 0.5 * math.erfc(-shift / 2)  # Phi(shift / sqrt 2)
    estimates = [auroc(*binormal(seed, n_positive, n_negative, shift)) for seed in range(300)]
    covered = np.mean([e.low <= truth <= e.high for e in estimates])
    assert 0.915 <= covered <= 0.985


def test_a_wider_level_gives_a_wider_interval():
    case = binormal(5)
    narrow, usual, wide = (auroc(*case, level=level) for level in (0.5, 0.95, 0.999))
    assert wide.low < usual.low < narrow.low < narrow.high < usual.high < wide.high
    assert wide.level == 0.999


@pytest.mark.parametrize("size", [1, 2, 5, 120, 5000])
def test_perfect_separation_is_bounded_no_closer_than_the_exact_binomial(size):
    estimate = auroc(np.arange(2 * size), np.arange(2 * size) >= size)
    assert (estimate.auroc, estimate.high) == (1.0, 1.0)
    exact = scipy.stats.beta.ppf(0.025, size, 1)
    assert 0.95 * exact < estimate.low <= exact * (1 + 1e-12)


def test_all_tied_scores_are_at_chance_with_wilsons_interval():
    estimate = auroc(np.full(100, 3.25), np.arange(100) < 50)
    assert estimate.auroc == 0.5
    # Wilson's interval for 25 successes of 50, from the textbook.
    assert (estimate.low, estimate.high) == pytest.approx((0.36645, 0.63355), abs=1e-4)


def test_one_score_in_a_class_gives_a_wide_interval_instead_of_none():
    estimate = auroc([0.7, *np.linspace(0, 1, 50)], [True] + [False] * 50)
    assert 0.6 < estimate.auroc < 0.8
    assert estimate.high - estimate.low > 0.7


def test_huge_and_tiny_scores_are_ranked_like_any_others():
    assert auroc([1e308, -1e308, 5e-324, 0.0], [True, False, True, False]).auroc == 1.0


def test_ten_thousand_scores_of_each_class_take_well_under_a_second():
    scores, labels = binormal(1, 10_000, 10_000)
    estimate = auroc(scores, labels)
    assert estimate.auroc == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12)


def test_accuracy_counts_a_score_on_the_threshold_as_negative():
    labels = [False, False, True, True]
    assert accuracy_at([0.0, 1.0, 1.0, 2.0], labels, 1.0) == 0.75
    assert accuracy_at([0.0, 1.0, 1.5, 2.0], labels, 1.0) == 1.0


@pytest.mark.parametrize("measure", [auroc, roc_curve, lambda s, p: accuracy_at(s, p, 0.0)])
class TestEveryMeasureRefuses:
    @pytest.mark.parametrize("label", [True, False])
    def test_a_single_class(self, measure, label):
        with pytest.raises(EmptyClassError, match="both classes"):
            measure([1.0, 2.0], [label, label])

    def test_no_scores_at_all(self, measure):
        with pytest.raises(EmptyClassError, match="0 positive and 0 negative"):
            measure([], [])

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_nan_and_inf_with_the_row(self, measure, bad):
        with pytest.raises(FitError, match="row 1"):
            measure([1.0, bad, 2.0], [True, False, True])

    def test_scores_and_labels_of_different_length(self, measure):
        with pytest.raises(ShapeError, match="one label for each score"):
            measure([1.0, 2.0, 3.0], [True, False])

    def test_class_names_in_place_of_booleans(self, measure):
        with pytest.raises(FitError, match="booleans"):
            measure([1.0, 2.0], ["testing", "deployment"])


@pytest.mark.parametrize("level", [0, 1, -0.5, math.nan])
def test_a_level_outside_zero_to_one_is_refused(level):
    with pytest.raises(FitError, match="level"):
        auroc([1.0, 2.0], [True, False], level=level)


@pytest.mark.parametrize("threshold", [math.nan, math.inf])
def test_a_threshold_that_is_not_finite_is_refused(threshold):
    with pytest.raises(FitError, match="threshold"):
        accuracy_at([1.0, 2.0], [True, False], threshold)


def test_the_module_needs_numpy_alone():
    heavy = ["torch", "transformers", "sklearn", "scipy", "pandas", "matplotlib", "jinja2"]
    code = "import sys, probecache.metrics; print([m for m in sys.argv[1:] if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


def test_all_is_sorted_and_exists():
    assert metrics.__all__ == sorted(metrics.__all__)
    assert all(hasattr(metrics, name) for name in metrics.__all__)
