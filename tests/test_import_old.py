"""Old caches: rows bit for bit, what they do not say asked for, what nobody knows never equal.

Old folders are made by plain torch.save, and read back by plain torch.load.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from old_caches import CLASSES, HIDDEN, LAYERS, Calls, forge, per_example, pickle_of, save, stacked
from sklearn.metrics import roc_auc_score
from synthetic import labelled, write_cache
from test_cli import command, content_of
from test_cli import refused as refused  # a fixture

import probecache
from probecache.errors import (
    LayerError,
    LayerNotCachedError,
    MismatchError,
    NonFiniteError,
    OutputError,
    StoreError,
    UsageError,
)
from probecache.identity import SCORING
from probecache.shipped import shipped
from probecache.store.describe import describe
from probecache.types import Identity
from probecache.unrecorded import is_imported, is_recorded, unrecorded
from probecache.workflow import import_old as module

MODEL = str(shipped("models/tiny-llama"))
TOLD = {
    "model": "org/name",
    "layer_convention": "residual",
    "num_hidden_layers": 24,
    "positions": "last",
    "quiet": True,
}
TOKENS = TOLD | {"positions": "all", "special_tokens": "kept"}
PREFIXES = {"testing": "test", "deployment": "deploy"}
PREFIXES_BACK = {prefix: label for label, prefix in PREFIXES.items()}
RECORDS = [
    {"question": f"question {number}", "type": label, "id": f"q{number}", "group": f"g{number % 5}"}
    for number, label in enumerate(
        ["deploy", "test"] * CLASSES["deploy"] + ["test"] * (CLASSES["test"] - CLASSES["deploy"])
    )
]


def file_rows(cache, label, layer):
    """A class's rows as plain torch reads them."""
    return torch.load(
        cache.path / f"layer_{layer}" / f"{PREFIXES[label]}_activations.pt", weights_only=True
    )


def same_bits(found, saved):
    return (
        found.dtype == saved.dtype
        and found.shape == saved.shape
        and torch.equal(found.view(torch.uint8), saved.contiguous().view(torch.uint8))
    )


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("middle", [False, True])
def test_one_file_per_class_comes_through_bit_for_bit(tmp_path, dtype, middle):
    saved = stacked(tmp_path / "old", dtype=dtype, middle=middle)
    before = content_of(tmp_path / "old")
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD)
    assert cache.layers == LAYERS
    assert cache.classes == ("testing", "deployment")
    for layer in LAYERS:
        for label, prefix in PREFIXES.items():
            assert same_bits(file_rows(cache, label, layer), saved[layer, prefix])
            assert torch.equal(cache[label, layer], saved[layer, prefix])
    assert content_of(tmp_path / "old") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_file_per_example_comes_through_bit_for_bit(tmp_path, dtype):
    saved = per_example(tmp_path / "old", dtype=dtype)
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOKENS)
    for layer in LAYERS:
        for label, prefix in PREFIXES.items():
            rows = file_rows(cache, label, layer)
            assert same_bits(rows, torch.cat(saved[layer, prefix]))
            members = [record for record in cache.examples if record.label == label]
            for record, example in zip(members, saved[layer, prefix], strict=True):
                assert torch.equal(rows[slice(*record.rows)], example)
                assert record.n_tokens == len(example)
                assert record.input_tokens == 0
    assert np.unique(cache.tokens("testing")).tolist() == [-1]


def test_many_layers_and_classes_of_any_name_come_through(tmp_path):
    classes = {"deploy": 3, "roleplay": 2, "test": 4}
    saved = stacked(tmp_path / "old", layers=(0, 2, 24), classes=classes)
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD)
    assert cache.layers == (0, 2, 24)
    assert cache.classes == ("testing", "deployment", "roleplay")
    for (layer, name), rows in saved.items():
        assert torch.equal(cache[name, layer], rows)


def test_an_imported_cache_is_whole(tmp_path, capsys):
    stacked(tmp_path / "old")
    probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD)
    code, out, _ = command(capsys, "verify", tmp_path / "new")
    assert code == 0, out


def test_a_damaged_import_is_not_repaired_by_a_model_that_nobody_knows(tmp_path, capsys):
    stacked(tmp_path / "old")
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD)
    file = cache.path / "layer_10" / "test_activations.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    before = content_of(cache.path)
    code, _, said = command(capsys, "verify", cache.path, "--repair")
    assert code == 2
    assert "was imported: nothing tells what its rows were made with; import the old" in said
    assert content_of(cache.path) == before


