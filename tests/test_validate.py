"""Validations of planted caches: recomputed from files that plain torch and pandas read."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from synthetic import labelled, rows_of, train, validate, write_cache

from probecache.dataset import load_dataset
from probecache.errors import (
    LayerNotCachedError,
    MismatchError,
    NonFiniteError,
    OutputError,
    UsageError,
)
from probecache.report.saved import read_validation
from probecache.workflow.belonging import require_data

HIDDEN = 12
LABELS = ("testing", "deployment", "deployment", "testing", "deployment", "testing", "deployment")
RECORDS = labelled(*LABELS)
COLUMNS = ["question_id", "question", "type", "mean_score", "max_score", "min_score", "std_score"]
TOKENS = [2, 5, 1, 3, 1, 4, 2]


def planted(seed, labels=LABELS, tokens=None, shift=1.0):
    """Unit normal rows; those of deployment are moved by `shift` along every coordinate."""
    made = torch.Generator().manual_seed(seed)
    counts = torch.tensor(tokens or [1] * len(labels))
    moved = torch.tensor([float(label == "deployment") for label in labels])
    rows = torch.randn(int(counts.sum()), HIDDEN, generator=made)
    return rows + shift * moved.repeat_interleave(counts)[:, None]


@pytest.fixture
def vectors(tmp_path):
    """Directions at layers 3 and 8, trained on rows of their own."""
    labels = ("testing", "deployment") * 10
    activations = {layer: planted(100 + layer, labels) for layer in (3, 8)}
    cache = write_cache(tmp_path / "training", labelled(*labels), activations)
    return train(cache, tmp_path / "run")


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "cache", RECORDS, {3: planted(3, shift=0.2), 8: planted(8)})


@pytest.fixture
def token_cache(tmp_path):
    activations = {layer: planted(layer, tokens=TOKENS, shift=0.3) for layer in (3, 8)}
    return write_cache(tmp_path / "cache", RECORDS, activations, tokens=TOKENS, positions="all")


@pytest.fixture
def output(tmp_path):
    """A free place, alone in its folder."""
    folder = tmp_path / "results"
    folder.mkdir()
    return folder / "validation"


def scores_of(cache, vectors, layer):
    """Scores of each example's tokens, from files that plain torch reads, in data order."""
    direction = torch.load(vectors.path / f"layer_{layer}.pt", weights_only=True).double()
    entries = json.loads((cache.path / "metadata.json").read_text(encoding="utf-8"))
    scores = []
    for entry in entries:
        start, stop = entry["rows"]
        scores.append(rows_of(cache, entry["class"], layer)[start:stop].double() @ direction)
    return [s.numpy() for s in scores]


