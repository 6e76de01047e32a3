"""Both ways of feeding prompts to a model: what goes in, and which rows come out.

The model is a fake: the residual of a token is a random vector of its prefix and layer, so what is
right is known without any attention.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from families import BLOCKS, FAMILIES, build
from hypothesis import given
from hypothesis import strategies as st
from works import padded, prompts_of, shared

from probecache.errors import PreflightError
from probecache.feeds import Context, PaddedWork, TreeWork
from probecache.models import ModelOptions, open_model
from probecache.plan import Batch, Stretch, plan_batches
from probecache.prefixes import PrefixTree
from probecache.types import TokenizedPrompt

WIDTH, PAD = 5, 9
LAYERS = (0, 2)


class Fake:
    """A model that no block is ever run of."""

    pad_token_id = PAD
    input_device = torch.device("cpu")


def prompt(ids, kept):
    return TokenizedPrompt(np.array(ids, dtype=np.int32), np.array(kept, dtype=np.int32))


def residual(ids, layer, dtype=torch.float32):
    """[hidden] of the last of some ids."""
    seed = hash((tuple(ids), layer)) % 2**32
    return torch.from_numpy(np.random.default_rng(seed).normal(size=WIDTH)).to(dtype)


def stream_of(feed, prompts, layer, dtype=torch.float32):
    """[B, T, hidden] of a feed's tokens, by the prompts and depths that it names; padding NaN."""
    rows = [
        residual(prompts[owner].ids[: depth + 1].tolist(), layer, dtype)
        if owner >= 0
        else torch.full((WIDTH,), torch.nan, dtype=dtype)
        for owner, depth in zip(feed.owners, feed.depths, strict=True)
    ]
    return torch.stack(rows).view(*feed.shape, WIDTH)


def cut_at(prompts, *cuts):
    """Packs of the prefix tree with these tokens of the walk at their beginnings."""
    tree = PrefixTree(prompts)
    return TreeWork(tree, [Stretch(*ends) for ends in pairwise([0, *cuts, len(tree)])], 16)


def passed(work, dtype=torch.float32):
    """Rows [K, hidden] by (layer, prompt) after all steps of a work, each prompt once."""
    context, found = Context(), {}
    for step in work.steps:
        feed = work.feed(step, context, Fake())
        sizes = [1 if work.mean else len(work.prompts[n].kept) for n in feed.prompts]
        for layer in LAYERS:
            rows = feed.rows(layer, stream_of(feed, work.prompts, layer, dtype))
            for index, piece in zip(feed.prompts, rows.split(sizes), strict=True):
                assert (layer, index) not in found
                found[layer, index] = piece
        feed.finish(0)
    return found


def expected_rows(prompts, dtype=torch.float32):
    return {
        (layer, n): torch.stack(
            [residual(one.ids[: place + 1].tolist(), layer, dtype) for place in one.kept]
        )
        for layer in LAYERS
        for n, one in enumerate(prompts)
    }


@st.composite
def prompt_sets(draw):
    ids = st.lists(st.integers(0, 2), min_size=1, max_size=6)
    drawn = draw(st.lists(ids, min_size=1, max_size=7))
    kept = [draw(st.sets(st.integers(0, len(ids) - 1), min_size=1)) for ids in drawn]
    return [prompt(ids, sorted(some)) for ids, some in zip(drawn, kept, strict=True)]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, rows in expected.items():
        assert torch.equal(found[key], rows)


@given(prompt_sets(), st.integers(1, 30), st.booleans())
def test_a_token_is_found_at_its_place_among_those_of_its_step(prompts, budget, in_packs):
    work = (shared if in_packs else padded)(prompts, budget)
    if in_packs:
        made = [work.tree.pack(step.start, step.stop, 16) for step in work.steps]
    else:
        made = [work.feed(step, Context(), Fake()) for step in work.steps]
    for index, one in enumerate(prompts):
        depths = np.arange(len(one))
        numbers, within = work.places(np.full(len(one), index), depths)
        for depth, number, place in zip(depths, numbers, within, strict=True):
            owner = made[number].owners[place]
            assert made[number].depths[place] == depth
            assert prompts[owner].ids[: depth + 1].tolist() == one.ids[: depth + 1].tolist()


# ---------------------------------------------------------------- rows


