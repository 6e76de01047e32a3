"""Fits of many rows by passes, against scikit-learn, NumPy's dense algebra and refits."""

from __future__ import annotations

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from probecache.errors import EmptyClassError, NoDirectionError, NonFiniteError, ShapeError
from probecache.fit import methods, primal_pairs, primal_rows, primal_scatter
from probecache.fit.design import Design, Method
from probecache.fit.methods import fit_layer
from probecache.fit.primal import DEFAULT_RATIO, GRID, fit_many_rows

EXAMPLES, HIDDEN, FOLDS = 500, 24, 5


class Data:
    """Unbalanced, correlated, badly scaled rows far from 0, one to five of each example."""

    def __init__(self, seed=0, folds=FOLDS, paired=True, apart=0.6, examples=EXAMPLES):
        rng = np.random.default_rng(seed)
        self.per_example = rng.integers(1, 6, examples)
        if paired:  # some groups hold both classes, most only one
            self.groups = np.arange(examples) // 2
            self.positive = (np.arange(examples) % 2 == 0) & (self.groups % 2 == 0)
        else:
            self.groups = np.arange(examples)
            self.positive = rng.random(examples) < 0.2
        self.folds = rng.permutation(self.groups.max() + 1)[self.groups] % folds if folds else None
        self.owners = np.repeat(np.arange(examples), self.per_example)
        rows = rng.normal(size=(len(self.owners), HIDDEN))
        rows = rows @ (np.eye(HIDDEN) + 0.3 * rng.normal(size=(HIDDEN, HIDDEN)))
        rows[self.positive[self.owners]] += apart * rng.normal(size=HIDDEN)
        rows *= np.where(np.arange(HIDDEN) % 9 == 4, 1000, 1)
        self.rows = (rows + 5000 * rng.normal(size=HIDDEN)).astype(np.float32)
        self.design = Design(self.positive, self.groups, self.folds)

    def chunks(self, step=97):
        for start in range(0, len(self.rows), step):
            yield self.owners[start : start + step], self.rows[start : start + step]

    def kept(self, left_out=()):
        """Rows about the mean of all, in float64, and classes, without some folds."""
        wide = self.rows.astype(np.float64)
        keep = np.ones(len(wide), dtype=bool)
        if left_out:
            keep = ~np.isin(self.folds[self.owners], left_out)
        return (wide - wide.mean(axis=0))[keep], self.positive[self.owners][keep]

    def scores(self, weights, intercept):
        """Every example's mean over its rows of the unit projection less the threshold."""
        rows, _ = self.kept()
        each = (rows @ weights + intercept) / np.linalg.norm(weights)
        return np.bincount(self.owners, each) / self.per_example

    def fit(self, method, strength=None, **options):
        strengths = {} if strength is None else {method: strength}
        found = fit_many_rows(self.chunks, HIDDEN, self.design, [method], strengths, **options)
        return found[method]


@pytest.fixture(scope="module")
def data():
    return Data()


def assert_fitted_as(data, found, refit):
    """The probe, held-out and inner scores equal those of `refit(rows, is_positive)`."""
    weights, intercept = refit(*data.kept())
    norm = np.linalg.norm(weights)
    np.testing.assert_allclose(found.probe.direction, weights / norm, atol=1e-6)
    assert found.probe.raw_norm == pytest.approx(norm, rel=1e-6)
    rows, _ = data.kept()
    stored = found.probe.score(data.rows) - found.probe.threshold
    expected = (rows @ weights + intercept) / norm
    np.testing.assert_allclose(stored, expected, atol=1e-6 * np.abs(rows).max())
    for fold in range(FOLDS):
        here = data.folds == fold
        assert_scores(found.held_out[here], data.scores(*refit(*data.kept((fold,))))[here])
        assert np.isnan(found.inner[fold, here]).all()
    for first, second in combinations(range(FOLDS), 2):
        scores = data.scores(*refit(*data.kept((first, second))))
        for outer, inner in ((first, second), (second, first)):
            here = data.folds == inner
            assert_scores(found.inner[outer, here], scores[here])


def assert_scores(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-6 * max(1, np.abs(expected).max()))


def ridge(alpha):
    def refit(rows, positive):
        model = Ridge(alpha, solver="cholesky").fit(rows, np.where(positive, 1.0, -1.0))
        return model.coef_, model.intercept_

    return refit


def logistic(strength):
    def refit(rows, positive):
        solver = {"solver": "newton-cholesky", "tol": 1e-12, "max_iter": 1000}
        model = LogisticRegression(C=strength, **solver).fit(rows, positive)
        return model.coef_[0], model.intercept_[0]

    return refit


