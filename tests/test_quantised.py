"""Quantised checkpoints are loaded as their config says: rows are those of what they stand for.

An FP8 checkpoint (tiles of 64 x 64, a scale each) is made here by hand, and beside it a plain one
that holds the same numbers; without a GPU transformers unpacks the first into the second.
"""

from __future__ import annotations

import json

import pytest
import torch
from families import BLOCKS, FAMILIES, RECORDS, Family, build
from safetensors.torch import load_file, save_file

import probecache
from probecache.errors import ModelError
from probecache.models import ModelOptions, open_model

SIDE = 64
WIDE = Family(
    "wide_llama",
    "LlamaConfig",
    FAMILIES["llama"].settings
    | {"hidden_size": 2 * SIDE, "intermediate_size": 3 * SIDE, "head_dim": 2 * SIDE // 4},
)


def quantised(weight):
    """A matrix in FP8, its scales, and the numbers that both stand for."""
    rows, columns = (size // SIDE for size in weight.shape)
    tiles = weight.view(rows, SIDE, columns, SIDE)
    scales = tiles.abs().amax(dim=(1, 3), keepdim=True) / 448  # the largest number of E4M3
    packed = (tiles / scales).to(torch.float8_e4m3fn)
    return (
        packed.view(weight.shape),
        scales.view(rows, columns),
        (packed.float() * scales).view(weight.shape),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The quantised model's folder and the plain one's."""
    packed = build(WIDE, tmp_path_factory.mktemp("packed"))
    plain = build(WIDE, tmp_path_factory.mktemp("plain"))
    stored, unpacked = {}, {}
    for name, weight in load_file(packed / "model.safetensors").items():
        if "proj" in name:
            stored[name], stored[f"{name}_scale_inv"], unpacked[name] = quantised(weight)
        else:
            stored[name] = weight.bfloat16()
            unpacked[name] = stored[name].float()
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(unpacked, plain / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    change_config(packed, dtype="bfloat16")
    change_config(packed, quantization_config=settings | {"weight_block_size": [SIDE, SIDE]})
    return packed, plain


def change_config(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def extracted(folder, output, **options):
    return probecache.extract(
        model=str(folder), data=RECORDS, output=output, batch_tokens=150, quiet=True, **options
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layers", ["all", "2"])
def test_rows_are_those_of_the_weights_that_the_checkpoint_stands_for(
    folders, tmp_path, dtype, layers
):
    packed, plain = (
        extracted(folder, tmp_path / folder.name, dtype=dtype, layers=layers) for folder in folders
    )
    for label in packed.classes:
        for layer in packed.layers:
            assert torch.equal(packed[label, layer], plain[label, layer])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_quantised_model_built_block_by_block_is_the_one_loaded_whole(folders, dtype):
    def source():
        return open_model(ModelOptions(str(folders[0]), dtype=dtype, device="cpu"))

    parts, whole = source(), source()
    expected = whole.load(BLOCKS).model.state_dict()
    loaded = parts.skeleton(BLOCKS)
    for index in range(BLOCKS):
        loaded.blocks[index] = parts.build_block(index, parts.read_block(index))
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert parts.reader.bytes_read == whole.reader.bytes_read == whole.weight_bytes(BLOCKS)


def test_the_identity_and_the_plan_tell_a_quantised_checkpoint(folders, tmp_path):
    packed, plain = folders
    cache = extracted(packed, tmp_path / "cache", layers="1")
    assert json.loads(cache.identity.quantization)["quant_method"] == "fp8"
    assert cache.info.dtype == "bfloat16"  # the checkpoint's own, for what is not packed
    small, large = (
        probecache.plan_extraction(model=str(folder), data=RECORDS, layers=[BLOCKS]).weight_bytes
        for folder in folders
    )
    assert small < large / 3
    assert extracted(plain, tmp_path / "plain", layers="1").identity.quantization is None


def test_a_method_whose_library_is_missing_is_one_clear_line(folders, tmp_path):
    packed = build(WIDE, tmp_path / "model")
    change_config(packed, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="expected to load") as caught:
        extracted(packed, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
