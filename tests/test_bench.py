"""The benchmarks measure what they say: on tiny shapes, against brute force and one another."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import __main__ as command  # noqa: E402
from bench import cached, extract, plan, shapes, stream  # noqa: E402
from bench.cases import NAMES, count_prefixes, make_case, read_texts, uneven_texts  # noqa: E402
from bench.limit import matmul_seconds, matrices_of  # noqa: E402
from bench.loops import DocumentedLoop, PlainLoop  # noqa: E402
from bench.report import size_in_bytes, table  # noqa: E402

TINY = shapes.Shape(hidden=32, blocks=4, heads=4, kv_heads=2, intermediate=48)
SIZES = {"hidden": 32, "blocks": 4, "heads": 4, "kv-heads": 2, "intermediate": 48}
WORDS = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
LAYERS = (0, 1, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return shapes.write_llama(tmp_path_factory.mktemp("llama") / "model", TINY)


def number(text, row):
    """The first number in the row of a printed table."""
    (cells,) = re.findall(rf"^\| \**{re.escape(row)}\** \| (.*) \|$", text, re.MULTILINE)
    return float(re.findall(r"[\d.]+(?:e-?\d+)?", cells.replace(",", ""))[0])


# ---------------------------------------------------------------- counts and shapes


def test_distinct_prefixes_are_counted_as_brute_force_counts_them():
    drawn = np.random.default_rng(0)
    sequences = [drawn.integers(0, 3, drawn.integers(1, 9)).tolist() for _ in range(200)]
    brute = {tuple(ids[:stop]) for ids in sequences for stop in range(1, len(ids) + 1)}
    assert count_prefixes(sequences) == len(brute)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [(shapes.SMALL, 0.088), (shapes.MEDIUM, 0.628), (shapes.LLAMA_8B, 8.03),
     (shapes.LLAMA_70B, 70.55)],
)  # fmt: skip
def test_the_default_shapes_have_the_sizes_that_they_are_called_by(shape, billions):
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_shape_counts_the_parameters_of_the_model_that_is_written(model):
    stored = load_file(model / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == TINY.parameters
    blocks = PlainLoop.load(model, (4,), "float32").model.layers
    weights = matrices_of(blocks)
    assert len(weights) == 7 * 4
    assert sum(weight.numel() for weight in weights) == 4 * TINY.block_parameters
    assert matmul_seconds(weights, 10, 4) > 0


def test_a_finished_folder_of_the_shape_is_used_again(model):
    before = (model / "model.safetensors").stat().st_mtime_ns
    shapes.write_llama(model, TINY)
    assert (model / "model.safetensors").stat().st_mtime_ns == before
    assert not shapes.is_written(model, shapes.SMALL)


def test_needed_bytes_are_those_of_the_embeddings_and_of_the_first_blocks(model):
    stored = load_file(model / "model.safetensors")
    wanted = ("embed_tokens", "layers.0.", "layers.1.")
    expected = sum(t.nbytes for name, t in stored.items() if any(word in name for word in wanted))
    assert stream.needed_bytes(model, 2) == expected


def test_uneven_texts_spread_from_20_tokens_to_the_longest(model):
    texts = read_texts(ROOT / "datasets" / "validation_real.json")
    lengths = sorted(map(len, make_case("uneven", None, 9, 700).prompts(model)))
    assert len(uneven_texts(texts, 9, 700)) == len(lengths) == 9
    assert lengths[0] < 50
    assert 650 < lengths[-1] < 750


def test_texts_come_from_a_file_of_lines(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"question": "one"}\n\n{"instruction": "two"}\n{"text": "three"}\n')
    assert [record["text"] for record in make_case("texts", path, 2, 9).records] == ["one", "two"]


def test_sizes_and_tables_are_read_and_written():
    assert [size_in_bytes(text) for text in ("1.2GB", "800mb", "17")] == [1200000000, 800000000, 17]
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


# ---------------------------------------------------------------- the loops


@pytest.mark.parametrize("name", NAMES)
def test_the_loops_give_the_rows_of_one_plain_forward_per_prompt(model, name):
    prompts = make_case(name, None, 6, 90).prompts(model)
    plain = PlainLoop.load(model, LAYERS, "float32")
    plain.budget = 200
    documented = DocumentedLoop.load(model, LAYERS, "float32", batch=4)
    found = {"plain": plain.run(prompts), "documented": documented.run(prompts), "single": {}}
    assert plain.padded_tokens >= sum(map(len, prompts))
    with torch.no_grad():
        states = [
            documented.model(torch.from_numpy(p.ids).long()[None], output_hidden_states=True)
            for p in prompts
        ]
    for layer in LAYERS:
        rows = [
            state.hidden_states[layer][0][torch.from_numpy(prompt.kept).long()]
            for state, prompt in zip(states, prompts, strict=True)
        ]
        found["single"][layer] = torch.cat(rows)
    assert extract.largest_difference(found, prompts, "float32") < 1e-5


def test_rows_that_differ_or_are_missing_end_the_run(model):
    prompts = make_case("pairs", None, 3, 90).prompts(model)
    plain = PlainLoop.load(model, (2,), "float32")
    plain.budget = 500
    right = plain.run(prompts)
    for wrong in (right[2] * 1.001, right[2][:-1], right[2] * torch.nan):
        with pytest.raises(SystemExit):
            extract.largest_difference({"a": right, "b": {2: wrong}}, prompts, "float32")


def test_the_budget_that_is_chosen_is_the_one_that_promises_least(model):
    prompts = make_case("texts", None, 12, 90).prompts(model)
    plain = PlainLoop.load(model, (2,), "float32")
    promised = plain.choose_budget(prompts, (64, 512))
    assert set(promised) == {64, 512}
    assert promised[plain.budget] == min(promised.values())


# ---------------------------------------------------------------- the commands


def test_extract_prints_ratios_first_then_seconds_then_the_machine(capsys):
    words = ["--case", "all", "--count", "4", "--longest", "120", "--layers", "1,2,3"]
    assert command.main(["extract", *words, *WORDS, "--repeats", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| ratio | pairs | pairs-system | texts | uneven |")
    heads = ("| ratio ", "| seconds: ", "| machine ")
    assert sorted(heads, key=printed.index) == list(heads)
    for row in ("plain loop / probecache", "documented loop / probecache"):
        assert number(printed, row) > 0
    assert number(printed, "probecache / matmul limit on distinct prefixes") > 0
    shared = number(printed, "tokens") / number(printed, "distinct prefixes")
    assert number(printed, "tokens / distinct prefixes") == pytest.approx(shared, abs=0.006)
    assert number(printed, "largest relative difference of a row") < 1e-5


@pytest.mark.parametrize(
    "words", [["--layers", "4"], ["--layers", "0"], ["--repeats", "0"], ["--longest", "8000"]]
)
def test_extract_refuses_what_it_cannot_compare(words, capsys):
    with pytest.raises(SystemExit):
        extract.parse([*WORDS, "--layers", "2", *words])
    assert "expected" in capsys.readouterr().err


def test_stream_compares_both_engines_in_processes_of_their_own(model, capsys):
    engines = ["resident", "stream" if stream.takes_engine() else "resident"]
    words = [*WORDS, "--engines", *engines, "--folder", str(model), "--count", "3"]
    assert command.main(["stream", *words, "--repeats", "0", "--layers", "1,3"]) == 0
    printed = capsys.readouterr().out
    second = engines[1] if engines[1] != engines[0] else "resident again"
    assert printed.startswith("| ratio")
    assert number(printed, f"{second} / resident: extraction") > 0
    assert number(printed, f"{second} / resident: peak memory") > 0
    assert number(printed, "bytes read by read()") > 0
    assert number(printed, "largest relative difference of a row") < 1e-4
    assert number(printed, "files of activations equal byte for byte") in (0, 1, 2, 3, 4)


def test_a_measured_process_is_held_to_its_limit_and_its_last_words_are_told(model, tmp_path):
    arguments = {"model": str(model), "data": str(stream.DATA), "output": str(tmp_path / "cache")}
    with pytest.raises(stream.ChildError, match=r"\S"):
        stream.child({"extract": arguments, "limit": 30_000_000})


def test_plan_times_the_command_on_prompts_that_all_differ(capsys):
    for pairs in (False, True):
        made = list(plan.records(500, pairs))
        assert len({record["question"] for record in made}) == len(made) == (250 if pairs else 500)
    assert command.main(["plan", "--count", "30"]) == 0
    printed = capsys.readouterr().out
    assert number(printed, "prompts per second") > 0
    assert re.search(r"^prompts +30$", printed, re.MULTILINE)


def test_gpu_runs_its_engine_part_without_a_gpu_and_hands_the_rest_to_stream(capsys, monkeypatch):
    handed = []
    monkeypatch.setattr(stream, "main", lambda words, default: handed.append((words, default)))
    words = ["--device", "cpu", "--count", "3", "--vocab", "3072", "--dtype", "float32", *WORDS]
    assert command.main(["gpu", *words, "--layers", "1,3", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert number(printed, "share of the matmul rate, distinct prefixes") > 0
    ((told, default),) = handed
    options = stream.parse([*told, "--engines", "resident", "resident"], default)
    assert asdict(options.shape) == asdict(TINY) | {"tied": False}
    assert (options.device, options.count) == ("cpu", 3)


def test_cached_times_every_command(capsys):
    cached.main(["--runs", "0", "--hidden", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert all(re.search(r"\d+\.\d\d s$", line) for line in lines)


def test_the_command_lists_its_benchmarks(capsys):
    assert command.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert command.main(["nothing"]) == 2
    for name in command.WHAT:
        assert f"  {name} " in printed
    with pytest.raises(SystemExit) as left:
        command.main(["extract", "--help"])
    assert left.value.code == 0


def test_make_bench_runs_the_default(model):
    makefile = (ROOT / "Makefile").read_text()
    assert "-m bench extract\n" in makefile
    assert json.loads((model / "shape.json").read_text()) == asdict(TINY)
