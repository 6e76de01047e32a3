"""Batches through a model: memory that runs out, which rows come back, and the check before a run.

Models are real and tiny; where memory must run out, a forward is made to raise as torch does.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import (
    BLOCKS,
    FAMILIES,
    TEXTS,
    build,
    full_model,
    plain_layers,
    relative_difference,
    token_ids,
)

from probecache.engine import ResidentEngine, Rows
from probecache.errors import ModelError, OutOfMemoryError, PreflightError
from probecache.models import ModelOptions, open_model
from probecache.plan import Batch, plan_batches
from probecache.types import Dtype, TokenizedPrompt
from probecache.workflow.preflight import check_engine, tolerance

LAYERS = tuple(range(BLOCKS + 1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    built = {}

    def folder(name):
        if name not in built:
            built[name] = build(FAMILIES[name], tmp_path_factory.mktemp(name))
        return built[name]

    return folder


def loaded(folder, dtype=Dtype.FLOAT32):
    return open_model(ModelOptions(str(folder), dtype=dtype, device="cpu")).load(BLOCKS)


def prompts_of(folder, kept=lambda count: range(count)):
    """The families' texts as prompts; kept(number of tokens) gives the kept indices."""
    found = []
    for text in TEXTS:
        ids = np.array(token_ids(folder, text), dtype=np.int32)
        found.append(TokenizedPrompt(ids, np.array(kept(len(ids)), dtype=np.int32)))
    return found


def run(engine, prompts, batches, **options):
    """Rows by (layer, prompt); fails if any come out twice."""
    found = {}
    mean = options.get("mean", False)
    for rows in engine.run(prompts, batches, LAYERS, **options):
        sizes = [1 if mean else len(prompts[index].kept) for index in rows.prompts]
        assert len(rows.values) == sum(sizes)
        pieces = rows.values.split(sizes)
        for index, piece in zip(rows.prompts, pieces, strict=True):
            assert (rows.layer, index) not in found
            found[rows.layer, index] = piece
    return found


def one_by_one(prompts):
    return [Batch((index,), len(prompt)) for index, prompt in enumerate(prompts)]


def all_in_one(prompts):
    return [Batch(tuple(range(len(prompts))), max(map(len, prompts)))]


def largest_difference(found, expected):
    assert found.keys() == expected.keys()
    return max(relative_difference(found[key], expected[key]) for key in expected)


# ---------------------------------------------------------------- which rows


