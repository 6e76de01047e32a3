"""Scores of tokens and of examples: against loops over files that plain torch reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from synthetic import labelled, rows_of, write_cache

from probecache.aggregate import parse_aggregate
from probecache.errors import NonFiniteError
from probecache.store import reader
from probecache.store.rows import ExampleRows
from probecache.workflow import scoring as module
from probecache.workflow.scoring import STATISTICS, score_layer

LABELS = ("testing", "deployment", "testing", "deployment", "deployment", "testing")
TOKENS = [3, 1, 7, 2, 5, 4]
HIDDEN, LAYER = 9, 4
DIRECTION = np.random.default_rng(1).normal(size=HIDDEN).astype(np.float32)


def cache_of(folder, rows, tokens=TOKENS, labels=LABELS):
    positions = "last" if tokens is None else "all"
    records = labelled(*labels)
    return write_cache(folder, records, {LAYER: rows}, tokens=tokens, positions=positions)


def planted(tokens=TOKENS, dtype=torch.float32):
    return torch.randn(sum(tokens), HIDDEN, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.fixture
def cache(tmp_path):
    return cache_of(tmp_path / "cache", planted())


def scores_by_hand(cache):
    """Each example's token scores in data order, in float64."""
    wide = torch.from_numpy(DIRECTION).double()
    return [
        (rows_of(cache, r.label, LAYER)[r.rows[0] : r.rows[1]].double() @ wide).numpy()
        for r in cache.examples
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_score_is_the_projection_of_the_row_on_disk_in_double_precision(tmp_path, dtype):
    cache = cache_of(tmp_path / "cache", planted(dtype=dtype))
    tokens = score_layer(ExampleRows(cache), LAYER, DIRECTION).tokens
    assert tokens.scores.dtype == np.float64
    for example, expected in enumerate(scores_by_hand(cache)):
        found = tokens.scores[tokens.owners == example]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_owners_starts_and_counts_tell_whose_each_score_is(cache):
    tokens = score_layer(ExampleRows(cache), LAYER, DIRECTION).tokens
    order = [n for label in cache.classes for n, name in enumerate(LABELS) if name == label]
    assert tokens.owners[tokens.starts].tolist() == order
    assert tokens.counts.tolist() == [TOKENS[n] for n in order]
    assert tokens.owners.tolist() == [n for n in order for _ in range(TOKENS[n])]


def test_statistics_and_aggregates_stand_in_data_order(cache):
    tokens, by_hand = (
        score_layer(ExampleRows(cache), LAYER, DIRECTION).tokens,
        scores_by_hand(cache),
    )
    for name, expected in zip(STATISTICS, (np.mean, np.max, np.min, np.std), strict=True):
        found = tokens.statistics()[name]
        np.testing.assert_allclose(found, [expected(s) for s in by_hand], atol=1e-12)
    for how, expected in (
        ("mean", np.mean),
        ("max", np.max),
        ("last", lambda s: s[-1]),
        ("top-2", lambda s: np.sort(s)[-2:].mean()),
        ("rolling-3", lambda s: max(s[i : i + 3].mean() for i in range(max(1, len(s) - 2)))),
    ):
        found = tokens.aggregated(parse_aggregate(how))
        np.testing.assert_allclose(found, [expected(s) for s in by_hand], atol=1e-12, err_msg=how)


def test_chunks_that_cut_examples_give_the_same_scores(cache, monkeypatch):
    whole = score_layer(ExampleRows(cache), LAYER, DIRECTION).tokens
    monkeypatch.setattr(reader, "_CHUNK_BYTES", 4 * HIDDEN * 2)
    pieces = list(ExampleRows(cache).chunks(LAYER))
    assert len(pieces) > 10
    cut = score_layer(ExampleRows(cache), LAYER, DIRECTION).tokens
    assert np.array_equal(cut.owners, whole.owners)
    np.testing.assert_allclose(cut.scores, whole.scores, atol=1e-13)


def test_spread_of_a_far_away_score_loses_no_digits(tmp_path):
    rows = torch.zeros(4, HIDDEN)
    rows[:, 0] = torch.tensor([4e6, 4e6 + 1, 4e6, 4e6 + 1])
    cache = cache_of(tmp_path / "cache", rows, [2, 2], ("testing", "deployment"))
    tokens = score_layer(ExampleRows(cache), LAYER, np.eye(HIDDEN, dtype=np.float32)[0]).tokens
    assert tokens.statistics()["std_score"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("chunk", [None, 2])
def test_what_is_no_number_is_refused_with_class_row_and_layer(tmp_path, monkeypatch, value, chunk):
    if chunk:
        monkeypatch.setattr(reader, "_CHUNK_BYTES", 4 * HIDDEN * chunk)
    rows = planted()
    rows[3 + 1 + 4, 2] = value  # the fifth of the third example's tokens, after 3 and 1
    cache = cache_of(tmp_path / "cache", rows)
    place = int((~torch.isfinite(rows_of(cache, "testing", LAYER)).all(1)).nonzero())
    with pytest.raises(NonFiniteError) as refused:
        score_layer(ExampleRows(cache), LAYER, DIRECTION)
    assert f"row {place} of class 'testing' at layer {LAYER} of {cache.path}" in str(refused.value)


def test_what_is_no_number_among_chosen_rows_is_refused_with_its_example(tmp_path):
    rows = planted()
    rows[2] = np.nan  # the last of the first example's three tokens
    cache = cache_of(tmp_path / "cache", rows)
    for positions in ("last-1", "mean"):
        with pytest.raises(NonFiniteError, match="example 'q0' of class 'testing' at layer 4"):
            score_layer(ExampleRows(cache, positions), LAYER, DIRECTION)


def test_all_is_sorted_and_exists():
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
