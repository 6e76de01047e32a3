"""Difference of means against its formula, scikit-learn and planted directions; how it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid

from probecache import fit, probe
from probecache.errors import EmptyClassError, FitError, NonFiniteError, ShapeError
from probecache.fit import MeanDifferenceFitter, fit_difference_of_means

HIDDEN = 8


def rows(seed, count=30, shift=0.0, dtype=np.float64):
    """Unit normal rows whose first two coordinates are moved."""
    made = np.random.default_rng(seed).normal(size=(count, HIDDEN))
    made[:, :2] += [shift, -2 * shift]
    return made.astype(dtype)


def cosine(a, b):
    a, b = (np.asarray(v, dtype=np.float64) for v in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def in_chunks(positive, negative, cuts):
    """A probe fitted on pieces of the classes, taken in turns."""
    fitter = MeanDifferenceFitter(positive.shape[1])
    pieces = zip(np.split(positive, cuts), np.split(negative, cuts), strict=True)
    for one, other in pieces:
        fitter.update(one, positive=True)
        fitter.update(other, positive=False)
    return fitter.finish()


# ---------------------------------------------------------------- what it computes


def test_a_case_worked_out_by_hand():
    # Means (3, 4) and (0, 0): direction (0.6, 0.8), distance 5, half-way at 2.5.
    found = fit_difference_of_means([[2.0, 4.0], [4.0, 4.0]], [[1.0, -1.0], [-1.0, 1.0]])
    assert found.direction.tolist() == pytest.approx([0.6, 0.8])
    assert found.raw_norm == 5.0
    assert found.threshold == 2.5
    # Norms: sqrt 20, sqrt 32, sqrt 2, sqrt 2; the median lies between the middle two.
    assert found.typical_norm == pytest.approx((math.sqrt(20) + math.sqrt(2)) / 2)
    assert (found.n_positive, found.n_negative) == (2, 2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_field_equals_the_formula_in_float64(dtype):
    positive, negative = rows(1, 40, 1.0, dtype), rows(2, 25, dtype=dtype)
    found = fit_difference_of_means(positive, negative)
    one, other = (r.astype(np.float64) for r in (positive, negative))
    raw = one.mean(axis=0) - other.mean(axis=0)
    np.testing.assert_allclose(found.direction, raw / np.linalg.norm(raw), rtol=1e-6)
    assert found.direction.dtype == np.float32
    assert np.linalg.norm(found.direction.astype(np.float64)) == pytest.approx(1, abs=1e-6)
    assert found.raw_norm == pytest.approx(np.linalg.norm(raw), rel=1e-12)
    midpoint = (one.mean(axis=0) + other.mean(axis=0)) / 2
    assert found.threshold == pytest.approx(midpoint @ raw / np.linalg.norm(raw), rel=1e-12)
    norms = np.linalg.norm(np.concatenate([one, other]), axis=1)
    assert found.typical_norm == pytest.approx(np.median(norms), rel=1e-12)
    assert (found.n_positive, found.n_negative) == (40, 25)


def test_a_torch_tensor_on_the_cpu_does_as_well_as_an_array():
    positive, negative = rows(1, shift=1.0, dtype=np.float32), rows(2, dtype=np.float32)
    arrays = fit_difference_of_means(positive, negative)
    tensors = fit_difference_of_means(torch.from_numpy(positive), torch.from_numpy(negative))
    assert np.array_equal(tensors.direction, arrays.direction)
    assert tensors.threshold == arrays.threshold


def test_a_bfloat16_tensor_is_taken_at_its_exact_values():
    positive, negative = (torch.from_numpy(r).bfloat16() for r in (rows(1, shift=1.0), rows(2)))
    found = fit_difference_of_means(positive, negative)
    exact = fit_difference_of_means(positive.double(), negative.double())
    assert np.array_equal(found.direction, exact.direction)
    assert found.threshold == exact.threshold


def test_the_centroids_and_calls_are_those_of_scikit_learns_nearest_centroid():
    positive, negative = rows(1, 40, 0.7), rows(2, 25)
    both, labels = np.concatenate([positive, negative]), np.arange(65) < 40
    theirs = NearestCentroid().fit(both, labels)
    found = fit_difference_of_means(positive, negative)
    raw = theirs.centroids_[1] - theirs.centroids_[0]
    np.testing.assert_allclose(found.direction * found.raw_norm, raw, rtol=1e-6)
    fresh = rows(3, 500, 0.4)
    called = found.score(fresh) > found.threshold
    assert 50 < called.sum() < 450
    assert np.array_equal(called, theirs.predict(fresh))


def test_direction_and_boundary_are_those_of_discriminant_analysis_with_a_round_covariance():
    positive, negative = rows(1, 40, 0.7), rows(2, 25)
    both, labels = np.concatenate([positive, negative]), np.arange(65) < 40
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=1.0, priors=[0.5, 0.5])
    theirs.fit(both, labels)
    found = fit_difference_of_means(positive, negative)
    scale = np.linalg.norm(theirs.coef_[0])
    np.testing.assert_allclose(found.direction, theirs.coef_[0] / scale, rtol=1e-6)
    assert found.threshold == pytest.approx(-theirs.intercept_[0] / scale, rel=1e-9)


def test_classes_weigh_equally_whatever_their_sizes():
    positive, negative = rows(1, 10, 1.0), rows(2, 12)
    once = fit_difference_of_means(positive, negative)
    often = fit_difference_of_means(np.tile(positive, (50, 1)), negative)
    np.testing.assert_allclose(often.direction, once.direction, rtol=1e-6)
    assert often.threshold == pytest.approx(once.threshold, rel=1e-12)


def test_both_means_lie_equally_far_from_the_threshold_on_their_own_side():
    positive, negative = rows(1, 40, 0.7) + 5, rows(2, 25) + 5
    found = fit_difference_of_means(positive, negative)
    above, below = found.score(positive).mean(), found.score(negative).mean()
    assert below < found.threshold < above
    assert above - found.threshold == pytest.approx(found.threshold - below, rel=1e-5)
    assert above - below == pytest.approx(found.raw_norm, rel=1e-6)


@given(st.integers(0, 10_000), st.floats(0.1, 100), st.floats(-100, 100))
def test_swapping_the_classes_negates_direction_and_threshold_exactly(seed, scale, offset):
    one, other = rows(seed, 7) * scale + offset, rows(seed + 1, 4, 0.3) * scale + offset
    forth, back = fit_difference_of_means(one, other), fit_difference_of_means(other, one)
    assert np.array_equal(back.direction, -forth.direction)
    assert back.threshold == -forth.threshold
    assert back.raw_norm == forth.raw_norm
    assert back.typical_norm == forth.typical_norm
    assert (back.n_positive, back.n_negative) == (forth.n_negative, forth.n_positive)


def test_scores_are_float64_projections_of_rows_of_any_dtype():
    found = fit_difference_of_means(rows(1, shift=1.0), rows(2))
    direction = found.direction.tolist()
    for dtype in (np.float16, np.float32, np.float64):
        fresh = rows(3, 20, dtype=dtype)
        expected = [math.fsum(map(float.__mul__, r.tolist(), direction)) for r in fresh]
        scores = found.score(fresh)
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- chunks and sums


@given(st.lists(st.integers(0, 30), max_size=6).map(sorted))
def test_chunks_of_any_size_give_what_one_update_gives(cuts):
    positive, negative = rows(1, 30, 1.0, np.float32), rows(2, 30, dtype=np.float32)
    whole, chunked = (
        fit_difference_of_means(positive, negative),
        in_chunks(positive, negative, cuts),
    )
    np.testing.assert_allclose(chunked.direction, whole.direction, rtol=1e-6, atol=1e-9)
    assert chunked.raw_norm == pytest.approx(whole.raw_norm, rel=1e-12)
    assert chunked.threshold == pytest.approx(whole.threshold, rel=1e-12)
    assert chunked.typical_norm == whole.typical_norm
    assert (chunked.n_positive, chunked.n_negative) == (30, 30)


def test_a_fitter_may_finish_early_and_go_on():
    positive, negative = rows(1, 30, 1.0), rows(2, 30)
    fitter = MeanDifferenceFitter(HIDDEN)
    fitter.update(positive[:10], positive=True)
    fitter.update(negative, positive=False)
    early = fitter.finish()
    fitter.update(positive[10:], positive=True)
    np.testing.assert_allclose(
        early.direction, fit_difference_of_means(positive[:10], negative).direction, rtol=1e-6
    )
    np.testing.assert_allclose(
        fitter.finish().direction, fit_difference_of_means(positive, negative).direction, rtol=1e-6
    )


def test_rows_are_left_as_they_were():
    positive, negative = rows(1, shift=1.0), rows(2)
    before = positive.copy(), negative.copy()
    fit_difference_of_means(positive, negative)
    assert np.array_equal(positive, before[0])
    assert np.array_equal(negative, before[1])


PLANTED = np.eye(HIDDEN)[-1]


def planted(count, offset, spread, distance):
    """The same rows for both classes, in two orders, but for `distance` in the last coordinate."""
    made = np.random.default_rng(0)
    negative = made.normal(offset, spread, (count, HIDDEN))
    return made.permutation(negative) + distance * PLANTED, negative


def mean_by_adding_up(rows):
    """The mean as a loop over rows takes it that keeps its sum in the rows' own dtype."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total.double() / len(rows)


