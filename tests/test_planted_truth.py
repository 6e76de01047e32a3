"""Directions that were planted: found as well as theory says, and scored as well as theory says.

Two unit normal classes lie D apart along an axis in d dimensions. From n examples of each, the
difference of means has a cosine of D / sqrt(D^2 + 2 (d - 1) / n) with the axis, and parts fresh
examples with an AUROC of Phi(D cosine / sqrt 2). Every layer of a cache is a draw of its own, so
one training repeats the experiment as often as there are layers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from planted import cache_of, classes, phi, rows_along, unit

import probecache

DRAWS = 10
METHODS = ("difference-of-means", "logistic", "lda", "ridge", "pca")


def cosine_in_theory(spacing, hidden, n):
    return spacing / math.sqrt(spacing**2 + 2 * (hidden - 1) / n)


def auroc_in_theory(spacing, cosine):
    return phi(spacing * cosine / math.sqrt(2))


def assert_agrees(draws, theory, widest):
    """The mean of the draws is within 3 of its standard errors, and these are narrow enough."""
    draws = np.asarray(draws)
    error = draws.std(ddof=1) / math.sqrt(len(draws))
    assert 0 < 3 * error < widest
    assert draws.mean() == pytest.approx(theory, abs=3 * error)


def draw(rng, positive, axes, spacing):
    """Rows of every layer, each around its own axis."""
    return {
        layer: rows_along(rng, positive, axis, spacing) for layer, axis in enumerate(axes, start=1)
    }


def cosines(vectors, axes):
    return np.array([vectors.directions[n] @ axis for n, axis in enumerate(axes, start=1)])


def areas(result):
    return np.array([layer.auroc.auroc for layer in result.layers])


# ---------------------------------------------------------------- as many dimensions as a 70B model


@pytest.fixture(scope="module", params=[2.0, 4.0])
def wide(request, tmp_path_factory):
    """A spacing; its axes; vectors from 102 of each class in 8192 dimensions; fresh examples."""
    folder, spacing = tmp_path_factory.mktemp("wide"), request.param
    rng = np.random.default_rng(int(spacing))
    axes = unit(rng.standard_normal((DRAWS, 8192)))
    cache = cache_of(folder / "training", classes(102), draw(rng, classes(102), axes, spacing))
    vectors = probecache.train(cache=cache, output=folder / "run")
    fresh = cache_of(folder / "fresh", classes(150), draw(rng, classes(150), axes, spacing))
    return spacing, axes, vectors, fresh


def test_the_cosine_with_the_planted_direction_is_that_of_theory(wide):
    spacing, axes, vectors, _ = wide
    theory = cosine_in_theory(spacing, 8192, 102)
    assert_agrees(cosines(vectors, axes), theory, widest=0.02)


def test_the_auroc_on_fresh_examples_is_that_of_theory(wide, tmp_path):
    spacing, _, vectors, fresh = wide
    result = probecache.validate(vectors=vectors, cache=fresh, output=tmp_path / "v", control=False)
    theory = auroc_in_theory(spacing, cosine_in_theory(spacing, 8192, 102))
    assert round(theory, 3) == {2.0: 0.587, 4.0: 0.803}[spacing]
    assert_agrees(areas(result), theory, widest=0.04)


def test_the_held_out_auroc_of_training_is_that_of_theory_for_four_fifths_of_the_examples(wide):
    spacing, _, vectors, _ = wide
    found = [record.cross_validation.auroc for record in vectors.info.layers.values()]
    theory = auroc_in_theory(spacing, cosine_in_theory(spacing, 8192, 102 * 4 / 5))
    assert_agrees(found, theory, widest=0.06)


def test_probabilities_fixed_in_training_hold_on_fresh_examples(wide, tmp_path):
    """The line is fitted on scores of probes from four fifths of the examples. The whole probe has
    a larger cosine, and so a slope that is larger by the ratio of the two: 1 at best."""
    spacing, _, vectors, fresh = wide
    result = probecache.validate(vectors=vectors, cache=fresh, output=tmp_path / "v", control=False)
    slopes = [layer.calibration.slope for layer in result.layers]
    whole, held_out = (cosine_in_theory(spacing, 8192, n) for n in (102, 102 * 4 / 5))
    if spacing == 4.0:  # where the classes hardly part a slope is anything
        assert_agrees(slopes, whole / held_out, widest=0.6)
    assert abs(np.mean([layer.calibration.intercept for layer in result.layers])) < 0.15


# ---------------------------------------------------------------- what held-out examples say


@pytest.mark.parametrize("folds", [2, 5])
def test_held_out_auroc_is_that_of_a_probe_trained_without_the_fold(tmp_path, folds):
    n, hidden, spacing, repeats = 20, 256, 3.0, 60
    rng = np.random.default_rng(folds)
    axes = unit(rng.standard_normal((repeats, hidden)))
    cache = cache_of(tmp_path / "c", classes(n), draw(rng, classes(n), axes, spacing))
    vectors = probecache.train(cache=cache, output=tmp_path / "run", folds=folds)
    found = [record.cross_validation.auroc for record in vectors.info.layers.values()]
    without = auroc_in_theory(spacing, cosine_in_theory(spacing, hidden, n * (1 - 1 / folds)))
    assert_agrees(found, without, widest=0.04)
    if folds == 2:  # far enough from what all examples give to tell the two apart
        assert auroc_in_theory(spacing, cosine_in_theory(spacing, hidden, n)) > without + 0.05


def test_the_interval_of_the_held_out_auroc_holds_the_truth(tmp_path):
    n, hidden, spacing, repeats = 40, 32, 1.5, 60
    rng = np.random.default_rng(0)
    axes = unit(rng.standard_normal((repeats, hidden)))
    cache = cache_of(tmp_path / "c", classes(n), draw(rng, classes(n), axes, spacing))
    vectors = probecache.train(cache=cache, output=tmp_path / "run")
    truth = auroc_in_theory(spacing, cosine_in_theory(spacing, hidden, n * 4 / 5))
    found = [record.cross_validation for record in vectors.info.layers.values()]
    held = np.mean([one.low <= truth <= one.high for one in found])
    assert 0.92 <= held <= 1


# ---------------------------------------------------------------- which class is positive


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """Vectors; a cache; the same cache with every label the other one."""
    folder, rng = tmp_path_factory.mktemp("swapped"), np.random.default_rng(5)
    axes = unit(rng.standard_normal((3, 48)))
    training = cache_of(folder / "training", classes(40), draw(rng, classes(40), axes, 1.5))
    positive = classes(60)
    rows = draw(rng, positive, axes, 1.5)
    caches = [
        cache_of(folder / name, labels, rows, prefix="fresh")
        for name, labels in (("right", positive), ("wrong", ~positive))
    ]
    return training, probecache.train(cache=training, output=folder / "run"), *caches


def test_swapped_labels_give_exactly_one_minus_the_auroc_and_the_mirrored_interval(
    swapped, tmp_path
):
    _, vectors, right, wrong = swapped
    forth, back = (
        probecache.validate(vectors=vectors, cache=cache, output=tmp_path / cache.path.name)
        for cache in (right, wrong)
    )
    for one, other in zip(forth.layers, back.layers, strict=True):
        assert 0.5 < one.auroc.auroc < 1
        assert other.auroc.auroc == 1 - one.auroc.auroc
        assert other.auroc.low == pytest.approx(1 - one.auroc.high, abs=1e-12)
        assert other.auroc.high == pytest.approx(1 - one.auroc.low, abs=1e-12)
    assert any("scores are reversed" in warning for warning in back.warnings)
    assert not any("scores are reversed" in warning for warning in forth.warnings)


def test_vectors_of_the_other_class_point_the_other_way_and_score_as_well(swapped, tmp_path):
    training, vectors, right, _ = swapped
    other = probecache.train(cache=training, output=tmp_path / "o", positive_class="testing")
    forth, back = (
        probecache.validate(vectors=one, cache=right, output=tmp_path / str(place))
        for place, one in enumerate((vectors, other))
    )
    assert (forth.positive_class, back.positive_class) == ("deployment", "testing")
    for one, two in zip(forth.layers, back.layers, strict=True):
        np.testing.assert_array_equal(other[one.layer], -vectors[one.layer])
        assert two.auroc.auroc == one.auroc.auroc > 0.5
        np.testing.assert_array_equal(two.scores, -one.scores)


# ---------------------------------------------------------------- methods


def test_all_five_methods_find_the_planted_direction(tmp_path):
    """n pairs in d dimensions, D apart: theory for means and PCA, a bound for the others."""
    pairs, hidden, spacing = 100, 64, 3.0
    rng = np.random.default_rng(9)
    axes = unit(rng.standard_normal((8, hidden)))
    positive, groups = classes(pairs), np.arange(2 * pairs) // 2
    cache = cache_of(tmp_path / "c", positive, draw(rng, positive, axes, spacing), groups=groups)
    fresh = cache_of(tmp_path / "fresh", classes(100), draw(rng, classes(100), axes, spacing))
    trained = probecache.train_methods(METHODS, cache=cache, output=tmp_path / "run")
    assert tuple(trained) == METHODS
    found = {method: cosines(vectors, axes) for method, vectors in trained.items()}
    theory = cosine_in_theory(spacing, hidden, pairs)
    assert_agrees(found["difference-of-means"], theory, widest=0.03)
    # The differences are N(D axis, 2 I): a planted singular vector, of strength D^2 / 2 against
    # the noise of as many dimensions per pair. Benaych-Georges & Nadakuditi 2012, section 3.1.
    strength, ratio = spacing**2 / 2, hidden / pairs
    lost = ratio * (1 + strength) / (strength * (strength + ratio))
    assert_agrees(found["pca"], math.sqrt(1 - lost), widest=0.05)
    for method in ("logistic", "lda", "ridge"):
        assert (found[method] > theory - 0.15).all(), method
    results = probecache.validate_methods(
        trained, cache=fresh, output=tmp_path / "v", control=False
    )
    ideal = auroc_in_theory(spacing, 1.0)
    for method, result in results.items():
        assert_agrees(areas(result), areas(result).mean(), widest=0.05)
        at_most = auroc_in_theory(spacing, found[method].mean())
        assert areas(result).mean() == pytest.approx(at_most, abs=0.015), method
        assert areas(result).mean() < ideal + 0.005


def test_with_unequal_noise_lda_beats_the_difference_of_means_by_as_much_as_theory_says(tmp_path):
    """With difference delta and covariance S: Phi(sqrt(delta' S^-1 delta / 2)) against Phi(delta'
    delta / sqrt(2 delta' S delta))."""
    hidden, n, repeats = 24, 300, 4
    rng = np.random.default_rng(3)
    deviations = np.geomspace(0.3, 6, hidden)
    delta = np.full(hidden, 0.3)

    def rows(positive):
        noise = rng.standard_normal((len(positive), hidden)) * deviations
        return (noise + np.where(positive, 0.5, -0.5)[:, None] * delta).astype(np.float32)

    caches = [
        cache_of(tmp_path / name, classes(n), {k: rows(classes(n)) for k in range(1, repeats + 1)})
        for name in ("training", "fresh")
    ]
    trained = probecache.train_methods(
        ["difference-of-means", "lda"], cache=caches[0], output=tmp_path / "run"
    )
    results = probecache.validate_methods(
        trained, cache=caches[1], output=tmp_path / "v", control=False
    )
    whitened = phi(math.sqrt((delta**2 / deviations**2).sum() / 2))
    plain = phi(delta @ delta / math.sqrt(2 * (delta**2 * deviations**2).sum()))
    assert whitened > plain + 0.2
    # From n of each class whitening with 2 n degrees of freedom loses a little. Raudys & Young
    # 2004, J. Multivariate Anal. 89:1, section 3.2.
    distance = math.sqrt((delta**2 / deviations**2).sum())
    cosine = cosine_in_theory(distance, hidden, n) * math.sqrt(1 - hidden / (2 * n))
    reached = auroc_in_theory(distance, cosine)
    assert areas(results["lda"]).mean() == pytest.approx(reached, abs=0.02)
    # The sampled difference of means strays along the noisy dimensions.
    strays = delta**2 + 2 * deviations**2 / n
    expected = phi(delta @ delta / math.sqrt(2 * (strays * deviations**2).sum()))
    assert expected < plain
    assert areas(results["difference-of-means"]).mean() == pytest.approx(expected, abs=0.02)
