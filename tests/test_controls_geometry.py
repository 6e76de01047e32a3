"""Random directions and the shape of activations, against plain NumPy and planted truth."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from probecache.controls import (
    first_token_share,
    outlier_dimensions,
    pair_agreement,
    random_auroc,
    random_directions,
)
from probecache.controls.streams import example_means
from probecache.errors import NoDirectionError, ShapeError, UsageError


def chunked(rows, owners=None, size=7):
    """Chunks as a cache gives them; rows of an example may be divided among two."""
    rows = np.asarray(rows, dtype=np.float32)
    owners = np.arange(len(rows)) if owners is None else np.asarray(owners)

    def chunks():
        for start in range(0, len(rows), size):
            yield owners[start : start + size], rows[start : start + size]

    return chunks


def ragged(seed, n, hidden):
    """Rows of n examples of 1 to 9 rows each, positives first, and their mean rows."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([np.arange(0, n, 2), np.arange(1, n, 2)])
    owners = np.repeat(order, rng.integers(1, 10, n))
    rows = rng.standard_normal((owners.size, hidden)).astype(np.float32) + 3
    means = np.stack([rows[owners == i].astype(np.float64).mean(axis=0) for i in range(n)])
    return rows, owners, means


@pytest.mark.parametrize("size", [1, 2, 5, 64, 10_000])
def test_means_are_those_of_each_example_however_its_rows_are_divided(size):
    rows, owners, means = ragged(0, 40, 6)
    found = np.full_like(means, np.nan)
    for examples, part in example_means(chunked(rows, owners, size)):
        assert np.isnan(found[examples]).all()
        found[examples] = part
    np.testing.assert_allclose(found, means, rtol=1e-12)


def test_no_chunks_and_empty_chunks_give_no_means():
    empty = (np.empty(0, np.int64), np.empty((0, 4), np.float32))
    assert list(example_means(lambda: [])) == []
    assert list(example_means(lambda: [empty, empty])) == []


