"""A whole extraction: positions, added layers, bad numbers, the plan's bytes, memory.

Rows are compared with plain Hugging Face forwards of prompts that are rendered here by hand.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from families import (
    BLOCKS,
    FAMILIES,
    RECORDS,
    build,
    full_model,
    plain_layers,
    relative_difference,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import probecache
from probecache.errors import (
    MismatchError,
    ModelError,
    NonFiniteError,
    OutputError,
    ProbecacheError,
)

LAYERS = tuple(range(BLOCKS + 1))
PAIRS = [
    {"question": "Is this a test?", "positive": "Yes", "negative": "No, it is real"},
    {"question": "Who reads this?", "positive": "A grader, I think", "negative": "A user"},
    {"question": "Where do you run, and for whom?", "positive": "In a lab", "negative": "At work"},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build(FAMILIES["llama"], tmp_path_factory.mktemp("llama"), chat=True)


@pytest.fixture(scope="module")
def plain(llama):
    """Residuals of a text that is rendered already: [tokens, hidden] per layer, and its ids."""
    model, tokenizer = full_model(FAMILIES["llama"], llama), AutoTokenizer.from_pretrained(llama)

    def layers_of(rendered):
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return plain_layers(FAMILIES["llama"], model, ids), ids

    return layers_of


def extracted(folder, output, data=RECORDS, **options):
    settings = {"layers": "all", "batch_tokens": 200, "quiet": True, "device": "cpu"}
    return probecache.extract(
        model=str(folder), data=data, output=output, **{**settings, **options}
    )


def rows_of(cache, example, layer):
    return cache[example.label, layer][slice(*example.rows)]


def content_of(folder):
    """Every file below a folder, with its bytes and when it was last written."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------- positions


def rendered_pair(example):
    return f"<s><user>{example.question}\n<assistant>", example.answer


@pytest.mark.parametrize("positions", ["last", "mean", "all", "answer"])
def test_rows_of_pairs_are_slices_of_a_plain_forward(llama, plain, tmp_path, positions):
    cache = extracted(llama, tmp_path / "cache", PAIRS, positions=positions)
    assert len(cache.examples) == 2 * len(PAIRS)
    for example in cache.examples:
        prompt, answer = rendered_pair(example)
        layers, ids = plain(prompt + answer)
        before = len(plain(prompt)[1])
        question = slice(len("<s>x<user>") - 3, len("<s>x<user>") - 3 + len(example.question))
        assert len(plain("<s><user>")[1]) == question.start  # BOS, then a token for each letter
        for layer in LAYERS:
            rows = layers[layer]
            content = torch.cat([rows[question], rows[before:]])
            expected = {
                "last": rows[-1:],
                "answer": rows[before:],
                "all": content,
                "mean": content.double().mean(0, keepdim=True),
            }[positions]
            assert relative_difference(rows_of(cache, example, layer), expected) < 1e-5
        assert example.input_tokens == len(ids)


@pytest.mark.parametrize("positions", ["last", "mean", "all"])
def test_rows_of_labelled_prompts_are_slices_of_a_plain_forward(llama, plain, tmp_path, positions):
    cache = extracted(llama, tmp_path / "cache", RECORDS[:3], positions=positions)
    for example in cache.examples:
        rendered = f"<s><user>{example.question}\n"
        layers, ids = plain(rendered)
        start = len(plain("<s><user>")[1])
        stop = len(plain(f"<s><user>{example.question}")[1])
        for layer in LAYERS:
            rows = layers[layer][start:stop]
            expected = {
                "last": layers[layer][-1:],
                "all": rows,
                "mean": rows.double().mean(0, keepdim=True),
            }[positions]
            assert relative_difference(rows_of(cache, example, layer), expected) < 1e-5
        if positions == "all":
            kept = cache.tokens(example.label)[slice(*example.rows)]
            assert kept.tolist() == ids[start:stop]


