"""Every family, through the public API: cached rows equal Hugging Face, one prompt at a time.

The reference is the whole model with its head and attention written out, one prompt per forward,
without padding; the last layer comes from a hook on the last block. Extraction pads, batches, cuts
the model and lets transformers choose the attention.
"""

from __future__ import annotations

import pytest
import torch
from families import (
    BLOCKS,
    FAMILIES,
    MAMBA,
    RECORDS,
    TEXTS,
    build,
    full_model,
    plain_layers,
    relative_difference,
    token_ids,
    tokenizer,
)

import probecache
from probecache.errors import PreflightError

# Pads: the texts are of 1 to 56 letters.
BATCH_TOKENS = 150


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return build(family, tmp_path_factory.mktemp(family.name))


@pytest.fixture(scope="module")
def expected(family, folder):
    """Per text, per layer: [tokens, hidden]."""
    model = full_model(family, folder)
    return [plain_layers(family, model, token_ids(folder, text)) for text in TEXTS]


def extracted(folder, output, **options):
    settings = {
        "layers": "all",
        "dtype": "float32",
        "positions": "all",
        "keep_special_tokens": True,
        "chat_template": False,
        "batch_tokens": BATCH_TOKENS,
        "quiet": True,
        "device": "cpu",
    }
    return probecache.extract(
        model=str(folder), data=RECORDS, output=output, **{**settings, **options}
    )


def rows_of(cache, example, layer):
    start, stop = example.rows
    return cache[example.label, layer][start:stop]


def worst_difference(cache, expected):
    return max(
        relative_difference(rows_of(cache, example, layer), expected[example.idx][layer])
        for example in cache.examples
        for layer in cache.layers
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_row_of_every_layer_equals_a_plain_forward_of_the_full_model(
    family, folder, expected, tmp_path, side
):
    tokenizer(family, side=side).save_pretrained(folder)
    cache = extracted(folder, tmp_path / "cache")
    assert cache.layers == tuple(range(BLOCKS + 1))
    assert [e.n_tokens for e in cache.examples] == [len(layers[0]) for layers in expected]
    assert worst_difference(cache, expected) < family.tolerance


def test_layers_of_a_cut_model_equal_those_of_the_full_model(family, folder, expected, tmp_path):
    cache = extracted(folder, tmp_path / "cache", layers=[1, BLOCKS // 2])
    assert worst_difference(cache, expected) < family.tolerance


def test_embeddings_alone_equal_those_of_the_full_model(family, folder, expected, tmp_path):
    cache = extracted(folder, tmp_path / "cache", layers=[0])
    assert worst_difference(cache, expected) < family.tolerance


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_the_preflight_and_keeps_its_dtype(
    family, folder, expected, tmp_path, dtype
):
    cache = extracted(folder, tmp_path / "cache", dtype=dtype)
    assert cache["testing", BLOCKS].dtype == getattr(torch, dtype)
    # Rounding adds up over the blocks; a wrong layer, row or mask would differ by the order of 1.
    middle = [
        relative_difference(rows_of(cache, example, 1), expected[example.idx][1])
        for example in cache.examples
    ]
    assert sorted(middle)[len(middle) // 2] < 0.1


def test_a_state_space_model_whose_layers_count_otherwise_is_refused(tmp_path):
    folder = build(MAMBA, tmp_path / "mamba")
    with pytest.raises(PreflightError, match=r"at layer 0 .* nothing was extracted"):
        extracted(folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
