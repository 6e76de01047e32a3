"""Platt scaling and calibration, against scikit-learn, a generic optimiser and planted truth."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from sklearn.calibration import _SigmoidCalibration, calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from probecache.errors import EmptyClassError, FitError, ShapeError
from probecache.metrics import Platt, calibration, fit_platt


def scored(seed, n=200, shift=1.5, scale=1.0, share=0.4):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < share
    return scale * (rng.normal(size=n) + shift * labels), labels


def by_optimiser(values, targets, penalty=lambda line: 0.0):
    """Slope and intercept by Nelder-Mead, which knows no derivative."""

    def loss(line):
        logits = line[0] * values + line[1]
        return -(targets * logits - np.logaddexp(0, logits)).sum() - penalty(line)

    options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 10_000, "maxfev": 10_000}
    return scipy.optimize.minimize(loss, [0.0, 0.0], method="Nelder-Mead", options=options).x


def smoothed(labels):
    n_positive, n_negative = labels.sum(), (~labels).sum()
    return np.where(labels, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))


@pytest.mark.parametrize(
    ("shift", "share"), [(1.5, 0.4), (0.0, 0.5), (-1.0, 0.5), (3.0, 0.1), (20.0, 0.5)]
)
def test_platt_equals_a_generic_optimiser(shift, share):
    scores, labels = scored(1, shift=shift, share=share)
    found = fit_platt(scores, labels)
    expected = by_optimiser(scores, smoothed(labels))
    assert (found.slope, found.intercept) == pytest.approx(tuple(expected), abs=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_platt_equals_scikit_learn_in_any_unit(scale):
    scores, labels = scored(2)
    found = fit_platt(scores * scale, labels)
    sklearns = _SigmoidCalibration().fit(scores, labels)
    # Its own optimiser stops at a gradient of 1e-6, for which the probabilities agree to 1e-5.
    np.testing.assert_allclose(
        found.probability(scores * scale), sklearns.predict(scores), atol=2e-5
    )
    exact = fit_platt(scores, labels)
    assert found.slope * scale == pytest.approx(exact.slope, rel=1e-9)
    assert found.intercept == pytest.approx(exact.intercept, rel=1e-9)


def test_platt_stays_finite_and_useful_on_separated_scores():
    scores, labels = np.array([-2.0, -1.0, 1.0, 2.0]), np.array([False, False, True, True])
    found = fit_platt(scores, labels)
    assert 0.5 < found.slope < 5
    assert found.intercept == pytest.approx(0, abs=1e-12)
    assert found.probability([-2.0, 0.0, 2.0]) == pytest.approx([0.19, 0.5, 0.81], abs=0.05)


def test_platt_of_scores_all_alike_is_the_smoothed_share_of_positives():
    labels = np.arange(10) < 3
    found = fit_platt(np.full(10, 7.0), labels)
    assert found.slope == 0
    assert found.probability([0.0, 99.0]) == pytest.approx([smoothed(labels).mean()] * 2)


def test_swapped_labels_turn_the_line_round():
    scores, labels = scored(3)
    one, other = fit_platt(scores, labels), fit_platt(scores, ~labels)
    assert (other.slope, other.intercept) == pytest.approx((-one.slope, -one.intercept), abs=1e-9)
    np.testing.assert_allclose(other.probability(scores), 1 - one.probability(scores), atol=1e-9)


def test_platt_finds_a_planted_line():
    rng = np.random.default_rng(4)
    scores = rng.normal(size=20_000)
    labels = rng.random(20_000) < Platt(2.0, -1.0).probability(scores)
    found = fit_platt(scores, labels)
    assert (found.slope, found.intercept) == pytest.approx((2.0, -1.0), abs=0.1)


def test_extreme_scores_neither_overflow_nor_warn():
    with np.errstate(all="raise", under="ignore"):
        assert Platt(1.0, 0.0).probability([-1e6, 0.0, 1e6]).tolist() == [0.0, 0.5, 1.0]
        outlier = fit_platt([-1.0, 0.0, 1.0, 1e9], [False, True, False, True])
        huge = fit_platt([-1e308, 1e308, -9e307, 9e307], [False, True, True, False])
    assert np.isfinite([outlier.slope, outlier.intercept, huge.slope, huge.intercept]).all()


def test_brier_and_bins_equal_scikit_learn():
    scores, labels = scored(5, 500)
    p = fit_platt(scores, labels).probability(scores)
    found = calibration(p, labels, bins=8)
    assert found.brier == pytest.approx(brier_score_loss(labels, p), abs=1e-15)
    observed, predicted = calibration_curve(labels, p, n_bins=8)
    assert [b.observed for b in found.bins] == pytest.approx(observed.tolist(), abs=1e-12)
    assert [b.predicted for b in found.bins] == pytest.approx(predicted.tolist(), abs=1e-12)
    assert sum(b.n for b in found.bins) == 500
    assert all(b.low < b.predicted <= b.high for b in found.bins)


def test_expected_calibration_error_by_hand():
    p = [0.1, 0.1, 0.1, 0.1, 0.9, 0.9]
    found = calibration(p, [False, False, False, True, True, True], bins=2)
    assert found.ece == pytest.approx((4 * 0.15 + 2 * 0.1) / 6)
    assert [(b.low, b.high, b.n) for b in found.bins] == [(0.0, 0.5, 4), (0.5, 1.0, 2)]


def test_zero_and_one_fall_into_the_outer_bins():
    found = calibration([0.0, 1.0, 0.0, 1.0], [False, True, True, True])
    assert [(b.low, b.high, b.n, b.observed) for b in found.bins] == [
        (0.0, 0.1, 2, 0.5),
        (0.9, 1.0, 2, 1.0),
    ]
    assert np.isfinite([found.slope, found.intercept]).all()


def test_recalibration_equals_the_penalised_likelihood_by_a_generic_optimiser():
    scores, labels = scored(6, 60)
    logits = 1.7 * scores - 2

    def jeffreys(line):
        p = 1 / (1 + np.exp(-line[0] * logits - line[1]))
        design = np.stack([logits, np.ones(60)], axis=1)
        return np.linalg.slogdet(design.T @ (design * (p * (1 - p))[:, None]))[1] / 2

    found = calibration(1 / (1 + np.exp(-logits)), labels)
    expected = by_optimiser(logits, labels.astype(float), jeffreys)
    assert (found.slope, found.intercept) == pytest.approx(tuple(expected), abs=1e-6)


def test_recalibration_of_many_equals_plain_logistic_regression():
    scores, labels = scored(7, 20_000)
    found = calibration(1 / (1 + np.exp(-scores)), labels)
    plain = LogisticRegression(C=np.inf, tol=1e-10).fit(scores[:, None], labels)
    expected = plain.coef_[0, 0], plain.intercept_[0]
    assert (found.slope, found.intercept) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.5, 0.0), (1.0, -1.0), (2.0, 0.5)])
def test_recalibration_finds_planted_miscalibration(slope, intercept):
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 2, 20_000)
    labels = rng.random(20_000) < Platt(slope, intercept).probability(logits)
    found = calibration(1 / (1 + np.exp(-logits)), labels)
    assert (found.slope, found.intercept) == pytest.approx((slope, intercept), abs=0.08)
    assert (found.ece < 0.015) == (slope == 1 and intercept == 0)


def test_the_slope_of_few_but_calibrated_probabilities_is_not_pulled_to_the_middle():
    rng = np.random.default_rng(9)
    slopes = []
    for _ in range(300):
        logits = rng.normal(0, 3, 60)
        labels = rng.random(60) < 1 / (1 + np.exp(-logits))
        slopes.append(calibration(1 / (1 + np.exp(-logits)), labels).slope)
    assert np.mean(slopes) == pytest.approx(1, abs=0.06)


def test_slope_and_intercept_are_finite_on_separated_and_on_constant_probabilities():
    separated = calibration([0.1, 0.2, 0.8, 0.9], [False, False, True, True])
    constant = calibration([0.3] * 4, [False, False, False, True])
    assert 0 < separated.slope < 10
    assert (constant.slope, len(constant.bins)) == (0.0, 1)
    assert np.isfinite(constant.intercept)


class TestRefused:
    def test_scores_in_place_of_probabilities(self):
        with pytest.raises(FitError, match="fit_platt"):
            calibration([0.5, 1.5], [True, False])

    def test_no_bins(self):
        with pytest.raises(FitError, match="1 bin"):
            calibration([0.5, 0.5], [True, False], bins=0)

    @pytest.mark.parametrize("measure", [fit_platt, calibration])
    def test_a_single_class_and_wrong_lengths(self, measure):
        with pytest.raises(EmptyClassError):
            measure([0.5, 0.5], [True, True])
        with pytest.raises(ShapeError):
            measure([0.5, 0.5], [True])