@given(prompt_sets(), st.integers(1, 30), st.booleans())
def test_padded_batches_give_every_prompts_kept_rows(prompts, budget, mixed):
    batches = plan_batches([*map(len, prompts)], budget, mixed=mixed)
    assert_equal(passed(PaddedWork(prompts, batches)), expected_rows(prompts))


@given(prompt_sets(), st.integers(1, 30))
def test_packs_give_every_prompts_kept_rows_also_those_of_earlier_packs(prompts, budget):
    assert_equal(passed(shared(prompts, budget)), expected_rows(prompts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("work", [padded, shared])
def test_a_mean_is_taken_in_float64_over_kept_rows_and_rounded_once(work, dtype):
    stem = list(range(300))
    prompts = [prompt([*stem, 7], range(1, 301)), prompt([*stem, 8], [5]), prompt([3], [0])]
    means = passed(work(prompts, 120, mean=True), dtype)
    rounded = {
        key: rows.double().mean(0, keepdim=True).to(dtype)
        for key, rows in expected_rows(prompts, dtype).items()
    }
    assert_equal(means, rounded)
    if dtype != torch.float32:  # the sum of so many in the dtype itself would differ
        narrow = expected_rows(prompts, dtype)[0, 0].cumsum(0)[-1:] / 300
        assert not torch.equal(means[0, 0], narrow)


def test_a_step_in_which_no_prompt_ends_gives_no_rows_and_no_means():
    prompts = [prompt([1, 2, 3, 4], [3])]
    for mean in (False, True):
        work = shared(prompts, 2, mean=mean)
        feed = work.feed(work.steps[0], Context(), Fake())
        assert feed.prompts == ()
        assert feed.rows(0, torch.ones(1, 2, WIDTH)).shape == (0, WIDTH)


def test_only_rows_that_a_later_prompt_may_keep_are_carried():
    prompts = [prompt(range(10), [7, 9]), prompt([*range(9), 30], [8])]
    work, context = cut_at(prompts, 3, 7), Context()
    carried = []
    for step in work.steps:
        feed = work.feed(step, context, Fake())
        feed.rows(0, stream_of(feed, prompts, 0))
        feed.finish(0)
        carried.append(len(context.rows.get(0, ())))
    # Nothing above depth 7 is kept.
    assert carried == [0, 0, 0]
    work, context = shared(prompts, 1), Context()
    for step in work.steps[:9]:
        feed = work.feed(step, context, Fake())
        feed.rows(0, stream_of(feed, prompts, 0))
        feed.finish(0)
    assert len(context.rows[0]) == 2


# ---------------------------------------------------------------- inputs


def test_padded_batches_pad_on_the_right_and_mask_it():
    prompts = [prompt([1, 2, 3], [0]), prompt([4], [0])]
    feed = PaddedWork(prompts, []).feed(Batch((1, 0), 3), Context(), Fake())
    assert feed.shape == (2, 3)
    assert feed.prompts == (1, 0)
    assert feed.inputs["input_ids"].tolist() == [[4, PAD, PAD], [1, 2, 3]]
    assert feed.inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert feed.owners.tolist() == [1, -1, -1, 0, 0, 0]
    assert feed.depths.tolist() == [0, 1, 2, 0, 1, 2]


def test_batches_without_padding_need_no_mask():
    prompts = [prompt([1, 2], [0]), prompt([4, 5], [0])]
    feed = PaddedWork(prompts, []).feed(Batch((0, 1), 2), Context(), Fake())
    assert feed.inputs.keys() == {"input_ids"}
    assert feed.inputs["input_ids"].dtype == torch.int64


def test_halves_of_a_batch_keep_its_padding():
    prompts = [prompt([1, 2, 3, 4], [0]), prompt([4], [0])]
    second = Batch((0, 1), 4).halves()[1]
    feed = PaddedWork(prompts, []).feed(second, Context(), Fake())
    assert feed.shape == (1, 4)
    assert feed.inputs["input_ids"].tolist() == [[4, PAD, PAD, PAD]]


@given(prompt_sets(), st.integers(1, 30))
def test_a_feed_has_as_many_tokens_as_its_step_halved_or_not(prompts, budget):
    for work in (padded(prompts, budget), shared(prompts, budget)):
        halves = [half for one in work.steps for half in (one.halves() if one.divisible else [one])]
        for steps in (work.steps, halves):
            context = Context()
            for step in steps:
                feed = work.feed(step, context, Fake())
                assert step.tokens == np.prod(feed.shape) == len(feed.owners) == len(feed.depths)
                feed.finish(0)


@given(prompt_sets(), st.integers(1, 10))
def test_packs_go_in_as_one_row_with_depths_for_positions(prompts, budget):
    work, context = shared(prompts, budget), Context()
    for step in work.steps:
        feed = work.feed(step, context, Fake())
        assert feed.shape == (1, step.tokens)
        assert feed.inputs["position_ids"].tolist() == [feed.depths.tolist()]
        ids = [prompts[o].ids[d] for o, d in zip(feed.owners, feed.depths, strict=True)]
        assert feed.inputs["input_ids"].tolist() == [ids]
        assert feed.inputs["attention_mask"].bool().all()
        feed.finish(0)


@given(prompt_sets(), st.integers(1, 30))
def test_both_ways_name_a_token_of_every_prefix_for_layers_that_are_known(prompts, budget):
    every = {tuple(one.ids[:n].tolist()) for one in prompts for n in range(1, len(one) + 1)}
    for work in (padded(prompts, budget), shared(prompts, budget)):
        named, context = set(), Context()
        for step in work.steps:
            feed = work.feed(step, context, Fake())
            places = zip(feed.owners, feed.depths, strict=True)
            named |= {tuple(prompts[o].ids[: d + 1].tolist()) for o, d in places if o >= 0}
            feed.finish(0)
        assert named == every


# ---------------------------------------------------------------- attention


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(FAMILIES["llama"], tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder):
    return open_model(ModelOptions(str(folder), device="cpu")).load(BLOCKS)


def fed(work, model, blocks):
    """Run the first step of a work and finish it as if so many blocks had run."""
    context = Context()
    with torch.inference_mode(), work.attention([model.model]):
        feed = work.feed(work.steps[0], context, model)
        with feed.running():
            model.forward(**feed.inputs)
        feed.finish(blocks)
    return context


@pytest.mark.parametrize("blocks", [0, 1, BLOCKS - 1, BLOCKS + 1])
def test_a_pack_is_refused_unless_every_block_attended_once(folder, model, blocks):
    with pytest.raises(PreflightError, match=f"every one of {blocks} blocks .* got {BLOCKS} att"):
        fed(shared(prompts_of(folder)), model, blocks)


def test_a_pack_leaves_keys_and_values_of_its_path_to_the_next(folder, model):
    work = shared(prompts_of(folder))
    context = fed(work, model, BLOCKS)
    carried = len(work.tree.pack(work.steps[0].start, work.steps[0].stop, 16).carried)
    assert carried > 0
    assert sorted(context.keys) == list(range(BLOCKS))
    for keys, values in context.keys.values():
        assert keys.shape == values.shape
        assert keys[:, :, :carried].shape == (1, 2, carried, 8)


def test_a_pack_that_is_refused_leaves_the_context_as_it_was(folder, model):
    work, context = shared(prompts_of(folder)), Context()
    with torch.inference_mode(), work.attention([model.model]):
        feed = work.feed(work.steps[0], context, model)
        with feed.running():
            model.forward(**feed.inputs)
    with pytest.raises(PreflightError):
        feed.finish(BLOCKS + 1)
    assert (context.keys, context.rows) == ({}, {})


def test_padded_batches_leave_nothing_and_keep_the_models_own_attention(folder, model):
    work = padded(prompts_of(folder))
    before = model.attention
    with work.attention([model.model]):
        assert model.attention == before
    assert fed(work, model, blocks=12345) == Context()


def test_a_tree_work_has_the_prompts_of_its_tree():
    prompts = [prompt([1, 2], [0])]
    work = shared(prompts)
    assert isinstance(work, TreeWork)
    assert work.prompts is prompts


# ---------------------------------------------------------------- what is left when some are done


@pytest.mark.parametrize("work", [padded, shared])
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=4, max_size=12),
    budget=st.integers(1, 5),
    chance=st.randoms(use_true_random=False),
)
def test_rows_of_what_is_left_are_those_of_the_prompts_that_are_not_done(
    work, prompts, budget, chance
):
    prompts = [prompt(ids, range(chance.randrange(len(ids)), len(ids))) for ids in prompts]
    left = {chance.randrange(len(prompts)) for _ in range(chance.randint(0, 3))}
    done = np.array([number not in left for number in range(len(prompts))])
    expected = {key: rows for key, rows in expected_rows(prompts).items() if key[1] in left}
    assert_equal(passed(work(prompts, budget).remaining(done)), expected)