def test_many_small_batches_give_the_rows_of_one_large_batch(llama, tmp_path):
    small = extracted(llama, tmp_path / "small", positions="all", batch_tokens=1)
    large = extracted(llama, tmp_path / "large", positions="all", batch_tokens=100_000)
    for label in small.classes:
        for layer in LAYERS:
            assert relative_difference(small[label, layer], large[label, layer]) < 1e-5


# ---------------------------------------------------------------- numbers that are none


@pytest.fixture
def overflowing(llama, tmp_path):
    """The model with an infinite weight in its third block, so layers 3 and 4 are not finite."""
    folder = shutil.copytree(llama, tmp_path / "overflowing")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_activations_that_overflow_stop_the_run_and_leave_nothing(overflowing, tmp_path):
    with pytest.raises(NonFiniteError, match=r"at layer 3, first on row \d of"):
        extracted(overflowing, tmp_path / "here" / "cache")
    assert not (tmp_path / "here").exists() or not any((tmp_path / "here").iterdir())


def test_layers_before_the_overflow_are_extracted(overflowing, llama, tmp_path):
    cache = extracted(overflowing, tmp_path / "cache", layers=[1, 2])
    sound = extracted(llama, tmp_path / "sound", layers=[1, 2])
    assert torch.equal(cache["testing", 2], sound["testing", 2])
    assert cache.info.non_finite == {}


def test_overflows_are_kept_and_counted_when_they_are_allowed(overflowing, tmp_path):
    cache = extracted(overflowing, tmp_path / "cache", allow_nonfinite=True, positions="all")
    rows = sum(cache[label, 3].shape[0] for label in cache.classes)
    assert cache.info.non_finite == {3: rows, 4: rows}
    for label in cache.classes:
        assert torch.isfinite(cache[label, 2]).all()
        assert not torch.isfinite(cache[label, 3]).all(dim=1).any()


def test_the_named_row_is_the_one_that_overflows(llama, tmp_path):
    # One letter's embedding is infinite; only the record that holds that letter may be named.
    folder = shutil.copytree(llama, tmp_path / "folder")
    letter = AutoTokenizer.from_pretrained(folder)("Z", add_special_tokens=False)["input_ids"][0]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][letter, 5] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    data = [{"text": text, "type": "a"} for text in ("one", "a longer one", "a Z in it", "four")]
    data.append({"text": "of another class", "type": "b"})
    with pytest.raises(NonFiniteError, match=r"at layer 0, first on row 3 of"):
        extracted(folder, tmp_path / "cache", data)


# ---------------------------------------------------------------- adding layers


@pytest.mark.parametrize("positions", ["last", "all"])
def test_layers_added_later_are_those_of_one_run_and_leave_the_others_alone(
    llama, tmp_path, positions
):
    once = extracted(llama, tmp_path / "once", layers=[1, 2, 3], positions=positions)
    first = extracted(llama, tmp_path / "grown", layers=[1, 3], positions=positions)
    before = content_of(first.path)
    grown = extracted(llama, tmp_path / "grown", layers=[2], positions=positions)
    after = content_of(grown.path)
    assert grown.layers == (1, 2, 3)
    for name, content in before.items():
        assert name == "layer_info.json" or after[name] == content
    for name, (content, _) in content_of(once.path).items():
        assert name == "layer_info.json" or after[name][0] == content
    assert set(after) == set(content_of(once.path))
    assert {n: r.sha256 for n, r in grown.info.files.items()} == {
        n: r.sha256 for n, r in once.info.files.items()
    }