def lda(shrinkage=None, scale=False):
    def refit(rows, positive):
        means = [rows[positive == side].mean(axis=0) for side in (False, True)]
        inside = rows - np.where(positive[:, None], means[1], means[0])
        share = ledoit_wolf(inside, assume_centered=True)[1] if shrinkage is None else shrinkage
        covariance = (1 - share) * inside.T @ inside / len(rows)
        covariance += share * np.trace(inside.T @ inside) / inside.size * np.eye(HIDDEN)
        weights = np.linalg.solve(covariance, means[1] - means[0])
        return weights, -weights @ (means[0] + means[1]) / 2

    return refit


def standardized(refit):
    def scaled(rows, positive):
        scaler = StandardScaler().fit(rows)
        weights, intercept = refit(scaler.transform(rows), positive)
        weights = weights / scaler.scale_
        return weights, intercept - weights @ scaler.mean_

    return scaled


# ---------------------------------------------------------------- equal to scikit-learn


@pytest.mark.parametrize("alpha", [1e-3, 30.0, 1e6])
def test_ridge_equals_scikit_learns_in_every_fold(data, alpha):
    found = data.fit(Method.RIDGE, alpha)
    assert_fitted_as(data, found, ridge(alpha))
    assert found.probe.strength == alpha


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e3])
def test_logistic_regression_equals_scikit_learns_in_every_fold(data, strength):
    found = data.fit(Method.LOGISTIC, strength)
    assert_fitted_as(data, found, logistic(strength))
    assert found.probe.strength == pytest.approx(strength)


@pytest.mark.parametrize("shrinkage", [1e-4, 0.3, None])
def test_lda_equals_its_formula_with_a_shrinkage_and_with_ledoit_and_wolfs(data, shrinkage):
    assert_fitted_as(data, data.fit(Method.LDA, shrinkage), lda(shrinkage))


def test_ledoit_and_wolfs_shrinkage_equals_scikit_learns(data):
    rows, positive = data.kept()
    inside = rows - np.where(
        positive[:, None], rows[positive].mean(axis=0), rows[~positive].mean(axis=0)
    )
    expected = ledoit_wolf(inside, assume_centered=True)[1]
    assert 0.001 < expected < 0.9
    assert data.fit(Method.LDA).probe.strength == pytest.approx(expected, rel=1e-5)


def test_lda_points_where_scikit_learns_does(data):
    rows, positive = data.kept()
    # scikit-learn averages the classes' covariances by the priors, so both get as many rows.
    count = positive.sum()
    some = np.concatenate([np.flatnonzero(positive), np.flatnonzero(~positive)[:count]])
    rows, positive = rows[some], positive[some]
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2).fit(rows, positive)
    design = Design(np.array([False, True]), np.array([0, 1]))
    found = fit_many_rows(
        lambda: [(positive.astype(int), rows)], HIDDEN, design, [Method.LDA], {Method.LDA: 0.2}
    )[Method.LDA]
    weights = model.coef_[0]
    norm = np.linalg.norm(weights)
    np.testing.assert_allclose(found.probe.direction, weights / norm, atol=1e-6)
    assert found.probe.raw_norm == pytest.approx(norm, rel=1e-6)
    threshold = -model.intercept_[0] / norm
    assert found.probe.threshold == pytest.approx(threshold, abs=1e-6 * np.abs(rows).max())


@pytest.mark.parametrize(
    ("method", "strength", "refit"),
    [
        (Method.RIDGE, 10.0, ridge(10.0)),
        (Method.LOGISTIC, 0.1, logistic(0.1)),
        (Method.LDA, None, lda()),
        (Method.LDA, 1.0, lda(1.0)),
    ],
)
def test_standardised_by_each_folds_own_deviations_and_folded_back(data, method, strength, refit):
    found = data.fit(method, strength, standardize=True)
    assert_fitted_as(data, found, standardized(refit))


# ---------------------------------------------------------------- pair differences


def pair_differences(data, left_out=()):
    rows, _ = data.kept()
    found = []
    for group in np.unique(data.groups):
        members = data.groups[data.owners] == group
        sides = [members & (data.positive[data.owners] == side) for side in (True, False)]
        if data.folds[data.groups == group][0] not in left_out and all(s.any() for s in sides):
            found.append(rows[sides[0]].mean(axis=0) - rows[sides[1]].mean(axis=0))
    return np.array(found)


