"""Single blocks of a model that is in memory: what goes in, what comes out, and what they leave."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import BLOCKS, FAMILIES, HIDDEN, MAMBA, build

from probecache.errors import ModelError
from probecache.loaded import Leftovers, LoadedModel, hidden_of, input_of, with_hidden
from probecache.models import ModelOptions, open_model
from probecache.types import Dtype

EVERY = {**FAMILIES, "mamba": MAMBA}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13]])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    built = {}

    def source(name, dtype=Dtype.FLOAT32):
        if name not in built:
            built[name] = build(EVERY[name], tmp_path_factory.mktemp(name))
        return open_model(ModelOptions(str(built[name]), dtype=dtype, device="cpu"))

    return source


def plain(source, ids=IDS):
    """Residual streams [tokens, hidden] of the whole model, by layer."""
    with torch.inference_mode():
        return source.load(BLOCKS).plain_hidden_states(ids)


def hooks_of(model):
    modules = model.model.modules()
    return [hook for m in modules for hook in (*m._forward_hooks, *m._forward_pre_hooks)]


def run_one(source, model, index, known, left, ids=IDS):
    """One block of a skeleton, in its place only meanwhile."""
    passing = model.blocks[index]
    model.blocks[index] = source.build_block(index, source.read_block(index))
    try:
        with torch.inference_mode():
            return model.run_block(index, {"input_ids": ids}, known, left)
    finally:
        model.blocks[index] = passing


# ---------------------------------------------------------------- one block


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_run_one_by_one_give_the_streams_of_the_whole_model(sources, name):
    source, expected = sources(name), plain(sources(name))
    model, left, known = source.skeleton(BLOCKS), Leftovers(), None
    for index in range(BLOCKS):
        before, behind = run_one(source, model, index, known, left)
        assert torch.equal(before[0], expected[index])
        assert torch.equal(behind[0], expected[index + 1])
        known = behind
    assert hooks_of(model) == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert"])
def test_a_block_in_the_middle_needs_nothing_but_the_stream_before_it(sources, name):
    source, expected = sources(name), plain(sources(name))
    known = expected[2][None]
    before, behind = run_one(source, source.skeleton(BLOCKS), 2, known, Leftovers())
    assert torch.equal(before, known)
    assert torch.equal(behind[0], expected[3])


@pytest.mark.parametrize("name", FAMILIES)
def test_embedding_gives_what_the_first_block_is_given(sources, name):
    source, expected = sources(name), plain(sources(name))
    model = source.skeleton(BLOCKS)
    with torch.inference_mode():
        assert torch.equal(model.embed({"input_ids": IDS})[0], expected[0])
    assert hooks_of(model) == []


def test_nothing_behind_the_block_is_run(sources):
    source = sources("llama")
    model = source.skeleton(BLOCKS)
    ran = []
    for index in (2, 3):
        model.blocks[index].register_forward_pre_hook(lambda *_: ran.append(1))
    model.model.norm.register_forward_pre_hook(lambda *_: ran.append(1))
    run_one(source, model, 1, torch.ones(1, IDS.shape[1], HIDDEN), Leftovers())
    assert ran == []


def test_no_hook_stays_when_a_block_fails(sources):
    source = sources("llama")
    model = source.skeleton(BLOCKS)

    def fail(*_arguments, **_options):
        raise KeyError

    model.blocks[1].forward = fail
    with pytest.raises(KeyError):
        model.run_block(1, {"input_ids": IDS}, None, Leftovers())
    assert hooks_of(model) == []


def test_no_hook_stays_when_an_embedding_fails(sources):
    model = sources("llama").skeleton(BLOCKS)
    with pytest.raises(IndexError):
        model.embed({"input_ids": IDS + 10_000})
    assert hooks_of(model) == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma4_dense"])
def test_plain_streams_go_on_from_one_that_is_known(sources, name):
    source, expected = sources(name), plain(sources(name))
    upper = source.load(BLOCKS, 2)
    with torch.inference_mode():
        upper.plain_hidden_states(IDS)
        transformers_own = hooks_of(upper)
        found = upper.plain_hidden_states(IDS, 2, expected[2][None])
    for layer in (3, 4):
        assert torch.equal(found[layer], expected[layer])
    assert hooks_of(upper) == transformers_own


# ---------------------------------------------------------------- what blocks leave


def test_what_a_block_adds_to_a_mapping_is_given_to_later_ones():
    left = Leftovers()
    first, second, third = {}, {}, {}
    left.give({"shared": first, "mask": None})
    first["sliding"] = "keys of block 0"
    left.take({"shared": first, "mask": None})
    left.give({"shared": second})
    assert second == {"sliding": "keys of block 0"}
    second["full"] = "keys of block 1"
    left.take({"shared": second})
    left.give({"shared": third})
    assert third == {"sliding": "keys of block 0", "full": "keys of block 1"}


def test_mappings_that_blocks_only_read_leave_nothing():
    left = Leftovers()
    options = {"position_embeddings": {"full": 1, "sliding": 2}, "hidden": torch.ones(1)}
    left.give(options)
    left.take(options)
    assert left.entries == {}


def test_what_was_left_does_not_change_with_the_mapping_afterwards():
    left, mapping = Leftovers(), {}
    left.give({"shared": mapping})
    mapping["keys"] = 1
    left.take({"shared": mapping})
    mapping["keys"] = 2
    assert left.entries == {"shared": {"keys": 1}}


def test_shared_keys_and_values_are_left_once_by_the_blocks_that_make_them(sources):
    source, expected = sources("gemma4"), plain(sources("gemma4"))
    model, left = source.skeleton(BLOCKS), Leftovers()
    counts = []
    for index in range(BLOCKS):
        run_one(source, model, index, expected[index][None], left)
        counts.append(sum(map(len, left.entries.values())))
    assert counts == [1, 2, 2, 2]
    _, behind = run_one(source, model, 3, expected[3][None], left)
    assert torch.equal(behind[0], expected[4])


def test_blocks_that_share_keys_and_values_cannot_do_without_those_that_were_left(sources):
    source, expected = sources("gemma4"), plain(sources("gemma4"))
    with pytest.raises(KeyError):
        run_one(source, source.skeleton(BLOCKS), 3, expected[3][None], Leftovers())


# ---------------------------------------------------------------- how layers count


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("depth", [1, BLOCKS])
def test_every_family_counts_layers_as_we_do(sources, name, depth):
    model = sources(name).skeleton(depth)
    forwards = [block.forward for block in model.blocks]
    model.check_layer_convention()
    transformers_own = hooks_of(model)  # it listens for hidden states from the first time on
    model.check_layer_convention()
    assert [block.forward for block in model.blocks] == forwards
    assert hooks_of(model) == transformers_own


@pytest.mark.parametrize("depth", [1, BLOCKS])
def test_a_model_whose_hidden_states_begin_behind_the_first_block_is_refused(sources, depth):
    model = sources("mamba").skeleton(depth)
    with pytest.raises(ModelError, match="MambaModel to be the residual stream after L blocks"):
        model.check_layer_convention()


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("scale", [1.0, 31.0, 5000.0])
def test_layers_are_counted_however_large_embeddings_are_and_however_coarse(sources, dtype, scale):
    model = sources("llama", dtype).skeleton(BLOCKS)
    with torch.no_grad():
        model.model.get_input_embeddings().weight.mul_(scale)
    model.check_layer_convention()


class Miscounting(LoadedModel):
    """Hands out other hidden states than its model does."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        return SimpleNamespace(hidden_states=self.changed(output.hidden_states))