def table_of(folder, layer):
    return pd.read_csv(
        folder / f"probe_stats_layer{layer}.csv",
        dtype={"question_id": str, "question": str, "type": str},
        keep_default_na=False,
    )


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def with_scores(folder, scores, layers=(8,), labels=None, name="scored"):
    """A cache whose rows lie at the given scores along the first axis, and vectors of that axis."""
    labels = labels or ["testing", "deployment"] * (len(scores) // 2)
    axis = torch.eye(HIDDEN)[0]
    ends = torch.stack([-axis, axis])
    training = write_cache(
        folder / f"{name}_training", labelled("testing", "deployment"), dict.fromkeys(layers, ends)
    )
    rows = torch.tensor(scores)[:, None] * axis
    cache = write_cache(folder / name, labelled(*labels), dict.fromkeys(layers, rows))
    return cache, train(training, folder / f"{name}_run")


WORDS = [f"{a}{b}" for a in "bdfgklmnprstvz" for b in ("ap", "eno", "iri", "ot", "umba")]


# ---------------------------------------------------------------- statistics per prompt


def test_the_statistics_have_these_columns_and_a_row_for_each_prompt_in_data_order(
    token_cache, vectors, output
):
    validate(token_cache, vectors, output)
    for layer in (3, 8):
        table = table_of(output, layer)
        assert list(table.columns) == [*COLUMNS, "n_tokens"]
        assert table["question_id"].tolist() == [record["id"] for record in RECORDS]
        assert table["question"].tolist() == [record["question"] for record in RECORDS]
        assert table["type"].tolist() == list(LABELS)
        assert table["n_tokens"].tolist() == TOKENS


def test_statistics_over_all_tokens_are_those_of_each_tokens_own_score(
    token_cache, vectors, output
):
    validate(token_cache, vectors, output)
    for layer in (3, 8):
        table, scores = table_of(output, layer), scores_of(token_cache, vectors, layer)
        assert [len(s) for s in scores] == TOKENS
        for name in ("mean", "max", "min", "std"):
            expected = [getattr(np, name)(s) for s in scores]
            np.testing.assert_allclose(table[f"{name}_score"], expected, rtol=1e-12, atol=1e-14)
        many = table["n_tokens"] > 1
        assert (table["max_score"] > table["mean_score"])[many].all()
        assert (table["mean_score"] > table["min_score"])[many].all()
        assert (table["std_score"] > 0)[many].all()


def test_the_statistics_of_one_token_are_its_score_without_spread(cache, vectors, output):
    validate(cache, vectors, output)
    for layer in (3, 8):
        table = table_of(output, layer)
        expected = np.concatenate(scores_of(cache, vectors, layer))
        for name in ("mean_score", "max_score", "min_score"):
            np.testing.assert_allclose(table[name], expected, rtol=1e-12)
        assert (table["std_score"] == 0).all()
        assert (table["n_tokens"] == 1).all()


def test_raw_vectors_give_scores_in_units_of_their_own_norm(cache, vectors, output):
    from probecache.store.vectors import load_vectors

    raw = load_vectors(vectors.path.parent / "vectors")
    result = validate(cache, raw, output)
    unit = validate(cache, vectors, output.with_name("unit"))
    for one, other in zip(result.layers, unit.layers, strict=True):
        norm = raw.info.layers[one.layer].raw_norm
        np.testing.assert_allclose(one.scores, other.scores * norm, rtol=1e-6)
        assert one.threshold == pytest.approx(other.threshold * norm)
        assert (one.auroc, one.accuracy) == (other.auroc, other.accuracy)
    assert summary_of(output)["normalized"] is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_two_bytes_a_number_are_scored_at_their_exact_values(
    tmp_path, vectors, output, dtype
):
    cache = write_cache(tmp_path / "narrow", RECORDS, {3: planted(3).to(dtype)})
    result = validate(cache, vectors, output, layers=[3], allow_mismatch=["dtype"])
    expected = np.concatenate(scores_of(cache, vectors, 3))
    np.testing.assert_allclose(result.layers[0].scores, expected, rtol=1e-12, atol=1e-14)


# What a spreadsheet would run: the file has an apostrophe in front of these, and of no others.
FORMULAS = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2 and @SUM(A1)",
    "@SUM(A1)",
    "  =1+1 behind spaces",
    "\tbehind a tab",
    "＝1+1 in full width",
    "'=1+1 quoted already",
    "\n\nstarts and ends in newlines\n",
]
AWKWARD = [
    *FORMULAS,
    "plain",
    "-1.5e3",
    "+7",
    "'tis no formula",
    "commas, and; semicolons\tand tabs",
    'some "quoted" words, and a lone " too',
    "two\nlines",
    "two\r\nlines of Windows",
    "one\rlone carriage return",
    "ends in a carriage return\r",
    "  spaces on both sides  ",
    "NA",
    "null",
    "1e5",
    "\ufeffmark first",
    "測試 \u2028 a line separator, \x85 another, \x0b a third",
    "\\N and \\ at the end \\",
    '\'single\', ""doubled""',
]


