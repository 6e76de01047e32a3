"""PEFT adapters: the residuals are those of peft's own model, or the adapter is refused.

The reference is peft's wrapper around the whole causal LM, one prompt per forward.
"""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from families import (
    BLOCKS,
    FAMILIES,
    RECORDS,
    TEXTS,
    build,
    full_model,
    plain_layers,
    relative_difference,
    token_ids,
)
from safetensors.torch import load_file, save_file

import probecache
from probecache.errors import MismatchError, ModelError
from probecache.models import ModelOptions, open_model

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gemma2": ["q_proj", "o_proj"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder for every family that is asked for, built once."""
    built = {}

    def folder(name):
        if name not in built:
            built[name] = build(FAMILIES[name], tmp_path_factory.mktemp(name))
        return built[name]

    return folder


def adapt(folder, name, output, **settings):
    """Save an adapter with weights that matter; return it and peft's model."""
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": TARGETS[name], "task_type": "CAUSAL_LM", **settings}
    adapted = peft.get_peft_model(full_model(FAMILIES[name], folder), peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.normal_(std=0.3)
    adapted.save_pretrained(output)
    return output, adapted.eval()


def extracted(folder, output, **options):
    settings = {
        "layers": "all",
        "positions": "all",
        "keep_special_tokens": True,
        "batch_tokens": 150,
        "quiet": True,
        "device": "cpu",
    }
    return probecache.extract(
        model=str(folder), data=RECORDS, output=output, **{**settings, **options}
    )


def worst_difference(cache, name, folder, adapted):
    expected = [
        plain_layers(FAMILIES[name], adapted.base_model.model, token_ids(folder, text))
        for text in TEXTS
    ]
    return max(
        relative_difference(
            cache[example.label, layer][slice(*example.rows)], expected[example.idx][layer]
        )
        for example in cache.examples
        for layer in cache.layers
    )


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("layers", ["all", [1, 2]])
def test_rows_with_an_adapter_equal_those_of_pefts_own_model(models, name, layers, tmp_path):
    folder = models(name)
    adapter, adapted = adapt(folder, name, tmp_path / "adapter")
    cache = extracted(folder, tmp_path / "cache", adapter=str(adapter), layers=layers)
    assert worst_difference(cache, name, folder, adapted) < 1e-5
    bare = extracted(folder, tmp_path / "bare", layers=[2])
    assert relative_difference(cache["testing", 2], bare["testing", 2]) > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"layers_to_transform": [0, 3]},
        {"use_rslora": True, "lora_alpha": 3},
    ],
    ids=str,
)
def test_whatever_lora_changes_below_a_layer_is_in_its_rows(models, settings, tmp_path):
    folder = models("llama")
    adapter, adapted = adapt(folder, "llama", tmp_path / "adapter", **settings)
    for layers in ("all", [0, 2]):
        cache = extracted(folder, tmp_path / str(layers), adapter=str(adapter), layers=layers)
        assert worst_difference(cache, "llama", folder, adapted) < 1e-5


def test_an_adapter_spread_over_devices_gives_the_same_rows(models, tmp_path):
    folder = models("llama")
    adapter, adapted = adapt(folder, "llama", tmp_path / "adapter")
    cache = extracted(
        folder, tmp_path / "cache", adapter=str(adapter), device=None, device_map="auto"
    )
    assert worst_difference(cache, "llama", folder, adapted) < 1e-5


def test_an_adapter_in_half_precision_passes_the_preflight(models, tmp_path):
    adapter, _ = adapt(models("llama"), "llama", tmp_path / "adapter")
    cache = extracted(models("llama"), tmp_path / "cache", adapter=str(adapter), dtype="bfloat16")
    assert cache["testing", BLOCKS].dtype == torch.bfloat16


def test_the_identity_tells_adapters_apart(models, tmp_path):
    folder = models("llama")
    one, _ = adapt(folder, "llama", tmp_path / "one")
    other = shutil.copytree(one, tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, other / "adapter_model.safetensors")

    bare = extracted(folder, tmp_path / "bare", layers=[1])
    first = extracted(folder, tmp_path / "first", layers=[1], adapter=str(one))
    assert bare.identity.adapter is None
    assert first.identity.adapter is not None
    moved = shutil.copytree(one, tmp_path / "moved")
    again = extracted(folder, tmp_path / "first", layers=[1, 2], adapter=str(moved))
    assert again.layers == (1, 2)
    for adapter in (str(other), None):
        with pytest.raises(MismatchError, match="adapter: expected"):
            extracted(folder, tmp_path / "first", layers=[3], adapter=adapter)


# ---------------------------------------------------------------- block by block


def contents(module):
    return dict([*module.named_parameters(), *module.named_buffers()])


