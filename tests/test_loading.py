"""Models loaded in parts are the model loaded whole, bit for bit, and every byte is read once."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from families import BLOCKS, FAMILIES, MAMBA, build, tokenizer
from safetensors.torch import load_file, save_file
from transformers.quantizers.base import get_keys_to_not_convert

import probecache.models
from probecache.checkpoint import read_header
from probecache.errors import ModelError
from probecache.loaded import hidden_of, input_of
from probecache.models import ModelOptions, open_model
from probecache.reading import LazyTensor, WeightReader

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
        loaded.forward(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    return caught


def instead(hidden):
    """A hook that gives a block this residual stream."""

    def hook(_module, arguments, options):
        if arguments:
            return (hidden, *arguments[1:]), options
        return arguments, {**options, "hidden_states": hidden}

    return hook


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
    depth = min(max(start, deepest(name)), whole.independent_blocks)
    if start > depth:
        pytest.skip("needs keys of lower blocks")
    loaded = upper.load(depth, start)
    assert upper.reader.bytes_read == upper.weight_bytes(depth, start)
    complete = whole.load(depth)
    for found, expected in zip(loaded.blocks[start:], complete.blocks[start:], strict=True):
        assert_same(found, expected)
    assert all(t.is_meta for block in loaded.blocks[:start] for t in block.parameters())
    if start < depth:
        reached = states(complete)
        loaded.blocks[start].register_forward_pre_hook(
            instead(reached[start - 1]), with_kwargs=True
        )
        for found, expected in zip(states(loaded)[start:], reached[start:], strict=True):
            assert torch.equal(found, expected)


# ---------------------------------------------------------------- pass-throughs


@pytest.mark.parametrize("name", EVERY)
def test_a_pass_through_returns_what_the_block_itself_returns(folders, name):
    source = source_of(folders(name))
    whole, caught = source.load(2), []
    whole.blocks[0].register_forward_hook(lambda _m, _a, out: caught.append(out))
    for depth in (1, 2):
        skeleton = source.skeleton(depth)
        skeleton.blocks[0].register_forward_hook(lambda _m, _a, out: caught.append(out))
        states(skeleton)
    states(whole)
    *passed, real = caught
    assert [isinstance(out, tuple) for out in passed] == [isinstance(real, tuple)] * 2


def test_both_forms_are_met_among_the_families(folders):
    forms = set()
    for name in ("llama", "falcon"):
        block = source_of(folders(name)).skeleton(1).blocks[0]
        forms.add(type(block(torch.zeros(1, 2, 4))))
    assert forms == {torch.Tensor, tuple}


def test_blocks_keep_what_the_models_loop_reads_off_them(folders):
    source = source_of(folders("gemma3"))
    for passing, real in zip(
        source.skeleton(BLOCKS).blocks, source.load(BLOCKS).blocks, strict=True
    ):
        assert type(passing) is type(real)
        assert passing.self_attn.is_sliding == real.self_attn.is_sliding


def test_a_block_takes_the_place_of_a_pass_through_and_gives_it_back(folders):
    source = source_of(folders("llama"))
    skeleton, whole = source.skeleton(2), states(source.load(2))
    before, empty = states(skeleton), skeleton.blocks[0]
    skeleton.blocks[0] = source.build_block(0, source.read_block(0))
    first, second = states(skeleton)
    assert torch.equal(first, whole[0])
    assert torch.equal(second, whole[0])
    skeleton.blocks[0] = empty
    assert all(torch.equal(a, b) for a, b in zip(states(skeleton), before, strict=True))


def test_a_model_whose_blocks_take_two_streams_is_refused(tmp_path):
    config = transformers.XLNetConfig(vocab_size=264, d_model=32, n_layer=2, n_head=4, d_inner=48)
    transformers.XLNetLMHeadModel(config).save_pretrained(tmp_path)
    tokenizer(FAMILIES["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"XLNetModel .* cannot be streamed"):
        source_of(tmp_path).skeleton(2)


# ---------------------------------------------------------------- what is read


def changed(folder, tmp_path, change):
    """A copy of a checkpoint; change(name, tensor) gives a new tensor, or None to drop it."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    for file in copy.glob("*.safetensors"):
        tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, file, metadata={"format": "pt"})
    return copy


def files_without(folder, *words):
    """Files of a checkpoint none of whose tensors bears one of these words."""
    return [
        file
        for file in folder.glob("*.safetensors")
        if not any(word in name for name in load_file(file) for word in words)
    ]


@pytest.mark.parametrize("lost", ["garbage", "absent"])
def test_files_without_needed_weights_are_never_opened(folders, tmp_path, lost):
    folder = shutil.copytree(folders("llama"), tmp_path / "copy")
    expected = source_of(folder).load(3, 2)
    useless = files_without(folder, "embed_tokens", "model.norm", "layers.2.")
    assert len(useless) > 3
    for file in useless:
        file.write_bytes(b"garbage") if lost == "garbage" else file.unlink()
    source = source_of(folder)
    loaded, skeleton = source.load(3, 2), source.skeleton(3)
    assert_same(loaded.blocks[2], expected.blocks[2])
    assert_same(source.build_block(2, source.read_block(2)), expected.blocks[2])
    assert skeleton.depth == 3
    with pytest.raises(ModelError, match="expected a safetensors file"):
        source.load(2)


