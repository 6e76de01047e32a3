"""Models loaded in parts are the model loaded whole, bit for bit, and every byte is read once."""

from __future__ import annotations

import pytest
import torch
from families import BLOCKS, FAMILIES, MAMBA, build

from probecache.errors import ModelError
from probecache.loaded import hidden_of, input_of
from probecache.models import ModelOptions, open_model

EVERY = {**FAMILIES, "mamba": MAMBA}
IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for every family that is asked for, built once, in several files."""
    built = {}

    def folder(name):
        if name not in built:
            built[name] = build(EVERY[name], tmp_path_factory.mktemp(name), shard="20KB")
        return built[name]

    return folder


def source_of(folder, **options):
    return open_model(ModelOptions(str(folder), device="cpu", **options))


def contents(module):
    """Every parameter and buffer, those included that no checkpoint holds."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor for name, tensor in named if "pooler" not in name}  # random; never used


def assert_same(found, expected):
    found, expected = contents(found), contents(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def states(loaded):
    """The residual stream behind every block, [batch, tokens, hidden] each."""
    caught, hooks = [], []
    for block in loaded.blocks:
        hooks.append(block.register_forward_hook(lambda _m, _a, out: caught.append(hidden_of(out))))
    with torch.inference_mode():
        loaded.forward(IDS, None)
    for hook in hooks:
        hook.remove()
    return caught


def deepest(name):
    """Blocks up to which none needs another: the last two of this Gemma 4 share keys and values."""
    return 2 if name == "gemma4" else BLOCKS


def streamed(source, depth):
    """A skeleton with all its blocks built one by one."""
    loaded = source.skeleton(depth)
    for index in range(depth):
        loaded.blocks[index] = source.build_block(index, source.read_block(index))
    return loaded


def assert_same_model(found, expected):
    assert_same(found.model, expected.model)
    for one, other in zip(states(found), states(expected), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_built_block_by_block_is_the_model_loaded_whole(folders, name, dtype):
    whole, parts = (source_of(folders(name), dtype=dtype) for _ in range(2))
    depth = deepest(name)
    assert_same_model(streamed(parts, depth), whole.load(depth))
    assert whole.reader.bytes_read == parts.reader.bytes_read == whole.weight_bytes(depth)


@pytest.mark.parametrize("name", EVERY)
def test_a_skeleton_hands_the_embeddings_on_to_its_end(folders, name):
    source = source_of(folders(name))
    expected = None

    def first_input(_module, arguments, options):
        nonlocal expected
        expected = input_of(arguments, options)

    whole = source.load(1)
    whole.blocks[0].register_forward_pre_hook(first_input, with_kwargs=True)
    states(whole)
    for depth in (1, 2):
        for state in states(source.skeleton(depth)):
            assert torch.equal(state, expected)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("start", [1, 2, BLOCKS])
def test_a_model_from_a_block_on_goes_on_where_the_lower_ones_ended(folders, name, start):
    whole, upper = source_of(folders(name)), source_of(folders(name))
    depth = max(start, deepest(name))
    if depth > deepest(name):
        with pytest.raises(ModelError, match="take keys and values from earlier ones"):
            upper.load(depth, start)
        return
    loaded = upper.load(depth, start)
    assert upper.reader.bytes_read == upper.weight_bytes(depth, start)
    complete = whole.load(depth)
    for found, expected in zip(loaded.blocks[start:], complete.blocks[start:], strict=True):
        assert_same(found, expected)
    assert all(t.is_meta for block in loaded.blocks[:start] for t in block.parameters())