def assert_streamed_is_resident(folder, adapter, depth, **options):
    def source():
        choice = ModelOptions(str(folder), adapter=str(adapter), device="cpu", **options)
        return open_model(choice)

    parts, whole = source(), source().load(depth)
    loaded = parts.skeleton(depth)
    for index in range(depth):
        loaded.blocks[index] = parts.build_block(index, parts.read_block(index))
    found, expected = contents(loaded.model), contents(whole.model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    ids = torch.tensor([token_ids(folder, TEXTS[0])])
    with torch.inference_mode():
        assert torch.equal(loaded.forward(input_ids=ids)[0], whole.forward(input_ids=ids)[0])
    return loaded, whole


SETTINGS = [
    {},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": "all-linear", "use_dora": True},
    {"layers_to_transform": [0, 3]},
    {"layers_to_transform": [3], "modules_to_save": ["embed_tokens"]},
    {"init_lora_weights": "pissa"},
    {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_with_an_adapter_built_alone_is_the_one_of_the_whole_model(
    models, settings, dtype, tmp_path
):
    adapter, _ = adapt(models("llama"), "llama", tmp_path / "adapter", **settings)
    for depth in (BLOCKS, 2):
        assert_streamed_is_resident(models("llama"), adapter, depth, dtype=dtype)


@pytest.mark.parametrize("name", TARGETS)
def test_adapted_blocks_of_every_family_can_be_built_alone(models, name, tmp_path):
    adapter, _ = adapt(models(name), name, tmp_path / "adapter")
    assert_streamed_is_resident(models(name), adapter, BLOCKS)


def test_an_adapted_model_goes_on_from_a_block(models, tmp_path):
    adapter, _ = adapt(models("llama"), "llama", tmp_path / "adapter")
    options = ModelOptions(str(models("llama")), adapter=str(adapter), device="cpu")
    whole, upper = open_model(options).load(BLOCKS), open_model(options).load(BLOCKS, 2)
    for found, expected in zip(upper.blocks[2:], whole.blocks[2:], strict=True):
        assert contents(found).keys() == contents(expected).keys()
        for name, tensor in contents(expected).items():
            assert torch.equal(contents(found)[name], tensor)


def test_half_an_adapter_is_refused_before_any_block_is_built(models, tmp_path):
    adapter, _ = adapt(models("llama"), "llama", tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    lost = {name for name in weights if ".layers.3." in name}
    kept = {name: tensor for name, tensor in weights.items() if name not in lost}
    save_file(kept, adapter / "adapter_model.safetensors")
    source = open_model(ModelOptions(str(models("llama")), adapter=str(adapter), device="cpu"))
    with pytest.raises(ModelError, match="one without the weights"):
        source.skeleton(BLOCKS)


# ---------------------------------------------------------------- refusals


def refused(folder, adapter, tmp_path, match):
    with pytest.raises(ModelError, match=match):
        extracted(folder, tmp_path / "cache", adapter=str(adapter))
    assert not (tmp_path / "cache").exists()


def test_an_adapter_of_another_architecture_is_refused(models, tmp_path):
    adapter, _ = adapt(models("gpt2"), "gpt2", tmp_path / "adapter")
    refused(models("llama"), adapter, tmp_path, "expected an adapter for this model")


def test_an_adapter_of_another_width_is_refused(models, tmp_path):
    family = FAMILIES["llama"]
    wide = type(family)("wide", family.kind, {**family.settings, "intermediate_size": 64})
    build(wide, tmp_path / "wide")
    adapter, _ = adapt(tmp_path / "wide", "llama", tmp_path / "adapter")
    refused(models("llama"), adapter, tmp_path, "expected an adapter for this model")


def test_an_adapter_of_a_shallower_model_is_refused(models, tmp_path):
    # peft leaves blocks without weights as they were, and says so in a warning alone.
    family = FAMILIES["llama"]
    shallow = type(family)("shallow", family.kind, {**family.settings, "num_hidden_layers": 2})
    build(shallow, tmp_path / "shallow")
    adapter, _ = adapt(tmp_path / "shallow", "llama", tmp_path / "adapter")
    refused(models("llama"), adapter, tmp_path, "expected an adapter for this model")


def test_an_adapter_of_a_deeper_model_is_refused(models, tmp_path):
    family = FAMILIES["llama"]
    deep = type(family)("deep", family.kind, {**family.settings, "num_hidden_layers": BLOCKS + 1})
    build(deep, tmp_path / "deep")
    adapter, _ = adapt(tmp_path / "deep", "llama", tmp_path / "adapter")
    refused(models("llama"), adapter, tmp_path, "a deeper model")


def test_an_adapter_whose_weights_bear_other_names_is_refused(models, tmp_path):
    adapter, _ = adapt(models("llama"), "llama", tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("self_attn", "attn"): tensor for name, tensor in weights.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    refused(models("llama"), adapter, tmp_path, "expected an adapter for this model")


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_a_learned_prompt_is_refused_because_it_adds_tokens(models, config, tmp_path):
    model = full_model(FAMILIES["llama"], models("llama"))
    learned = config(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(model, learned).save_pretrained(tmp_path / "adapter")
    refused(models("llama"), tmp_path / "adapter", tmp_path, "not inside the blocks")


def test_a_folder_that_is_no_adapter_is_refused(models, tmp_path):
    refused(models("llama"), models("gpt2"), tmp_path, "expected adapter_config.json")


def test_a_pickled_adapter_is_refused(models, tmp_path):
    adapter, _ = adapt(models("llama"), "llama", tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    torch.save(weights, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    refused(models("llama"), adapter, tmp_path, "expected adapter_model.safetensors")


@pytest.mark.parametrize("content", [None, "no json", "[]", json.dumps({"peft_type": "NEW"})])
def test_an_adapter_without_a_proper_config_is_refused(models, content, tmp_path):
    adapter, _ = adapt(models("llama"), "llama", tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(content) if content else path.unlink()
    refused(models("llama"), adapter, tmp_path, "adapter")