def test_every_byte_is_counted_once_by_whatever_road(folders):
    source = source_of(folders("mixtral"))
    source.skeleton(BLOCKS)
    outside = source.reader.bytes_read
    for index in range(BLOCKS):
        weights = source.read_block(index)
        assert weights.nbytes == source.block_bytes(index)
    assert source.reader.bytes_read == source.weight_bytes(BLOCKS)
    assert outside == source.weight_bytes(BLOCKS) - sum(map(source.block_bytes, range(BLOCKS)))


def test_tensors_are_read_as_the_safetensors_library_reads_them_but_aligned(tmp_path):
    dtypes = ["float32", "float16", "bfloat16", "float64", "int8", "uint8", "int64", "bool"]
    dtypes += ["float8_e4m3fn", "float8_e5m2", "int16", "int32"]
    tensors = {name: torch.randn(3, 5).mul(9).to(getattr(torch, name)) for name in dtypes}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    expected, reader = load_file(path), WeightReader(torch.device("cpu"))
    for stored in read_header(path):
        found = LazyTensor(stored, reader)[...]
        assert found.dtype == expected[stored.name].dtype
        assert torch.equal(found, expected[stored.name])
        assert found.data_ptr() % 64 == 0
    assert reader.bytes_read == sum(tensor.nbytes for tensor in tensors.values())


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders("llama"), tmp_path / "copy")
    source = source_of(folder)
    source.weight_bytes(BLOCKS)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ModelError, match=r"bytes of .* got fewer"):
        source.load(BLOCKS)
    with pytest.raises(ModelError, match=r"bytes of .* got fewer"):
        source.read_block(0)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("llama", ".2.mlp.up_proj.weight"),
        ("mixtral", ".2.block_sparse_moe.experts.3.w1.weight"),
        ("falcon", ".2.mlp.dense_h_to_4h.weight"),
    ],
)
def test_a_block_without_one_of_its_weights_is_refused(tmp_path, name, word):
    folder = build(EVERY[name], tmp_path / "whole")
    lost = [stored for stored in load_file(folder / "model.safetensors") if word in stored]
    assert len(lost) == 1
    source = source_of(changed(folder, tmp_path, lambda n, t: None if n in lost else t))
    source.build_block(1, source.read_block(1))
    with pytest.raises(ModelError):
        source.load(3)
    with pytest.raises(ModelError):
        source.build_block(2, source.read_block(2))


def test_a_block_with_a_weight_of_another_shape_is_refused(folders, tmp_path):
    wanted = "model.layers.2.mlp.up_proj.weight"
    bent = changed(folders("llama"), tmp_path, lambda n, t: t[:-1].clone() if n == wanted else t)
    source = source_of(bent)
    with pytest.raises(ModelError, match=r"of another shape, first .*2\.mlp\.up_proj"):
        source.build_block(2, source.read_block(2))


def test_a_skeleton_without_an_embedding_is_refused(tmp_path):
    folder = build(EVERY["llama"], tmp_path / "whole")
    wanted = "model.embed_tokens.weight"
    source = source_of(changed(folder, tmp_path, lambda n, t: None if n == wanted else t))
    with pytest.raises(ModelError, match="1 are missing or of another shape"):
        source.skeleton(2)


def test_a_file_without_what_the_index_says_of_it_is_refused(folders, tmp_path):
    wanted = "model.layers.2.mlp.up_proj.weight"
    source = source_of(changed(folders("llama"), tmp_path, lambda n, t: None if n == wanted else t))
    with pytest.raises(ModelError, match=f"expected {wanted} in .* as the index says"):
        source.read_block(2)


def test_a_quantiser_that_wants_the_files_gets_them_but_no_parts(folders, monkeypatch):
    monkeypatch.setattr(probecache.models, "_WANT_FILES", ("mine",))
    expected = source_of(folders("llama")).load(2)
    # A folder is read by transformers itself, with the same outcome.
    source = source_of(folders("llama"))
    monkeypatch.setattr(type(source), "quantization", '{"quant_method": "mine"}')
    assert_same(source.load(2).model, expected.model)
    assert source.reader.bytes_read == 0
    for part in (lambda: source.skeleton(2), lambda: source.load(2, 1)):
        with pytest.raises(ModelError, match="cannot be streamed"):
            part()


@pytest.mark.parametrize("name", EVERY)
def test_quantisers_spare_the_same_modules_of_a_block_built_alone(folders, name):
    source = source_of(folders(name))
    models = [source.load(BLOCKS).model, source._loader._framed(source.config, 1)]
    matrices = {n for n, module in models[0].named_modules() if hasattr(module, "in_features")}
    one, other = (set(get_keys_to_not_convert(model)) & matrices for model in models)
    assert one == other


# ---------------------------------------------------------------- devices


def test_a_model_spread_over_devices_is_the_same_in_parts(folders):
    spread = ModelOptions(str(folders("llama")), device_map="auto")
    whole, upper = open_model(spread).load(BLOCKS), open_model(spread).load(BLOCKS, 2)
    expected = source_of(folders("llama")).load(BLOCKS)
    assert_same(whole.model, expected.model)
    for index in (2, 3):
        assert_same(upper.blocks[index], expected.blocks[index])
    assert torch.equal(states(whole)[-1], states(expected)[-1])


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_device_map_of_a_single_device_gives_the_same_blocks(folders, name):
    # The road that an accelerator takes.
    source = source_of(folders(name))
    loader = replace(source._loader, device_map="cpu")
    block = loader.block(1, source.read_block(1))
    assert_same(block, source.load(2).blocks[1])