@pytest.mark.parametrize("reader", ["pandas", "csv"])
def test_awkward_texts_are_read_back_exactly_but_for_an_apostrophe_before_formulas(
    tmp_path, vectors, output, reader
):
    labels = ["testing", "deployment"] * 20
    records = [
        {"question": text, "id": f"{place}{text}", "type": label}
        for place, (text, label) in enumerate(zip(AWKWARD, labels, strict=False))
    ]
    cache = write_cache(tmp_path / "awkward", records, {3: planted(3, labels[: len(records)])})
    validate(cache, vectors, output, layers=[3])
    if reader == "pandas":
        table = table_of(output, 3)
        found = list(zip(table["question_id"], table["question"], table["type"], strict=True))
    else:
        with (output / "probe_stats_layer3.csv").open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file, strict=True)
        assert {len(row) for row in rows} == {len(header)} == {8}
        found = [tuple(row[:3]) for row in rows]
    assert found == [
        (r["id"], f"'{r['question']}" if r["question"] in FORMULAS else r["question"], r["type"])
        for r in records
    ]
    questions = read_validation(output).scores[3].questions
    assert questions == tuple(record["question"] for record in records)


def test_awkward_classes_are_read_back_exactly(tmp_path, output):
    labels = ['a, "b"', "c\rd", "=e\nf"] * 2
    cache = write_cache(tmp_path / "c", labelled(*labels), {3: planted(3, labels)})
    run = train(cache, tmp_path / "r", positive_class='a, "b"')
    validate(cache, run, output)
    assert table_of(output, 3)["type"].tolist() == ['a, "b"', "c\rd", "'=e\nf"] * 2
    assert read_validation(output).scores[3].classes == tuple(labels)
    assert summary_of(output)["positive_class"] == 'a, "b"'
    assert summary_of(output)["negative_class"] == "c\rd + =e\nf"


# ---------------------------------------------------------------- how well the classes part


def test_auroc_is_that_of_scikit_learn_on_the_written_scores(token_cache, vectors, output):
    result = validate(token_cache, vectors, output)
    areas = set()
    for layer, row in zip(result.layers, summary_of(output)["layers"], strict=True):
        table = table_of(output, layer.layer)
        area = roc_auc_score(table["type"] == "deployment", table["mean_score"])
        assert layer.auroc.auroc == pytest.approx(area, abs=1e-12)
        assert row["auroc"] == layer.auroc.auroc
        areas.add(area)
    assert areas
    assert not areas & {0.0, 0.5, 1.0}


def test_vectors_of_the_other_positive_class_give_the_same_auroc_and_opposite_scores(
    cache, vectors, tmp_path, output
):
    from probecache.store.reader import open_cache

    training = open_cache(tmp_path / "training")
    other = train(training, tmp_path / "other", positive_class="testing")
    one, two = validate(cache, vectors, output), validate(cache, other, output.with_name("two"))
    assert two.positive_class == "testing"
    for forth, back in zip(one.layers, two.layers, strict=True):
        assert np.array_equal(back.scores, -forth.scores)
        assert back.auroc.auroc == pytest.approx(forth.auroc.auroc, abs=1e-12)
        assert (back.auroc.n_positive, back.auroc.n_negative) == (3, 4)
        assert (forth.auroc.n_positive, forth.auroc.n_negative) == (4, 3)


def test_every_line_of_the_summary_is_what_its_statistics_give(token_cache, vectors, output):
    validate(token_cache, vectors, output)
    for row in summary_of(output)["layers"]:
        table = table_of(output, row["layer"])
        positive = table["type"] == "deployment"
        above, below = (table["mean_score"][side].to_numpy() for side in (positive, ~positive))
        threshold = vectors.info.layers[row["layer"]].threshold
        assert row["threshold"] == threshold
        assert row["accuracy"] == np.mean((table["mean_score"] > threshold) == positive)
        assert (row["n_positive"], row["n_negative"]) == (4, 3)
        expected = (above.mean(), below.mean(), above.std(), below.std())
        names = ("mean_positive", "mean_negative", "std_positive", "std_negative")
        assert [row[name] for name in names] == pytest.approx(expected, rel=1e-12)
        assert 0 <= row["auroc_low"] <= row["auroc"] <= row["auroc_high"] <= 1
        assert row["auroc_low"] < row["auroc_high"]