def principal(data, differences, left_out=(), scale=None):
    """Direction, threshold and size of the first principal direction, by SVD."""
    rows, positive = data.kept(left_out)
    scale = np.ones(HIDDEN) if scale is None else scale
    _, sizes, vectors = np.linalg.svd(differences / scale)
    weights = vectors[0] / scale
    means = [rows[positive == side].mean(axis=0) for side in (False, True)]
    weights = weights * np.sign(weights @ (means[1] - means[0]))
    return weights, -weights @ (means[0] + means[1]) / 2, sizes[0]


@pytest.mark.parametrize("memory", [primal_pairs._DIFFERENCES_BYTES, 0])
@pytest.mark.parametrize("standardize", [False, True])
def test_pair_differences_equal_an_svd_of_them_kept_or_not(data, monkeypatch, memory, standardize):
    monkeypatch.setattr(primal_pairs, "_DIFFERENCES_BYTES", memory)
    found = data.fit(Method.PCA, standardize=standardize)
    for left_out in ((), (0,), (2,), (1, 3)):
        differences = pair_differences(data, left_out)
        scale = data.kept(left_out)[0].std(axis=0) if standardize else None
        weights, intercept, size = principal(data, differences, left_out, scale)
        norm = np.linalg.norm(weights)
        expected = data.scores(weights, intercept)
        if not left_out:
            np.testing.assert_allclose(found.probe.direction, weights / norm, atol=1e-6)
            spread = size / np.sqrt(len(differences)) * norm
            assert found.probe.raw_norm == pytest.approx(spread, rel=1e-6)
        elif len(left_out) == 1:
            here = data.folds == left_out[0]
            assert_scores(found.held_out[here], expected[here])
        else:
            here = data.folds == left_out[1]
            assert_scores(found.inner[left_out[0], here], expected[here])


def test_where_no_group_is_a_pair_all_pairs_of_rows_are_taken():
    data = Data(seed=3, paired=False)
    found = data.fit(Method.PCA)
    rows, positive = data.kept()
    every = (rows[positive][:, None] - rows[~positive][None]).reshape(-1, HIDDEN)
    # An SVD of a hundred thousand differences is one of their triangular factor.
    weights, _, size = principal(data, np.linalg.qr(every)[1])
    np.testing.assert_allclose(found.probe.direction, weights, atol=1e-6)
    assert found.probe.raw_norm == pytest.approx(size / np.sqrt(len(every)), rel=1e-6)


# ---------------------------------------------------------------- strengths chosen from the data


def chosen_by_refits(data, outer=()):
    """The grid's share with the least squared error on folds left out, those of `outer` apart."""
    totals = np.zeros(len(GRID))
    for fold in set(range(FOLDS)) - set(outer):
        left_out = (*outer, fold)
        rows, positive = data.kept(left_out)
        spread = ((rows - rows.mean(axis=0)) ** 2).sum() / HIDDEN
        held, sides = data.kept()[0], data.positive[data.owners]
        here = data.folds[data.owners] == fold
        for number, share in enumerate(GRID):
            weights, intercept = ridge(share * spread)(rows, positive)
            errors = held[here] @ weights + intercept - np.where(sides[here], 1, -1)
            totals[number] += (errors**2).sum()
    return GRID[int(totals.argmin())]


def mean_eigenvalue(data, left_out=()):
    rows, _ = data.kept(left_out)
    return ((rows - rows.mean(axis=0)) ** 2).sum() / HIDDEN


@pytest.fixture(scope="module")
def weak():
    """Few rows and a weak direction, so that the best strength lies within the grid."""
    return Data(seed=5, apart=0.15)


def test_ridges_strength_is_that_of_least_held_out_error_in_and_out_of_folds(weak):
    found = weak.fit(Method.RIDGE)
    alpha = chosen_by_refits(weak) * mean_eigenvalue(weak)
    assert found.probe.strength == pytest.approx(alpha, rel=1e-6)
    for fold in range(FOLDS):
        share, here = chosen_by_refits(weak, (fold,)), weak.folds == fold
        refit = ridge(share * mean_eigenvalue(weak, (fold,)))
        assert_scores(found.held_out[here], weak.scores(*refit(*weak.kept((fold,))))[here])
        other = (fold + 1) % FOLDS
        here = weak.folds == other
        refit = ridge(share * mean_eigenvalue(weak, (fold, other)))
        expected = weak.scores(*refit(*weak.kept((fold, other))))[here]
        assert_scores(found.inner[fold, here], expected)


