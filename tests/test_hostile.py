"""Strangers' folders: nothing in them runs, reaches the terminal, or is written elsewhere.

What is refused for its size or its kind, here too; every canary is first shown to fire by itself.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import shutil
import signal
import struct
import sys
from pathlib import Path

import pytest
import torch
from families import BLOCKS, FAMILIES, build
from synthetic import labelled, train, validate, write_cache

import probecache
from probecache.adapter import find_adapter
from probecache.atomic import sha256_of_file
from probecache.dataset import load_dataset
from probecache.errors import DataError, ModelError, OutputError, PromptError, StoreError
from probecache.make_validation import make_validation
from probecache.models import ModelOptions, open_model
from probecache.prompts import PromptOptions, tokenize_dataset
from probecache.report import write_report
from probecache.report.saved import read_validation
from probecache.shipped import shipped
from probecache.store.describe import describe
from probecache.store.reader import open_cache
from probecache.store.tensorfile import data_offset
from probecache.store.vectors import load_vectors
from probecache.workflow.results import require_output

LABELS = ["testing", "deployment"] * 3
HIDDEN = 4
TERABYTE = 1 << 40


def planted(folder, labels=LABELS, ids="q", positive="deployment", **identity):
    """A cache, a run and a validation of these labels; paths by name."""
    rows = torch.randn(len(labels), HIDDEN, generator=torch.Generator().manual_seed(0))
    records = [{**record, "id": f"{ids}{n}"} for n, record in enumerate(labelled(*labels))]
    cache = write_cache(folder / "cache", records, {0: rows, 3: rows * 2}, **identity)
    vectors = train(cache, folder / "run", positive_class=positive)
    validate(cache, vectors, folder / "validation")
    return {"cache": cache.path, "run": vectors.path, "validation": folder / "validation"}


@pytest.fixture
def made(tmp_path):
    return planted(tmp_path / "made")


@pytest.fixture
def in_time():
    """A test that hangs, on a pipe say, is ended."""

    def end(*_):
        raise TimeoutError("hung")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def tree(folder):
    """Every name below a folder, with its content where it is a file."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


# ---------------------------------------------------------------- nothing runs


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "fired"


def with_canary(path, canary, manifest, record_of):
    """Put an object that runs code into a tensor's file and record the file as if it were right."""
    tensor = torch.load(path, weights_only=True)
    with path.open("wb") as file:
        torch.save([tensor, canary], file)
    with path.open("rb") as file:
        offset = data_offset(file)
    wanted = {"bytes": path.stat().st_size, "offset": offset, "sha256": sha256_of_file(path)}
    edit(manifest, lambda content: record_of(content).update(wanted))


def test_no_pickle_in_a_cache_or_in_vectors_is_run(made, marker, tmp_path):
    cache, run = made["cache"], made["run"]
    for layer in (0, 3):
        for prefix in ("test", "deploy"):
            name = f"layer_{layer}/{prefix}_activations.pt"
            info = cache / "layer_info.json"
            with_canary(cache / name, Canary(marker), info, lambda m, name=name: m["files"][name])
        path, info = run / f"layer_{layer}.pt", run / "vectors.json"
        with_canary(path, Canary(marker), info, lambda m, n=str(layer): m["layers"][n]["file"])
    torch.load(path, weights_only=False)
    assert marker.exists(), "a canary that cannot fire shows nothing"
    marker.unlink()
    for name in ("pickle.pkl", "data.pt", "layer_0/other.pt", "__init__.py", "conftest.py"):
        (cache / name).write_bytes(pickle.dumps(Canary(marker)))
    opened, vectors = open_cache(cache), load_vectors(run)
    assert opened["testing", 3].shape == (3, HIDDEN)
    describe(cache)
    describe(run)
    validate(opened, train(opened, tmp_path / "again"), tmp_path / "scores", visualize=True)
    validate(opened, vectors, tmp_path / "others")
    assert not marker.exists()


def test_tokens_are_read_without_unpickling(tmp_path, marker):
    tokens = [2, 1, 3, 1, 1, 2]
    rows = {0: torch.ones(sum(tokens), HIDDEN)}
    records = labelled(*LABELS)
    cache = write_cache(tmp_path / "c", records, rows, tokens=tokens, positions="all")
    path, info = cache.path / "tokens.pt", cache.path / "layer_info.json"
    with_canary(path, Canary(marker), info, lambda m: m["files"]["tokens.pt"])
    assert open_cache(cache.path).tokens("testing").tolist() == list(range(6))
    assert not marker.exists()