def test_the_summary_says_what_was_scored_with_what(cache, vectors, output):
    dataset = load_dataset(RECORDS)
    validate(cache, vectors, output, dataset=dataset)
    summary = summary_of(output)
    assert summary["format"] == "probecache-validation"
    assert (summary["positive_class"], summary["negative_class"]) == ("deployment", "testing")
    assert (summary["positions"], summary["dtype"]) == ("last", "float32")
    assert summary["model"] == "org/planted"
    assert "residual stream after L blocks" in summary["layer_convention"]
    assert summary["cache"] == str(cache.path)
    assert summary["vectors"] == str(vectors.path)
    assert summary["method"] == "difference-of-means"
    assert summary["data"] == dataset.source
    assert summary["classes"] == {"testing": 3, "deployment": 4}
    assert summary["num_examples"] == 7
    areas = {row["layer"]: row["auroc"] for row in summary["layers"]}
    assert areas[summary["best_layer"]] == max(areas.values())


def test_the_summarys_table_is_the_same_as_csv(token_cache, vectors, output):
    validate(token_cache, vectors, output)
    rows = summary_of(output)["layers"]
    with (output / "summary.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file, strict=True))
    nested = {"below_best", "tpr_at_1", "tpr_at_5"}
    plain = [{name: row[name] for name in row if name not in nested} for row in rows]
    assert all(nested < row.keys() for row in rows)
    parts = {f"{name}_{part}" for name in nested for part in ("low", "high")}
    assert set(table[0]) == {*rows[0], *parts, "below_best_p_value"}
    best, other = sorted(rows, key=lambda row: row["below_best"] is not None)
    cells = {int(row["layer"]): row for row in table}
    assert cells[best["layer"]]["below_best"] == ""
    for part in ("low", "high", "p_value"):
        assert float(cells[other["layer"]][f"below_best_{part}"]) == other["below_best"][part]
    for cells, row in zip(table, plain, strict=True):
        assert {n: float(cells[n]) if cells[n] else None for n in row} == row


def test_the_best_layer_is_the_one_whose_classes_part_best(tmp_path, vectors, output):
    activations = {3: planted(3, shift=3.0), 8: planted(8, shift=-3.0)}
    cache = write_cache(tmp_path / "c", RECORDS, activations)
    result = validate(cache, vectors, output)
    assert [layer.auroc.auroc for layer in result.layers] == [1.0, 0.0]
    assert result.best.layer == summary_of(output)["best_layer"] == 3


def test_some_of_the_layers_may_be_scored_alone(cache, vectors, output):
    result = validate(cache, vectors, output, layers=[8])
    assert [layer.layer for layer in result.layers] == [8]
    assert sorted(path.name for path in output.iterdir()) == [
        "probe_stats_layer8.csv",
        "summary.csv",
        "summary.json",
    ]


def test_a_layer_named_twice_is_scored_once(cache, vectors, output):
    result = validate(cache, vectors, output, layers=[8, 3, 8])
    assert [layer.layer for layer in result.layers] == [3, 8]
    assert [row["layer"] for row in summary_of(output)["layers"]] == [3, 8]


def test_many_chunks_give_the_scores_of_one(token_cache, vectors, output, monkeypatch):
    whole = validate(token_cache, vectors, output)
    monkeypatch.setattr("probecache.store.reader._CHUNK_BYTES", 4 * HIDDEN * 2)
    assert len(list(token_cache.chunks("testing", 3))) > 2
    chunked = validate(token_cache, vectors, output.with_name("chunked"))
    for one, other in zip(whole.layers, chunked.layers, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-12)


@pytest.mark.parametrize(
    "words", [("test", "deploy"), ("testing", "deployment"), ("test", "deployment")]
)
def test_the_words_test_and_deploy_mean_testing_and_deployment(tmp_path, vectors, output, words):
    labels = [words[0] if label == "testing" else words[1] for label in LABELS]
    cache = write_cache(tmp_path / "c", labelled(*labels), {3: planted(3), 8: planted(8)})
    validate(cache, vectors, output, dataset=load_dataset(RECORDS))
    assert table_of(output, 3)["type"].tolist() == list(LABELS)
    assert summary_of(output)["classes"] == {"testing": 3, "deployment": 4}


# ---------------------------------------------------------------- warnings


def warnings_of(cache, vectors, output):
    result = validate(cache, vectors, output)
    assert summary_of(output)["warnings"] == list(result.warnings)
    return " ".join(result.warnings)


def test_classes_that_part_well_at_one_layer_raise_no_warning(tmp_path, output):
    axis = torch.zeros(200)
    axis[7] = 1.0

    def rows(seed, labels):
        signs = torch.tensor([1.0 if label == "deployment" else -1.0 for label in labels])
        noise = torch.randn(len(labels), 200, generator=torch.Generator().manual_seed(seed))
        return {8: noise + 2 * signs[:, None] * axis}

    labels = ["testing", "deployment"] * 60
    records = [
        {**record, "question": " ".join(np.random.default_rng(n).choice(WORDS, 12))}
        for n, record in enumerate(labelled(*labels))
    ]
    training = write_cache(tmp_path / "training", labelled(*labels), rows(0, labels))
    cache = write_cache(tmp_path / "cache", records, rows(1, labels))
    assert warnings_of(cache, train(training, tmp_path / "run"), output) == ""


def test_reversed_scores_are_told_with_the_layer_and_the_positive_class(tmp_path, output):
    cache, vectors = with_scores(tmp_path, [1.0, -1.0, 2.0, -2.0] * 10)
    found = warnings_of(cache, vectors, output)
    assert "layer 8" in found
    assert "reversed" in found
    assert "'deployment'" in found


def test_scores_at_chance_are_told(tmp_path, output):
    cache, vectors = with_scores(tmp_path, [-1.0, -1.0, 1.0, 1.0] * 10)
    found = warnings_of(cache, vectors, output)
    assert "reaches chance" in found
    assert "reversed" not in found


def test_the_best_of_several_layers_is_told_to_be_optimistic_and_that_of_one_is_not(
    tmp_path, output
):
    scores = [-1.0, 1.0, -2.0, 2.0] * 10
    several = with_scores(tmp_path, scores, (3, 8), name="several")
    assert "optimistic" in warnings_of(*several, output)
    one = with_scores(tmp_path, scores, name="one")
    assert "optimistic" not in warnings_of(*one, output)


def test_a_threshold_that_does_not_carry_over_is_told(tmp_path, output):
    cache, vectors = with_scores(tmp_path, [9.0, 10.0, 9.1, 10.1] * 10)
    result = validate(cache, vectors, output)
    assert result.best.auroc.auroc == 1.0
    assert result.best.accuracy == 0.5
    assert "threshold" in " ".join(result.warnings)


# ---------------------------------------------------------------- what does not belong together


def test_few_positives_on_their_side_are_no_threshold_that_failed(tmp_path, output):
    scores = [2.0] + [-2.0] * 39
    labels = ["deployment"] + ["testing"] * 39
    cache, vectors = with_scores(tmp_path, scores, labels=labels)
    assert "one side" not in warnings_of(cache, vectors, output)


def test_scoring_the_prompts_that_were_trained_on_is_told(tmp_path, output):
    labels = ("testing", "deployment") * 10
    cache = write_cache(tmp_path / "cache", labelled(*labels), {8: planted(8, labels)})
    warning = warnings_of(cache, train(cache, tmp_path / "run"), output)
    assert "the very prompts that the vectors were trained on" in warning


def test_weights_are_compared_on_the_scored_layers_alone(tmp_path, cache, vectors, output):
    other = write_cache(
        tmp_path / "other",
        RECORDS,
        {3: planted(3), 8: planted(8)},
        weights={3: f"{3:064x}", 8: "f" * 64},
    )
    validate(other, vectors, output, layers=[3])
    with pytest.raises(MismatchError, match=r"expected \{8: content 0.*\}, got \{8: content f"):
        validate(other, vectors, output, layers=[3, 8])


def test_a_link_is_followed_and_stays_a_link(tmp_path, cache, vectors, output):
    target = tmp_path / "elsewhere" / "validation"
    target.parent.mkdir()
    output.symlink_to(target)
    for _ in range(2):
        result = validate(cache, vectors, output)
        assert output.is_symlink()
        assert (target / "summary.json").is_file()
        assert result.path == output
    assert [path.name for path in target.parent.iterdir()] == ["validation"]


def refused(error, cache, vectors, output, **options):
    """The message of a refusal that left nothing behind."""
    with pytest.raises(error) as caught:
        validate(cache, vectors, output, **options)
    assert list(output.parent.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_width_is_refused_with_both_widths_and_models(tmp_path, vectors, output):
    wide = torch.zeros(len(LABELS), HIDDEN + 4)
    cache = write_cache(tmp_path / "wide", RECORDS, {3: wide, 8: wide}, model="org/wider")
    message = refused(MismatchError, cache, vectors, output, allow_mismatch=["hidden_size"])
    assert f"{vectors.path} and cache {cache.path}" in message
    assert "hidden_size: expected 12, got 16" in message
    assert "model org/planted against org/wider" in message


FIELDS = {
    "architecture": "Other",
    "num_hidden_layers": 30,
    "weights": {3: "f" * 64, 8: f"{8:064x}"},
    "adapter": "a" * 64,
    "quantization": "bitsandbytes 4-bit",
    "dtype": "bfloat16",
    "tokenizer": "9" * 64,
    "chat_template": None,
    "template_date": "2026-01-31",
    "attention": "sdpa",
    "versions": {"probecache": "9"},
    "special_tokens_kept": True,
    "system_prompt": "You are an assistant.",
    "layer_convention": "layer L = residual stream before block L",
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_cache_made_otherwise_is_refused_until_that_is_allowed(tmp_path, vectors, output, name):
    activations = {3: planted(3), 8: planted(8)}
    cache = write_cache(tmp_path / "c", RECORDS, activations, **{name: FIELDS[name]})
    message = refused(MismatchError, cache, vectors, output)
    assert f"{vectors.path} and cache {cache.path}" in message
    assert f"{name}: expected " in message
    assert f"--allow-mismatch {name}" in message
    assert message.count("--allow-mismatch") == 1
    refused(MismatchError, cache, vectors, output, allow_mismatch=["hidden_size"])
    result = validate(cache, vectors, output, allow_mismatch=[name])
    assert result.warnings[0].startswith(f"Scored across a difference in {name}: expected ")
    [told] = json.loads((output / "summary.json").read_text())["allowed_mismatch"]
    assert f"{told}." in result.warnings[0]
    np.testing.assert_allclose(
        result.layers[0].scores, np.concatenate(scores_of(cache, vectors, 3)), rtol=1e-12
    )


def test_every_difference_must_be_allowed(tmp_path, vectors, output):
    different = {"tokenizer": "9" * 64, "architecture": "Other"}
    cache = write_cache(tmp_path / "c", RECORDS, {3: planted(3), 8: planted(8)}, **different)
    message = refused(MismatchError, cache, vectors, output)
    assert "--allow-mismatch architecture --allow-mismatch tokenizer" in message
    message = refused(MismatchError, cache, vectors, output, allow_mismatch=["tokenizer"])
    assert "tokenizer: " not in message
    validate(cache, vectors, output, allow_mismatch=different)


def test_other_data_and_positions_are_no_mismatch(tmp_path, vectors, output):
    cache = write_cache(
        tmp_path / "c",
        RECORDS,
        {3: planted(3, tokens=TOKENS), 8: planted(8, tokens=TOKENS)},
        tokens=TOKENS,
        positions="all",
        token_ids="3" * 64,
        special_tokens_kept=True,
    )
    assert validate(cache, vectors, output).path == output


def test_a_field_that_cannot_be_allowed_is_refused_with_those_that_can(cache, vectors, output):
    message = refused(UsageError, cache, vectors, output, allow_mismatch=["model"])
    assert "got 'model'" in message
    assert "weights" in message


def test_a_layer_without_vectors_is_refused_with_those_that_have_them(tmp_path, vectors, output):
    cache = write_cache(tmp_path / "c", RECORDS, {n: planted(n) for n in (3, 5, 8)})
    message = refused(MismatchError, cache, vectors, output, layers=[3, 5])
    assert f"vectors for layer 5 in {vectors.path}" in message
    assert "layers 3, 8" in message


@pytest.mark.parametrize("layers", [None, [8]])
def test_a_layer_that_is_not_cached_is_refused_with_those_that_are(
    tmp_path, vectors, output, layers
):
    cache = write_cache(tmp_path / "c", RECORDS, {3: planted(3), 5: planted(5)})
    message = refused(LayerNotCachedError, cache, vectors, output, layers=layers)
    assert "Layer 8 not found" in message
    assert "are 3, 5" in message


def test_no_layers_are_refused(cache, vectors, output):
    assert "at least one layer" in refused(UsageError, cache, vectors, output, layers=[])


def test_a_cache_without_the_positive_class_is_refused_with_the_classes_it_has(
    tmp_path, vectors, output
):
    labels = [label.replace("deployment", "chatting") for label in LABELS]
    cache = write_cache(tmp_path / "c", labelled(*labels), {3: planted(3), 8: planted(8)})
    message = refused(MismatchError, cache, vectors, output)
    assert "positive class 'deployment'" in message
    assert "the classes testing, chatting" in message


def changed(**fields):
    """The records with the third one changed."""
    return [*RECORDS[:2], {**RECORDS[2], **fields}, *RECORDS[3:]]


@pytest.mark.parametrize(
    ("records", "difference"),
    [
        (RECORDS[:-1], "7 examples expected, 6 found"),
        ([*RECORDS, {**RECORDS[0], "id": "more"}], "7 examples expected, 8 found"),
        (changed(type="testing"), "row 3 differs in its class"),
        (changed(question="What else?"), "row 3 differs in its text"),
        (changed(id="other"), "row 3 differs in its id"),
        (changed(group="other"), "row 3 differs in its group"),
        (changed(category="other"), "row 3 differs in its category"),
        ([RECORDS[1], RECORDS[0], *RECORDS[2:]], "row 1 differs in its class"),
    ],
)
def test_data_that_the_cache_was_not_made_from_are_refused_with_the_first_difference(
    cache, vectors, output, records, difference
):
    dataset = load_dataset(records)
    message = refused(MismatchError, cache, vectors, output, dataset=dataset)
    assert str(cache.path) in message
    assert dataset.source in message
    assert difference in message


def test_pairs_with_another_answer_or_another_turn_are_refused(tmp_path):
    pairs = [{"question": "Who?", "positive": "A grader", "negative": "A user"}]
    cache = write_cache(tmp_path / "pairs", pairs, {3: torch.eye(2)})
    require_data(cache, load_dataset(pairs))
    with pytest.raises(MismatchError, match="row 1 differs in its answer"):
        require_data(cache, load_dataset([{**pairs[0], "negative": "A friend"}]))
    turns = [
        {"messages": [{"role": "user", "content": "Hi"}], "type": label} for label in ("a", "b")
    ]
    cache = write_cache(tmp_path / "turns", turns, {3: torch.eye(2)})
    before = [{"role": "system", "content": "Be kind."}]
    with pytest.raises(MismatchError, match="the messages differ"):
        require_data(
            cache, load_dataset([{**t, "messages": before + t["messages"]} for t in turns])
        )


def test_the_same_data_in_another_file_are_no_mismatch(tmp_path, cache, vectors, output):
    path = tmp_path / "again.jsonl"
    path.write_text("\n\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    validate(cache, vectors, output, dataset=load_dataset(path))
    assert summary_of(output)["data"] == str(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused_with_class_row_and_layer(tmp_path, vectors, output, bad):
    broken = planted(8)
    broken[4, 1] = bad  # the third row of deployment
    cache = write_cache(tmp_path / "c", RECORDS, {3: planted(3), 8: broken})
    message = refused(NonFiniteError, cache, vectors, output)
    assert "row 2 of class 'deployment' at layer 8" in message
    assert str(cache.path) in message


# ---------------------------------------------------------------- where it goes


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_what_is_returned_lists_the_files_that_are_there(cache, vectors, output):
    result = validate(cache, vectors, output, visualize=True)
    assert result.path == output
    assert set(result.files) == {path for path in output.rglob("*") if path.is_file()}
    names = {str(path.relative_to(output)) for path in result.files}
    assert {"summary.json", "summary.csv", "report.html", "probe_stats_layer3.csv"} <= names
    assert any(name.startswith("visualizations/") for name in names)
    assert list(output.parent.iterdir()) == [output]


def test_an_empty_folder_is_taken(cache, vectors, output):
    output.mkdir()
    validate(cache, vectors, output)
    assert (output / "summary.json").is_file()
    assert list(output.parent.iterdir()) == [output]


def test_an_earlier_validation_is_replaced_whole(cache, vectors, output):
    validate(cache, vectors, output, visualize=True)
    validate(cache, vectors, output, visualize=True)
    validate(cache, vectors, output, layers=[8])
    assert [row["layer"] for row in summary_of(output)["layers"]] == [8]
    assert sorted(path.name for path in output.iterdir()) == [
        "probe_stats_layer8.csv",
        "summary.csv",
        "summary.json",
    ]
    assert list(output.parent.iterdir()) == [output]


def put_a_file(output):
    output.write_text("mine")


def put_a_foreign_folder(output):
    output.mkdir()
    (output / "thesis.txt").write_text("mine")


def put_a_foreign_summary(output):
    output.mkdir()
    (output / "summary.json").write_text('{"format": "another"}')


def put_a_summary_that_is_no_object(output):
    output.mkdir()
    (output / "summary.json").write_text("[]")


@pytest.mark.parametrize(
    "put",
    [put_a_file, put_a_foreign_folder, put_a_foreign_summary, put_a_summary_that_is_no_object],
)
def test_a_place_that_holds_something_else_is_refused_and_left(cache, vectors, output, put):
    put(output)
    before = content_of(output.parent)
    with pytest.raises(OutputError, match=r"free or an earlier validation.*another folder"):
        validate(cache, vectors, output)
    assert content_of(output.parent) == before
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("name", ["notes.txt", "visualizations/mine.png", "a folder/x.csv"])
def test_a_users_file_beside_an_earlier_validation_is_never_lost(cache, vectors, output, name):
    validate(cache, vectors, output, visualize=True)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    before = content_of(output)
    with pytest.raises(OutputError, match=re.escape(name.split("/")[-1].split(".")[0])) as caught:
        validate(cache, vectors, output)
    assert "would be lost" in str(caught.value)
    assert content_of(output) == before
    (output / name).unlink()


def test_an_earlier_validation_stays_as_it_was_when_the_next_one_fails(
    tmp_path, cache, vectors, output
):
    validate(cache, vectors, output)
    before = content_of(output)
    broken = planted(8)
    broken[4, 1] = float("nan")
    bad = write_cache(tmp_path / "c", RECORDS, {3: planted(3), 8: broken})
    with pytest.raises(NonFiniteError):
        validate(bad, vectors, output)
    assert content_of(output) == before
    assert list(output.parent.iterdir()) == [output]


def test_an_earlier_validation_comes_back_when_the_next_one_cannot_be_put_in_its_place(
    cache, vectors, output, monkeypatch
):
    validate(cache, vectors, output)
    before = content_of(output)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("probecache.workflow.results.commit_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        validate(cache, vectors, output, layers=[8])
    assert content_of(output) == before
    assert list(output.parent.iterdir()) == [output]


def test_nothing_is_left_when_the_report_cannot_be_drawn(cache, vectors, output, monkeypatch):
    def undrawable(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("probecache.report.draw_figures", undrawable)
    message = refused(OutputError, cache, vectors, output, visualize=True)
    assert "disk or quota is full" in message


def test_a_place_below_a_file_is_refused(cache, vectors, output):
    output.write_text("mine")
    with pytest.raises(OutputError, match="another --output"):
        validate(cache, vectors, output / "below")
    assert output.read_text() == "mine"