def test_logistic_regression_takes_a_quarter_of_ridges_strength(weak):
    both = fit_many_rows(weak.chunks, HIDDEN, weak.design, [Method.LOGISTIC, Method.RIDGE])
    strength = both[Method.LOGISTIC].probe.strength
    assert list(both) == [Method.LOGISTIC, Method.RIDGE]
    assert strength == pytest.approx(4 / both[Method.RIDGE].probe.strength)
    weights, _ = logistic(strength)(*weak.kept())
    expected = weights / np.linalg.norm(weights)
    np.testing.assert_allclose(both[Method.LOGISTIC].probe.direction, expected, atol=1e-6)


def test_without_folds_nothing_is_held_out_and_the_strength_is_a_fixed_share():
    data = Data(folds=None)
    found = data.fit(Method.RIDGE)
    assert found.held_out is None
    assert found.inner is None
    expected = DEFAULT_RATIO * mean_eigenvalue(data)
    assert found.probe.strength == pytest.approx(expected, rel=1e-6)


def test_two_folds_hold_out_but_leave_nothing_for_an_inner_choice():
    data = Data(folds=2)
    for method in (Method.RIDGE, Method.LOGISTIC, Method.LDA, Method.PCA):
        found = data.fit(method)
        assert np.isfinite(found.held_out).all()
        assert found.inner is None


def test_a_choice_inside_a_fold_never_sees_that_fold(weak):
    turned = Data(seed=5, apart=0.15)
    here = turned.folds == 2
    inside = turned.folds[turned.owners] == 2
    turned.rows[inside] = turned.rows[inside][::-1] * np.float32(1.001)
    before, after = weak.fit(Method.RIDGE), turned.fit(Method.RIDGE)
    scale = np.abs(before.inner[2, ~here]).max()
    np.testing.assert_allclose(after.inner[2, ~here], before.inner[2, ~here], atol=1e-6 * scale)
    assert np.abs(after.inner[1, ~here & (turned.folds != 1)]).max() > 0


# ---------------------------------------------------------------- the same as in the dual form


@pytest.mark.parametrize("standardize", [False, True])
def test_passes_and_the_gram_matrix_give_one_answer(standardize):
    data = Data(seed=1, examples=100)
    strengths = {Method.RIDGE: 20.0, Method.LOGISTIC: 0.3}
    given = (HIDDEN, data.design, list(Method), strengths)
    dual = fit_layer(data.chunks, *given, standardize=standardize)
    primal = fit_many_rows(data.chunks, *given, standardize=standardize)
    assert list(primal) == list(dual) == list(Method)
    for method in Method:
        one, other = primal[method], dual[method]
        names = ("direction", "raw_norm", "typical_norm", "n_positive", "n_negative", "strength")
        for name in names:
            found, expected = (getattr(fit.probe, name) for fit in (one, other))
            if expected is None:
                assert found is None
            else:
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)
        scale = np.abs(other.held_out).max()
        # Against scikit-learn both are held to less; here it is conventions that are compared.
        np.testing.assert_allclose(one.held_out, other.held_out, atol=1e-5 * scale)
        np.testing.assert_allclose(one.inner, other.inner, atol=1e-5 * scale)
        offset = other.probe.threshold - one.probe.threshold
        assert abs(offset) < 1e-6 * np.linalg.norm(data.rows[0])


def test_a_layer_of_too_many_rows_for_a_gram_matrix_is_fitted_by_passes(data, monkeypatch):
    monkeypatch.setattr(methods, "may_be_held", lambda *_: False)
    chosen = {Method.RIDGE: 5.0, Method.LDA: 0.1}
    found = fit_layer(data.chunks, HIDDEN, data.design, list(chosen), chosen)
    expected = fit_many_rows(data.chunks, HIDDEN, data.design, list(chosen), chosen)
    for method in chosen:
        np.testing.assert_array_equal(found[method].held_out, expected[method].held_out)
        assert found[method].probe.strength == chosen[method]


# ---------------------------------------------------------------- rows in any pieces


def everything(data, **options):
    found = fit_many_rows(data.chunks, HIDDEN, data.design, list(Method), **options)
    return {m: (f.probe.direction, f.held_out, f.inner) for m, f in found.items()}


def test_small_tiles_blocks_and_batches_change_nothing(data, monkeypatch):
    expected = everything(data)
    monkeypatch.setattr(primal_scatter, "_TILE", 5)
    monkeypatch.setattr(primal_scatter, "_FOLDS_BYTES", 4 * FOLDS * HIDDEN * 10)
    monkeypatch.setattr(primal_rows, "_BATCH_BYTES", 8 * HIDDEN * 61)
    found = everything(data)
    for method, parts in expected.items():
        for one, other in zip(parts, found[method], strict=True):
            scale = np.nanmax(np.abs(one))
            np.testing.assert_allclose(other, one, atol=2e-6 * scale, err_msg=method)