def test_the_same_import_gives_the_same_bytes(tmp_path):
    stacked(tmp_path / "old")
    for name in ("one", "other"):
        probecache.import_cache(tmp_path / "old", tmp_path / name, **TOLD)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "other")


def test_memory_does_not_grow_with_the_cache(tmp_path):
    """Memory that is not the page cache's, behind every write: 160 MB of files, 60 MB of memory."""
    generator = torch.Generator().manual_seed(0)
    for label in CLASSES:
        rows = torch.randn(2000, 10_000, generator=generator)
        save(tmp_path / "old" / "layer_3" / f"{label}.pt", rows)
    code = (
        "import sys, probecache, torch\n"
        "from pathlib import Path\n"
        "from probecache.store.writer import CacheWriter\n"
        "def held():\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(status.split('RssAnon:')[1].split()[0]) << 10\n"
        "write, after = CacheWriter.write, []\n"
        "def watched(*arguments):\n"
        "    write(*arguments)\n"
        "    after.append(held())\n"
        "CacheWriter.write = watched\n"
        "torch.isfinite(torch.ones(2)).all()\n"
        "before = held()\n"
        "probecache.import_cache(sys.argv[1], sys.argv[2], model='m', layer_convention='residual',"
        "num_hidden_layers=9, positions='last', quiet=True)\n"
        "assert len(after) > 8\n"
        "print(max(after) - before)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "old"), str(tmp_path / "new")]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 80e6
    rows = torch.load(tmp_path / "new/layer_3/deploy_activations.pt", weights_only=True, mmap=True)
    saved = torch.load(tmp_path / "old/layer_3/deploy.pt", weights_only=True, mmap=True)
    assert torch.equal(rows, saved)


# ---------------------------------------------------------------- what layers mean


def test_layers_of_blocks_are_counted_on(tmp_path):
    saved = stacked(tmp_path / "old", layers=(0, 23))
    told = TOLD | {"layer_convention": "block"}
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **told)
    assert cache.layers == (1, 24)
    assert torch.equal(cache["test", 1], saved[0, "test"])
    assert torch.equal(cache["test", 24], saved[23, "test"])


def test_the_normed_last_entry_of_hidden_states_is_left_out(tmp_path):
    saved = stacked(tmp_path / "old", layers=(0, 23, 24))
    told = TOLD | {"layer_convention": "hidden_states"}
    plans = []
    cache = probecache.import_cache(
        tmp_path / "old", tmp_path / "new", **told, announce=plans.append
    )
    assert cache.layers == (0, 23)
    assert plans[0].normed == (24,)
    assert torch.equal(cache["test", 23], saved[23, "test"])
    stacked(tmp_path / "last", layers=(24,))
    with pytest.raises(UsageError, match="gone through the final norm"):
        probecache.import_cache(tmp_path / "last", tmp_path / "n", **told)


