"""Steps through a model that is in memory: which rows come back, memory that runs out, and layers
that are known already. Padded batches and packs of a prefix tree pass the same tests.

Models are real and tiny; where memory must run out, a forward is made to raise as torch does.
"""

from __future__ import annotations

import gc
from itertools import pairwise

import numpy as np
import pytest
import torch
from families import (
    BLOCKS,
    FAMILIES,
    full_model,
    plain_layers,
    relative_difference,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from works import (
    KINDS,
    Known,
    equal,
    largest_difference,
    padded,
    prompts_of,
    run,
    shared,
    sorted_out,
)

from probecache import engine
from probecache.engine import ResidentEngine
from probecache.errors import OutOfMemoryError
from probecache.feeds import PaddedWork, TreeWork
from probecache.models import ModelOptions, open_model
from probecache.plan import Batch, Stretch
from probecache.prefixes import PrefixTree
from probecache.types import Dtype, TokenizedPrompt

LAYERS = tuple(range(BLOCKS + 1))
WHOLE = 10_000  # a budget that everything goes into at once


@pytest.fixture(scope="module", autouse=True)
def collections_are_quick():
    """Collecting when memory runs out need not go through all that imports left behind."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """Makes work of either kind of some prompts, within a budget of tokens."""
    return KINDS[request.param]


def loaded(folder, dtype=Dtype.FLOAT32, start=0):
    return open_model(ModelOptions(str(folder), dtype=dtype, device="cpu")).load(BLOCKS, start)


def one_by_one(prompts):
    return PaddedWork(prompts, [Batch((n,), len(prompt)) for n, prompt in enumerate(prompts)])


# ---------------------------------------------------------------- going on in the middle


# Dense, sliding windows, experts, both in turn, keys of two parts.
GOING_ON = ["llama", "mistral", "qwen3_moe", "gpt_oss", "gemma3", "gpt2", "deepseek_v3"]


@pytest.fixture(scope="module")
def engines(folders):
    """Engines by family, each loaded once."""
    made = {}

    def engine_of(name):
        if name not in made:
            made[name] = ResidentEngine(loaded(folders(name)))
        return made[name]

    return engine_of


def without(rows, done):
    """Those of the prompts that are not done."""
    return {key: values for key, values in rows.items() if not done[key[1]]}


@st.composite
def branching(draw):
    """Prompts of few different ids, long against a step, and which of them are done."""
    ids = st.lists(st.integers(3, 5), min_size=1, max_size=9)
    drawn = draw(st.lists(ids, min_size=1, max_size=7))
    for old in draw(st.lists(st.sampled_from(drawn), max_size=4)):
        drawn.append(old[: draw(st.integers(1, len(old)))] + draw(ids))
    kept = {
        "last": lambda count: [count - 1],
        "all": range,
        "some": lambda count: sorted(draw(st.sets(st.integers(0, count - 1), min_size=1))),
    }[draw(st.sampled_from(["last", "all", "some"]))]
    prompts = [
        TokenizedPrompt(np.array(one, np.int32), np.array(kept(len(one)), np.int32))
        for one in drawn
    ]
    return prompts, np.array([draw(st.booleans()) for _ in prompts])


@pytest.mark.parametrize("name", GOING_ON)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=branching(), budget=st.integers(1, 24), tile=st.sampled_from([2, 5, 16]))
@pytest.mark.parametrize("mean", [False, True], ids=["rows", "mean"])
def test_the_rows_that_are_left_are_those_of_the_whole_run_bit_for_bit(
    engines, name, drawn, budget, tile, mean
):
    prompts, done = drawn
    for work in (shared(prompts, budget, tile=tile, mean=mean), padded(prompts, budget, mean=mean)):
        whole = run(engines(name), work, LAYERS)
        left = sorted_out(engines(name).run(work.remaining(done), LAYERS), work)
        assert equal(left, without(whole, done))


def test_nothing_is_run_when_all_is_done(engines, kind, folders):
    work, told = kind(prompts_of(folders("llama"))), []
    done = np.ones(len(work.prompts), dtype=bool)
    assert list(engines("llama").run(work.remaining(done), LAYERS, None, told.append)) == []
    assert told == []


def replayed(work, number):
    """Steps that a run computes again which was stopped after so many."""
    done = work.tree.ends < work.steps[number].start
    again = [step for step in work.remaining(done).steps if step.start < work.steps[number].start]
    return len(again)


def test_pairs_behind_one_system_prompt_need_few_steps_again():
    chance = np.random.default_rng(0)
    system, prompts = chance.integers(3, 250, 40), []
    for _ in range(200):
        question = chance.integers(3, 250, chance.integers(10, 60))
        for _ in range(2):
            ids = np.concatenate([system, question, chance.integers(3, 250, 12)])
            prompts.append(TokenizedPrompt(ids.astype(np.int32), np.array([5], np.int32)))
    work = shared(prompts, 512)
    assert len(work.steps) > 20
    # All stand under the system prompt in the first step.
    assert {replayed(work, number) for number in range(1, len(work.steps))} == {1}


def test_a_long_prompt_over_many_steps_needs_its_own_again_and_no_others():
    chance = np.random.default_rng(0)
    lengths = [30, 30, 900, 30, 30]
    prompts = [
        TokenizedPrompt(
            np.concatenate([[1, first], chance.integers(3, 250, count)]).astype(np.int32),
            np.array([count], np.int32),
        )
        for first, count in enumerate(lengths, 3)
    ]
    work = shared(prompts, 100)
    first = int(work.tree.bounds[2])
    touched = [step for step in work.steps if step.stop > first and step.start < first + 901]
    assert len(touched) > 8
    done = np.array([True, True, False, True, True])
    left = work.remaining(done).steps
    # BOS is in the first.
    assert left == [work.steps[0], *(step for step in touched if step != work.steps[0])]
    after = work.remaining(np.array([True, True, True, True, False])).steps
    assert len(after) <= 2


def test_steps_may_still_be_halved_when_a_run_goes_on(folders, monkeypatch):
    prompts = prompts_of(folders("llama"))
    model = ResidentEngine(loaded(folders("llama")))
    done = np.arange(len(prompts)) % 2 == 0
    work = shared(prompts, 60)
    halved = TreeWork(work.tree, [half for step in work.steps for half in step.halves()], work.tile)
    whole = run(model, halved, LAYERS)
    model = ResidentEngine(loaded(folders("llama")), 40)
    left = sorted_out(model.run(work.remaining(done), LAYERS), work)
    assert largest_difference(left, {k: v for k, v in whole.items() if not done[k[1]]}) < 1e-6


# ---------------------------------------------------------------- which rows


KEPT = {
    "the first": lambda count: [0],
    "the last": lambda count: [count - 1],
    "some in the middle": lambda count: range(count // 3, count // 2 + 1),
    "every second": lambda count: range(0, count, 2),
}


@pytest.mark.parametrize(("name", "kind"), [("llama", padded), ("llama", shared), ("bert", padded)])
@pytest.mark.parametrize("kept", KEPT)
def test_kept_rows_are_those_of_a_plain_forward_in_the_order_of_kept(folders, name, kind, kept):
    folder = folders(name)
    model = full_model(FAMILIES[name], folder)
    prompts = prompts_of(folder, KEPT[kept])
    found = run(ResidentEngine(loaded(folder)), kind(prompts), LAYERS)
    for index, prompt in enumerate(prompts):
        plain = plain_layers(FAMILIES[name], model, prompt.ids.tolist())
        for layer in LAYERS:
            rows = plain[layer][prompt.kept.tolist()]
            assert relative_difference(found[layer, index], rows) < 1e-5


@pytest.mark.parametrize("dtype", list(Dtype))
def test_means_are_taken_in_float64_and_then_rounded_once(folders, kind, dtype):
    prompts = prompts_of(folders("llama"), lambda count: range(1, count))
    engine = ResidentEngine(loaded(folders("llama"), dtype))
    rows, means = (run(engine, kind(prompts, mean=mean), LAYERS) for mean in (False, True))
    for key, found in means.items():
        exact = rows[key].double().mean(0, keepdim=True)
        assert found.dtype == getattr(torch, dtype)
        assert torch.equal(found, exact.to(found.dtype))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta"])
def test_one_batch_of_all_prompts_equals_a_batch_for_each(folders, name):
    engine, prompts = ResidentEngine(loaded(folders(name))), prompts_of(folders(name))
    alone = run(engine, one_by_one(prompts), LAYERS)
    together = run(engine, padded(prompts, WHOLE), LAYERS)
    assert largest_difference(together, alone) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("tile", [5, 512])
@pytest.mark.parametrize("budget", [1, 23, WHOLE])
def test_packs_of_any_size_in_tiles_of_any_size_equal_prompts_one_by_one(
    folders, name, tile, budget
):
    engine, prompts = ResidentEngine(loaded(folders(name))), prompts_of(folders(name))
    alone = run(engine, one_by_one(prompts), LAYERS)
    assert largest_difference(run(engine, shared(prompts, budget, tile=tile), LAYERS), alone) < 1e-5


def test_only_the_layers_that_were_asked_for_come_out_and_no_hook_stays(folders, kind):
    model = loaded(folders("llama"))
    attention = model.attention
    rows = list(ResidentEngine(model).run(kind(prompts_of(folders("llama")), WHOLE), [1, 3]))
    assert [piece.layer for piece in rows] == [1, 3]
    assert untouched(model)
    assert model.attention == attention


def test_no_hook_stays_when_rows_are_no_longer_asked_for(folders, kind):
    model = loaded(folders("llama"))
    attention = model.attention
    rows = ResidentEngine(model).run(kind(prompts_of(folders("llama")), 30), LAYERS)
    next(rows)
    rows.close()
    assert untouched(model)
    assert model.attention == attention


def untouched(model):
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_rows_do_not_depend_on_the_prompts_they_share_a_batch_with(folders):
    engine, prompts = ResidentEngine(loaded(folders("bert"))), prompts_of(folders("bert"))
    longest = max(map(len, prompts))
    pair, other = (
        {
            rows.layer: rows.values[-len(prompts[5]) :]
            for rows in engine.run(PaddedWork(prompts, [Batch((first, 5), longest)]), LAYERS)
        }
        for first in (3, 0)
    )
    assert largest_difference(pair, other) < 1e-5


def test_packs_in_which_no_prompt_ends_give_no_rows(folders):
    prompts = prompts_of(folders("llama"), texts=["a long text alone", "a long text again"])
    work = shared(prompts, 4)
    found = list(ResidentEngine(loaded(folders("llama"))).run(work, LAYERS))
    assert len(work.steps) > 2
    assert {rows.prompts for rows in found} == {(0,), (1,)}


def test_told_adds_up_to_tokens_times_blocks(folders, kind):
    work, told = kind(prompts_of(folders("llama"))), []
    run(ResidentEngine(loaded(folders("llama"))), work, LAYERS, None, told.append)
    assert told == [step.tokens * BLOCKS for step in work.steps]


def test_shared_prefixes_are_computed_once(folders):
    prompts, told = prompts_of(folders("llama")), []
    engine = ResidentEngine(loaded(folders("llama")))
    run(engine, shared(prompts), LAYERS, None, told.append)
    prefixes = {tuple(p.ids[:n]) for p in prompts for n in range(1, len(p) + 1)}
    assert sum(told) == len(prefixes) * BLOCKS


# ---------------------------------------------------------------- layers that are known already


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma4_dense", "llama4", "opt"])
@pytest.mark.parametrize("start", [0, 1, BLOCKS - 1])
def test_rows_from_a_known_layer_on_are_the_same_bit_for_bit(folders, kind, name, start):
    work = kind(prompts_of(folders(name)))
    expected = run(ResidentEngine(loaded(folders(name))), work, LAYERS)
    upper, above = ResidentEngine(loaded(folders(name), start=start)), LAYERS[start + 1 :]
    found = run(upper, work, above, Known(start, expected))
    assert equal(found, {key: rows for key, rows in expected.items() if key[0] > start})
    assert untouched(upper.model)


def test_told_counts_only_the_blocks_above_a_known_layer(folders, kind):
    prompts, told = prompts_of(folders("llama")), []
    work = kind(prompts)
    whole = run(ResidentEngine(loaded(folders("llama"))), work, LAYERS)
    upper = ResidentEngine(loaded(folders("llama"), start=3))
    run(upper, work, [4], Known(3, whole), told.append)
    assert told == [step.tokens * (BLOCKS - 3) for step in work.steps]


def test_wrong_rows_at_the_known_layer_change_what_comes_out(folders, kind):
    work = kind(prompts_of(folders("llama")))
    expected = run(ResidentEngine(loaded(folders("llama"))), work, LAYERS)
    other = {key: rows.roll(1, dims=0) for key, rows in expected.items()}
    upper = ResidentEngine(loaded(folders("llama"), start=2))
    found = run(upper, work, [4], Known(2, other))
    assert relative_difference(found[4, 0], expected[4, 0]) > 0.1


# ---------------------------------------------------------------- memory


class Cramped:
    """A loaded model without room for more than `limit` tokens."""

    def __init__(self, model, limit, error=torch.OutOfMemoryError):
        self.loaded, self.limit, self.error, self.sizes = model, limit, error, []

    def __getattr__(self, name):
        return getattr(self.loaded, name)

    def forward(self, input_ids, **more):
        self.sizes.append(input_ids.numel())
        # Fails late, with some layers already caught and keys handed on, as a device does.
        output = self.loaded.forward(input_ids=input_ids, **more)
        if input_ids.numel() > self.limit:
            raise self.error(f"out of memory: tried to allocate {input_ids.numel()} tokens")
        return output


@pytest.mark.parametrize(
    ("error", "limit"),
    [(torch.OutOfMemoryError, 60), (MemoryError, 120), (RuntimeError, 150)],
)
def test_every_row_comes_out_once_and_right_when_memory_runs_out(folders, kind, error, limit):
    model, prompts = loaded(folders("llama")), prompts_of(folders("llama"))
    expected = run(ResidentEngine(model), one_by_one(prompts), LAYERS)
    cramped = Cramped(model, limit, error)
    found = run(ResidentEngine(cramped), kind(prompts, WHOLE), LAYERS)
    assert max(cramped.sizes) > limit
    assert largest_difference(found, expected) < 1e-5
    assert untouched(model)


@pytest.mark.parametrize("name", ["mistral", "llama4", "gemma4"])
def test_halved_packs_hand_on_to_one_another(folders, name):
    model, prompts = loaded(folders(name)), prompts_of(folders(name))
    expected = run(ResidentEngine(model), one_by_one(prompts), LAYERS)
    found = run(ResidentEngine(Cramped(model, 9)), shared(prompts, 80), LAYERS)
    assert largest_difference(found, expected) < FAMILIES[name].tolerance


def test_told_adds_up_although_steps_are_halved(folders, kind):
    work, told = kind(prompts_of(folders("llama")), WHOLE), []
    cramped = Cramped(loaded(folders("llama")), 60)
    run(ResidentEngine(cramped), work, LAYERS, None, told.append)
    assert len(told) > len(work.steps)
    assert sum(told) == sum(step.tokens for step in work.steps) * BLOCKS


def test_a_pack_that_failed_at_the_very_end_is_run_again_from_the_same_context(
    folders, kind, monkeypatch
):
    made = []

    def without_room_for_the_second(prompts, kept):
        made.append(prompts)
        if len(made) == 2:
            raise MemoryError
        return transfer(prompts, kept)

    transfer = engine.Transfer
    work = kind(prompts_of(folders("llama")))
    expected = run(ResidentEngine(loaded(folders("llama"))), work, LAYERS)
    monkeypatch.setattr(engine, "Transfer", without_room_for_the_second)
    found = run(ResidentEngine(loaded(folders("llama"))), work, LAYERS)
    assert largest_difference(found, expected) < 1e-5


def test_a_known_layer_and_halved_steps_go_together(folders, kind):
    work = kind(prompts_of(folders("llama")), WHOLE)
    expected = run(ResidentEngine(loaded(folders("llama"))), work, LAYERS)
    upper = Cramped(loaded(folders("llama"), start=2), 60)
    found = run(ResidentEngine(upper), work, [3, 4], Known(2, expected))
    wanted = {key: rows for key, rows in expected.items() if key[0] > 2}
    assert largest_difference(found, wanted) < 1e-5


def eight_of_each(prompt):
    length = len(prompt)
    steps = [Batch(tuple(range(at, at + 8)), length) for at in range(0, 32, 8)]
    return PaddedWork([prompt] * 32, steps), length


def stretches_of_eight(prompts):
    tree = PrefixTree(prompts)
    stop = len(tree) // 8 * 8
    steps = [Stretch(at, at + 8) for at in range(0, stop, 8)]
    return TreeWork(tree, [*steps, Stretch(stop, len(tree))], 16), len(steps)


def test_batches_after_the_first_that_did_not_fit_are_cut_before_they_run(folders):
    work, length = eight_of_each(prompts_of(folders("llama"))[0])
    cramped = Cramped(loaded(folders("llama")), 4 * length)
    run(ResidentEngine(cramped), work, LAYERS)
    assert cramped.sizes == [8 * length] + [4 * length] * 8


def test_stretches_after_the_first_that_did_not_fit_are_cut_before_they_run(folders):
    work, count = stretches_of_eight(prompts_of(folders("llama")))
    cramped = Cramped(loaded(folders("llama")), 4)
    run(ResidentEngine(cramped), work, LAYERS)
    assert cramped.sizes[: 1 + 2 * count] == [8] + [4] * 2 * count
    assert max(cramped.sizes[1:]) == 4


def test_a_single_prompt_without_room_is_named_by_its_length(folders):
    model, prompts = loaded(folders("llama")), prompts_of(folders("llama"))
    longest = max(map(len, prompts))
    with pytest.raises(OutOfMemoryError, match=f"a prompt of {longest} tokens"):
        run(ResidentEngine(Cramped(model, longest - 1)), padded(prompts, WHOLE), LAYERS)


def test_an_end_comes_where_not_even_one_token_has_room(folders, kind):
    model, prompts = loaded(folders("llama")), prompts_of(folders("llama"))
    cramped = Cramped(model, 0)
    with pytest.raises(OutOfMemoryError, match="memory ran out"):
        run(ResidentEngine(cramped), kind(prompts, WHOLE), LAYERS)
    assert all(later < sooner for sooner, later in pairwise(cramped.sizes))
    assert untouched(model)


def test_other_errors_of_a_forward_are_not_taken_for_lack_of_memory(folders, kind):
    class Broken(Cramped):
        def forward(self, **_inputs):
            raise RuntimeError("shapes do not match")

    model = loaded(folders("llama"))
    attention = model.attention
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(ResidentEngine(Broken(model, 0)), kind(prompts_of(folders("llama"))), LAYERS)
    assert untouched(model)
    assert model.attention == attention


# ---------------------------------------------------------------- kinds of models


@pytest.mark.parametrize("name", FAMILIES)
def test_models_that_route_tokens_to_experts_are_known(folders, name):
    routed = name in ("qwen3_moe", "mixtral", "gpt_oss", "llama4", "deepseek_v3")
    assert loaded(folders(name)).has_experts == routed