@pytest.mark.parametrize(
    "changed",
    [
        lambda states: states[1:],
        lambda states: states[:-1],
        lambda states: (states[0], *states),
        lambda states: (states[0], states[2], states[1], *states[3:]),
    ],
)
def test_any_other_count_is_refused(sources, changed):
    model = Miscounting(sources("llama").skeleton(BLOCKS).model, BLOCKS)
    object.__setattr__(model, "changed", changed)
    with pytest.raises(ModelError, match="got another count"):
        model.check_layer_convention()


def test_pass_throughs_are_themselves_again_after_an_error(sources):
    class Failing(LoadedModel):
        def forward(self, **_inputs):
            raise KeyError

    model = Failing(sources("llama").skeleton(BLOCKS).model, BLOCKS)
    forwards = [block.forward for block in model.blocks]
    with pytest.raises(KeyError):
        model.check_layer_convention()
    assert [block.forward for block in model.blocks] == forwards
    assert hooks_of(model) == []


# ---------------------------------------------------------------- what blocks take and return


def test_the_stream_is_found_however_a_block_is_called_and_whatever_it_returns():
    stream, other = torch.ones(1), torch.zeros(1)
    assert input_of((stream, other), {}) is stream
    assert input_of((), {"hidden_states": stream}) is stream
    assert hidden_of(stream) is hidden_of((stream, other)) is hidden_of([stream]) is stream


def test_only_the_stream_among_a_blocks_arguments_is_changed():
    stream, other, new = torch.ones(1), torch.zeros(1), torch.full((1,), 2.0)
    args, kwargs = with_hidden((stream, other), {"mask": other}, new)
    assert args[0] is new
    assert args[1] is kwargs["mask"] is other
    given = {"hidden_states": stream, "mask": other}
    args, kwargs = with_hidden((), given, new)
    assert (args, kwargs["hidden_states"], kwargs["mask"]) == ((), new, other)
    assert given["hidden_states"] is stream