def test_hidden_states_of_a_real_model_are_its_layers(tmp_path):
    """The layout's own tool, over the model that ships: against what extract caches."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = labelled("testing", "deployment", "testing", "deployment")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    rows = {}
    for record in records:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": record["question"]}],
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        states = model(ids, output_hidden_states=True).hidden_states
        for layer in (5, 20, 24):
            rows.setdefault((layer, record["type"]), []).append(states[layer][:, -1].detach())
    for (layer, label), pieces in rows.items():
        save(tmp_path / "old" / f"layer_{layer}" / f"{label}.pt", torch.stack(pieces))
    told = TOLD | {"layer_convention": "hidden_states"}
    ours = probecache.import_cache(tmp_path / "old", tmp_path / "new", **told, data=records)
    theirs = probecache.extract(
        model=MODEL,
        data=records,
        output=tmp_path / "extracted",
        layers="5,20",
        positions="last",
        dtype="float32",
        quiet=True,
    )
    assert ours.layers == theirs.layers == (5, 20)
    for layer in ours.layers:
        for label in ours.classes:
            torch.testing.assert_close(
                ours[label, layer], theirs[label, layer], rtol=1e-4, atol=1e-3
            )
    assert [one.id for one in ours.examples] == [one.id for one in theirs.examples]


@pytest.mark.parametrize(
    ("convention", "blocks", "word"),
    [("residual", 9, "layers 0 to 9"), ("hidden_states", 9, "0 to 9"), ("block", 10, "0 to 9")],
)
def test_a_layer_that_the_model_cannot_have_is_refused(tmp_path, convention, blocks, word):
    stacked(tmp_path / "old")
    told = TOLD | {"layer_convention": convention, "num_hidden_layers": blocks}
    with pytest.raises(LayerError, match=word):
        probecache.import_cache(tmp_path / "old", tmp_path / "new", **told)


# ---------------------------------------------------------------- what has to be told


def test_all_that_is_missing_is_asked_for_at_once(refused, tmp_path):
    stacked(tmp_path / "old")
    line = refused("import", tmp_path / "old", tmp_path / "new")
    for option in (
        *("--model", "--layer-convention", "--num-hidden-layers", "--positions"),
        *("--special-tokens", "residual =", "block =", "hidden_states ="),
    ):
        assert f"{option}" in line
    assert "one file per class at layers 9,10, classes deploy, test" in line


@pytest.mark.parametrize("name", ["model", "layer_convention", "num_hidden_layers", "positions"])
def test_whatever_is_missing_is_asked_for_alone(tmp_path, name):
    stacked(tmp_path / "old")
    option = "--" + name.replace("_", "-")
    others = {"--" + other.replace("_", "-") for other in TOLD} - {option}
    with pytest.raises(UsageError, match=f"no {option} ") as refusal:
        probecache.import_cache(tmp_path / "old", tmp_path / "new", **(TOLD | {name: None}))
    assert not [other for other in others if f"no {other} " in str(refusal.value)]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["", " ", "\t\n"])
def test_an_empty_name_is_none(tmp_path, name):
    stacked(tmp_path / "old")
    with pytest.raises(UsageError, match="no --model "):
        probecache.import_cache(tmp_path / "old", tmp_path / "new", **(TOLD | {"model": name}))


@pytest.mark.parametrize(
    ("make", "told", "word"),
    [
        (stacked, {"positions": "mean"}, "no --special-tokens"),
        (stacked, {"special_tokens": "kept"}, "leave it out"),
        (stacked, {"positions": "all", "special_tokens": "kept"}, "last or mean"),
        (stacked, {"positions": "answer"}, "last or mean"),
        (stacked, {"positions": "first"}, "expected --positions to be last"),
        (per_example, {"positions": "role:user"}, "answer of a cache to import, got role:user"),
        (per_example, {"positions": "last-2"}, "answer of a cache to import, got last-2"),
        (stacked, {"layer_convention": "foo"}, "expected --layer-convention to be residual, hid"),
        (
            stacked,
            {"positions": "mean", "special_tokens": "x"},
            "expected --special-tokens to be k",
        ),
        (stacked, {"num_hidden_layers": 0}, "from 1 to"),
        (stacked, {"num_hidden_layers": 10**9}, "from 1 to"),
        (per_example, {"positions": "all"}, "no --special-tokens"),
        (per_example, {"positions": "last"}, "all or answer"),
        (per_example, {"positions": "mean", "special_tokens": "kept"}, "all or answer"),
    ],
)
def test_what_is_told_has_to_make_sense(tmp_path, make, told, word):
    make(tmp_path / "old")
    with pytest.raises(UsageError, match=word):
        probecache.import_cache(tmp_path / "old", tmp_path / "new", **(TOLD | told))
    assert not (tmp_path / "new").exists()


def test_what_is_told_of_special_tokens_is_stored(tmp_path):
    stacked(tmp_path / "old")
    for words, kept in (("kept", True), ("left-out", False)):
        told = TOLD | {"positions": "mean", "special_tokens": words}
        cache = probecache.import_cache(tmp_path / "old", tmp_path / words, **told)
        assert cache.identity.special_tokens_kept is kept
        assert cache.identity.positions == "mean"


def test_an_answer_of_tokens_is_taken_at_its_word(tmp_path):
    per_example(tmp_path / "old")
    told = TOLD | {"positions": "answer"}
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **told)
    assert cache.info.positions == "answer"


# ---------------------------------------------------------------- which examples


def test_without_data_examples_have_numbers_and_no_question(tmp_path):
    stacked(tmp_path / "old")
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD)
    assert [one.id for one in cache.examples] == [
        *(f"test-{number}" for number in range(12)),
        *(f"deploy-{number}" for number in range(11)),
    ]
    assert {one.question for one in cache.examples} == {"(question not recorded)"}
    assert len({one.group for one in cache.examples}) == 23
    assert cache.info.num_examples == 23


def test_with_data_examples_are_its_own_in_its_order(tmp_path):
    saved = stacked(tmp_path / "old")
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD, data=RECORDS)
    assert [one.id for one in cache.examples] == [record["id"] for record in RECORDS]
    assert [one.group for one in cache.examples] == [record["group"] for record in RECORDS]
    counts = {"testing": 0, "deployment": 0}
    for record in cache.examples:
        expected = saved[9, PREFIXES[record.label]][counts[record.label]]
        assert torch.equal(cache[record.label, 9][record.rows[0]], expected)
        counts[record.label] += 1
    # The data is known, so it may be asked for as with any cache.
    assert probecache.train(cache=cache.path, data=RECORDS, output=tmp_path / "run").layers
    with pytest.raises(MismatchError, match="--data"):
        probecache.train(cache=cache.path, data=RECORDS[::-1], output=tmp_path / "run")


def test_tokens_of_pairs_go_to_their_answers(tmp_path):
    pairs = [
        {"question": f"question {n}", "positive": f"yes {n}", "negative": f"no {n}"}
        for n in range(12)
    ]
    saved = {}
    for label, shift in (("test", 0), ("deploy", 1)):
        for number in range(12):
            rows = torch.randn(1 + (number + shift) % 3, HIDDEN)
            saved[PREFIXES_BACK[label], number] = rows
            save(tmp_path / f"old/layer_4/{label}/{number}.pt", rows[None])
    told = TOLD | {"positions": "answer"}
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **told, data=pairs)
    assert cache.info.num_examples == 12
    for record in cache.examples:
        number = int(record.question.split()[1])
        assert record.answer == f"{'yes' if record.label == 'testing' else 'no'} {number}"
        rows = cache[record.label, 4][slice(*record.rows)]
        assert torch.equal(rows, saved[record.label, number])


@pytest.mark.parametrize(
    ("records", "word"),
    [
        (RECORDS[:-1], "12 examples of class 'testing'"),
        ([*RECORDS, RECORDS[0] | {"id": "more"}], "got 12"),
        (
            [record | {"type": "other"} for record in RECORDS[::2]] + RECORDS[1::2],
            "one name for each of the classes",
        ),
        ([*RECORDS, {"question": "?", "type": "third"}], "third"),
    ],
)
def test_data_of_other_examples_is_refused(tmp_path, records, word):
    stacked(tmp_path / "old")
    with pytest.raises(MismatchError, match=word):
        probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD, data=records)


def test_names_that_stand_for_one_class_or_for_one_alone_are_refused(tmp_path):
    stacked(tmp_path / "twice", classes={"test": 3, "testing": 3, "deploy": 3})
    with pytest.raises(MismatchError, match="got files of deploy, test, testing"):
        probecache.import_cache(tmp_path / "twice", tmp_path / "new", **TOLD)
    stacked(tmp_path / "one", classes={"test": 3})
    with pytest.raises(MismatchError, match="two classes or more"):
        probecache.import_cache(tmp_path / "one", tmp_path / "new", **TOLD)


def test_classes_of_the_data_are_found_by_their_safe_names(tmp_path):
    stacked(tmp_path / "old", classes={"in_the_wild": 2, "graded": 2})
    records = labelled("in the wild", "graded", "in the wild", "graded")
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD, data=records)
    assert cache.classes == ("in the wild", "graded")


# ---------------------------------------------------------------- training and scoring


def test_training_and_scoring_give_what_the_old_tensors_give(tmp_path):
    saved = stacked(tmp_path / "old")
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD)
    vectors = probecache.train(cache=cache.path, output=tmp_path / "run")
    result = probecache.validate(cache=cache.path, vectors=vectors, output=tmp_path / "out")
    for outcome in result.layers:
        test, deploy = (saved[outcome.layer, name].double().numpy() for name in CLASSES)
        direction = deploy.mean(0) - test.mean(0)
        direction /= np.linalg.norm(direction)
        np.testing.assert_allclose(vectors.directions[outcome.layer], direction, rtol=1e-5)
        scores = np.concatenate([test, deploy]) @ direction
        truth = [0] * len(test) + [1] * len(deploy)
        assert outcome.auroc.auroc == pytest.approx(roc_auc_score(truth, scores))


def test_scores_of_tokens_are_those_of_the_old_files(tmp_path):
    saved = per_example(tmp_path / "old")
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOKENS)
    vectors = probecache.train(cache=cache.path, output=tmp_path / "run")
    result = probecache.validate(cache=cache.path, vectors=vectors, output=tmp_path / "out")
    for outcome in result.layers:
        test, deploy = (torch.cat(saved[outcome.layer, name]).double() for name in CLASSES)
        direction = deploy.mean(0) - test.mean(0)
        direction /= direction.norm()
        means = [
            float((rows.double() @ direction).mean())
            for name in CLASSES
            for rows in saved[outcome.layer, name]
        ]
        np.testing.assert_allclose(outcome.scores, means, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- what nobody knows


def _told_fields(cache):
    values = {field.name: getattr(cache.identity, field.name) for field in fields(Identity)}
    notes = {
        name: set(value.values()) if name == "weights" else {value}
        for name, value in values.items()
        if isinstance(value, str) or name == "weights"
    }
    return {name for name, found in notes.items() if not all(map(is_recorded, found))}


def test_what_nobody_knows_is_stored_as_such(tmp_path):
    stacked(tmp_path / "old")
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD)
    assert _told_fields(cache) >= {
        *("weights", "architecture", "quantization", "adapter", "attention", "tokenizer"),
        *("chat_template", "system_prompt", "data", "token_ids"),
    }
    assert cache.identity.model == "org/name"
    assert cache.identity.num_hidden_layers == 24
    assert is_imported(cache.identity)
    with_data = probecache.import_cache(tmp_path / "old", tmp_path / "data", **TOLD, data=RECORDS)
    assert is_recorded(with_data.identity.data)


def test_other_numbers_or_another_count_of_layers_are_another_unknown(tmp_path):
    stacked(tmp_path / "old")
    stacked(tmp_path / "other", dtype=torch.float16)
    block = TOLD | {"layer_convention": "block"}
    found = [
        probecache.import_cache(tmp_path / old, tmp_path / f"new{place}", **told).identity
        for place, (old, told) in enumerate([("old", TOLD), ("other", TOLD), ("old", block)])
    ]
    assert len({identity.tokenizer for identity in found}) == 3


def test_a_note_equals_no_value_and_no_other_note():
    assert unrecorded("a" * 64) == unrecorded("a" * 64)
    assert unrecorded("a" * 64) != unrecorded("b" * 64)
    assert not is_recorded(unrecorded("a" * 64))
    assert all(map(is_recorded, [None, "", "0" * 64, "LlamaForCausalLM"]))


@pytest.fixture
def trained(tmp_path):
    """Vectors of an imported cache, and a cache like it of which all is known."""
    saved = stacked(tmp_path / "old")
    cache = probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD)
    vectors = probecache.train(cache=cache.path, output=tmp_path / "run")
    records = labelled(*["testing"] * 12, *["deployment"] * 11)
    rows = {layer: torch.cat([saved[layer, name] for name in CLASSES]) for layer in LAYERS}
    known = write_cache(tmp_path / "known", records, rows, model="org/name")
    return vectors, cache, known


def test_vectors_of_an_import_score_nothing_else_silently(trained, tmp_path):
    vectors, _, known = trained
    with pytest.raises(MismatchError) as refusal:
        probecache.validate(cache=known.path, vectors=vectors, output=tmp_path / "out")
    unknown = [
        *("weights", "architecture", "quantization", "adapter", "tokenizer", "chat_template"),
        "system_prompt",
    ]
    for name in unknown:
        assert f"{name}: expected" in str(refusal.value)
        assert f"--allow-mismatch {name}" in str(refusal.value)
    result = probecache.validate(
        cache=known.path, vectors=vectors, output=tmp_path / "out", allow_mismatch=SCORING
    )
    assert len(result.layers) == len(LAYERS)


def test_vectors_of_others_score_an_import_not_silently_either(trained, tmp_path):
    _, imported, known = trained
    vectors = probecache.train(cache=known.path, output=tmp_path / "known-run")
    with pytest.raises(MismatchError, match="weights: expected"):
        probecache.validate(cache=imported.path, vectors=vectors, output=tmp_path / "out")


def test_two_imports_are_not_taken_for_one_model(trained, tmp_path):
    vectors, _, _ = trained
    stacked(tmp_path / "second", middle=True, classes={"test": 5, "deploy": 5})
    other = probecache.import_cache(tmp_path / "second", tmp_path / "new2", **TOLD)
    with pytest.raises(MismatchError, match="tokenizer: expected 'not recorded"):
        probecache.validate(cache=other.path, vectors=vectors, output=tmp_path / "out")


def test_no_layer_is_added_to_an_import(trained, tmp_path):
    _, imported, _ = trained
    data = labelled("testing", "deployment")
    before = content_of(imported.path)
    for call in (probecache.extract, probecache.plan_extraction):
        with pytest.raises(MismatchError, match="imported"):
            call(model=MODEL, data=data, layers="11", output=imported.path)
    assert content_of(imported.path) == before
    with pytest.raises(LayerNotCachedError, match="no layer can be added"):
        probecache.train(cache=imported.path, layers="11", output=tmp_path / "run")


def test_a_model_is_not_run_with_a_system_prompt_that_nobody_knows(tmp_path):
    """With every difference allowed, prompts are rendered by the defaults and not by a note."""
    records = labelled(*["testing", "deployment"] * 3)
    cache = probecache.extract(
        model=MODEL, data=records, layers="3", output=tmp_path / "own", dtype="float32", quiet=True
    )
    for label, prefix in PREFIXES.items():
        save(tmp_path / f"old/layer_3/{prefix}.pt", cache[label, 3].clone())
    imported = probecache.import_cache(
        tmp_path / "old",
        tmp_path / "new",
        **(TOLD | {"positions": "mean", "special_tokens": "left-out"}),
    )
    vectors = probecache.train(cache=imported.path, output=tmp_path / "run")
    results = [
        probecache.validate(
            vectors=vectors,
            output=tmp_path / name,
            allow_mismatch=SCORING,
            **source,
        )
        for name, source in (
            ("a", {"model": MODEL, "data": records, "quiet": True}),
            ("b", {"cache": cache.path}),
        )
    ]
    np.testing.assert_array_equal(results[0].layers[0].scores, results[1].layers[0].scores)


def test_a_model_is_refused_before_it_is_read_with_every_field_that_has_to_be_allowed(
    trained, tmp_path
):
    def begun(_):
        raise AssertionError("the run has begun")

    vectors, _, _ = trained
    with pytest.raises(MismatchError) as refusal:
        probecache.validate(
            vectors=vectors,
            model=MODEL,
            data=labelled("testing", "deployment"),
            output=tmp_path / "out",
            allow_mismatch=["num_hidden_layers", "hidden_size"],
            announce=begun,
        )
    for name in ("weights", "architecture", "tokenizer", "template_date", "system_prompt"):
        assert f"{name}: expected" in str(refusal.value)
    assert "--template-date" not in str(refusal.value)


def test_info_tells_what_is_known_and_what_is_not(trained):
    vectors, imported, _ = trained
    for path in (imported.path, vectors.path):
        facts = {line[:17].strip(): line[18:] for line in describe(path)}
        assert facts["model"] == "org/name (as told; 24 blocks)"
        assert facts["dtype"] == "float32 of the rows; the model's own is not recorded"
        assert {"weights", "tokenizer", "chat_template", "system_prompt", "quantization"} <= set(
            facts["not recorded"].split(", ")
        )
        assert not facts.keys() & {"prompts", "system prompt", "adapter"}
    assert "imported from one file per class" in "\n".join(describe(imported.path))


# ---------------------------------------------------------------- what is refused


def _snapshot(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_rows_that_are_not_finite_are_refused_or_counted(tmp_path):
    rows = stacked(tmp_path / "old")[10, "test"]
    rows[3, 0], rows[7, 2] = float("nan"), float("-inf")
    save(tmp_path / "old/layer_10/test_activations.pt", rows)
    before = _snapshot(tmp_path)
    with pytest.raises(NonFiniteError, match="2 of 12 rows"):
        probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD)
    assert _snapshot(tmp_path) == before
    cache = probecache.import_cache(
        tmp_path / "old", tmp_path / "new", **TOLD, allow_nonfinite=True
    )
    assert cache.info.non_finite == {10: 2}


def test_the_new_place_has_to_be_free_and_outside(tmp_path):
    stacked(tmp_path / "old")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    for place, word in (
        (tmp_path / "taken", "to be free"),
        (tmp_path / "taken" / "mine", "to be free"),
        (tmp_path / "old", "to be free"),
        (tmp_path / "old" / "new", "outside"),
    ):
        before = content_of(tmp_path)
        with pytest.raises(OutputError, match=word):
            probecache.import_cache(tmp_path / "old", place, **TOLD)
        assert content_of(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert probecache.import_cache(tmp_path / "old", tmp_path / "empty", **TOLD).layers == LAYERS


@pytest.mark.parametrize("name", ["layer_9/test_activations.pt", "layer_10/deploy_activations.pt"])
def test_a_damaged_or_cut_file_leaves_nothing(tmp_path, name):
    saved = stacked(tmp_path / "old")
    path = tmp_path / "old" / name
    whole = path.read_bytes()
    layer, label = (9, "test") if "test" in name else (10, "deploy")
    place = whole.index(saved[layer, label].numpy().tobytes()) + 5
    before = _snapshot(tmp_path)
    for content in (whole[:-100], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
        path.write_bytes(content)
        with pytest.raises(StoreError, match=path.name):
            probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD)
        assert _snapshot(tmp_path) == before


def test_no_code_of_an_old_cache_runs(tmp_path):
    stacked(tmp_path / "old")
    canary = tmp_path / "canary"
    forge(
        tmp_path / "old/layer_10/deploy_activations.pt",
        pickle_of(Calls(os.system, f"touch {canary}")),
    )
    with pytest.raises(StoreError, match="may run code"):
        probecache.import_cache(tmp_path / "old", tmp_path / "new", **TOLD)
    assert not canary.exists()


# ---------------------------------------------------------------- the command


def arguments(told):
    """The same as words of a command line."""
    given = {"--" + name.replace("_", "-"): value for name, value in told.items()}
    quiet = ["--quiet"] if given.pop("--quiet") else []
    return [*quiet, *(str(word) for pair in given.items() for word in pair)]


def test_the_command_tells_what_it_found_and_what_it_did(capsys, tmp_path):
    stacked(tmp_path / "old", layers=(9, 10, 24))
    (tmp_path / "old" / "metadata.json").write_text("{}")
    code, out, _ = command(
        *(capsys, "import", tmp_path / "old", tmp_path / "new"),
        *arguments(TOLD | {"layer_convention": "hidden_states"}),
    )
    assert code == 0
    assert "testing (12 examples, files of test), deployment (11 examples, files of deploy)" in out
    assert "23 rows of 6 x float32 per layer, positions last" in out
    assert "layer 24 is left out" in out
    assert "not read: metadata.json" in out
    assert f"{tmp_path / 'new'} holds 23 examples x 2 layers" in out


def test_the_command_tells_layers_that_are_called_otherwise_here(capsys, tmp_path):
    stacked(tmp_path / "old")
    told = arguments(TOLD | {"layer_convention": "block"})
    code, out, _ = command(capsys, "import", tmp_path / "old", tmp_path / "new", *told)
    assert code == 0
    assert "layers 9,10, which are layers 10,11 here" in out


def test_names_of_files_do_not_reach_the_terminal_raw(capsys, tmp_path):
    stacked(tmp_path / "old")
    (tmp_path / "old" / "a\x1b[31m\n.json").write_text("")
    _, out, _ = command(capsys, "import", tmp_path / "old", tmp_path / "new", *arguments(TOLD))
    assert "\x1b" not in out
    assert "a\\x1b[31m\\n.json" in out


def test_a_refusal_is_one_line(refused, tmp_path):
    stacked(tmp_path / "old")
    forge(tmp_path / "old/layer_9/test_activations.pt", b"\x80\x02]q\x00(")
    line = refused("import", tmp_path / "old", tmp_path / "new", *arguments(TOLD))
    assert "test_activations.pt" in line
    assert "nowhere" in refused("import", tmp_path / "nowhere", tmp_path / "n", *arguments(TOLD))


def test_data_may_be_a_file_that_the_old_cache_brings(capsys, tmp_path):
    stacked(tmp_path / "old")
    data = tmp_path / "old" / "metadata.json"
    data.write_text(json.dumps(RECORDS))
    code, _, err = command(
        *(capsys, "import", tmp_path / "old", tmp_path / "new"),
        *arguments(TOLD | {"data": data}),
    )
    assert code == 0, err
    cache = probecache.open_cache(tmp_path / "new")
    assert cache.examples[0].question == "question 0"
    assert cache.info.origin.data == str(data)


def test_importing_the_module_is_light():
    code = (
        "import sys, probecache.workflow.import_old\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_module_tells_what_is_public():
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
