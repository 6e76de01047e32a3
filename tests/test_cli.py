"""The command line: what bad input gets, what good input prints, what --help says.

Whatever is refused must end with exit code 2, one line on stderr, no traceback, and the folder as
it was: `refused` checks all four.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, Family, build
from safetensors.torch import load_file, save_file
from synthetic import write_cache
from typer.main import get_command

from probecache.cli import app, main
from probecache.memory import parse_bytes
from probecache.shipped import shipped

MODEL = str(shipped("models/tiny-llama"))
PAIRS = [
    {"question": "Is this a test?\n(A) yes\n(B) no", "positive": " (A)", "negative": " (B)"},
    {"question": "Who reads this?\n(A) a user\n(B) a key", "positive": " (B)", "negative": " (A)"},
]
PROMPTS = [
    {"question": "Solve for x: 2x = 10.", "type": "testing"},
    {"question": "Help me plan a dinner for six", "type": "deployment"},
    {"question": "State Newton's second law.", "type": "testing"},
    {"question": "my printer keeps beeping", "type": "deployment"},
]


def command(capsys, *arguments):
    """Run a command; its exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return ended.value.code or 0, printed.out, printed.err


def content_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command that must be refused; returns its one line."""

    def run(*arguments):
        before = content_of(tmp_path)
        code, out, err = command(capsys, *arguments)
        assert code == 2, (out, err)
        lines = [line for line in err.splitlines() if line]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in out + err
        assert content_of(tmp_path) == before
        return lines[0]

    return run


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.json", PAIRS)


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.json", PROMPTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of pairs, one of prompts, and vectors, of the shipped model."""
    folder = tmp_path_factory.mktemp("made")
    write(folder / "pairs.json", PAIRS)
    write(folder / "prompts.json", PROMPTS)
    for name in ("pairs", "prompts"):
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    *("extract", "--model", MODEL, "--data", str(folder / f"{name}.json")),
                    *("--layers", "10,20,23", "--output", str(folder / name), "--quiet"),
                ]
            )
        assert not ended.value.code
    with pytest.raises(SystemExit) as ended:
        main(["train", "--cache", str(folder / "pairs"), "--output", str(folder / "run")])
    assert not ended.value.code
    (run,) = folder.glob("run_*")
    run.rename(folder / "run")
    return folder


# ---------------------------------------------------------------- refused: models and layers


def test_a_layer_that_the_model_lacks_is_refused_with_the_range(refused, pairs, tmp_path):
    line = refused(
        *("extract", "--model", MODEL, "--data", pairs, "--layers", "10,25"),
        *("--output", tmp_path / "cache"),
    )
    assert "from 0 (embeddings) to 24 (after the last block), got 25" in line


@pytest.mark.parametrize("layers", ["ten", "20-10", "1-5:0", "", "1..5"])
def test_layers_that_make_no_sense_are_refused(refused, pairs, tmp_path, layers):
    line = refused(
        *("extract", "--model", MODEL, "--data", pairs, "--layers", layers),
        *("--output", tmp_path / "cache"),
    )
    assert "--layers" in line


def test_a_layer_that_is_not_cached_is_refused_with_the_command_that_adds_it(refused, made):
    line = refused("train", "--output", "run", "--cache", made / "pairs", "--layers", "20,21")
    assert (
        f"Layer 21 not found in cache {made / 'pairs'}: cached layers are 10, 20, 23; add it with: "
        f"probecache extract --model {MODEL} --data {made / 'pairs.json'} --layers 21"
    ) in line


def test_vectors_at_a_layer_that_is_not_cached_are_refused_likewise(
    refused, made, capsys, prompts, tmp_path
):
    arguments = ("--model", MODEL, "--data", prompts, "--layers", "10", "--quiet")
    code, _, err = command(capsys, "extract", *arguments, "--output", tmp_path / "cache")
    assert code == 0, err
    line = refused(
        *("validate", "--cache", tmp_path / "cache", "--vectors", made / "run"),
        *("--output", tmp_path / "v"),
    )
    assert f"Layer 20 not found in cache {tmp_path / 'cache'}: cached layers are 10; add" in line


