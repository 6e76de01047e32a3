"""Every family, through the public API: cached rows equal Hugging Face, one prompt at a time.

The reference is the whole model with its head and attention written out, one prompt per forward,
without padding; the last layer comes from a hook on the last block. Extraction shares prefixes or
pads, cuts the model, runs it whole or block by block, and lets transformers choose the attention.
"""

from __future__ import annotations

import pytest
import torch
from families import (
    BLOCKS,
    FAMILIES,
    MAMBA,
    build,
    full_model,
    plain_layers,
    relative_difference,
    token_ids,
    tokenizer,
)
from transformers import AutoTokenizer
from works import BRANCHING

import probecache
from probecache.errors import ModelError

RECORDS = [
    {"text": text, "type": "testing" if number % 2 else "deployment"}
    for number, text in enumerate(BRANCHING)
]
ENGINES = ["resident", "stream"]
# By whether prefixes are shared: four packs, or batches of 1 to 7 prompts with padding in most.
BATCH_TOKENS = {True: 60, False: 150}
OWN_MASKS = ("bloom", "falcon")  # their attention does not take a tree of prefixes


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """Its tokenizer pads on the left, where no batch of ours has padding."""
    folder = build(family, tmp_path_factory.mktemp(family.name))
    tokenizer(family, side="left").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(family, folder):
    """Per text, per layer: [tokens, hidden]."""
    model = full_model(family, folder)
    return [plain_layers(family, model, token_ids(folder, text)) for text in BRANCHING]


@pytest.fixture(scope="module")
def caches(folder, tmp_path_factory):
    """The cache of all layers by engine and by whether prefixes are shared, made once."""
    made = {}

    def cache(engine, share):
        if (engine, share) not in made:
            output = tmp_path_factory.mktemp(f"{engine}-{share}") / "cache"
            made[engine, share] = extracted(folder, output, engine=engine, share_prefixes=share)
        return made[engine, share]

    return cache


def extracted(folder, output, share_prefixes=True, **options):
    settings = {
        "data": RECORDS,
        "layers": "all",
        "dtype": "float32",
        "positions": "all",
        "keep_special_tokens": True,
        "chat_template": False,
        "share_prefixes": share_prefixes,
        "batch_tokens": BATCH_TOKENS[share_prefixes],
        "quiet": True,
        "device": "cpu",
    }
    return probecache.extract(model=str(folder), output=output, **{**settings, **options})


def rows_of(cache, example, layer):
    start, stop = example.rows
    return cache[example.label, layer][start:stop]


def worst_difference(cache, expected):
    return max(
        relative_difference(rows_of(cache, example, layer), expected[example.idx][layer])
        for example in cache.examples
        for layer in cache.layers
    )


def assert_same_rows(one, other):
    """Bit for bit."""
    assert one.layers == other.layers
    for label in one.classes:
        for layer in one.layers:
            assert torch.equal(one[label, layer], other[label, layer])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("share", [True, False])
def test_every_row_of_every_layer_equals_a_plain_forward_of_the_full_model(
    family, caches, expected, engine, share
):
    cache = caches(engine, share)
    assert cache.layers == tuple(range(BLOCKS + 1))
    assert [e.n_tokens for e in cache.examples] == [len(layers[0]) for layers in expected]
    assert worst_difference(cache, expected) < family.tolerance


@pytest.mark.parametrize("share", [True, False])
def test_streamed_rows_equal_resident_ones_bit_for_bit(caches, share):
    assert_same_rows(caches("stream", share), caches("resident", share))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cache_says_whether_prefixes_were_shared_and_if_not_why(family, caches, engine):
    said = caches(engine, True).info.execution
    if family.masked:
        why = f"padded batches, because in {family.config.model_type} tokens see those behind them"
    elif family.name in OWN_MASKS:
        why = (
            f"padded batches, because the attention of {family.name} does not take a tree of "
            "prefixes"
        )
    else:
        why = "shared prefixes"
    assert said == {"engine": engine, "batches": why}
    padded = caches(engine, False).info.execution
    assert padded == {"engine": engine, "batches": "padded batches, because asked for"}


def test_it_does_not_matter_where_the_tokenizer_pads(family, folder, caches, tmp_path):
    left = caches("resident", False)
    tokenizer(family, side="right").save_pretrained(folder)
    right = extracted(folder, tmp_path / "cache", share_prefixes=False, engine="resident")
    assert_same_rows(right, left)


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_of_a_cut_model_equal_those_of_the_full_model(
    family, folder, expected, tmp_path, engine
):
    cache = extracted(folder, tmp_path / "cache", layers=[1, BLOCKS // 2], engine=engine)
    assert worst_difference(cache, expected) < family.tolerance


@pytest.mark.parametrize("engine", ENGINES)
def test_embeddings_alone_equal_those_of_the_full_model(family, folder, expected, tmp_path, engine):
    cache = extracted(folder, tmp_path / "cache", layers=[0], engine=engine)
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


# ---------------------------------------------------------------- other positions

PAIRS = [
    {"question": "Is this a test?", "positive": "Yes", "negative": "No, it is not"},
    {"question": "Is this a test", "positive": "?", "negative": "or something else"},
    {
        "question": "Who are you, and what is it that you do all day?",
        "positive": "A",
        "negative": "B",
    },
]


def answered(folder):
    """Ids of prompt and answer, and where the answer begins, in the order of a cache's examples."""
    words = AutoTokenizer.from_pretrained(folder)
    for pair in PAIRS:
        turns = [{"role": "user", "content": pair["question"]}]
        text = words.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompt = words(text, add_special_tokens=False)["input_ids"]
        for answer in (pair["positive"], pair["negative"]):
            whole = words(text + answer, add_special_tokens=False)["input_ids"]
            assert whole[: len(prompt)] == prompt
            yield whole, len(prompt)


POSITIONS = {
    "last": lambda rows, start: rows[-1:],
    "mean": lambda rows, start: rows.double().mean(0, keepdim=True).float(),
    "answer": lambda rows, start: rows[start:],
}


@pytest.fixture(scope="module", params=["llama", "gemma2", "gemma4", "gpt2", "falcon"])
def talker(request, tmp_path_factory):
    """A family with a chat template, its folder, and what is right of every answered prompt."""
    family = FAMILIES[request.param]
    folder = build(family, tmp_path_factory.mktemp(f"chat-{family.name}"), chat=True)
    model = full_model(family, folder)
    found = [(plain_layers(family, model, ids), start) for ids, start in answered(folder)]
    return family, folder, found


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_pairs_keep_the_last_token_the_mean_or_the_answer(
    talker, tmp_path, positions, engine, share
):
    family, folder, found = talker
    choose = POSITIONS[positions]
    expected = [[choose(rows, start) for rows in layers] for layers, start in found]
    cache = extracted(
        folder,
        tmp_path / "cache",
        share,
        data=PAIRS,
        chat_template=True,
        positions=positions,
        engine=engine,
    )
    assert worst_difference(cache, expected) < family.tolerance


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("resident", r"at layer 0 .* nothing was extracted"),
        ("stream", r"hidden_states\[L\] of MambaModel to be the residual stream after L blocks"),
    ],
)
def test_a_state_space_model_whose_layers_count_otherwise_is_refused(
    tmp_path, engine, message, share
):
    folder = build(MAMBA, tmp_path / "mamba")
    with pytest.raises(ModelError, match=message):
        extracted(folder, tmp_path / "cache", share, engine=engine)
    assert not (tmp_path / "cache").exists()
