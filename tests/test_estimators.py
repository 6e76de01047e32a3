"""The estimators: scikit-learn's own checks, and the same numbers as its models."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from probecache import estimators
from probecache.errors import NoDirectionError
from probecache.estimators import (
    DifferenceOfMeansProbe,
    LDAProbe,
    LogisticProbe,
    PairPCAProbe,
    RidgeProbe,
)
from probecache.fit import Design, Method, fit_layer
from probecache.folds import assign_folds

ALL = [DifferenceOfMeansProbe(), LDAProbe(), LogisticProbe(), PairPCAProbe(), RidgeProbe()]


def pairs(n=60, d=90, seed=0, shift=0.4):
    """Rows of pairs, the second member of each being positive, and labels that are words."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(n // 2, d)).repeat(2, axis=0) + random.normal(size=(n, d)) + 5
    positive = np.arange(n) % 2 == 1
    rows[positive] += shift * random.normal(size=d)
    return rows, np.where(positive, "testing", "deployment"), np.arange(n) // 2


@parametrize_with_checks([*ALL, RidgeProbe(alpha=None), LogisticProbe(standardize=True)])
def test_scikit_learns_own_check(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_the_class_that_sorts_last_is_the_one_of_higher_decisions(estimator):
    rows, labels, groups = pairs()
    model = clone(estimator).fit(rows, labels, groups=groups)
    assert model.classes_.tolist() == ["deployment", "testing"]
    decisions, likely = model.decision_function(rows), model.predict_proba(rows)
    assert decisions[labels == "testing"].mean() > decisions[labels == "deployment"].mean() + 0.1
    assert np.array_equal(model.predict(rows) == "testing", decisions > 0)
    assert np.array_equal(likely.argmax(axis=1) == 1, decisions > 0)
    np.testing.assert_allclose(likely.sum(axis=1), 1)
    np.testing.assert_allclose(decisions, rows @ model.coef_[0] + model.intercept_[0])


def test_coefficients_are_those_of_scikit_learns_models():
    rows, labels, _ = pairs()
    signs = np.where(labels == "testing", 1, -1)
    ridge, model = RidgeProbe(alpha=3.0).fit(rows, labels), Ridge(3.0).fit(rows, signs)
    np.testing.assert_allclose(ridge.coef_[0], model.coef_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ridge.decision_function(rows), model.predict(rows), atol=1e-6)
    logistic = LogisticProbe(C=0.1).fit(rows, labels)
    model = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-12).fit(rows, labels)
    np.testing.assert_allclose(logistic.coef_, model.coef_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        logistic.predict_proba(rows), model.predict_proba(rows), rtol=0, atol=2e-6
    )


def test_probabilities_are_the_likeliest_curve_of_decisions_of_groups_held_out():
    rows, labels, groups = pairs()
    positive = labels == "testing"
    folds = assign_folds(positive, groups)
    held_out = fit_layer(
        lambda: [(np.arange(60), rows)],
        90,
        Design(positive, groups, folds),
        [Method.RIDGE],
        1.0,
    )[Method.RIDGE].held_out
    targets = np.where(positive, 31 / 32, 1 / 32)

    def loss(slope):
        return np.sum(np.logaddexp(0, slope * held_out) - targets * slope * held_out)

    slope = minimize_scalar(loss, bounds=(0, 20), method="bounded", options={"xatol": 1e-9}).x
    model = RidgeProbe().fit(rows, labels, groups=groups)
    likely = model.predict_proba(rows)[:, 1]
    found = np.log(likely / (1 - likely)) / model.decision_function(rows) * model.probe_.raw_norm
    assert slope > 0.1
    np.testing.assert_allclose(found, slope, rtol=1e-5)


def test_rows_that_tell_nothing_get_probabilities_of_a_half():
    random = np.random.default_rng(1)
    rows, labels = random.normal(size=(40, 400)), np.arange(40) % 2
    found = [
        DifferenceOfMeansProbe().fit(rows[:, k : k + 40], labels).predict_proba(rows[:, k : k + 40])
        for k in range(0, 400, 40)
    ]
    assert np.median(np.abs(np.array(found) - 0.5)) < 0.1


def test_pairs_that_belong_together_change_the_direction_of_their_pca():
    rows, labels, groups = pairs()
    differences = rows[1::2] - rows[::2]
    first = np.linalg.svd(differences)[2][0]
    model = PairPCAProbe().fit(rows, labels, groups=groups)
    assert abs(model.probe_.direction @ first) == pytest.approx(1, abs=1e-6)
    assert abs(PairPCAProbe().fit(rows, labels).probe_.direction @ first) < 0.99


def test_they_work_where_scikit_learn_cross_validates():
    rows, labels, _ = pairs(shift=0.8)
    for estimator in ALL:
        scores = cross_val_score(clone(estimator), rows, labels, cv=3, scoring="roc_auc")
        assert scores.mean() > 0.6, estimator


def test_three_classes_and_one_are_refused():
    rows = np.random.default_rng(0).normal(size=(9, 4))
    with pytest.raises(ValueError, match="expected labels of two classes, got 3"):
        RidgeProbe().fit(rows, np.arange(9) % 3)
    with pytest.raises(ValueError, match="two classes, got one class"):
        RidgeProbe().fit(rows, np.zeros(9))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        RidgeProbe().fit(rows, np.arange(9) % 2, groups=[1, 2])


def test_equal_means_have_no_direction():
    with pytest.raises(NoDirectionError):
        RidgeProbe().fit(np.ones((6, 3)), [0, 1] * 3)


def test_importing_the_package_and_its_fitters_does_not_import_scikit_learn():
    code = "import sys, probecache, probecache.fit, probecache.api; print('sklearn' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_all_is_sorted_and_exists():
    assert estimators.__all__ == sorted(estimators.__all__)
    assert all(hasattr(estimators, name) for name in estimators.__all__)
