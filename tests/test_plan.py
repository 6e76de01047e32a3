"""Batches hold every prompt once and stretches every token, within the budget; halves lose none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probecache.errors import UsageError
from probecache.plan import (
    Batch,
    Stretch,
    estimate_working_set,
    plan_batches,
    plan_stretches,
)

LENGTHS = st.lists(st.integers(1, 60), max_size=40)
BUDGETS = st.integers(1, 200)


# ---------------------------------------------------------------- padded batches


@given(LENGTHS, BUDGETS, st.booleans())
def test_every_prompt_is_in_one_batch_that_keeps_the_budget(lengths, budget, mixed):
    batches = plan_batches(lengths, budget, mixed=mixed)
    assert sorted(i for batch in batches for i in batch.prompts) == list(range(len(lengths)))
    for batch in batches:
        assert batch.padded_length == max(lengths[i] for i in batch.prompts)
        assert batch.tokens == len(batch.prompts) * batch.padded_length
        assert batch.tokens <= budget or len(batch.prompts) == 1
    sizes = [batch.padded_length for batch in batches]
    assert sizes == sorted(sizes, reverse=True)


@given(LENGTHS, BUDGETS)
def test_no_two_neighbouring_batches_would_fit_into_one(lengths, budget):
    for first, _ in itertools.pairwise(plan_batches(lengths, budget)):
        assert (len(first.prompts) + 1) * first.padded_length > budget


@given(LENGTHS, BUDGETS)
def test_batches_that_may_not_be_mixed_hold_prompts_of_one_length(lengths, budget):
    batches = plan_batches(lengths, budget, mixed=False)
    for batch in batches:
        assert {lengths[index] for index in batch.prompts} == {batch.padded_length}
    for first, second in itertools.pairwise(batches):
        full = (len(first.prompts) + 1) * first.padded_length > budget
        assert full or second.padded_length < first.padded_length


@given(st.lists(st.integers(0, 99), min_size=2, max_size=30, unique=True))
def test_halves_of_a_batch_share_the_prompts_out_and_keep_the_padding(prompts):
    batch = Batch(tuple(prompts), padded_length=7)
    first, second = batch.halves()
    assert first.prompts + second.prompts == batch.prompts
    assert first.prompts
    assert second.prompts
    assert (first.padded_length, second.padded_length) == (7, 7)


# ---------------------------------------------------------------- stretches


@st.composite
def walks(draw):
    """Where each prompt's own tokens begin in a walk, and how deep it branches off."""
    own = draw(st.lists(st.integers(0, 40), min_size=1, max_size=40))
    own[0] += 1
    branches = [0, *draw(st.lists(st.integers(0, 30), min_size=len(own) - 1, max_size=len(own)))]
    return np.cumsum([0, *own]), np.array(branches[: len(own)])


@given(walks(), st.integers(1, 100))
def test_stretches_follow_one_another_within_the_budget_and_use_most_of_it(walk, budget):
    begins, branches = walk
    stretches = plan_stretches(begins, branches, budget)
    assert [t for one in stretches for t in range(one.start, one.stop)] == [*range(begins[-1])]
    sizes = [one.tokens for one in stretches]
    assert max(sizes) <= budget
    assert all(size >= budget - budget // 4 for size in sizes[:-1])


def test_a_stretch_ends_where_a_prompt_branches_off_highest():
    begins = np.array([0, 50, 76, 80, 95, 130, 200])
    branches = np.array([0, 20, 3, 30, 3, 5])
    assert plan_stretches(begins, branches, 100) == [
        Stretch(0, 95),
        Stretch(95, 195),
        Stretch(195, 200),
    ]
    assert plan_stretches(begins, branches, 90)[0] == Stretch(0, 76)


@given(st.integers(0, 1000), st.integers(2, 300))
def test_halves_of_a_stretch_are_of_like_size_and_in_order(start, tokens):
    first, second = Stretch(start, start + tokens).halves()
    assert (first.start, first.stop, second.stop) == (start, second.start, start + tokens)
    assert {first.tokens, second.tokens} <= {tokens // 2, -(-tokens // 2)}


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("step", [Batch((3,), 60), Stretch(5, 6)])
def test_a_single_prompt_or_token_cannot_be_cut(step):
    assert not step.divisible


@pytest.mark.parametrize("step", [Batch(tuple(range(5)), 60), Stretch(5, 105)])
def test_halving_comes_to_an_end_with_nothing_lost(step):
    waiting, tokens = [step], 0
    while waiting:
        one = waiting.pop()
        if one.divisible:
            halves = one.halves()
            assert sum(half.tokens for half in halves) == one.tokens
            waiting.extend(halves)
        else:
            tokens += one.tokens
    assert tokens == step.tokens


@pytest.mark.parametrize(
    "plan",
    [lambda: plan_batches([3], 0), lambda: plan_stretches(np.array([0, 3]), np.array([0]), 0)],
)
def test_a_budget_below_one_token_is_refused(plan):
    with pytest.raises(UsageError, match="at least 1, got 0"):
        plan()


def test_a_working_set_grows_with_tokens_and_with_what_they_attend_to():
    def size(tokens, attended):
        return estimate_working_set(tokens, attended, 32, 48, heads=4, itemsize=2)

    assert size(200, 50) == 2 * size(100, 50)
    assert size(100, 60) - size(100, 50) == 100 * 10 * 4 * 2