CODE = """from pathlib import Path
from transformers import LlamaConfig
Path({marker!r}).touch()
class Config(LlamaConfig):  # of its own: what registers it must not mark the class of other tests
    pass
"""
REMOTE = {
    "AutoConfig": "canary.Config",
    "AutoModel": "canary.Model",
    "AutoModelForCausalLM": "canary.Model",
    "AutoTokenizer": ["canary.Slow", "canary.Fast"],
}


@pytest.fixture
def model_with_canaries(tmp_path, marker):
    """The model that ships, with code beside it, named in every settings file that may name it."""
    folder = tmp_path / "model"
    shutil.copytree(shipped("models/tiny-llama"), folder)
    code = CODE.format(marker=str(marker))
    for name in ("canary", "modeling_llama", "configuration_llama", "tokenization_llama"):
        (folder / f"{name}.py").write_text(code)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        edit(folder / name, lambda c: c.update(auto_map=REMOTE, trust_remote_code=True))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"auto_map": {"AutoProcessor": "canary.P"}}))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Canary(marker)))
    return folder


def test_no_code_beside_a_model_is_run(model_with_canaries, marker, tmp_path):
    from transformers import AutoConfig

    AutoConfig.from_pretrained(model_with_canaries, trust_remote_code=True)
    assert marker.exists(), "a canary that cannot fire shows nothing"
    marker.unlink()
    options = {"model": str(model_with_canaries), "data": labelled(*LABELS), "layers": "1"}
    probecache.extract(output=tmp_path / "cache", quiet=True, **options)
    assert not marker.exists()


def test_a_model_that_is_nothing_without_its_code_is_refused(model_with_canaries, marker):
    edit(model_with_canaries / "config.json", lambda c: c.update(model_type="canary"))
    with pytest.raises(ModelError, match="expected a Hugging Face model"):
        open_model(ModelOptions(str(model_with_canaries)))
    assert not marker.exists()


def test_pickled_weights_alone_are_refused(model_with_canaries, marker):
    (model_with_canaries / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickles can run code"):
        open_model(ModelOptions(str(model_with_canaries)))
    assert not marker.exists()


@pytest.mark.parametrize("asked", ["evil/code", "flex_attention", "paged|eager", ["eager"]])
@pytest.mark.parametrize("place", [None, "text_config", "vision_config"])
def test_attention_that_transformers_would_fetch_or_compile_is_refused(tmp_path, asked, place):
    folder = build(FAMILIES["gemma3_images"], tmp_path / "model")
    asks = {place: asked} if place else asked
    edit(folder / "config.json", lambda c: c.update(attn_implementation=asks))
    with pytest.raises(ModelError, match=r"ask for the attention eager, sdpa, .* got"):
        open_model(ModelOptions(str(folder)))


@pytest.mark.parametrize("asked", ["eager", "sdpa", {"text_config": "eager"}, None])
def test_attention_that_a_config_may_ask_for_is_taken(tmp_path, asked):
    folder = build(FAMILIES["gemma3_images"], tmp_path / "model")
    edit(folder / "config.json", lambda c: c.update(attn_implementation=asked))
    assert open_model(ModelOptions(str(folder))).num_hidden_layers == BLOCKS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than 10000"),
        ({"num_labels": 10**9}, "num_labels is 1000000000, more than 100000"),
    ],
)
@pytest.mark.parametrize("place", [None, "text_config"])
def test_a_config_that_counts_more_than_any_model_has_is_refused(
    model_with_canaries, settings, words, place
):
    change = {place: settings} if place else settings
    edit(model_with_canaries / "config.json", lambda c: c.update(change))
    with pytest.raises(ModelError, match=words):
        open_model(ModelOptions(str(model_with_canaries)))