@pytest.mark.parametrize(
    ("dtype", "offset", "spread", "distance"),
    [
        (torch.bfloat16, 8.0, 1.0, 1.0),
        (torch.float16, 8.0, 1.0, 0.2),
        (torch.float32, 1e5, 1e4, 0.1),
    ],
)
def test_a_direction_survives_that_sums_in_the_rows_own_dtype_would_lose(
    dtype, offset, spread, distance
):
    positive, negative = (
        torch.from_numpy(r).to(dtype) for r in planted(8000, offset, spread, distance)
    )
    naive = mean_by_adding_up(positive) - mean_by_adding_up(negative)
    assert not naive.norm() > 0 or abs(cosine(naive, PLANTED)) < 0.9
    found = fit_difference_of_means(positive, negative)
    assert cosine(found.direction, PLANTED) > 0.999
    assert found.raw_norm == pytest.approx(distance, rel=0.01)


@pytest.mark.parametrize(("distance", "width", "count"), [(1.0, 64, 50), (2.0, 512, 40)])
def test_a_planted_direction_is_recovered_as_well_as_theory_says(distance, width, count):
    # The estimate is D along the direction plus noise of variance 2/n in each other coordinate.
    expected = distance / math.sqrt(distance**2 + 2 * (width - 1) / count)
    found = []
    for seed in range(40):
        made = np.random.default_rng(seed)
        truth = made.normal(size=width)
        truth /= np.linalg.norm(truth)
        negative = made.normal(size=(count, width))
        positive = made.normal(size=(count, width)) + distance * truth
        found.append(cosine(fit_difference_of_means(positive, negative).direction, truth))
    assert 0.3 < expected < 0.95
    assert np.mean(found) == pytest.approx(expected, abs=0.02)


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("shape", [(3, HIDDEN + 1), (HIDDEN,), (1, 3, HIDDEN)])
def test_rows_of_another_shape_are_refused_with_the_width_expected(shape):
    with pytest.raises(ShapeError, match=r"width 8, got .*read from the same model") as caught:
        MeanDifferenceFitter(HIDDEN).update(np.zeros(shape), positive=True)
    assert str(list(shape)) in str(caught.value)


