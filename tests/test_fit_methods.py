"""Ridge, logistic regression, LDA and PCA of pair differences against scikit-learn and refits."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.decomposition import TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from probecache.errors import EmptyClassError, FitError, NoDirectionError, NonFiniteError
from probecache.fit import Design, Method, fit_layer, leave_group_out_scores
from probecache.folds import assign_folds

WIDE, TALL = (45, 130), (160, 12)
SHAPES = pytest.mark.parametrize("shape", [WIDE, TALL], ids=["d > n", "d < n"])
REGULARISED = [Method.RIDGE, Method.LOGISTIC, Method.LDA]
GIVEN = {Method.RIDGE: 7.0, Method.LOGISTIC: 0.3, Method.LDA: 0.2}


def rows_of(shape, seed=0, share=3, shift=0.6):
    """Unbalanced classes, correlated dimensions of unequal scale, a mean far from 0; in threes."""
    n, d = shape
    random = np.random.default_rng(seed)
    positive = np.arange(n) % share == 0
    rows = random.normal(size=(n, d)) * np.geomspace(0.3, 3, d)
    rows += random.normal(size=(n, 1)) * random.normal(size=d)
    rows[positive] += shift * random.normal(size=d)
    return rows + 40 * random.normal(size=d), positive


def pieces(rows, owners=None, step=17):
    owners = np.arange(len(rows)) if owners is None else owners
    cuts = range(0, len(rows), step)
    return lambda: ((owners[c : c + step], rows[c : c + step]) for c in cuts)


def fitted(rows, positive, method, strength=None, *, groups=None, folds=None, owners=None, **more):
    groups = np.arange(len(positive)) if groups is None else groups
    design = Design(positive, groups, folds)
    chunks = pieces(rows, owners)
    return fit_layer(chunks, rows.shape[1], design, [method], strength, **more)[method]


def coefficients(probe):
    return probe.direction.astype(np.float64) * probe.raw_norm


def cosine(a, b):
    a, b = (np.asarray(v, dtype=np.float64) for v in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def close(found, expected, tolerance=1e-6):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def crossing(coef, intercept):
    """Where on its unit direction a linear decision function is 0."""
    return -intercept / np.linalg.norm(coef)


# ---------------------------------------------------------------- one fit


@SHAPES
@pytest.mark.parametrize("alpha", [1e-2, 1.0, 1e4])
def test_ridge_is_that_of_scikit_learn(shape, alpha):
    rows, positive = rows_of(shape)
    probe = fitted(rows, positive, Method.RIDGE, alpha).probe
    model = Ridge(alpha, solver="cholesky", tol=1e-12).fit(rows, np.where(positive, 1, -1))
    close(coefficients(probe), model.coef_)
    assert probe.threshold == pytest.approx(crossing(model.coef_, model.intercept_), rel=1e-6)
    assert probe.strength == alpha


@SHAPES
@pytest.mark.parametrize("c", [1e-4, 0.1, 100.0])
def test_logistic_regression_is_that_of_scikit_learn(shape, c):
    rows, positive = rows_of(shape)
    probe = fitted(rows, positive, Method.LOGISTIC, c).probe
    # Rows without their mean are the same problem, on which it arrives.
    centred = rows - rows.mean(axis=0)
    model = LogisticRegression(C=c, tol=1e-12, solver="newton-cholesky").fit(centred, positive)
    close(coefficients(probe), model.coef_[0])
    intercept = model.intercept_[0] - model.coef_[0] @ rows.mean(axis=0)
    assert probe.threshold == pytest.approx(crossing(model.coef_[0], intercept), rel=1e-5)


def test_logistic_regression_of_separable_classes_satisfies_its_equations_at_any_strength():
    rows, positive = rows_of(WIDE, shift=5.0)
    for c in (1e-9, 1.0, 1e3, 1e6):
        probe = fitted(rows, positive, Method.LOGISTIC, c).probe
        decisions = probe.raw_norm * (probe.score(rows) - probe.threshold)
        assert ((decisions > 0) == positive).all() or c < 1e-3
        residuals = positive - 1 / (1 + np.exp(-decisions))
        close(c * residuals @ (rows - rows.mean(axis=0)), coefficients(probe), 1e-3)


@SHAPES
@pytest.mark.parametrize("shrinkage", [0.05, 0.5, 1.0])
def test_lda_is_that_of_scikit_learn_with_equal_priors(shape, shrinkage):
    rows, positive = rows_of(shape)
    probe = fitted(rows, positive, Method.LDA, shrinkage).probe
    model = LinearDiscriminantAnalysis(solver="eigen", shrinkage=shrinkage).fit(rows, positive)
    assert cosine(probe.direction, model.coef_[0]) > 1 - 1e-9
    middle = (rows[positive].mean(axis=0) + rows[~positive].mean(axis=0)) / 2
    assert probe.threshold == pytest.approx(float(probe.score(middle[None])[0]), rel=1e-6)


@SHAPES
def test_lda_has_the_length_of_its_formula_and_the_shrinkage_of_ledoit_and_wolf(shape):
    rows, positive = rows_of(shape)
    means = np.where(positive[:, None], rows[positive].mean(axis=0), rows[~positive].mean(axis=0))
    within = rows - means
    probe = fitted(rows, positive, Method.LDA).probe
    g = ledoit_wolf_shrinkage(within, assume_centered=True)
    assert probe.strength == pytest.approx(g, rel=1e-9)
    covariance = within.T @ within / len(rows)
    spread = np.trace(covariance) / shape[1]
    sigma = (1 - g) * covariance + g * spread * np.eye(shape[1])
    gap = rows[positive].mean(axis=0) - rows[~positive].mean(axis=0)
    close(coefficients(probe), np.linalg.solve(sigma, gap))


@SHAPES
def test_ridge_at_the_matching_strength_has_the_direction_of_lda(shape):
    rows, positive = rows_of(shape)
    means = np.where(positive[:, None], rows[positive].mean(axis=0), rows[~positive].mean(axis=0))
    spread = ((rows - means) ** 2).sum() / len(rows) / shape[1]
    g = 0.3
    ridge = fitted(rows, positive, Method.RIDGE, len(rows) * g / (1 - g) * spread).probe
    lda = fitted(rows, positive, Method.LDA, g).probe
    close(lda.direction, ridge.direction)


@SHAPES
@pytest.mark.parametrize(
    ("method", "strength"), [(Method.RIDGE, 1e13), (Method.LOGISTIC, 1e-13), (Method.LDA, 1.0)]
)
def test_without_bound_all_regularised_methods_become_the_difference_of_means(
    shape, method, strength
):
    rows, positive = rows_of(shape)
    means = fitted(rows, positive, Method.DIFFERENCE_OF_MEANS).probe
    close(fitted(rows, positive, method, strength).probe.direction, means.direction, 1e-5)


def test_pca_is_the_first_singular_vector_of_the_pairs_differences():
    rows, _ = rows_of((40, 70), shift=1.0)
    positive, groups = np.arange(40) % 2 == 1, np.arange(40) // 2
    differences = rows[1::2] - rows[::2]
    svd = TruncatedSVD(1, algorithm="arpack", random_state=0).fit(differences)
    probe = fitted(rows, positive, Method.PCA, groups=groups).probe
    assert abs(cosine(probe.direction, svd.components_[0])) > 1 - 1e-10
    assert probe.direction @ differences.mean(axis=0) > 0
    assert probe.raw_norm == pytest.approx(svd.singular_values_[0] / np.sqrt(20), rel=1e-6)


def test_pca_of_groups_of_several_takes_their_means_and_leaves_out_groups_of_one_class():
    rows, _ = rows_of((9, 30))
    positive = np.array([1, 1, 0, 1, 0, 0, 0, 1, 1], dtype=bool)
    groups = np.array([5, 5, 5, 2, 2, 2, 9, 8, 8])
    differences = [rows[:2].mean(axis=0) - rows[2], rows[3] - rows[4:6].mean(axis=0)]
    first = np.linalg.svd(np.array(differences))[2][0]
    probe = fitted(rows, positive, Method.PCA, groups=groups).probe
    assert abs(cosine(probe.direction, first)) > 1 - 1e-10


@SHAPES
def test_pca_without_pairs_is_that_of_all_pairs_of_the_two_classes(shape):
    rows, positive = rows_of(shape)
    differences = (rows[positive][:, None] - rows[~positive]).reshape(-1, shape[1])
    values, vectors = np.linalg.eigh(differences.T @ differences / len(differences))
    probe = fitted(rows, positive, Method.PCA).probe
    assert abs(cosine(probe.direction, vectors[:, -1])) > 1 - 1e-10
    assert probe.raw_norm == pytest.approx(np.sqrt(values[-1]), rel=1e-6)


@SHAPES
@pytest.mark.parametrize("method", [Method.RIDGE, Method.LOGISTIC])
def test_standardised_fits_are_the_pipelines_folded_back(shape, method):
    rows, positive = rows_of(shape)
    rows[:, 3] = 5.0  # a dimension that never varies
    model = {
        Method.RIDGE: Ridge(7.0, solver="cholesky"),
        Method.LOGISTIC: LogisticRegression(C=0.3, tol=1e-12, max_iter=100_000),
    }[method]
    pipeline = make_pipeline(StandardScaler(), model).fit(rows, np.where(positive, 1, -1))
    scaler, coef = pipeline[0], np.ravel(model.coef_)
    folded = coef / scaler.scale_
    probe = fitted(rows, positive, method, GIVEN[method], standardize=True).probe
    close(coefficients(probe), folded, 2e-6)
    intercept = float(np.ravel(model.intercept_)[0]) - folded @ scaler.mean_
    assert probe.threshold == pytest.approx(crossing(folded, intercept), rel=1e-5)


@pytest.mark.parametrize("method", list(Method))
def test_rows_in_other_pieces_and_float32_give_the_same_probe(method):
    rows, positive = rows_of(WIDE)
    narrow = rows.astype(np.float32)
    design = Design(positive, np.arange(len(rows)))
    one, other = (
        fit_layer(pieces(given, step=step), WIDE[1], design, [method], GIVEN.get(method))[method]
        for given, step in ((narrow, 1000), (narrow.astype(np.float64), 4))
    )
    assert np.abs(one.probe.direction - other.probe.direction).max() < 1e-6
    assert one.probe.typical_norm == other.probe.typical_norm
    assert (one.probe.n_positive, one.probe.n_negative) == (15, 30)


@pytest.mark.parametrize("method", list(Method))
def test_swapped_classes_turn_the_direction_round(method):
    rows, positive = rows_of(WIDE)
    forth, back = (fitted(rows, p, method, GIVEN.get(method)).probe for p in (positive, ~positive))
    close(back.direction, -forth.direction)
    assert back.threshold == pytest.approx(-forth.threshold, rel=1e-6)


# ---------------------------------------------------------------- what is held out


def with_folds(shape=(60, 90), count=4):
    """Examples of one to four rows, in groups of two of both classes, and folds of the groups."""
    random = np.random.default_rng(5)
    n, d = shape
    positive = np.arange(n) % 2 == 0
    groups = np.arange(n) // 2
    folds = assign_folds(positive, groups, most=count)
    owners = np.repeat(random.permutation(n), random.integers(1, 5, size=n))
    rows = random.normal(size=(len(owners), d)) * np.geomspace(0.3, 2, d) + 10
    rows += positive[owners][:, None] * random.normal(size=d) * 0.3
    return rows, owners, positive, groups, folds


def refit_score(data, left_out, score, method, strength, standardize):
    """Scores of fold `score` by a fit that is never shown the folds `left_out`, and its strength.

    Examples are numbered anew, as are the folds that remain.
    """
    rows, owners, positive, groups, folds = data
    examples = np.flatnonzero(~np.isin(folds, left_out))
    kept = np.isin(owners, examples)
    renumbered = np.unique(folds[examples], return_inverse=True)[1]
    fit = fitted(
        rows[kept],
        positive[examples],
        method,
        strength,
        groups=groups[examples],
        folds=renumbered if renumbered.max() else None,
        owners=np.searchsorted(examples, owners[kept]),
        standardize=standardize,
    )
    projections = fit.probe.score(rows) - fit.probe.threshold
    scored = np.flatnonzero(folds == score)
    return scored, np.array([projections[owners == e].mean() for e in scored]), fit.probe.strength


@pytest.mark.parametrize("standardize", [False, True], ids=["as they are", "standardised"])
@pytest.mark.parametrize("method", list(Method))
def test_held_out_scores_at_a_given_strength_are_those_of_refits(method, standardize):
    data = with_folds()
    rows, owners, positive, groups, folds = data
    strength = GIVEN.get(method)
    fit = fitted(
        rows,
        positive,
        method,
        strength,
        groups=groups,
        folds=folds,
        owners=owners,
        standardize=standardize,
    )
    assert not np.isnan(fit.held_out).any()
    assert np.array_equal(np.isnan(fit.inner), np.arange(4)[:, None] == folds)
    for f in range(4):
        examples, scores, _ = refit_score(data, [f], f, method, strength, standardize)
        np.testing.assert_allclose(fit.held_out[examples], scores, atol=2e-5)
    for f, g in ((0, 1), (3, 1), (2, 3)):
        examples, scores, _ = refit_score(data, [f, g], g, method, strength, standardize)
        np.testing.assert_allclose(fit.inner[f, examples], scores, atol=2e-5)


@pytest.mark.parametrize("standardize", [False, True], ids=["as they are", "standardised"])
@pytest.mark.parametrize("method", REGULARISED)
def test_a_strength_is_chosen_as_if_the_outer_fold_did_not_exist(method, standardize):
    data = with_folds()
    rows, owners, positive, groups, folds = data
    fit = fitted(
        rows,
        positive,
        method,
        groups=groups,
        folds=folds,
        owners=owners,
        standardize=standardize,
    )
    for f in range(4):
        examples, scores, strength = refit_score(data, [f], f, method, None, standardize)
        np.testing.assert_allclose(fit.held_out[examples], scores, atol=2e-5)
        g = (f + 1) % 4
        inner = None if method is Method.LDA else strength
        examples, scores, _ = refit_score(data, [f, g], g, method, inner, standardize)
        np.testing.assert_allclose(fit.inner[f, examples], scores, atol=2e-5)


@pytest.mark.parametrize("method", list(Method))
def test_nothing_in_a_fold_moves_what_is_fitted_without_it(method):
    rows, owners, positive, groups, folds = with_folds()
    changed = rows.copy()
    elsewhere = folds[owners] == 2
    changed[elsewhere] = 100 * np.random.default_rng(8).normal(size=changed[elsewhere].shape)
    one, other = (
        fitted(given, positive, method, groups=groups, folds=folds, owners=owners)
        for given in (rows, changed)
    )
    np.testing.assert_allclose(
        one.inner[2][folds != 2], other.inner[2][folds != 2], rtol=1e-5, atol=1e-5
    )
    assert np.abs(one.held_out - other.held_out)[folds == 2].min() > 0.1


def test_two_folds_have_held_out_scores_and_no_inner_ones():
    rows, owners, positive, groups, folds = with_folds(count=2)
    for method in Method:
        fit = fitted(rows, positive, method, groups=groups, folds=folds, owners=owners)
        assert fit.inner is None
        assert fit.held_out[positive].mean() > fit.held_out[~positive].mean()


def test_the_chosen_alpha_has_the_least_squared_error_of_all_left_out_groups():
    rows, positive = rows_of((40, 60), shift=0.3)
    groups, signs = np.arange(40) // 3, np.where(positive, 1.0, -1.0)
    chosen = fitted(rows, positive, Method.RIDGE, groups=groups).probe.strength

    def error(alpha):
        total = 0.0
        for g in np.unique(groups):
            model = Ridge(alpha, solver="cholesky").fit(rows[groups != g], signs[groups != g])
            total += ((model.predict(rows[groups == g]) - signs[groups == g]) ** 2).sum()
        return total

    step = 10 ** (7 / 9)
    assert error(chosen) < min(error(chosen * step), error(chosen / step))
    logistic = fitted(rows, positive, Method.LOGISTIC, groups=groups).probe
    assert logistic.strength == pytest.approx(4 / chosen)


@SHAPES
@pytest.mark.parametrize("method", [Method.RIDGE, Method.DIFFERENCE_OF_MEANS])
def test_leave_group_out_in_closed_form_is_refits_to_ten_digits(shape, method):
    rows, positive = rows_of(shape)
    groups = np.arange(len(rows)) // 2
    found = leave_group_out_scores(rows, positive, groups, method, GIVEN.get(method))
    for g in np.unique(groups):
        kept = groups != g
        if method is Method.RIDGE:
            centred = rows - rows[kept].mean(axis=0)
            signs = np.where(positive, 1.0, -1.0)
            kernel = centred[kept] @ centred[kept].T + GIVEN[method] * np.eye(kept.sum())
            mean = signs[kept].mean()
            w = centred[kept].T @ np.linalg.solve(kernel, signs[kept] - mean)
            decisions = centred[~kept] @ w + mean
        else:
            low, high = (rows[kept & (positive == side)].mean(axis=0) for side in (False, True))
            w = high - low
            decisions = (rows[~kept] - (high + low) / 2) @ w
        np.testing.assert_allclose(found[~kept], decisions / np.linalg.norm(w), rtol=0, atol=1e-10)


def test_leave_group_out_refuses_a_group_that_holds_a_class():
    rows, positive = rows_of((9, 20))
    with pytest.raises(EmptyClassError, match="both classes without group 0"):
        leave_group_out_scores(rows, positive, positive.astype(int))


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("method", list(Method))
def test_numbers_that_are_none_and_equal_means_are_refused_by_every_method(method):
    rows, positive = rows_of(WIDE)
    rows[31, 4] = np.nan
    with pytest.raises(NonFiniteError, match="NaN or Inf in row 20 of the negative class"):
        fitted(rows, positive, method)
    same = np.ones(WIDE)  # whose means are equal to the last bit
    with pytest.raises(NoDirectionError, match="means to differ"):
        fitted(same, positive, method)


@pytest.mark.parametrize("method", list(Method))
def test_folds_that_leave_no_rows_of_a_class_are_refused_by_every_method(method):
    rows, positive = rows_of((12, 20))
    folds = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    some = np.flatnonzero(~positive | (folds == 0))
    with pytest.raises(EmptyClassError, match=r"positive class without the folds \[0\], got none"):
        fitted(rows[some], positive, method, folds=folds, owners=some)


def test_an_example_without_rows_has_no_score():
    rows, positive = rows_of((24, 20))
    folds, some = np.arange(24) // 6, np.delete(np.arange(24), 5)
    for method in Method:
        fit = fitted(rows[some], positive, method, folds=folds, owners=some)
        assert np.isnan(fit.held_out).nonzero()[0].tolist() == [5]
        assert np.isnan(fit.inner[:, 5]).all()


def test_a_single_group_leaves_nothing_to_choose_a_strength_by():
    rows, positive = rows_of(WIDE)
    with pytest.raises(FitError, match=r"two or more groups to choose.*got 1; name a strength"):
        fitted(rows, positive, Method.RIDGE, groups=np.zeros(45, int))


@pytest.mark.parametrize(("method", "imported"), [("dom", []), ("ridge", ["scipy"])])
def test_fitting_imports_what_it_needs_and_never_scikit_learn(method, imported):
    code = (
        "import sys, numpy as np\n"
        "from probecache.fit import *\n"
        f"methods = parse_methods({method!r})\n"
        "rows = np.random.default_rng(0).normal(size=(12, 30))\n"
        "design = Design(np.arange(12) % 2 == 0, np.arange(12) // 2, np.arange(12) // 4)\n"
        "fit_layer(lambda: [(np.arange(12), rows)], 30, design, methods)\n"
        "print(sorted({'sklearn', 'scipy', 'torch'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(imported)