KEPT = {
    "the first": lambda count: [0],
    "the last": lambda count: [count - 1],
    "some in the middle": lambda count: range(count // 3, count // 2 + 1),
    "every second": lambda count: range(0, count, 2),
}


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("kept", KEPT)
def test_kept_rows_are_those_of_a_plain_forward_in_the_order_of_kept(folders, name, kept):
    folder = folders(name)
    model = full_model(FAMILIES[name], folder)
    prompts = prompts_of(folder, KEPT[kept])
    found = run(ResidentEngine(loaded(folder)), prompts, plan_batches([*map(len, prompts)], 100))
    for index, prompt in enumerate(prompts):
        plain = plain_layers(FAMILIES[name], model, prompt.ids.tolist())
        for layer in LAYERS:
            rows = plain[layer][prompt.kept.tolist()]
            assert relative_difference(found[layer, index], rows) < 1e-5


@pytest.mark.parametrize("dtype", list(Dtype))
def test_means_are_taken_in_float64_and_then_rounded_once(folders, dtype):
    folder = folders("llama")
    prompts = prompts_of(folder, lambda count: range(1, count))
    engine, batches = ResidentEngine(loaded(folder, dtype)), all_in_one(prompts_of(folder))
    rows, means = (run(engine, prompts, batches, mean=mean) for mean in (False, True))
    for key, found in means.items():
        exact = rows[key].double().mean(0, keepdim=True)
        assert found.dtype == getattr(torch, dtype)
        assert torch.equal(found, exact.to(found.dtype))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta"])
def test_one_batch_of_all_prompts_equals_a_batch_for_each(folders, name):
    engine, prompts = ResidentEngine(loaded(folders(name))), prompts_of(folders(name))
    alone = run(engine, prompts, one_by_one(prompts))
    together = run(engine, prompts, all_in_one(prompts))
    assert largest_difference(together, alone) < 1e-5


def test_only_the_layers_that_were_asked_for_come_out_and_no_hook_stays(folders):
    model, prompts = loaded(folders("llama")), prompts_of(folders("llama"))
    rows = list(ResidentEngine(model).run(prompts, all_in_one(prompts), [1, 3]))
    assert [piece.layer for piece in rows] == [1, 3]
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_rows_do_not_depend_on_the_prompts_they_share_a_batch_with(folders):
    engine, prompts = ResidentEngine(loaded(folders("bert"))), prompts_of(folders("bert"))
    longest = max(map(len, prompts))
    pair = run(engine, prompts, [Batch((3, 5), longest)])
    other = run(engine, prompts, [Batch((0, 5), longest)])
    assert all(relative_difference(pair[x, 5], other[x, 5]) < 1e-5 for x in LAYERS)


# ---------------------------------------------------------------- memory


class Cramped:
    """A loaded model without room for more than `limit` padded tokens."""

    def __init__(self, model, limit, error=torch.OutOfMemoryError):
        self.model, self.limit, self.error, self.sizes = model, limit, error, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def forward(self, input_ids, attention_mask, **more):
        self.sizes.append(input_ids.numel())
        if input_ids.numel() > self.limit:
            # Fails late, with some layers already caught, as a device does.
            self.model.forward(input_ids, attention_mask, **more)
            raise self.error(f"out of memory: tried to allocate {input_ids.numel()} tokens")
        return self.model.forward(input_ids, attention_mask, **more)

    def plain_hidden_states(self, input_ids):
        if input_ids.numel() > self.limit:
            raise self.error("out of memory")
        return self.model.plain_hidden_states(input_ids)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
@pytest.mark.parametrize("limit", [60, 120, 250])
def test_every_row_comes_out_once_and_right_when_memory_runs_out(folders, error, limit):
    model, prompts = loaded(folders("llama")), prompts_of(folders("llama"))
    expected = run(ResidentEngine(model), prompts, one_by_one(prompts))
    cramped = Cramped(model, limit, error)
    found = run(ResidentEngine(cramped), prompts, all_in_one(prompts))
    assert max(cramped.sizes) > limit
    assert largest_difference(found, expected) < 1e-5


def test_batches_after_the_first_that_did_not_fit_are_cut_before_they_run(folders):
    model = loaded(folders("llama"))
    prompt = prompts_of(folders("llama"))[0]
    length = len(prompt)
    prompts = [prompt] * 32
    batches = [Batch(tuple(range(at, at + 8)), length) for at in range(0, 32, 8)]
    cramped = Cramped(model, 4 * length)
    found = run(ResidentEngine(cramped), prompts, batches)
    assert len(found) == 32 * len(LAYERS)
    assert cramped.sizes == [8 * length] + [4 * length] * 8


def test_a_single_prompt_without_room_is_named_by_its_length(folders):
    model, prompts = loaded(folders("llama")), prompts_of(folders("llama"))
    longest = max(map(len, prompts))
    with pytest.raises(OutOfMemoryError, match=f"a prompt of {longest} tokens"):
        run(ResidentEngine(Cramped(model, longest - 1)), prompts, all_in_one(prompts))


def test_other_errors_of_a_forward_are_not_taken_for_lack_of_memory(folders):
    class Broken(Cramped):
        def forward(self, *_args, **_more):
            raise RuntimeError("shapes do not match")

    prompts = prompts_of(folders("llama"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(ResidentEngine(Broken(loaded(folders("llama")), 0)), prompts, all_in_one(prompts))


# ---------------------------------------------------------------- the check before a run


def check(engine, model, prompts, dtype=Dtype.FLOAT32):
    return check_engine(engine, model, prompts, LAYERS, dtype, token_budget=10_000)


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "bert"])
def test_a_right_engine_passes_with_much_room_to_spare(folders, name, dtype):
    model = loaded(folders(name), dtype)
    found = check(ResidentEngine(model), model, prompts_of(folders(name)), dtype)
    assert found < tolerance(dtype) / 3


class MaskIgnored:
    """Padding is seen by every token of an encoder."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def forward(self, input_ids, attention_mask, **more):
        return self.model.forward(input_ids, self.mask(attention_mask), **self.more(input_ids))

    def mask(self, attention_mask):
        return None

    def more(self, input_ids):
        return {}


class PositionsShifted(MaskIgnored):
    """Every token stands one place further on."""

    def mask(self, attention_mask):
        return attention_mask

    def more(self, input_ids):
        places = torch.arange(1, input_ids.shape[1] + 1)
        return {"position_ids": places.expand(input_ids.shape)}


class PositionsStretched(PositionsShifted):
    """Tokens stand twice as far apart."""

    def more(self, input_ids):
        return {"position_ids": 2 * super().more(input_ids)["position_ids"]}


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("bert", MaskIgnored),
        ("modernbert", MaskIgnored),
        ("gpt2", PositionsShifted),
        ("llama", PositionsStretched),
    ],
)
def test_a_forward_that_ignores_masks_or_moves_positions_is_refused(folders, name, fault, dtype):
    model = loaded(folders(name), dtype)
    with pytest.raises(PreflightError, match="does not batch as expected"):
        check(ResidentEngine(fault(model)), model, prompts_of(folders(name)), dtype)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_an_engine_that_counts_layers_from_one_is_refused(folders, dtype):
    class OffByOne(ResidentEngine):
        def run(self, prompts, batches, layers, *, mean=False):
            for rows in super().run(prompts, batches, layers, mean=mean):
                yield replace(rows, layer=min(rows.layer + 1, BLOCKS))

    model = loaded(folders("llama"), dtype)
    with pytest.raises(PreflightError):
        check(OffByOne(model), model, prompts_of(folders("llama")), dtype)


def test_an_engine_that_mixes_up_prompts_of_one_length_is_refused(folders):
    class Swapped(ResidentEngine):
        def run(self, prompts, batches, layers, *, mean=False):
            for rows in super().run(prompts, batches, layers, mean=mean):
                yield Rows(rows.layer, rows.prompts, rows.values.roll(1, dims=0))

    model = loaded(folders("llama"))
    with pytest.raises(PreflightError):
        check(Swapped(model), model, prompts_of(folders("llama")))


@pytest.mark.parametrize("dtype", list(Dtype))
def test_one_wrong_token_in_a_prompt_is_refused_where_no_expert_can_stray(folders, dtype):
    class FirstTokenLost(ResidentEngine):
        def run(self, prompts, batches, layers, *, mean=False):
            for rows in super().run(prompts, batches, layers, mean=mean):
                lost = rows.values[[1, *range(1, len(rows.values))]]
                yield Rows(rows.layer, rows.prompts, lost)

    model = loaded(folders("llama"), dtype)
    with pytest.raises(PreflightError):
        check(FirstTokenLost(model), model, prompts_of(folders("llama")), dtype)


def test_rows_that_only_batching_makes_infinite_are_refused(folders):
    class Overflowing(ResidentEngine):
        def run(self, prompts, batches, layers, *, mean=False):
            for rows in super().run(prompts, batches, layers, mean=mean):
                yield Rows(rows.layer, rows.prompts, rows.values * torch.inf)

    model = loaded(folders("llama"))
    with pytest.raises(PreflightError, match="got inf"):
        check(Overflowing(model), model, prompts_of(folders("llama")))


@pytest.mark.parametrize("name", FAMILIES)
def test_models_that_route_tokens_to_experts_are_known(folders, name):
    routed = name in ("qwen3_moe", "mixtral", "gpt_oss", "llama4", "deepseek_v3")
    assert loaded(folders(name)).has_experts == routed


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_memory_that_runs_out_in_the_check_itself_is_told_as_such(folders, error):
    model, prompts = loaded(folders("llama")), prompts_of(folders("llama"))
    cramped = Cramped(model, 10, error)
    with pytest.raises(OutOfMemoryError, match="room for a prompt of"):
        check(ResidentEngine(cramped), cramped, prompts)


def test_a_model_that_cannot_run_on_token_ids_alone_is_refused(folders):
    class Demanding(Cramped):
        def plain_hidden_states(self, input_ids):
            raise TypeError("forward() missing 1 required argument: 'pixel_values'")

    model, prompts = loaded(folders("llama")), prompts_of(folders("llama"))
    demanding = Demanding(model, 0)
    with pytest.raises(ModelError, match="pixel_values"):
        check(ResidentEngine(demanding), demanding, prompts)
