"""The check before a run lets right engines through and refuses every fault that it is there for.

Faults are put into a model, a work or an engine that is otherwise real.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import BLOCKS
from works import KINDS, Known, padded, prompts_of, run, shared

from probecache import prefixes
from probecache.engine import ResidentEngine, Rows
from probecache.errors import ModelError, OutOfMemoryError, PreflightError
from probecache.feeds import TreeWork
from probecache.models import ModelOptions, open_model
from probecache.prefixes import PrefixTree
from probecache.types import Dtype, TokenizedPrompt
from probecache.workflow.preflight import (
    Comparison,
    PlainRun,
    Sample,
    check_engine,
    choose_sample,
    tolerance,
)

LAYERS = tuple(range(BLOCKS + 1))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """Makes work of either kind of some prompts."""
    return KINDS[request.param]


def loaded(folder, dtype=Dtype.FLOAT32, start=0):
    return open_model(ModelOptions(str(folder), dtype=dtype, device="cpu")).load(BLOCKS, start)


def sample_of(prompts, start=None):
    return Sample(prompts, np.arange(len(prompts)), start)


def check(engine, model, work, dtype=Dtype.FLOAT32):
    comparison = Comparison(model, dtype)
    return check_engine(engine, comparison, sample_of(work.prompts), work, LAYERS)


def refused(engine, model, work, dtype=Dtype.FLOAT32):
    """Whether an engine is refused because its numbers are wrong."""
    with pytest.raises(PreflightError, match="does not batch as expected: nothing was extracted"):
        check(engine, model, work, dtype)
    return True


# ---------------------------------------------------------------- right engines


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("llama", "qwen3_moe", "gemma2") for kind in (padded, shared)]
    + [("bert", padded)],
)
def test_a_right_engine_passes_with_much_room_to_spare(folders, name, kind, dtype):
    model = loaded(folders(name), dtype)
    found = check(ResidentEngine(model), model, kind(prompts_of(folders(name))), dtype)
    assert found < tolerance(dtype) / 3


def test_a_right_engine_passes_from_a_known_layer_on(folders, kind):
    work = kind(prompts_of(folders("llama")))
    known = Known(2, run(ResidentEngine(loaded(folders("llama"))), work, LAYERS))
    model = loaded(folders("llama"), start=2)
    comparison, sample = Comparison(model, Dtype.FLOAT32), sample_of(work.prompts, known)
    assert check_engine(ResidentEngine(model), comparison, sample, work, [3, 4]) < 1e-5
    assert {layer for layer, _ in comparison.plain} == {3, 4}


def test_plain_forwards_are_run_once_for_both_ways_of_running(folders):
    model, prompts = loaded(folders("llama")), prompts_of(folders("llama"))
    comparison, sample = Comparison(model, Dtype.FLOAT32), sample_of(prompts)
    check_engine(ResidentEngine(model), comparison, sample, shared(prompts), LAYERS)
    before = dict(comparison.plain)
    check_engine(ResidentEngine(model), comparison, sample, padded(prompts), LAYERS)
    assert all(comparison.plain[key] is rows for key, rows in before.items())


# ---------------------------------------------------------------- wrong forwards


class Faulty:
    """A loaded model whose forward is told something else."""

    def __init__(self, model):
        self.loaded = model

    def __getattr__(self, name):
        return getattr(self.loaded, name)

    def forward(self, input_ids, **inputs):
        return self.loaded.forward(input_ids=input_ids, **self.changed(input_ids, inputs))


class MaskIgnored(Faulty):
    """Padding is seen by every token of an encoder."""

    def changed(self, ids, inputs):
        return {}


class PositionsShifted(Faulty):
    """Every token stands one place further on."""

    def changed(self, ids, inputs):
        places = torch.arange(ids.shape[1]).expand(ids.shape)
        return {**inputs, "position_ids": inputs.get("position_ids", places) + 1}


class PositionsStretched(PositionsShifted):
    """Tokens stand twice as far apart."""

    def changed(self, ids, inputs):
        return {**inputs, "position_ids": 2 * super().changed(ids, inputs)["position_ids"]}


class PositionsOfTheWalk(Faulty):
    """Tokens are counted through, whatever their depth."""

    def changed(self, ids, inputs):
        return {**inputs, "position_ids": torch.arange(ids.shape[1])[None]}


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize(
    ("name", "fault", "kind"),
    [
        ("bert", MaskIgnored, padded),
        ("modernbert", MaskIgnored, padded),
        ("gpt2", PositionsShifted, padded),
        ("gpt2", PositionsShifted, shared),
        ("llama", PositionsStretched, padded),
        ("llama", PositionsStretched, shared),
        ("gpt2", PositionsOfTheWalk, shared),
        ("llama", PositionsOfTheWalk, shared),
    ],
)
def test_a_forward_that_ignores_masks_or_moves_positions_is_refused(
    folders, name, fault, kind, dtype
):
    model = loaded(folders(name), dtype)
    assert refused(ResidentEngine(fault(model)), model, kind(prompts_of(folders(name))), dtype)


# ---------------------------------------------------------------- wrong sharing


class OtherContext(TreeWork):
    """Packs are given another context than they were left."""

    def feed(self, step, context, model):
        context.keys = {
            number: tuple(self.changed(one) for one in pair)
            for number, pair in context.keys.items()
        }
        return super().feed(step, context, model)


class ContextForgotten(OtherContext):
    def changed(self, one):
        return torch.zeros_like(one)


class ContextTurnedAround(OtherContext):
    def changed(self, one):
        return one.flip(2)


class CarriedFromElsewhere(TreeWork):
    """What a pack hands on are its first tokens, not the path to the next one."""

    def feed(self, step, context, model):
        original = self.tree.pack

        def pack(*arguments):
            right = original(*arguments)
            return replace(right, carried=np.arange(len(right.carried)))

        self.tree.pack = pack
        try:
            return super().feed(step, context, model)
        finally:
            del self.tree.pack


class RowsOfOtherTokens(TreeWork):
    """Rows that were carried from pack to pack belong one token further up."""

    def feed(self, step, context, model):
        context.rows = {layer: rows.roll(1, dims=0) for layer, rows in context.rows.items()}
        return super().feed(step, context, model)


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize(
    "fault", [ContextForgotten, ContextTurnedAround, CarriedFromElsewhere, RowsOfOtherTokens]
)
def test_a_context_that_is_not_what_was_left_is_refused(folders, fault, dtype):
    model, right = loaded(folders("llama"), dtype), shared(prompts_of(folders("llama")))
    work = fault(right.tree, right.steps, right.tile)
    assert refused(ResidentEngine(model), model, work, dtype)


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tokens_that_see_their_siblings_are_refused(folders, monkeypatch, name, dtype):
    def all_before(depths):
        path = np.ones((len(depths), depths[0]), dtype=bool)
        return np.concatenate([path, np.tri(len(depths), dtype=bool)], axis=1)

    model = loaded(folders(name), dtype)
    monkeypatch.setattr(prefixes, "_ancestry", all_before)
    assert refused(ResidentEngine(model), model, shared(prompts_of(folders(name)), 1000), dtype)


def test_the_pair_that_a_sample_is_made_of_is_enough_to_see_siblings_seen(folders, monkeypatch):
    texts = ["Is this a test? yes", "Is this a test? no", "Something else altogether, and long"]
    chosen = choose_sample(PrefixTree(prompts_of(folders("llama"), texts=texts)))
    model = loaded(folders("llama"))
    monkeypatch.setattr(
        prefixes,
        "_ancestry",
        lambda depths: np.tri(len(depths), depths[0] + len(depths), depths[0], dtype=bool),
    )
    assert refused(ResidentEngine(model), model, shared(chosen.prompts))


# ---------------------------------------------------------------- wrong engines


@pytest.mark.parametrize("dtype", list(Dtype))
def test_an_engine_that_counts_layers_from_one_is_refused(folders, kind, dtype):
    class OffByOne(ResidentEngine):
        def run(self, *arguments):
            for rows in super().run(*arguments):
                yield replace(rows, layer=min(rows.layer + 1, BLOCKS))

    model = loaded(folders("llama"), dtype)
    assert refused(OffByOne(model), model, kind(prompts_of(folders("llama"))), dtype)


def test_an_engine_that_mixes_up_prompts_of_one_length_is_refused(folders, kind):
    class Swapped(ResidentEngine):
        def run(self, *arguments):
            for rows in super().run(*arguments):
                yield Rows(rows.layer, rows.prompts, rows.values.roll(1, dims=0))

    model = loaded(folders("llama"))
    assert refused(Swapped(model), model, kind(prompts_of(folders("llama"))))


@pytest.mark.parametrize("dtype", list(Dtype))
def test_one_wrong_token_in_a_prompt_is_refused_where_no_expert_can_stray(folders, kind, dtype):
    class FirstTokenLost(ResidentEngine):
        def run(self, *arguments):
            for rows in super().run(*arguments):
                lost = rows.values[[1, *range(1, len(rows.values))]]
                yield Rows(rows.layer, rows.prompts, lost)

    model = loaded(folders("llama"), dtype)
    assert refused(FirstTokenLost(model), model, kind(prompts_of(folders("llama"))), dtype)


def test_rows_that_only_batching_makes_infinite_are_refused(folders, kind):
    class Overflowing(ResidentEngine):
        def run(self, *arguments):
            for rows in super().run(*arguments):
                yield Rows(rows.layer, rows.prompts, rows.values * torch.inf)

    model = loaded(folders("llama"))
    with pytest.raises(PreflightError, match="got inf"):
        check(Overflowing(model), model, kind(prompts_of(folders("llama"))))


# ---------------------------------------------------------------- errors on the way


class Failing(Faulty):
    """A model that raises where a single prompt is run."""

    def __init__(self, model, error):
        super().__init__(model)
        self.error = error

    def plain_hidden_states(self, *_arguments):
        raise self.error

    run_block = plain_hidden_states


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_memory_that_runs_out_in_the_check_itself_is_told_as_such(folders, kind, error):
    model = Failing(loaded(folders("llama")), error("out of memory"))
    with pytest.raises(OutOfMemoryError, match="room for a prompt of"):
        check(ResidentEngine(model), model, kind(prompts_of(folders("llama"))))


def test_a_model_that_cannot_run_on_token_ids_alone_is_refused(folders, kind):
    missing = TypeError("forward() missing 1 required argument: 'pixel_values'")
    model = Failing(loaded(folders("llama")), missing)
    with pytest.raises(ModelError, match="pixel_values"):
        check(ResidentEngine(model), model, kind(prompts_of(folders("llama"))))


def test_errors_while_a_block_runs_on_a_single_prompt_are_named_too(folders):
    prompts = prompts_of(folders("llama"))
    for error, named in [
        (MemoryError("out of memory"), OutOfMemoryError),
        (TypeError("no such mask"), ModelError),
    ]:
        model = Failing(loaded(folders("llama")), error)
        plain = PlainRun(Comparison(model, Dtype.FLOAT32), sample_of(prompts), LAYERS)
        with pytest.raises(named):
            plain.through(0)


# ---------------------------------------------------------------- block by block


@pytest.mark.parametrize("name", ["llama", "gemma4", "gpt2", "bert"])
def test_plain_rows_block_by_block_are_those_of_plain_forwards(folders, name):
    source = open_model(ModelOptions(str(folders(name)), dtype=Dtype.FLOAT32, device="cpu"))
    prompts, model = prompts_of(folders(name)), source.skeleton(BLOCKS)
    plain = PlainRun(Comparison(model, Dtype.FLOAT32), sample_of(prompts), LAYERS)
    for index in range(BLOCKS):
        passing = model.blocks[index]
        model.blocks[index] = source.build_block(index, source.read_block(index))
        plain.through(index)
        model.blocks[index] = passing
    whole = loaded(folders(name))
    for index, prompt in enumerate(prompts):
        with torch.inference_mode():
            states = whole.plain_hidden_states(torch.from_numpy(prompt.ids.astype("i8"))[None])
        for layer in LAYERS:
            assert torch.equal(plain.comparison.plain[layer, index], states[layer])


def test_plain_rows_from_a_known_layer_on_need_no_lower_block(folders):
    prompts, whole = prompts_of(folders("llama")), loaded(folders("llama"))
    known = Known(2, run(ResidentEngine(whole), padded(prompts), LAYERS))
    comparison = Comparison(loaded(folders("llama"), start=2), Dtype.FLOAT32)
    plain = PlainRun(comparison, sample_of(prompts, known), [3])
    plain.through(2)
    with torch.inference_mode():
        states = whole.plain_hidden_states(torch.from_numpy(prompts[0].ids.astype("i8"))[None])
    assert torch.allclose(comparison.plain[3, 0], states[3], rtol=1e-4, atol=1e-5)
    assert {layer for layer, _ in comparison.plain} == {3}


# ---------------------------------------------------------------- which prompts


def chosen_ids(prompts):
    tree = PrefixTree([TokenizedPrompt(np.array(p, "i4"), np.array([0], "i4")) for p in prompts])
    return choose_sample(tree)


def test_a_sample_holds_a_short_prompt_with_what_shares_most_with_it_and_a_long_one():
    pair = [[1, 2, 3, 4], [1, 2, 3, 5, 6]]
    others = [[7 + length] * length for length in range(6, 46)]
    sample = chosen_ids([others[0], pair[1], *others[1:], pair[0]])
    ids = [prompt.ids.tolist() for prompt in sample.prompts]
    assert max(map(len, ids)) == 30  # 3 % of 1,026 distinct tokens
    assert len(ids) <= 3


def test_a_long_prompt_that_would_take_more_than_a_few_percent_of_the_run_is_not_in_the_sample():
    others = [[7 + length] * length for length in range(6, 15)]
    sample = chosen_ids(others)
    assert max(map(len, sample.prompts)) < 8


def test_a_sample_holds_what_shares_most_with_its_short_prompt():
    pair = [[1, 2, 3, 4], [1, 2, 3, 5, 6]]
    sample = chosen_ids([*pair, [1, 9, 9, 9, 9, 9], [8] * 7])
    assert all(member in [prompt.ids.tolist() for prompt in sample.prompts] for member in pair)


def test_every_token_of_a_sample_is_compared():
    for prompt in chosen_ids([[1, 2, 3], [1, 2], [4]]).prompts:
        assert prompt.kept.tolist() == list(range(len(prompt)))


@pytest.mark.parametrize("prompts", [[[1]], [[1, 2], [1, 2]], [[1], [1, 2]]])
def test_few_prompts_are_sample_enough(prompts):
    sample = chosen_ids(prompts)
    assert 1 <= len(sample.prompts) <= len(prompts)
    assert [sample.prompts[n].ids.tolist() for n in range(len(sample.prompts))] == [
        prompts[index] for index in sample.indices
    ]


def test_a_sample_asks_for_the_known_rows_of_the_runs_prompts_and_keeps_padding():
    class Recording:
        layer = 3

        def rows(self, prompts, depths):
            self.asked = prompts.tolist(), depths.tolist()
            return torch.zeros(len(prompts), 4)

    prompts = [TokenizedPrompt(np.arange(3, dtype="i4"), np.array([0], "i4"))] * 2
    start = Recording()
    sample = Sample(prompts, np.array([5, 9]), start)
    sample.rows(np.array([0, 1, -1]), np.array([2, 1, 0]))
    assert start.asked == ([5, 9, -1], [2, 1, 0])
    assert sample.known(1).shape == (1, 3, 4)
    assert start.asked == ([9, 9, 9], [0, 1, 2])
    assert (sample.layer, sample.as_start()) == (3, sample)
    assert Sample(prompts, np.array([5, 9])).as_start() is None