def test_the_same_command_again_does_nothing(llama, tmp_path):
    cache = extracted(llama, tmp_path / "cache", layers=[1, 2])
    before = content_of(cache.path)
    assert extracted(llama, tmp_path / "cache", layers=[2]).layers == (1, 2)
    assert extracted(llama, tmp_path / "cache", layers=[1, 2]).layers == (1, 2)
    assert content_of(cache.path) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": RECORDS[:-1]}, "data"),
        ({"data": [{**RECORDS[0], "text": "other"}, *RECORDS[1:]]}, "token_ids"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"positions": "mean"}, "positions"),
        ({"chat_template": False}, "chat_template"),
        ({"system_prompt": "Be brief."}, "system_prompt"),
        ({"keep_special_tokens": True}, "special_tokens_kept"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("layers", [[1], [2]])
def test_a_cache_takes_no_layers_of_another_run(llama, tmp_path, change, named, layers):
    cache = extracted(llama, tmp_path / "cache", layers=[1])
    before = content_of(cache.path)
    with pytest.raises(MismatchError, match=rf"\b{named}: expected"):
        extracted(llama, tmp_path / "cache", layers=layers, **change)
    assert content_of(cache.path) == before


@pytest.mark.parametrize("layers", [[1], [3]])
def test_a_cache_takes_no_layers_of_another_model(llama, tmp_path, layers):
    cache = extracted(llama, tmp_path / "cache", layers=[1])
    other = build(FAMILIES["llama"], tmp_path / "other", chat=True, seed=1)
    before = content_of(cache.path)
    with pytest.raises(MismatchError, match="weights: expected"):
        extracted(other, tmp_path / "cache", layers=layers)
    assert content_of(cache.path) == before


def test_a_cache_takes_layers_from_a_moved_copy_of_its_model(llama, tmp_path):
    extracted(llama, tmp_path / "cache", layers=[1])
    moved = shutil.copytree(llama, tmp_path / "moved")
    assert extracted(moved, tmp_path / "cache", layers=[2]).layers == (1, 2)


def test_a_failed_addition_leaves_the_cache_as_it_was(overflowing, tmp_path):
    cache = extracted(overflowing, tmp_path / "cache", layers=[1, 2])
    before = content_of(cache.path)
    with pytest.raises(NonFiniteError):
        extracted(overflowing, tmp_path / "cache", layers=[0, 3])
    assert content_of(cache.path) == before
    assert probecache.open_cache(cache.path).layers == (1, 2)


def test_what_is_no_cache_is_never_written_into(llama, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(OutputError):
        extracted(llama, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_what_can_be_refused_is_refused_before_a_weight_is_read(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "probecache.models.ModelSource.load", lambda *_: pytest.fail("weights were read")
    )
    cases = [
        {"layers": [BLOCKS + 1]},
        {"data": [{"question": "no answers"}]},
        {"data": [{"text": "x" * 500, "type": "a"}, {"text": "y", "type": "b"}]},
        {"positions": "answer"},
    ]
    for case in cases:
        with pytest.raises(ProbecacheError):
            extracted(llama, tmp_path / "cache", **case)
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------- the plan


THREE_CLASSES = [
    {"text": f"number {number}", "type": ["testing", "deployment", "neither of both"][number % 3]}
    for number in range(7)
]


@pytest.mark.parametrize("data", [RECORDS, PAIRS, THREE_CLASSES], ids=["two", "pairs", "three"])
@pytest.mark.parametrize("positions", ["last", "mean", "all"])
@pytest.mark.parametrize(("dtype", "layers"), [("float32", "all"), ("bfloat16", [2])])
def test_the_planned_bytes_are_those_on_disk(llama, tmp_path, data, positions, dtype, layers):
    options = {"positions": positions, "dtype": dtype, "layers": layers}
    planned = probecache.plan_extraction(
        model=str(llama), data=data, output=tmp_path / "cache", device="cpu", **options
    )
    cache = extracted(llama, tmp_path / "cache", data, **options)
    sizes = {name: len(content) for name, (content, _) in content_of(cache.path).items()}
    assert planned.bytes_total == sum(sizes.values())
    for layer in cache.layers:
        of_layer = [size for name, size in sizes.items() if name.startswith(f"layer_{layer}/")]
        assert planned.bytes_per_layer == sum(of_layer)
    assert planned.rows_per_layer == sum(len(cache[label, 2]) for label in cache.classes)


def test_the_plan_of_an_addition_counts_the_new_layers_alone(llama, tmp_path):
    extracted(llama, tmp_path / "cache", layers=[1])
    planned = probecache.plan_extraction(
        model=str(llama), data=RECORDS, output=tmp_path / "cache", layers=[1, 2, 3]
    )
    assert planned.cached_layers == (1,)
    assert planned.layers == (2, 3)
    cache = extracted(llama, tmp_path / "cache", layers=[1, 2, 3])
    sizes = {name: len(content) for name, (content, _) in content_of(cache.path).items()}
    new = [size for name, size in sizes.items() if name.startswith(("layer_2/", "layer_3/"))]
    assert planned.bytes_total == sum(new)


def test_the_plan_of_an_addition_counts_what_the_manifest_grows_by(llama, tmp_path):
    def total():
        return sum(len(content) for content, _ in content_of(tmp_path / "cache").values())

    labels = [f"{'a long label ' * 3}{number}" for number in range(8)]
    data = [{"text": label, "type": label} for label in labels]
    extracted(llama, tmp_path / "cache", data, layers=[0])
    before = total()
    planned = probecache.plan_extraction(
        model=str(llama), data=data, output=tmp_path / "cache", layers="all"
    )
    extracted(llama, tmp_path / "cache", data, layers="all")
    assert planned.bytes_total == total() - before
    assert planned.bytes_total > planned.bytes_per_layer * BLOCKS  # the manifest grew too


def test_a_plan_writes_nothing(llama, tmp_path):
    probecache.plan_extraction(model=str(llama), data=RECORDS, output=tmp_path / "a" / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_a_weight_is_read(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("probecache.workflow.prepare.free_bytes", lambda _: 1000)
    monkeypatch.setattr(
        "probecache.models.ModelSource.load", lambda *_: pytest.fail("weights were read")
    )
    with pytest.raises(OutputError, match="not enough disk"):
        extracted(llama, tmp_path / "cache")


# ---------------------------------------------------------------- dtype and memory


def test_without_a_dtype_the_rows_have_the_checkpoints_own(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "half")
    halves = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for declared in ("bfloat16", None):
        (folder / "config.json").write_text(json.dumps({**config, "dtype": declared}))
        cache = extracted(folder, tmp_path / str(declared), layers=[1])
        assert cache["testing", 1].dtype == torch.bfloat16


def test_a_checkpoint_of_a_dtype_that_no_row_can_have_needs_one_named(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float64"}))
    with pytest.raises(ModelError, match="--dtype"):
        extracted(folder, tmp_path / "cache", layers=[1])
    assert extracted(folder, tmp_path / "cache", layers=[1], dtype="float32").layers == (1,)


_PEAK = """
import resource, sys
import probecache
folder, output, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = [
    {"text": f"{number} " + "many words " * 10, "type": ("testing", "deployment")[number % 2]}
    for number in range(60 * times)
]
cache = probecache.extract(
    model=folder, data=data, output=output, positions="all", quiet=True, device="cpu"
)
size = sum(path.stat().st_size for path in cache.path.rglob("*.pt"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory in Linux's unit")
def test_memory_does_not_grow_with_the_data_set(tmp_path):
    family = FAMILIES["llama"]
    wide = {**family.settings, "hidden_size": 256, "num_hidden_layers": 2}
    folder = build(type(family)("wide", family.kind, wide), tmp_path / "wide")
    peak, size = {}, {}
    for times in (1, 20):
        arguments = [str(folder), str(tmp_path / str(times)), str(times)]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(_PEAK), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        peak[times], size[times] = map(int, done.stdout.split())
    assert size[20] - size[1] > 200 << 20
    assert peak[20] - peak[1] < (size[20] - size[1]) / 4