def test_directions_do_not_depend_on_chunks_and_are_repeatable():
    rows, owners, means = ragged(1, 30, 12)
    found = random_directions(chunked(rows, owners), 30, count=5, seed=4)
    # The means have been rounded to float32 on their way.
    at_once = random_directions(chunked(means, size=100), 30, count=5, seed=4)
    np.testing.assert_allclose(found, at_once, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    other = random_directions(chunked(rows, owners), 30, count=5, seed=5)
    assert np.abs(found - other).max() > 0.1


def test_directions_vary_as_the_data_do():
    """Scaled back to what they were before they got unit norm, in expectation."""
    rng = np.random.default_rng(2)
    scales = 1 / np.arange(1, 31) ** 0.5
    rotation = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    data = 5 + (rng.standard_normal((400, 30)) * scales) @ rotation
    covariance = np.cov(data.astype(np.float32).T)
    draws = random_directions(chunked(data), 400, count=20_000)
    found = draws.T @ draws / len(draws)
    # The common mean, 150 times the variance, has no part in it.
    values, vectors = np.linalg.eigh(covariance)
    along = np.einsum("hk,hj,jk->k", vectors, found, vectors)
    unit = rng.standard_normal((20_000, 30)) * np.sqrt(values)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    np.testing.assert_allclose(along, (unit**2).mean(axis=0), rtol=0.05)
    across = vectors.T @ found @ vectors - np.diag(along)
    assert np.abs(across).max() < 0.05 * along.max()


def test_random_directions_on_null_data_are_at_chance():
    labels = np.arange(200) % 2 == 0
    means, sides = [], []
    for seed in range(20):
        rows = np.random.default_rng(seed).standard_normal((200, 40))
        control = random_auroc(chunked(rows, size=64), labels, seed=seed)
        assert control.aurocs.shape == (10,)
        assert 0.5 <= control.lowest <= control.mean <= control.highest < 0.7
        means.append(control.mean)
        directions = random_directions(chunked(rows, size=64), 200, seed=seed)
        scores = rows.astype(np.float32) @ directions.T
        won = scores[labels][:, None] > scores[~labels][None]
        sides.append(won.mean(axis=(0, 1)))
        np.testing.assert_allclose(np.maximum(sides[-1], 1 - sides[-1]), control.aurocs, atol=1e-9)
    assert np.mean(sides) == pytest.approx(0.5, abs=0.01)
    # Folding adds 0.8 standard errors of 0.041.
    assert np.mean(means) == pytest.approx(0.5 + 0.8 * 0.041, abs=0.01)


def test_random_directions_find_a_dominating_direction_that_parts_the_classes():
    rng = np.random.default_rng(3)
    labels = np.arange(120) % 2 == 0
    rows = rng.standard_normal((120, 50))
    rows[:, 7] += np.where(labels, 100, -100)
    assert random_auroc(chunked(rows), labels).lowest > 0.9
    rows[:, 7] = np.where(labels, 2, -2) + rng.standard_normal(120)
    rows[:, 8:30] *= 20
    assert random_auroc(chunked(rows), labels).highest < 0.75


def test_equal_examples_have_no_random_direction():
    with pytest.raises(NoDirectionError, match="12 of which all are equal"):
        random_directions(chunked(np.full((12, 5), 7.3)), 12)
    with pytest.raises(NoDirectionError, match="use a deeper layer"):
        random_directions(chunked(np.ones((1, 5))), 1)
    with pytest.raises(UsageError, match="at least 1 random direction, got 0"):
        random_directions(chunked(np.ones((3, 5))), 3, count=0)


def test_outlier_dimensions_are_named_with_their_share():
    rows, owners, means = ragged(4, 50, 20)
    rows[:, 3] += 100
    rows[:, 11] -= 200
    means[:, 3] += 100
    means[:, 11] -= 200
    dimensions, share = outlier_dimensions(chunked(rows, owners), 20, most=2)
    assert dimensions == (11, 3)
    assert share == pytest.approx((means[:, [3, 11]] ** 2).sum() / (means**2).sum(), rel=1e-5)
    assert outlier_dimensions(chunked(np.zeros((4, 5))), 5) == ((0, 1, 2), 0.0)


def pairs_of(differences):
    """A positive and a negative for each difference, around some common text."""
    rng = np.random.default_rng(9)
    base = rng.standard_normal(differences.shape)
    rows = np.concatenate([base + differences / 2, base - differences / 2])
    return rows, np.arange(len(rows)) < len(base), np.tile(np.arange(len(base)), 2)


def test_agreement_is_the_mean_cosine_of_all_twos_of_pairs():
    differences = np.random.default_rng(5).standard_normal((30, 12)) + 0.7
    rows, positive, groups = pairs_of(differences)
    found = pair_agreement(chunked(rows), positive, groups * 5 + 2)
    units = differences / np.linalg.norm(differences, axis=1, keepdims=True)
    cosines = [float(a @ b) for a, b in itertools.combinations(units, 2)]
    assert found.cosine == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found.pairs == 30
    assert found.cosine > found.chance


def test_random_differences_exceed_chance_in_five_of_a_hundred_cases():
    exceeded = 0
    for seed in range(400):
        rows, positive, groups = pairs_of(np.random.default_rng(seed).standard_normal((25, 8)))
        found = pair_agreement(chunked(rows, size=100), positive, groups)
        exceeded += found.cosine > found.chance
    assert 8 <= exceeded <= 36


def test_several_examples_of_a_class_count_as_their_mean():
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((15, 4))
    positive = np.array([True, True, False] * 5)
    groups = np.repeat(np.arange(5), 3)
    found = pair_agreement(chunked(rows), positive, groups)
    merged = np.concatenate([(rows[0::3] + rows[1::3]) / 2, rows[2::3]])
    expected = pair_agreement(chunked(merged), np.arange(10) < 5, np.tile(np.arange(5), 2))
    assert found.cosine == pytest.approx(expected.cosine, abs=1e-6)


def test_without_two_pairs_that_differ_there_is_no_agreement():
    rows = np.random.default_rng(7).standard_normal((6, 3))
    positive = np.array([True, False] * 3)
    assert pair_agreement(chunked(rows), positive, np.arange(6)) is None
    assert pair_agreement(chunked(rows), positive, [0, 0, 1, 2, 3, 4]) is None
    assert pair_agreement(chunked(np.ones((6, 3))), positive, [0, 0, 1, 1, 2, 2]) is None
    with pytest.raises(ShapeError, match="6 labels and 5 groups"):
        pair_agreement(chunked(rows), positive, np.arange(5))


def test_more_pairs_than_can_be_held_are_sampled_evenly():
    differences = np.random.default_rng(8).standard_normal((4500, 6)) + 0.5
    rows, positive, groups = pairs_of(differences)
    found = pair_agreement(chunked(rows, size=1000), positive, groups)
    units = differences / np.linalg.norm(differences, axis=1, keepdims=True)
    everything = (np.sum(units.sum(axis=0) ** 2) - 4500) / (4500 * 4499)
    assert found.pairs == 2000
    assert found.cosine == pytest.approx(everything, abs=0.03)


def test_controls_hold_a_chunk_and_not_the_rows():
    hidden, examples = 512, 2000

    def chunks():
        for start in range(0, examples, 50):
            rng = np.random.default_rng(start)
            rows = rng.standard_normal((500, hidden)).astype(np.float32)
            yield np.repeat(np.arange(start, start + 50), 10), rows

    labels = np.arange(examples) % 2 == 0
    tracemalloc.start()
    random_auroc(chunks, labels, count=10)
    outlier_dimensions(chunks, hidden)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6  # the rows are 41 MB, a chunk is 1 MB, and 2 MB in float64


def test_the_first_tokens_share_is_that_of_the_covariance():
    rng = np.random.default_rng(10)
    counts = rng.integers(1, 30, 200)
    scores = [rng.standard_normal(count) + 1 for count in counts]
    means = np.array([one.mean() for one in scores])
    first = np.array([one[0] / one.size for one in scores])
    expected = np.cov(first, means)[0, 1] / means.var(ddof=1)
    assert first_token_share(np.concatenate(scores), counts) == pytest.approx(expected)


def test_a_first_token_like_any_other_has_an_even_share():
    scores = np.random.default_rng(11).standard_normal((3000, 8))
    found = first_token_share(scores.ravel(), np.full(3000, 8))
    assert found == pytest.approx(1 / 8, abs=0.03)


def test_a_first_token_that_is_huge_and_always_the_same_has_nearly_all():
    rng = np.random.default_rng(12)
    counts = rng.integers(10, 60, 200)
    scores = [np.append(300.0, rng.standard_normal(count - 1)) for count in counts]
    assert first_token_share(np.concatenate(scores), counts) > 0.98


def test_without_second_tokens_or_variance_there_is_no_share():
    assert first_token_share(np.arange(5.0), np.ones(5, int)) is None
    assert first_token_share(np.full(10, 2.5), np.full(5, 2)) is None
    assert first_token_share([], []) is None
    with pytest.raises(ShapeError, match="add up to the scores, got 6"):
        first_token_share(np.arange(5.0), [3, 3])