def test_rows_may_come_in_any_pieces(data):
    whole = fit_many_rows(
        lambda: data.chunks(10**6), HIDDEN, data.design, [Method.LOGISTIC], {Method.LOGISTIC: 0.1}
    )[Method.LOGISTIC]
    single = fit_many_rows(
        lambda: data.chunks(1), HIDDEN, data.design, [Method.LOGISTIC], {Method.LOGISTIC: 0.1}
    )[Method.LOGISTIC]
    np.testing.assert_array_equal(single.held_out, whole.held_out)


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    monkeypatch.setattr(primal_rows, "_BATCH_BYTES", 20_000)
    monkeypatch.setattr(primal_scatter, "_TILE", 16)
    positive = np.arange(100) % 3 == 0
    design = Design(positive, np.arange(100) // 2, np.arange(100) // 2 % 4)

    strengths = {Method.LDA: None, Method.RIDGE: 10.0, Method.LOGISTIC: 0.1}

    def peak(repeats):
        def chunks():
            for number in range(repeats):
                rows = np.random.default_rng(number).normal(size=(100, 32)).astype(np.float32)
                rows[positive, :5] += 0.5
                yield np.arange(100), rows

        tracemalloc.start()
        try:
            fit_many_rows(chunks, 32, design, list(strengths), strengths)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(5), peak(60)
    # 6000 rows of 32 float32 are 768 kB; only the norms, 4 bytes each, are kept.
    assert many < few + 100_000


def test_an_example_without_rows_has_no_score(data):
    design = Design(
        np.append(data.positive, True), np.append(data.groups, 9999), np.append(data.folds, 0)
    )
    found = fit_many_rows(data.chunks, HIDDEN, design, [Method.RIDGE, Method.PCA])
    for fitted in found.values():
        assert np.isnan(fitted.held_out[-1])
        assert np.isfinite(fitted.held_out[:-1]).all()


def test_separable_classes_converge_however_weak_the_penalty():
    rng = np.random.default_rng(0)
    positive = rng.random(400) < 0.3
    rows = rng.normal(size=(400, 10)).astype(np.float32)
    rows[positive, 3] += 12
    design = Design(positive, np.arange(400))
    found = fit_many_rows(
        lambda: [(np.arange(400), rows)], 10, design, [Method.LOGISTIC], {Method.LOGISTIC: 1e4}
    )[Method.LOGISTIC]
    weights, _ = logistic(1e4)(rows.astype(np.float64), positive)
    np.testing.assert_allclose(found.probe.direction, weights / np.linalg.norm(weights), atol=1e-6)


def test_the_factor_stands_dimensions_that_repeat_one_another():
    rng = np.random.default_rng(0)
    positive = rng.random(600) < 0.5
    rows = np.repeat(rng.normal(size=(600, 6)), 3, axis=1) + 100
    rows[positive] += rng.normal(size=18)
    design = Design(positive, np.arange(600))
    found = fit_many_rows(
        lambda: [(np.arange(600), rows)], 18, design, [Method.RIDGE], {Method.RIDGE: 1e-3}
    )[Method.RIDGE]
    weights, _ = ridge(1e-3)(rows - rows.mean(axis=0), positive)
    np.testing.assert_allclose(found.probe.direction, weights / np.linalg.norm(weights), atol=1e-6)


# ---------------------------------------------------------------- refusals


def fit_rows(rows, positive, hidden=3):
    design = Design(np.array(positive), np.arange(len(positive)))
    return fit_many_rows(lambda: [(np.arange(len(rows)), rows)], hidden, design, [Method.RIDGE])


def test_what_is_not_finite_is_named_by_class_and_row():
    rows = np.random.default_rng(0).normal(size=(6, 3))
    rows[4, 1] = np.nan
    with pytest.raises(NonFiniteError, match="in row 2 of the positive class"):
        fit_rows(rows, [True, False, True, False, True, False])


def test_widths_missing_classes_and_equal_means_are_refused():
    rows = np.random.default_rng(0).normal(size=(4, 3))
    with pytest.raises(ShapeError, match=r"width 5, got \[4, 3\]"):
        fit_rows(rows, [True, True, False, False], hidden=5)
    with pytest.raises(EmptyClassError, match="of the negative class"):
        fit_rows(rows, [True] * 4)
    with pytest.raises(NoDirectionError, match="use a deeper layer"):
        fit_rows(np.ones((4, 3)), [True, True, False, False])
