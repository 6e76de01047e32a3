"""Names of methods, strengths and designs: what is understood and what is refused."""

from __future__ import annotations

import importlib
import pkgutil

import numpy as np
import pytest

from probecache import fit
from probecache.errors import EmptyClassError, FitError, ShapeError, UsageError
from probecache.fit import Design, Method, fit_layer, gram, parse_methods
from probecache.fit.design import held_out_and_inner, parse_strengths

POSITIVE = np.array([1, 0, 1, 0, 1, 0], dtype=bool)
GROUPS = np.array([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ridge,lda", (Method.RIDGE, Method.LDA)),
        (" dom , LAT,", (Method.DIFFERENCE_OF_MEANS, Method.PCA)),
        (["mean-difference", "Logistic"], (Method.DIFFERENCE_OF_MEANS, Method.LOGISTIC)),
        ("difference of means,difference_of_means", (Method.DIFFERENCE_OF_MEANS,)),
        (list(Method), tuple(Method)),
    ],
)
def test_methods_are_known_by_their_names_and_short_ones(given, expected):
    assert parse_methods(given) == expected


@pytest.mark.parametrize("given", ["svm", "ridge,svm", ["svm"]])
def test_an_unknown_method_is_refused_with_all_names(given):
    with pytest.raises(UsageError, match=r"'svm'") as caught:
        parse_methods(given)
    assert all(str(name) in str(caught.value) for name in [*Method, "dom", "lat"])


@pytest.mark.parametrize("given", ["", " , ", []])
def test_no_method_is_refused(given):
    with pytest.raises(UsageError, match="at least one method, got none; choose from"):
        parse_methods(given)


def test_a_single_strength_is_that_of_the_only_regularised_method():
    methods = (Method.DIFFERENCE_OF_MEANS, Method.RIDGE)
    assert parse_strengths(methods, 3.0) == {methods[0]: None, Method.RIDGE: 3.0}
    both = {Method.RIDGE: 3.0, Method.LDA: 1.0}
    assert parse_strengths(both, both) == both


@pytest.mark.parametrize(
    ("methods", "strength", "message"),
    [
        ("ridge,lda", 0.5, "for one regularised method, got one for ridge, lda"),
        ("dom", 0.5, "got one for methods that have none"),
        ("pca", {Method.PCA: 1.0}, "no strength for pca"),
        ("ridge", 0.0, "a positive alpha for ridge, got 0.0"),
        ("ridge", np.inf, "a positive alpha for ridge, got inf"),
        ("logistic", -1.0, "a positive C for logistic, got -1.0"),
        ("lda", 1.5, "a shrinkage above 0 and at most 1 for lda, got 1.5"),
        ("lda", np.nan, "a shrinkage above 0 and at most 1 for lda, got nan"),
    ],
)
def test_strengths_that_make_no_sense_are_refused_before_a_row_is_read(methods, strength, message):
    def unread():
        raise AssertionError("rows were read")

    with pytest.raises(UsageError, match=message):
        fit_layer(unread, 4, Design(POSITIVE, GROUPS), parse_methods(methods), strength)


def test_a_design_takes_lists():
    design = Design([True, False], [0, 1])
    assert design.is_positive.dtype == np.bool_
    assert (design.n_folds, design.fold_sets) == (0, ())


def test_folds_are_left_out_one_by_one_and_from_three_on_two_by_two():
    three = Design(np.tile(POSITIVE, 2), np.tile(GROUPS, 2), np.tile([0, 0, 1, 1, 2, 2], 2))
    assert three.fold_sets == ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2))
    assert Design(POSITIVE, GROUPS, [0, 0, 1, 1, 1, 1]).fold_sets == ((0,), (1,))
    assert Design(POSITIVE, GROUPS, GROUPS, nested=False).fold_sets == ((0,), (1,), (2,))


@pytest.mark.parametrize("name", ["groups", "folds"])
def test_a_design_of_unequal_lengths_is_refused(name):
    parts = {"is_positive": POSITIVE, "groups": GROUPS, "folds": GROUPS, name: GROUPS[:5]}
    with pytest.raises(ShapeError, match=rf"{name} for each of 6 examples, got \[5\]"):
        Design(**parts)


@pytest.mark.parametrize("folds", [[0] * 6, [1, 1, 2, 2, 3, 3], [0, 0, 2, 2, 0, 0], [-1] * 6])
def test_folds_that_are_not_numbered_from_0_are_refused(folds):
    with pytest.raises(FitError, match="two or more folds numbered from 0"):
        Design(POSITIVE, GROUPS, folds)


def test_folds_that_leave_one_class_are_refused():
    with pytest.raises(EmptyClassError, match=r"without the folds \[0\], got 0 positive and 3"):
        Design(POSITIVE, GROUPS, [0, 1, 0, 1, 0, 1])
    with pytest.raises(EmptyClassError, match=r"without the folds \[0, 1\], got 2 positive and 0"):
        Design(POSITIVE, GROUPS, [2, 0, 2, 1, 1, 0])


def test_scores_are_put_where_their_folds_are():
    design = Design(POSITIVE, GROUPS, GROUPS)
    scores = {s: np.full(6, 10.0 * s[0] + s[-1]) for s in design.fold_sets}
    scores[2, 0] = np.full(6, 20.0)
    held_out, inner = held_out_and_inner(design, scores)
    assert held_out.tolist() == [0, 0, 11, 11, 22, 22]
    nan = np.nan
    expected = [[nan, nan, 1, 1, 2, 2], [1, 1, nan, nan, 12, 12], [20, 20, 12, 12, nan, nan]]
    np.testing.assert_array_equal(inner, expected)


def test_too_many_rows_for_a_gram_matrix_are_told_or_read_in_passages(monkeypatch):
    rows = np.random.default_rng(0).normal(size=(12, 4))
    design = Design(np.arange(12) % 2 == 0, np.arange(12) // 2)
    monkeypatch.setattr(gram, "MOST_ROWS", 11)
    monkeypatch.setattr(fit.methods.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FitError, match=r"for ridge, got 12; take the difference of means"):
        fit_layer(lambda: [(np.arange(12), rows)], 4, design, [Method.RIDGE])
    means = Method.DIFFERENCE_OF_MEANS
    assert fit_layer(lambda: [(np.arange(12), rows)], 4, design, [means])[means].held_out is None


def test_every_module_says_what_it_exports_in_order():
    for found in pkgutil.iter_modules(fit.__path__):
        module = importlib.import_module(f"probecache.fit.{found.name}")
        constants_first = sorted(module.__all__, key=lambda name: (not name.isupper(), name))
        assert module.__all__ == constants_first
        assert all(hasattr(module, name) for name in module.__all__)