@pytest.mark.parametrize(
    ("bomb", "words"),
    [
        ("[" + ",".join(['{"":[]}'] * 200_000) + "]", "too many values for so few bytes"),
        ('"' + "x" * (4 << 20) + '"', "config.json has 419.... bytes, more than 4194304"),
    ],
    ids=["dense", "long"],
)
def test_a_config_that_its_size_does_not_explain_is_refused(model_with_canaries, bomb, words):
    path = model_with_canaries / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + f', "junk": {bomb}}}')
    with pytest.raises(ModelError, match=words):
        open_model(ModelOptions(str(model_with_canaries)))


def test_a_config_of_many_names_and_of_infinity_is_taken(model_with_canaries):
    names = {str(number): f"LABEL_{number}" for number in range(21_843)}
    numbers = {name: int(number) for number, name in names.items()}
    change = {"id2label": names, "label2id": numbers, "time_step_limit": [0.0, float("inf")]}
    edit(model_with_canaries / "config.json", lambda c: c.update(change))
    assert open_model(ModelOptions(str(model_with_canaries))).config.num_labels == 21_843


@pytest.mark.parametrize("trained", ["x", [4], float("nan")])
def test_a_config_of_words_for_numbers_is_refused(model_with_canaries, trained):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    rope["original_max_position_embeddings"] = trained
    edit(model_with_canaries / "config.json", lambda c: c.update(rope_parameters=rope))
    with pytest.raises(ModelError, match="expected original_max_position_embeddings in"):
        open_model(ModelOptions(str(model_with_canaries))).depends_on_length(8)


def test_an_adapter_that_names_a_module_is_refused_before_it_is_imported(
    tmp_path, marker, monkeypatch
):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "canary_module.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(folder)
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    settings |= {"megatron_config": {"a": 1}, "megatron_core": "canary_module"}
    settings |= {"auto_mapping": {"parent_library": "canary_module", "base_model_class": "A"}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(marker)))
    importlib.import_module("canary_module")
    assert marker.exists(), "a canary that cannot fire shows nothing"
    marker.unlink()
    sys.modules.pop("canary_module")
    with pytest.raises(ModelError, match="names a module to import"):
        find_adapter(str(folder), []).apply(None, lambda name: 0, 1)
    assert not marker.exists()


TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch x') }}",
    "a range": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "a text": "{{ 'a' * 10**13 }}",
    "an error": "{{ raise_exception('\x1b[2J no') }}",
    "a file": "{% include '/etc/passwd' %}",
    "no template": "{% for %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_chat_template_is_refused(tmp_path, name, in_time):
    folder = tmp_path / "model"
    shutil.copytree(shipped("models/tiny-llama"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    source = open_model(ModelOptions(str(folder)))
    with pytest.raises(PromptError, match="chat template") as caught:
        tokenize_dataset(
            load_dataset(labelled(*LABELS)), source.tokenizer, source.facts, PromptOptions()
        )
    assert str(caught.value).isprintable()
    assert re.search(r"but it refused: \S", str(caught.value))  # a MemoryError has no words


# ---------------------------------------------------------------- nothing is written elsewhere

NAMES = ["../../x", "/abs", "..", ".", "a\0b", "x" * 300, "CON", "dot.", "two words", "~", "$HOME"]
NAMES += ["a\\..\\b", "\x1b[2J", "\u202ex", "-rf", "测", "probe_stats_layer0.csv", "report.html"]


def test_names_from_data_never_become_places(tmp_path):
    labels = [name for name in NAMES for _ in range(2)]
    (tmp_path / "other").write_text("other")
    made = planted(tmp_path / "in", labels, ids="../../i/", positive="../../x", model="../../m")
    vectors = load_vectors(made["run"])
    validate(open_cache(made["cache"]), vectors, made["validation"], visualize=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "other"]
    found = sorted(path.name for path in (tmp_path / "in").iterdir())
    assert found == ["cache", made["run"].parent.name, "validation"]
    word = "[A-Za-z0-9_-]+"
    for name in tree(made["cache"]):
        assert re.fullmatch(
            rf"layer_info\.json|metadata\.json|layer_\d+(/({word}_activations\.pt|rows\.crc32))?",
            name,
        )
    figures = {"roc_curves", "auroc_by_layer", "score_distributions", "calibration"}
    expected = {f"visualizations/{name}.{kind}" for name in figures for kind in ("png", "svg")}
    expected |= {"summary.json", "summary.csv", "report.html", "visualizations"}
    expected |= {f"probe_stats_layer{layer}.csv" for layer in (0, 3)}
    assert set(tree(made["validation"])) == expected


def test_an_extraction_of_hostile_names_writes_into_its_cache_alone(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    records = [
        {"question": f"What is {name!r}?", "type": name, "id": f"../{name}", "category": name}
        for name in NAMES
    ]
    cache = probecache.extract(
        model=str(shipped("models/tiny-llama")), data=records, output="c", layers="1", quiet=True
    )
    assert cache.classes == tuple(NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["c"]


def test_a_report_writes_through_no_link_inside_a_strangers_folder(made, tmp_path):
    folder, elsewhere = made["validation"], tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "precious").write_text("precious")
    (folder / "report.html").symlink_to(tmp_path / "precious")
    write_report(folder)
    assert (tmp_path / "precious").read_text() == "precious"
    shutil.rmtree(folder / "visualizations")
    (folder / "visualizations").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="nothing is written through links"):
        write_report(folder)
    assert not any(elsewhere.iterdir())


def test_files_that_are_links_are_read(made, tmp_path):
    before = open_cache(made["cache"])["testing", 3].clone()
    for path in [p for folder in made.values() for p in folder.rglob("*") if p.is_file()]:
        target = tmp_path / f"{abs(hash(path))}"
        path.rename(target)
        path.symlink_to(target)
    assert torch.equal(open_cache(made["cache"])["testing", 3], before)
    load_vectors(made["run"])
    read_validation(made["validation"])


# ---------------------------------------------------------------- what is no file

READ = {
    "layer_info.json": ("cache", lambda m: open_cache(m["cache"])),
    "metadata.json": ("cache", lambda m: open_cache(m["cache"]).examples),
    "layer_3/test_activations.pt": ("cache", lambda m: open_cache(m["cache"])),
    "vectors.json": ("run", lambda m: load_vectors(m["run"])),
    "layer_3.pt": ("run", lambda m: load_vectors(m["run"])),
    "summary.json": ("validation", lambda m: read_validation(m["validation"])),
    "probe_stats_layer3.csv": ("validation", lambda m: read_validation(m["validation"])),
}


def replaced(path, kind):
    path.unlink()
    match kind:
        case "a pipe":
            os.mkfifo(path)
        case "an endless device":
            path.symlink_to("/dev/zero")
        case "a folder":
            path.mkdir()
        case "a terabyte of nothing":
            path.touch()
            os.truncate(path, TERABYTE)
        case "a link in a circle":
            path.symlink_to(path)


KINDS = ["a pipe", "an endless device", "a folder", "a terabyte of nothing", "a link in a circle"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READ)
def test_what_is_no_file_of_its_kind_is_refused_at_once(made, in_time, name, kind):
    where, read = READ[name]
    replaced(made[where] / name, kind)
    with pytest.raises(StoreError, match=r"expected|malformed") as caught:
        read(made)
    assert str(made[where]) in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_file_that_is_none_is_refused_at_once(tmp_path, in_time, kind):
    for suffix in (".json", ".jsonl", ".csv"):
        path = tmp_path / f"data{suffix}"
        path.touch()
        replaced(path, kind)
        with pytest.raises(DataError, match=f"data{suffix}"):
            load_dataset(path)
    if kind.endswith("nothing"):
        with pytest.raises(DataError, match="zeros"):
            make_validation(str(path), str(path), tmp_path / "out.json")


def read_model(folder):
    source = open_model(ModelOptions(str(folder)))
    return source.tokenizer, source.weight_samples((1,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_with_what_is_no_file_is_refused_at_once(tmp_path, in_time, name, kind):
    folder = tmp_path / "model"
    shutil.copytree(shipped("models/tiny-llama"), folder)
    replaced(folder / name, kind)
    with pytest.raises(ModelError):
        read_model(folder)


def test_an_output_with_a_pipe_for_a_summary_is_no_earlier_validation(made, in_time):
    for kind in KINDS:
        path = made["validation"] / "summary.json"
        replaced(path, kind)
        with pytest.raises(OutputError, match="holds something else"):
            require_output(made["validation"])
        path.rmdir() if kind == "a folder" else path.unlink()
        path.touch()
