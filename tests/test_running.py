"""Which way a model runs: shared prefixes where they give the same numbers, else padded batches.

Faults are planted in the attention over the prefix tree, at one block, so that padded batches stay
right; what comes out must then be what padded batches give when they are asked for.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import (
    BLOCKS,
    FAMILIES,
    HIDDEN,
    MAMBA,
    RECORDS,
    Family,
    build,
    full_model,
    plain_layers,
    relative_difference,
    token_ids,
)
from safetensors.torch import load_file, save_file
from synthetic import labelled, write_cache

import probecache
from probecache.attention import PackPass
from probecache.errors import ModelError, NonFiniteError, PreflightError
from probecache.feeds import PaddedWork
from probecache.models import ModelOptions, open_model
from probecache.store.writer import CacheWriter
from probecache.workflow.running import CachedRows

ENGINES = ["resident", "stream"]
GROUPED = FAMILIES["phi3"].settings


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build(FAMILIES["llama"], tmp_path_factory.mktemp("llama"))


def extracted(folder, output, **options):
    settings = {"layers": "all", "positions": "all", "batch_tokens": 60, "quiet": True}
    settings |= {"device": "cpu", "chat_template": False, "keep_special_tokens": True}
    return probecache.extract(
        model=str(folder), data=RECORDS, output=output, **{**settings, **options}
    )


def tensors_of(cache):
    return {str(p.relative_to(cache.path)): p.read_bytes() for p in cache.path.rglob("*.pt")}


@pytest.fixture
def fault(monkeypatch):
    """Plants a fault: what attention over the tree gives at one block goes through a function."""
    attend = PackPass.attend

    def plant(block, change):
        def faulty(self, attention, module, *arguments, **options):
            found = attend(self, attention, module, *arguments, **options)
            return change(found) if module.layer_idx == block else found

        monkeypatch.setattr(PackPass, "attend", faulty)

    return plant


def other_numbers(found):
    return found * 1.5


def no_numbers(found):
    return found * torch.nan


def refuse(found):
    raise RuntimeError("a shape that no tree has")


OTHER, REFUSED = (
    "padded batches, because llama with shared prefixes gave other numbers",
    "padded batches, because the attention of llama does not take a tree of prefixes",
)
FAULTS = [
    pytest.param(other_numbers, OTHER, id="other numbers"),
    pytest.param(no_numbers, OTHER, id="no numbers"),
    pytest.param(refuse, REFUSED, id="an error"),
]


# ---------------------------------------------------------------- from shared prefixes to batches


@pytest.mark.parametrize("engine", ENGINES)
def test_prefixes_are_shared_where_that_gives_the_same_numbers(llama, tmp_path, engine):
    shared = extracted(llama, tmp_path / "shared", engine=engine)
    padded = extracted(llama, tmp_path / "padded", engine=engine, share_prefixes=False)
    assert shared.info.execution == {"engine": engine, "batches": "shared prefixes"}
    assert padded.info.execution["batches"] == "padded batches, because asked for"
    for label in shared.classes:
        for layer in shared.layers:
            assert relative_difference(shared[label, layer], padded[label, layer]) < 1e-5
    assert shared.info.timing["computed_tokens"] == shared.info.timing["distinct_tokens"]
    assert padded.info.timing["computed_tokens"] >= padded.info.timing["tokens"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("block", [0, BLOCKS - 1])
@pytest.mark.parametrize(("change", "reason"), FAULTS)
def test_a_fault_of_sharing_leads_to_padded_batches(
    llama, tmp_path, fault, engine, block, change, reason
):
    padded = extracted(llama, tmp_path / "padded", engine=engine, share_prefixes=False)
    fault(block, change)
    found = extracted(llama, tmp_path / "found", engine=engine)
    assert found.info.execution == {"engine": engine, "batches": reason}
    assert tensors_of(found) == tensors_of(padded)
    assert found.info.non_finite == {}
    assert found.info.timing["computed_tokens"] == padded.info.timing["computed_tokens"]


def test_the_reason_is_told_unless_told_to_be_quiet(llama, tmp_path, fault, capsys):
    fault(BLOCKS - 1, other_numbers)
    extracted(llama, tmp_path / "quiet", engine="stream")
    assert capsys.readouterr().err == ""
    extracted(llama, tmp_path / "told", engine="stream", quiet=False)
    told = capsys.readouterr().err
    assert told.startswith("Prefixes are not shared: llama with shared prefixes gave other numbers")


def test_in_streaming_rows_of_lower_blocks_are_overwritten(llama, tmp_path, fault, monkeypatch):
    """The fault shows at the last block, when the rows of all others are on their way to disk."""
    written, write = [], CacheWriter.write

    def counted(self, layer, examples, rows):
        written.append((layer, tuple(examples)))
        write(self, layer, examples, rows)

    fault(BLOCKS - 1, other_numbers)
    monkeypatch.setattr(CacheWriter, "write", counted)
    extracted(llama, tmp_path / "found", engine="stream", batch_tokens=1000)
    every = tuple(range(len(RECORDS)))
    for layer in range(BLOCKS + 1):
        seen = [index for at, examples in written if at == layer for index in examples]
        times = 1 if layer == BLOCKS else 2
        assert sorted(seen) == sorted(every * times)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_are_not_finite_are_counted_once(tmp_path, fault, engine):
    folder = build(FAMILIES["llama"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    letter = token_ids(folder, "j")[-1]  # of one text
    tensors["model.embed_tokens.weight"][letter] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    options = {"engine": engine, "allow_nonfinite": True}
    padded = extracted(folder, tmp_path / "padded", share_prefixes=False, **options)
    fault(BLOCKS - 1, other_numbers)
    found = extracted(folder, tmp_path / "found", **options)
    assert found.info.execution["batches"].startswith("padded batches, because ")
    assert found.info.non_finite == padded.info.non_finite
    assert found.info.non_finite[0] == 1
    assert found.info.non_finite[1] > 1


@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_that_are_not_finite_do_not_reach_prompts_that_share_a_row(tmp_path, engine):
    """Masked keys count with a weight of 0, and 0 times infinity is not a number."""
    folder = build(FAMILIES["llama"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    letter = token_ids(folder, "j")[-1]  # of one text, which no short sample holds
    tensors["model.embed_tokens.weight"][letter] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    options = {"engine": engine, "positions": "last", "batch_tokens": 1000, "layers": [1, BLOCKS]}
    cache = extracted(folder, tmp_path / "cache", allow_nonfinite=True, **options)
    assert cache.info.non_finite == {1: 1, BLOCKS: 1}
    with pytest.raises(NonFiniteError, match=r"1 of \d+ rows .* first on row 1 "):
        extracted(folder, tmp_path / "refused", **options)


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_that_counts_places_in_a_row_sees_rows_that_are_short_enough(tmp_path, engine):
    """Llama 4 scales queries by their place in the row from `floor_scale` on."""
    settings = {
        **FAMILIES["llama4"].settings,
        "attention_chunk_size": 128,
        "no_rope_layers": [0] * 4,
    }
    for scale, batches in ((64, "shared prefixes"), (16, "padded batches, because llama4_text")):
        family = Family("llama4", "Llama4TextConfig", {**settings, "floor_scale": scale})
        folder = build(family, tmp_path / f"model{scale}")
        options = {"engine": engine, "batch_tokens": 1000}
        cache = extracted(folder, tmp_path / f"cache{scale}", **options)
        assert cache.info.execution["batches"].startswith(batches)
        assert worst_difference(cache, family, folder) < family.tolerance


@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_that_padding_changes_go_in_batches_of_one_length(
    llama, tmp_path, monkeypatch, engine
):
    feed = PaddedWork.feed

    def faulty(self, step, context, model):
        made = feed(self, step, context, model)
        rows, padded = made.rows, "attention_mask" in made.inputs
        made.rows = lambda layer, hidden: rows(layer, hidden * (1 + layer * padded))
        return made

    expected = extracted(llama, tmp_path / "expected")
    monkeypatch.setattr(PaddedWork, "feed", faulty)
    cache = extracted(llama, tmp_path / "cache", engine=engine, share_prefixes=False)
    assert cache.info.execution["batches"] == "batches of one length, because asked for"
    for label in cache.classes:
        for layer in cache.layers:
            assert relative_difference(cache[label, layer], expected[label, layer]) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("positions", ["last", "mean"])
def test_other_positions_fall_back_too(llama, tmp_path, fault, engine, positions):
    options = {"engine": engine, "positions": positions}
    padded = extracted(llama, tmp_path / "padded", share_prefixes=False, **options)
    fault(BLOCKS - 1, other_numbers)
    found = extracted(llama, tmp_path / "found", **options)
    assert tensors_of(found) == tensors_of(padded)


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_that_are_added_fall_back_too(llama, tmp_path, fault, engine):
    padded = extracted(llama, tmp_path / "padded", engine=engine, share_prefixes=False)
    extracted(llama, tmp_path / "found", engine=engine, share_prefixes=False, layers=[1])
    fault(BLOCKS - 1, other_numbers)
    found = extracted(llama, tmp_path / "found", engine=engine)
    # Layer 0 comes from the tokens, where nothing is at fault; the others from layer 1.
    assert found.info.execution["batches"] == f"shared prefixes; {OTHER}"
    assert tensors_of(found) == tensors_of(padded)


@pytest.fixture
def padding_at_fault(monkeypatch):
    """Padded batches give other numbers."""
    feed = PaddedWork.feed

    def faulty(self, step, context, model):
        made = feed(self, step, context, model)
        rows = made.rows
        made.rows = lambda layer, hidden: rows(layer, hidden * (1 + layer))
        return made

    monkeypatch.setattr(PaddedWork, "feed", faulty)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("change", "reason"), FAULTS)
def test_what_is_wrong_both_ways_is_refused_and_leaves_nothing(
    llama, tmp_path, fault, padding_at_fault, engine, change, reason
):
    fault(BLOCKS - 1, change)
    with pytest.raises(PreflightError, match=r"at layer \d on a prompt .* nothing was extracted"):
        extracted(llama, tmp_path / "here" / "cache", engine=engine)
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_raises_both_ways_is_refused_in_words(llama, tmp_path, monkeypatch, engine):
    def broken(*_arguments, **_options):
        raise ValueError("needs an image")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", broken)
    with pytest.raises(ModelError, match=r"to run on token ids alone .* got: needs an image"):
        extracted(llama, tmp_path / "here" / "cache", engine=engine)
    assert list((tmp_path / "here").iterdir()) == []


# ---------------------------------------------------------------- models that cannot share


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert", "in bert tokens see those behind them"),
        ("bloom", "the attention of bloom does not take a tree of prefixes"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_architectures_without_a_tree_go_in_padded_batches(tmp_path, name, reason, engine):
    family = FAMILIES[name]
    folder = build(family, tmp_path / name)
    cache = extracted(folder, tmp_path / "cache", engine=engine, layers=[1, BLOCKS])
    assert cache.info.execution["batches"] == f"padded batches, because {reason}"
    assert worst_difference(cache, family, folder) < family.tolerance


def worst_difference(cache, family, folder):
    """From plain forwards, one prompt each, of models that have seen no other prompt."""
    worst = 0.0
    for example in cache.examples:
        model = full_model(family, folder)
        plain = plain_layers(family, model, token_ids(folder, example.question))
        for layer in cache.layers:
            rows = cache[example.label, layer][slice(*example.rows)]
            worst = max(worst, relative_difference(rows, plain[layer]))
    return worst


TRAINED = 16  # tokens, which some of the texts exceed and some do not
SCALED = {
    "longrope": Family(
        "longrope",
        "Phi3Config",
        {**GROUPED, "original_max_position_embeddings": TRAINED}
        | {
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4},
                **{"long_factor": [2.0, 3.0, 4.0, 5.0]},
                "original_max_position_embeddings": TRAINED,
            }
        },
    ),
    "dynamic": Family(
        "dynamic",
        "LlamaConfig",
        {**FAMILIES["llama"].settings}
        | {
            "rope_parameters": {
                **{"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
                "original_max_position_embeddings": TRAINED,
            }
        },
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SCALED)
def test_embeddings_that_change_with_the_length_see_each_length_alone(tmp_path, name, engine):
    family = SCALED[name]
    folder = build(family, tmp_path / name)
    cache = extracted(folder, tmp_path / "cache", engine=engine, batch_tokens=1000)
    assert "changes with a prompt's length" in cache.info.execution["batches"]
    # Without padding: batches hold prompts of one length.
    assert cache.info.timing["computed_tokens"] == cache.info.timing["tokens"]
    assert worst_difference(cache, family, folder) < family.tolerance


def test_the_lengths_of_these_embeddings_matter_to_this_test(tmp_path):
    """Else the test above would pass without anyone caring for lengths."""
    family = SCALED["longrope"]
    folder = build(family, tmp_path / "model")
    model = full_model(family, folder)
    ids = token_ids(folder, RECORDS[0]["text"])
    short, long = (plain_layers(family, model, ids[:count])[1][:10] for count in (12, 40))
    assert relative_difference(short, long) > 1e-3


def test_texts_within_the_trained_length_share_prefixes(tmp_path):
    folder = build(SCALED["longrope"], tmp_path / "model")
    data = [r for r in RECORDS if len(token_ids(folder, r["text"])) <= TRAINED]
    cache = probecache.extract(
        model=str(folder),
        data=data,
        output=tmp_path / "cache",
        device="cpu",
        quiet=True,
        chat_template=False,
    )
    assert cache.info.execution["batches"] == "shared prefixes"


# ---------------------------------------------------------------- rows that are known already


def test_cached_rows_are_found_by_prompt_and_depth_and_padding_by_zeros(tmp_path):
    tokens = [3, 1, 4, 2]
    values = torch.randn(sum(tokens), HIDDEN)
    # In data order within each class; the classes alternate.
    records = labelled("testing", "deployment", "testing", "deployment")
    cache = write_cache(tmp_path / "c", records, {2: values}, tokens=tokens, positions="all")
    known = CachedRows(cache, 2)
    starts = np.cumsum([0, *tokens])
    every = [(p, d) for p, count in enumerate(tokens) for d in range(count)]
    order = np.random.default_rng(0).permutation(len(every))
    prompts, depths = np.array([every[place] for place in order]).T
    expected = torch.stack([values[starts[p] + d] for p, d in zip(prompts, depths, strict=True)])
    assert known.layer == 2
    assert torch.equal(known.rows(prompts, depths), expected)
    assert not known.rows(np.array([-1, -1]), np.array([0, 5])).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert", "opt"])
def test_streaming_accepts_the_convention_of_usual_architectures(tmp_path, name, dtype):
    folder = build(FAMILIES[name], tmp_path / name)
    open_model(ModelOptions(str(folder), dtype=dtype)).skeleton(BLOCKS).check_layer_convention()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_architecture_whose_hidden_states_count_otherwise_is_refused(tmp_path, engine):
    """Mamba's `hidden_states[0]` is the stream behind the first block."""
    folder = build(MAMBA, tmp_path / "mamba")
    with pytest.raises(ModelError, match=r"at layer 0 on|hidden_states\[L\] of MambaModel"):
        extracted(folder, tmp_path / "here" / "cache", engine=engine)
    assert list((tmp_path / "here").iterdir()) == []
