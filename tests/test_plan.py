"""Batches hold every prompt once within the budget; distinct prefixes are counted exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probecache.errors import UsageError
from probecache.plan import Batch, count_distinct_prefixes, plan_batches
from probecache.types import TokenizedPrompt


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200))
def test_every_prompt_is_in_one_batch_that_keeps_the_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch.prompts) == list(range(len(lengths)))
    for batch in batches:
        assert batch.padded_length == max(lengths[i] for i in batch.prompts)
        assert batch.padded_tokens == len(batch.prompts) * batch.padded_length
        assert batch.padded_tokens <= budget or len(batch.prompts) == 1
    sizes = [batch.padded_length for batch in batches]
    assert sizes == sorted(sizes, reverse=True)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_no_two_neighbouring_batches_would_fit_into_one(lengths, budget):
    batches = plan_batches(lengths, budget)
    for first, second in itertools.pairwise(batches):
        assert (len(first.prompts) + 1) * first.padded_length > budget
        assert first.padded_length >= second.padded_length


@given(st.lists(st.integers(0, 99), min_size=2, max_size=30, unique=True))
def test_halves_share_the_prompts_out_and_keep_the_padding(prompts):
    batch = Batch(tuple(prompts), padded_length=7)
    first, second = batch.halves()
    assert first.prompts + second.prompts == batch.prompts
    assert first.prompts
    assert second.prompts
    assert (first.padded_length, second.padded_length) == (7, 7)


def test_a_budget_below_one_token_is_refused():
    with pytest.raises(UsageError, match="at least 1, got 0"):
        plan_batches([3], 0)


# Few ids, so that prefixes are shared; 256 and 65536 differ from 1 in another byte only.
_IDS = st.lists(st.sampled_from([0, 1, 255, 256, 65536]), min_size=1, max_size=7)


@given(st.lists(_IDS, max_size=12))
def test_distinct_prefixes_are_as_many_as_a_set_of_them_holds(prompts):
    every = {tuple(ids[:n]) for ids in prompts for n in range(1, len(ids) + 1)}
    tokenized = [
        TokenizedPrompt(np.array(ids, dtype=np.int32), np.array([0], dtype=np.int32))
        for ids in prompts
    ]
    assert count_distinct_prefixes(tokenized) == len(every)