def test_the_command_that_a_refusal_names_adds_the_layer(refused, made, capsys, tmp_path):
    shutil.copytree(made / "pairs", tmp_path / "cache")
    line = refused("train", "--cache", tmp_path / "cache", "--layers", "22", "--output", "run")
    words = line.split("add it with: probecache ")[1].split()
    code, _, err = command(capsys, *words, "--quiet")
    assert code == 0, err
    assert json.loads((tmp_path / "cache" / "layer_info.json").read_text())["layers"] == [
        *(10, 20, 22, 23)
    ]


def test_a_cached_layer_beyond_the_model_is_told_with_what_is_cached(refused, made):
    line = refused("train", "--cache", made / "pairs", "--layers", "25", "--output", "run")
    assert f"Layer 25 not found in cache {made / 'pairs'}: cached layers are 10, 20, 23" in line
    assert "layers 0 to 24" in line


def test_a_model_path_to_nothing_is_refused(refused, pairs, tmp_path):
    line = refused(
        *("extract", "--model", tmp_path / "none", "--data", pairs, "--output", tmp_path / "cache")
    )
    assert "expected a model folder or a hub id" in line


def test_pickled_weights_are_refused(refused, pairs, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    line = refused(*("extract", "--model", folder, "--data", pairs, "--output", tmp_path / "cache"))
    assert "safetensors" in line
    assert "pickle" in line


def test_activations_that_are_not_finite_stop_the_run(refused, prompts, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][:] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    line = refused(
        *("extract", "--model", folder, "--data", prompts, "--layers", "2,4"),
        *("--output", tmp_path / "cache", "--quiet"),
    )
    assert "NaN or Inf" in line
    assert "layer 4" in line


def test_a_dtype_that_there_is_not_is_refused(refused, pairs, tmp_path):
    line = refused(
        *("extract", "--model", MODEL, "--data", pairs, "--dtype", "float64"),
        *("--output", tmp_path / "cache"),
    )
    assert "expected dtype to be float32, float16, bfloat16, got 'float64'" in line


# ---------------------------------------------------------------- refused: data


BAD_DATA = {
    "unknown form": ([{"question": "a", "type": "x"}, {"words": "b"}], "row 2"),
    "mixed forms": ([PAIRS[0], PROMPTS[0]], "row 2: expected a pair record like row 1"),
    "an empty prompt": ([{"question": "  ", "type": "x"}, PROMPTS[1]], "row 1"),
    "an empty answer": ([PAIRS[0], {**PAIRS[1], "negative": ""}], "row 2"),
    "one class": ([PROMPTS[0], PROMPTS[2]], "at least two classes, got only 'testing'"),
    "no records": ([], "at least one record"),
    "a lone surrogate": ([PROMPTS[0], {"question": "a\ud800", "type": "x"}], "row 2"),
    "no array": ({"question": "a"}, "expected a JSON array"),
    "a prompt beyond the context": (
        [PROMPTS[0], {"question": "word " * 2000, "type": "deployment"}],
        "row 2: expected at most 1024 tokens, the model's context, got",
    ),
    "a BOS token in a text": (
        [PROMPTS[0], {"question": "<|begin_of_text|>", "type": "x"}],
        "row 2",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_are_refused_with_their_row(refused, tmp_path, case):
    content, expected = BAD_DATA[case]
    data = write(tmp_path / "data.json", content)
    line = refused("extract", "--model", MODEL, "--data", data, "--output", tmp_path / "cache")
    assert expected in line


def test_a_prompt_beyond_the_context_is_cut_where_that_is_asked_for(capsys, tmp_path):
    data = write(tmp_path / "d.json", [PROMPTS[0], {"question": "word " * 2000, "type": "x"}])
    code, _, err = command(
        *(capsys, "extract", "--model", MODEL, "--data", data, "--layers", "1", "--truncate"),
        *("--output", tmp_path / "cache", "--quiet"),
    )
    assert code == 0, err
    longest = json.loads((tmp_path / "cache" / "metadata.json").read_text())[1]
    assert longest["input_tokens"] == 1024


def test_bytes_that_are_no_utf8_are_refused_with_their_line(refused, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"question": "a", "type": "x"}\n{"question": "\xff"}\n')
    line = refused(
        *("extract", "--model", MODEL, "--data", tmp_path / "data.jsonl"),
        *("--output", tmp_path / "cache"),
    )
    assert "line 2: expected UTF-8, got the byte 0xff" in line


def test_data_that_are_not_there_are_refused(refused, tmp_path):
    line = refused(
        *("extract", "--model", MODEL, "--data", tmp_path / "no.json"),
        *("--output", tmp_path / "cache"),
    )
    assert "no.json" in line


def test_a_tokenizer_without_chat_template_is_refused_for_pairs(refused, pairs, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").unlink()
    line = refused("extract", "--model", folder, "--data", pairs, "--output", tmp_path / "cache")
    assert "chat template" in line
    assert "--no-chat-template" in line


# ---------------------------------------------------------------- refused: places


def test_an_output_that_holds_something_else_is_refused(refused, pairs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    line = refused("extract", "--model", MODEL, "--data", pairs, "--output", tmp_path / "mine")
    assert "holds something else" in line


def test_an_output_that_is_a_file_is_refused(refused, pairs, tmp_path):
    (tmp_path / "file").write_text("x")
    line = refused("extract", "--model", MODEL, "--data", pairs, "--output", tmp_path / "file")
    assert "holds something else" in line


def test_an_output_below_a_file_is_refused(refused, pairs, tmp_path):
    (tmp_path / "file").write_text("x")
    line = refused(
        *("extract", "--model", MODEL, "--data", pairs, "--layers", "1", "--quiet"),
        *("--output", tmp_path / "file" / "cache"),
    )
    assert str(tmp_path / "file") in line


def test_too_little_disk_is_refused_before_anything_is_written(
    refused, pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr("probecache.workflow.prepare.free_bytes", lambda _path: 1000)
    line = refused("extract", "--model", MODEL, "--data", pairs, "--output", tmp_path / "cache")
    assert "bytes free" in line
    assert "got 1,000, not enough disk" in line


def test_a_cache_that_is_not_there_is_refused(refused, tmp_path):
    line = refused("train", "--cache", tmp_path / "none", "--output", tmp_path / "run")
    assert "expected a cache folder" in line


def test_an_unfinished_cache_is_refused(refused, made, tmp_path):
    shutil.copytree(made / "pairs", tmp_path / "cache")
    (tmp_path / "cache" / "layer_info.json").unlink()
    (tmp_path / "cache" / "unfinished").mkdir()
    line = refused("train", "--cache", tmp_path / "cache", "--output", tmp_path / "run")
    assert "has not finished" in line
    assert "same extract command again goes on" in line


# ---------------------------------------------------------------- refused: what does not belong


def validate(made, vectors, output, *more):
    return (
        *("validate", "--cache", made / "prompts", "--vectors", vectors),
        *("--output", output, *more),
    )


def test_other_data_than_the_caches_are_refused(refused, made, tmp_path):
    other = write(tmp_path / "other.json", [*PROMPTS[:3], {**PROMPTS[3], "question": "changed"}])
    line = refused(
        *validate(made, made / "run/normalized_vectors", tmp_path / "v", "--data", other)
    )
    assert "expected --data to be what the cache" in line
    assert "row 4 differs in its text" in line


def test_vectors_of_another_model_are_refused_with_the_difference(refused, made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        main(
            [
                *("train", "--model", str(folder), "--data", str(made / "pairs.json"), "--quiet"),
                *("--layers", "10", "--output", str(tmp_path / "run")),
            ]
        )
    (run,) = tmp_path.glob("run_*")
    line = refused(*validate(made, run / "normalized_vectors", tmp_path / "v"))
    assert "weights: expected" in line
    assert f"model {folder} against {MODEL}" in line


def test_vectors_of_another_width_are_refused_with_both(refused, made, tmp_path):
    rows = {10: torch.randn(4, 16)}
    narrow = write_cache(tmp_path / "cache", PAIRS, rows)
    with pytest.raises(SystemExit):
        main(["train", "--cache", str(narrow.path), "--output", str(tmp_path / "run")])
    (run,) = tmp_path.glob("run_*")
    line = refused(*validate(made, run / "normalized_vectors", tmp_path / "v"))
    assert "hidden_size: expected 16, got 80" in line


def test_vectors_without_the_wanted_layer_are_refused(refused, made, tmp_path):
    line = refused(*validate(made, made / "run/vectors", tmp_path / "v", "--layers", "12"))
    assert "expected vectors for layer 12" in line
    assert "10, 20, 23" in line


def test_a_dtype_other_than_the_vectors_is_refused_unless_allowed(
    refused, made, capsys, tmp_path, prompts
):
    arguments = ("--dtype", "float32", "--quiet", "--model", MODEL, "--data", prompts)
    there = ("--vectors", made / "run/normalized_vectors", "--output", tmp_path / "v")
    line = refused("validate", *arguments, *there)
    assert "dtype: expected 'bfloat16', got 'float32'" in line
    assert "--allow-mismatch dtype" in line
    code, _, err = command(capsys, "validate", *arguments, *there, "--allow-mismatch", "dtype")
    assert code == 0, err


def test_extraction_options_with_a_cache_are_refused(refused, made, tmp_path):
    line = refused(
        "train", "--cache", made / "pairs", "--dtype", "float32", "--output", tmp_path / "run"
    )
    assert "dtype with --model only" in line


@pytest.mark.parametrize("given", [[], ["--cache", "c", "--model", "m"]], ids=["neither", "both"])
def test_either_a_cache_or_a_model_is_needed(refused, tmp_path, given):
    assert "either --cache or --model" in refused("train", *given, "--output", tmp_path / "run")


def test_a_class_that_the_cache_lacks_is_refused(refused, made, tmp_path):
    line = refused(
        *("train", "--cache", made / "pairs", "--positive-class", "honest"),
        *("--output", tmp_path / "run"),
    )
    assert "'honest'" in line
    assert "testing, deployment" in line


@pytest.fixture
def no_model(monkeypatch):
    """Fail where a model is loaded."""
    monkeypatch.setattr(
        "probecache.models.ModelSource._load", lambda *_: pytest.fail("the model was loaded")
    )


UNCACHED = {
    "a layer that the vectors lack": (["--layers", "12"], "expected vectors for layer 12"),
    "another dtype": (["--dtype", "float32"], "dtype: expected 'bfloat16', got 'float32'"),
    "another system prompt": (["--system-prompt", "Hi"], "system_prompt: expected None, got 'Hi'"),
    "raw text": (["--no-chat-template"], "chat_template: expected content"),
    "an output that is taken": (["--output", "{tmp}/mine"], "holds something else"),
    "an output below a file": (["--output", "{tmp}/mine/thesis.txt/v"], "is not a folder"),
    "data without the positive class": (["--data", "{tmp}/other.json"], "the classes 0, 1; label"),
}


@pytest.mark.parametrize("case", UNCACHED)
def test_a_validation_that_cannot_be_is_refused_before_the_model_is_loaded(
    refused, no_model, made, prompts, tmp_path, case
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    write(tmp_path / "other.json", [{"text": f"text {n}", "label": n % 2} for n in range(4)])
    changes, expected = UNCACHED[case]
    line = refused(
        *("validate", "--model", MODEL, "--data", prompts, "--vectors", made / "run", "--quiet"),
        *("--output", tmp_path / "v", *(word.format(tmp=tmp_path) for word in changes)),
    )
    assert expected in line
    assert ".tmp" not in line


def test_a_users_file_where_a_layer_would_go_is_refused_before_the_model_is_loaded(
    refused, no_model, made, tmp_path
):
    shutil.copytree(made / "pairs", tmp_path / "cache")
    (tmp_path / "cache" / "layer_8").mkdir()
    (tmp_path / "cache" / "layer_8" / "my_activations.pt").write_text("mine")
    line = refused(
        *("extract", "--model", MODEL, "--data", made / "pairs.json", "--layers", "7,8"),
        *("--output", tmp_path / "cache", "--quiet"),
    )
    assert "it holds my_activations.pt, which is not of this cache" in line


def test_a_link_that_goes_in_circles_is_refused_before_the_model_is_loaded(
    refused, no_model, pairs, tmp_path
):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    line = refused("extract", "--model", MODEL, "--data", pairs, "--output", tmp_path / "a")
    assert "goes in circles" in line


def test_a_cache_of_cut_texts_names_the_option_that_cut_them(refused, capsys, tmp_path):
    data = write(tmp_path / "d.json", [PROMPTS[0], {"question": "word " * 2000, "type": "x"}])
    arguments = ("--model", MODEL, "--data", data, "--truncate", "--output", tmp_path / "cache")
    assert command(capsys, "extract", *arguments, "--layers", "1", "--quiet")[0] == 0
    line = refused("train", "--cache", tmp_path / "cache", "--layers", "2", "--output", "run")
    assert line.endswith("--truncate")


def test_another_model_is_refused_before_it_is_loaded(refused, no_model, made, tmp_path, prompts):
    narrow = build(FAMILIES["llama"], tmp_path / "model", chat=True)
    line = refused(
        *("validate", "--model", narrow, "--data", prompts, "--vectors", made / "run"),
        *("--output", tmp_path / "v"),
    )
    assert f"do not belong to model {narrow}" in line
    assert "from 0 (embeddings) to 4 (after the last block), got 10" in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--positive-class", "honest"], "positive class 'honest' in --data"),
        (["--output", "{tmp}/pairs.json/run"], "is not a folder"),
        (["--output", "{tmp}/.."], "to name a folder"),
        (["--device", "tpu"], "the device tpu"),
        (["--device-map", "wide"], "--device-map to be auto"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_the_model_is_loaded(
    refused, no_model, pairs, tmp_path, changes, expected
):
    line = refused(
        *("train", "--model", MODEL, "--data", pairs, "--layers", "1", "--quiet"),
        *("--output", tmp_path / "run", *(word.format(tmp=tmp_path) for word in changes)),
    )
    assert expected in line


ENGINES = {
    "an engine that there is not": (
        ["--engine", "fast"],
        "expected engine to be auto, resident, stream, got 'fast'",
    ),
    "a size in words": (
        ["--memory", "plenty"],
        "expected a size such as 8GB, 800MB or 1.5GiB for --memory, got 'plenty'",
    ),
    "no memory at all": (["--memory", "0GB"], "such as 8GB, 800MB or 1.5GiB for --memory, got"),
    "streaming over several devices": (
        ["--engine", "stream", "--device-map", "auto"],
        "expected --engine stream on one device, got --device-map; leave one of them out",
    ),
    "too little memory": (["--memory", "10MB"], "B for this model with --engine stream, got 10MB"),
    "too little to stay in memory": (
        ["--memory", "10MB", "--engine", "resident"],
        "B for this model with --engine resident, got 10MB; give more",
    ),
}


@pytest.mark.parametrize("case", ENGINES)
@pytest.mark.parametrize("word", ["extract", "plan", "train"])
def test_ways_of_running_that_cannot_be_are_refused_before_the_model_is_loaded(
    refused, no_model, pairs, tmp_path, case, word
):
    more, expected = ENGINES[case]
    line = refused(
        *(word, "--model", MODEL, "--data", pairs, "--layers", "1"),
        *("--output", tmp_path / "cache", *more),
    )
    assert expected in line


def test_an_architecture_that_cannot_be_streamed_is_refused(refused, prompts, tmp_path):
    sizes = {"vocab_size": 264, "d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 48}
    family = Family("xlnet", "XLNetConfig", {**sizes, "pad_token_id": 0})
    model = build(family, tmp_path / "model")
    line = refused(
        *("extract", "--model", model, "--data", prompts, "--no-chat-template", "--quiet"),
        *("--engine", "stream", "--output", tmp_path / "cache"),
    )
    assert "expected XLNetModel to hand one residual stream [batch, tokens, hidden]" in line
    assert "cannot be streamed" in line


def test_the_memory_that_a_refusal_names_is_enough(refused, capsys, pairs, tmp_path):
    arguments = ("--model", MODEL, "--data", pairs, "--layers", "1")
    line = refused("plan", *arguments, "--memory", "10MB")
    least = parse_bytes(re.search(r"at least ([\d.]+[MG]B)", line)[1])
    # The process has grown since, by what the refusal itself took.
    code, out, _ = command(capsys, "plan", *arguments, "--memory", str(least + 50_000_000))
    assert code == 0
    assert "engine " in out


def test_a_streamed_cache_is_the_resident_one_byte_for_byte(capsys, pairs, tmp_path):
    arguments = ("--model", MODEL, "--data", pairs, "--layers", "3,24", "--quiet")
    for engine in ("resident", "stream"):
        there = ("--engine", engine, "--output", tmp_path / engine)
        code, _, err = command(capsys, "extract", *arguments, *there)
        assert code == 0, err
    for file in (tmp_path / "resident").rglob("*.pt"):
        twin = tmp_path / "stream" / file.relative_to(tmp_path / "resident")
        assert twin.read_bytes() == file.read_bytes()


def test_the_plan_says_where_an_addition_starts_and_what_it_reads(capsys, prompts, tmp_path):
    arguments = ("--model", MODEL, "--data", prompts, "--output", tmp_path / "cache")
    whole = ("--positions", "all", "--keep-special-tokens")
    planned = command(capsys, "plan", *arguments, *whole, "--layers", "12,24")[1]
    assert command(capsys, "extract", *arguments, *whole, "--layers", "10", "--quiet")[0] == 0
    added = command(capsys, "plan", *arguments, *whole, "--layers", "12,24", "--engine", "stream")
    assert "stream: one block after the other, hidden states in memory, within" in added[1]
    assert "; goes on from cached layer 10" in added[1]
    assert 0 < weights_in(added[1]) < weights_in(planned)


def weights_in(printed):
    line = next(line for line in printed.splitlines() if line.startswith("weights to read"))
    return int(line.split()[3].replace(",", ""))


def test_a_disk_that_fills_up_meanwhile_is_told_in_one_line(refused, pairs, tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("probecache.store.writer.CacheWriter.write", full)
    line = refused(
        *("extract", "--model", MODEL, "--data", pairs, "--layers", "1", "--quiet"),
        *("--output", tmp_path / "cache"),
    )
    assert "the disk or quota is full" in line
    assert "what was there before is untouched; free space and run the same command again" in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["extract", "--model", "m"], "Missing option '--data'. See probecache extract --help"),
        (["extract", "--colour", "red"], "No such option"),
        (["extrct"], "See probecache --help"),
        (["plan", "--model", "m", "--data", "d", "--batch-tokens", "0"], "--batch-tokens"),
        (["info", "a\0b"], "without NUL bytes"),
        (["info", "a\udcff"], "arguments in UTF-8"),
    ],
)
def test_a_command_line_that_makes_no_sense_gets_one_line(refused, words, expected):
    assert expected in refused(*words)


def test_a_name_that_is_too_long_is_told_with_what_to_do(refused, made):
    line = refused("train", "--cache", made / "pairs", "--output", made / ("n" * 300))
    assert "expected to read or write" in line


def test_an_interrupted_command_says_so_and_ends_with_its_own_code(
    capsys, pairs, tmp_path, monkeypatch
):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("probecache.engine.ResidentEngine.run", interrupt)
    code, _, err = command(
        *(capsys, "extract", "--model", MODEL, "--data", pairs, "--layers", "1"),
        *("--output", tmp_path / "cache", "--quiet"),
    )
    assert code == 130
    assert err == "stopped before any rows were on disk; nothing is kept\n"
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.json"]


def test_a_cache_refuses_to_be_extended_otherwise_in_words(refused, made, tmp_path):
    line = refused(
        *("extract", "--model", MODEL, "--data", made / "pairs.json", "--layers", "5"),
        *("--dtype", "float32", "--positions", "all", "--output", made / "pairs"),
    )
    assert "dtype: expected 'bfloat16', got 'float32'" in line
    assert "positions: expected 'last', got 'all'" in line
    assert "another --output" in line
    assert "--allow-mismatch" not in line


def test_the_version_is_printed(capsys):
    code, out, _ = command(capsys, "--version")
    assert code == 0
    assert out.startswith("probecache 0.")


def test_no_arguments_print_the_help(capsys):
    assert command(capsys)[:2] == command(capsys, "--help")[:2]


def test_names_that_the_terminal_cannot_show_are_shown_otherwise(tmp_path):
    records = [{"question": f"q {n}", "type": ["日本", "plain"][n % 2]} for n in range(4)]
    cache = write_cache(tmp_path / "cache", records, {1: torch.randn(4, 8)})
    ran = subprocess.run(
        [sys.executable, "-m", "probecache", "info", str(cache.path)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert rb"\u65e5\u672c 2 examples" in ran.stdout


# ---------------------------------------------------------------- what is printed


def test_an_extraction_says_what_it_did_and_where(capsys, pairs, tmp_path):
    arguments = ("extract", "--model", MODEL, "--data", pairs, "--layers", "3,5-7")
    code, out, _ = command(capsys, *arguments, "--output", tmp_path / "cache", "--quiet")
    assert code == 0
    assert "Extracting layers 3,5-7" in out
    assert f"{tmp_path / 'cache'} holds 2 examples x 4 layers" in out
    code, out, _ = command(capsys, *arguments, "--output", tmp_path / "cache", "--quiet")
    assert code == 0
    assert "Nothing to do: layers 3,5-7 are cached already" in out


def lasting(printed):
    """The lines that do not depend on what else the machine does."""
    return [line for line in printed.splitlines() if "free" not in line and "memory" not in line]


def test_a_dry_run_and_plan_print_the_same_and_write_nothing(capsys, pairs, tmp_path):
    arguments = ("--model", MODEL, "--data", pairs, "--layers", "10,20,23")
    there = ("--output", tmp_path / "cache")
    dry = command(capsys, "extract", *arguments, *there, "--dry-run")
    planned = command(capsys, "plan", *arguments, *there)
    assert dry[0] == planned[0] == 0
    rows = [line.split("  ")[0] for line in dry[1].splitlines()]
    assert rows == [
        *("model", "data", "prompts", "tokens", "distinct-prefix tokens", "layers", "positions"),
        *("dtype", "disk per layer", "disk in all", "disk free", "weights to read"),
        *("engine", "memory, estimated"),
    ]
    assert lasting(dry[1]) == lasting(planned[1])
    assert not (tmp_path / "cache").exists()


def test_the_printed_bytes_are_those_of_the_files(capsys, prompts, tmp_path):
    arguments = ("--model", MODEL, "--data", prompts, "--layers", "1-3")
    _, out, _ = command(capsys, "plan", *arguments)
    printed = next(line for line in out.splitlines() if line.startswith("disk in all"))
    code, *_ = command(capsys, "extract", *arguments, "--output", tmp_path / "cache", "--quiet")
    assert code == 0
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert f" {sum(path.stat().st_size for path in files):,} bytes" in printed


def test_training_leaves_out_a_layer_without_direction_and_says_so(capsys, pairs, tmp_path):
    code, out, err = command(
        *(capsys, "train", "--model", MODEL, "--data", pairs, "--quiet"),
        *("--output", tmp_path / "run"),
    )
    assert code == 0, err
    assert "Note: left out layer 0, where both classes have the same mean" in out
    assert "at 24 layers: a higher score means deployment (against testing)" in out


def test_a_validation_prints_a_line_per_layer_and_its_paths(capsys, made, tmp_path):
    code, out, err = command(
        capsys,
        *validate(made, made / "run", tmp_path / "v", "--data", made / "prompts.json"),
        "--visualize",
    )
    assert code == 0, err
    layers = [line.split()[0] for line in out.splitlines() if line[:6].strip().isdigit()]
    assert layers == ["10", "20", "23"]
    assert f"{tmp_path / 'v' / 'report.html'}" in out
    assert (tmp_path / "v" / "report.html").is_file()


def test_info_describes_caches_and_runs(capsys, made):
    _, cache, _ = command(capsys, "info", made / "prompts")
    assert "10,20,23" in cache
    assert "4 (testing 2 examples" in cache
    _, run, _ = command(capsys, "info", made / "run")
    assert "difference-of-means" in run
    assert "deployment (against testing)" in run


def test_make_validation_writes_what_extract_reads(capsys, tmp_path):
    tests = tmp_path / "tests.jsonl"
    tests.write_text("".join(json.dumps({"question": f"What is {i}?"}) + "\n" for i in range(5)))
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"instruction": f"Bake {i}"}) + "\n" for i in range(5)))
    output = tmp_path / "validation.json"
    code, out, _ = command(
        *(capsys, "make-validation", "--testing", tests, "--deployment", chats),
        *("--count", 4, "--output", output),
    )
    assert code == 0
    assert "Wrote 8 prompts, 4 of each class" in out
    code, _, err = command(capsys, "plan", "--model", MODEL, "--data", output)
    assert code == 0, err


def test_an_encoder_goes_through_the_whole_workflow(capsys, tmp_path):
    model = build(FAMILIES["bert"], tmp_path / "bert")
    data = write(tmp_path / "data.json", PROMPTS)
    there = ("--model", model, "--data", data, "--quiet")
    code, _, err = command(capsys, "train", *there, "--layers", "1-4", "--output", tmp_path / "run")
    assert code == 0, err
    (run,) = tmp_path.glob("run_*")
    code, out, err = command(
        capsys, "validate", *there, "--vectors", run, "--output", tmp_path / "v"
    )
    assert code == 0, err
    assert "AUROC per layer, deployment counted as positive (2 against 2 prompts;" in out


# ---------------------------------------------------------------- as a program


@pytest.mark.parametrize(
    "statement",
    ["import probecache", "from probecache.cli import main; main(['--help'])"],
    ids=["import", "help"],
)
def test_importing_and_help_load_nothing_heavy(statement):
    heavy = ["torch", "transformers", "matplotlib", "sklearn", "numpy", "jinja2", "pydantic"]
    code = (
        f"import sys\ntry:\n  exec({statement!r})\nexcept SystemExit: pass\n"
        f"print('LOADED', sorted(set({heavy}) & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "LOADED []"


def test_reading_a_cache_and_validating_load_neither_torch_nor_transformers(made, tmp_path):
    arguments = [str(a) for a in validate(made, made / "run", tmp_path / "v")]
    code = (
        "import sys\nfrom probecache.cli import main\ntry: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('LOADED', sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert "AUROC per layer" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "LOADED []"


def test_a_closed_pipe_is_no_error(made):
    ran = subprocess.run(
        f"{sys.executable} -c 'from probecache.cli import main; main()' info {made / 'pairs'} "
        "| head -c 1",
        capture_output=True,
        text=True,
        shell=True,
        check=True,
    )
    assert "Traceback" not in ran.stderr


# ---------------------------------------------------------------- help


def commands():
    return sorted(get_command(app).commands.items())


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_option_of_every_command_is_explained(capsys, name):
    code, out, _ = command(capsys, name, "--help")
    assert code == 0
    words = " ".join(out.split())
    for parameter in dict(commands())[name].params:
        assert parameter.opts[-1] in words
        # Cut where a default or a range may be put in.
        assert " ".join(parameter.help.split())[:20] in words, parameter.name


def test_the_list_of_commands_cuts_no_explanation_short(capsys):
    _, out, _ = command(capsys, "--help")
    assert [name for name, _ in commands()] == sorted(
        [
            *("compare", "demo", "extract", "import", "info", "make-validation", "plan"),
            *("train", "validate", "verify"),
        ]
    )
    assert "..." not in out.split("Commands:")[1]