def test_classes_of_two_widths_are_refused():
    with pytest.raises(ShapeError, match=r"width 8, got \[2, 5\]"):
        fit_difference_of_means(rows(1), np.zeros((2, 5)))


@pytest.mark.parametrize(("positive", "name"), [(True, "negative"), (False, "positive")])
def test_a_class_without_rows_is_refused_by_name(positive, name):
    fitter = MeanDifferenceFitter(HIDDEN)
    fitter.update(rows(1), positive=positive)
    fitter.update(np.zeros((0, HIDDEN)), positive=not positive)
    with pytest.raises(EmptyClassError, match=f"rows of the {name} class, got none"):
        fitter.finish()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("positive", "name"), [(True, "positive"), (False, "negative")])
def test_numbers_that_are_none_are_refused_with_class_and_row_over_all_updates(bad, positive, name):
    broken = rows(1, 10)
    broken[[3, 7], 5] = bad
    fitter = MeanDifferenceFitter(HIDDEN)
    fitter.update(rows(2, 20), positive=positive)
    fitter.update(rows(3, 50), positive=not positive)
    with pytest.raises(NonFiniteError, match=f"NaN or Inf in row 23 of the {name} class"):
        fitter.update(broken, positive=positive)


def test_large_finite_numbers_are_no_infinities():
    positive, negative = np.full((3, 2), 3e38, np.float32), np.zeros((3, 2), np.float32)
    found = fit_difference_of_means(positive, negative)
    assert found.direction.tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert found.raw_norm == pytest.approx(3e38 * math.sqrt(2), rel=1e-6)


def test_small_numbers_are_no_zeros():
    positive, negative = np.full((3, 2), 1e-30, np.float32), np.zeros((3, 2), np.float32)
    assert fit_difference_of_means(positive, negative).direction.tolist() == pytest.approx(
        [math.sqrt(0.5)] * 2
    )


def test_equal_means_have_no_direction():
    same = rows(1)
    with pytest.raises(FitError, match=r"means to differ, got equal ones.*use a deeper layer"):
        fit_difference_of_means(same, same)


def test_messages_are_one_line():
    for positive, negative in (
        (rows(1), np.zeros((2, 5))),
        (rows(1), np.zeros((0, HIDDEN))),
        (rows(1), np.full((2, HIDDEN), np.nan)),
        (rows(1), rows(1)),
    ):
        with pytest.raises((FitError, NonFiniteError)) as caught:
            fit_difference_of_means(positive, negative)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the frozen answer


def test_a_probe_cannot_be_changed():
    found = fit_difference_of_means(rows(1, shift=1.0), rows(2))
    with pytest.raises(AttributeError):
        found.threshold = 0.0


def test_all_is_sorted_and_exists():
    for module in (fit, probe):
        assert module.__all__ == sorted(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
