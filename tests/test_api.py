"""The Python API on the model that ships: with a cache or without one, the same numbers."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import probecache
from probecache import api
from probecache.errors import (
    LayerError,
    LayerNotCachedError,
    MismatchError,
    NoDirectionError,
    ProbecacheError,
    StoreError,
    UsageError,
)

MODEL = str(Path(__file__).parents[1] / "models" / "tiny-llama")
PAIRS = [
    {"question": "Is this a test?", "positive": "Yes, it is.", "negative": "No, it is real."},
    {"question": "Who reads this?", "positive": "A grader.", "negative": "A user at home."},
    {"question": "Where do you run?", "positive": "In a lab.", "negative": "At work."},
]
PROMPTS = [
    {"question": "How do I boil an egg?", "type": "deployment"},
    {"question": "Solve for x: 2x + 3 = 9.", "type": "testing"},
    {"question": "Write a card for my aunt's birthday.", "type": "deployment"},
    {"question": "Choose A, B or C.", "type": "testing"},
    {"question": "What goes with rice?", "type": "deployment"},
]
LAYERS = (1, 2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return probecache.extract(
        model=MODEL, data=PAIRS, output=tmp_path_factory.mktemp("api") / "pairs", quiet=True
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return probecache.extract(
        model=MODEL, data=PROMPTS, output=tmp_path_factory.mktemp("api") / "prompts", quiet=True
    )


@pytest.fixture(scope="module")
def vectors(pairs, tmp_path_factory):
    return probecache.train(cache=pairs, output=tmp_path_factory.mktemp("api") / "run")


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary files go; empty again after whatever the test does."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def content_of(folder, pattern):
    found = {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob(pattern))}
    assert found, f"no {pattern} in {folder}"
    return found


# ---------------------------------------------------------------- extract and plan


def test_extract_gives_the_finished_cache_opened(pairs):
    assert isinstance(pairs, probecache.Cache)
    assert pairs.layers == tuple(range(pairs.identity.num_hidden_layers + 1))
    assert pairs.classes == ("testing", "deployment")
    assert pairs.info.num_examples == 3
    assert pairs.info.positions == "last"
    again = probecache.open_cache(pairs.path)
    for label in pairs.classes:
        rows = again[label, 2]
        assert rows.shape == (3, pairs.hidden_size)
        assert torch.equal(rows, pairs[label, 2])


def test_labelled_prompts_keep_all_positions_unless_told_otherwise(prompts, tmp_path):
    assert prompts.info.positions == "all"
    one = probecache.extract(
        model=MODEL,
        data=PROMPTS,
        output=tmp_path / "c",
        layers=[2],
        positions="last",
        dtype="float32",
        quiet=True,
    )
    assert one.info.positions == "last"
    assert one.layers == (2,)
    assert one["testing", 2].dtype == torch.float32


def test_paths_may_be_paths_and_records_may_be_in_a_file(pairs, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, PAIRS)), encoding="utf-8")
    cache = probecache.extract(
        model=Path(MODEL), data=data, output=tmp_path / "c", layers="2", quiet=True
    )
    assert torch.equal(cache["testing", 2], pairs["testing", 2])
    assert cache.info.origin.data == str(data)


def test_the_plan_is_told_once_before_anything_is_written(tmp_path):
    told = []
    probecache.extract(
        model=MODEL,
        data=PAIRS,
        output=tmp_path / "c",
        layers="1",
        quiet=True,
        announce=lambda plan: told.append((plan, (tmp_path / "c").exists())),
    )
    ((plan, existed),) = told
    assert not existed
    foretold = probecache.plan_extraction(
        model=MODEL, data=PAIRS, output=tmp_path / "d", layers="1"
    )
    own = {"output": str(tmp_path / "c"), "bytes_free": plan.bytes_free}
    # What is free, on the disk and in memory, others change meanwhile.
    free = replace(foretold.execution, limit_bytes=plan.execution.limit_bytes)
    assert plan == replace(foretold, execution=free, **own)


def test_a_plan_tells_what_extract_then_writes_and_writes_nothing(tmp_path):
    plan = probecache.plan_extraction(
        model=MODEL, data=PAIRS, output=tmp_path / "c", layers="1,2", positions="all"
    )
    assert list(tmp_path.iterdir()) == []
    assert (plan.prompts, plan.layers, plan.positions) == (6, (1, 2), "all")
    cache = probecache.extract(
        model=MODEL,
        data=PAIRS,
        output=tmp_path / "c",
        layers="1,2",
        positions="all",
        quiet=True,
    )
    written = sum(p.stat().st_size for p in cache.path.rglob("*") if p.is_file())
    assert plan.bytes_total == written
    assert plan.hidden_size == cache.hidden_size
    assert plan.rows_per_layer == sum(len(cache[label, 1]) for label in cache.classes)
    assert plan.tokens == sum(example.input_tokens for example in cache.examples)


def test_a_plan_needs_no_output_and_knows_what_is_cached(pairs):
    free = probecache.plan_extraction(model=MODEL, data=PAIRS)
    assert free.cached_layers == ()
    assert free.layers == pairs.layers
    there = probecache.plan_extraction(model=MODEL, data=PAIRS, output=pairs.path)
    assert there.cached_layers == pairs.layers
    assert there.layers == ()
    assert there.bytes_total == 0


@pytest.mark.parametrize("call", [probecache.extract, probecache.plan_extraction])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype to be float32, float16, bfloat16, got 'float8'"),
        ({"positions": "first"}, "STOP (such as chars:0-20, chars:-20-), got 'first'"),
        ({"positions": "match:["}, "got 'match:[': unterminated character set"),
        ({"layers": []}, "at least one layer"),
        ({"layers": "1-"}, "'1-'"),
        ({"layers": "99"}, "got 99"),
        ({"revision": "main"}, "--revision"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_written(
    call, options, message, tmp_path
):
    with pytest.raises(UsageError) as caught:
        call(model=MODEL, data=PAIRS, output=tmp_path / "c", **options)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- with a cache or without


def test_vectors_without_a_cache_are_bit_equal_to_those_with_one(vectors, tmp_path, scratch):
    direct = probecache.train(model=MODEL, data=PAIRS, output=tmp_path / "direct", quiet=True)
    assert direct.layers == vectors.layers
    assert len(direct.layers) > 2
    run, twin = direct.path.parent, vectors.path.parent
    assert content_of(run, "*.pt") == content_of(twin, "*.pt")
    assert direct.info.layers == vectors.info.layers
    assert direct.info.identity == vectors.info.identity


def test_scores_without_a_cache_are_bit_equal_to_those_with_one(
    vectors, prompts, tmp_path, scratch
):
    cached = probecache.validate(cache=prompts, vectors=vectors, output=tmp_path / "cached")
    direct = probecache.validate(
        model=MODEL, data=PROMPTS, vectors=vectors, output=tmp_path / "direct", quiet=True
    )
    assert content_of(direct.path, "*.csv") == content_of(cached.path, "*.csv")
    for one, other in zip(direct.layers, cached.layers, strict=True):
        assert np.array_equal(one.scores, other.scores)
        assert one.auroc == other.auroc
    assert len({float(score) for score in direct.layers[0].scores}) == len(PROMPTS)


def test_a_run_of_fewer_layers_gives_the_same_numbers_at_those(vectors, prompts, tmp_path, scratch):
    few = probecache.train(
        model=MODEL, data=PAIRS, output=tmp_path / "few", layers=LAYERS, quiet=True
    )
    assert few.layers == LAYERS
    assert all(torch.equal(few[layer], vectors[layer]) for layer in LAYERS)
    direct = probecache.validate(
        model=MODEL, data=PROMPTS, vectors=few, output=tmp_path / "v", layers="2", quiet=True
    )
    whole = probecache.validate(cache=prompts, vectors=vectors, output=tmp_path / "w")
    ours, theirs = ({r.layer: r for r in result.layers} for result in (direct, whole))
    assert list(ours) == [2]
    assert np.array_equal(ours[2].scores, theirs[2].scores)


def test_a_cache_that_was_not_kept_is_told_as_such(vectors, tmp_path, scratch):
    run = probecache.train(model=MODEL, data=PAIRS, output=tmp_path / "r", layers="2", quiet=True)
    assert run.info.source_cache == "(not kept)"
    result = probecache.validate(
        model=MODEL, data=PROMPTS, vectors=run, output=tmp_path / "v", quiet=True
    )
    summary = json.loads((result.path / "summary.json").read_text())
    assert summary["cache"] == "(not kept)"
    assert summary["data"] == "records in memory"


def test_a_cache_that_was_not_kept_is_gone_after_an_error_too(tmp_path, scratch):
    with pytest.raises(ProbecacheError, match="'chatting'"):
        probecache.train(
            model=MODEL,
            data=PAIRS,
            output=tmp_path / "r",
            layers="1",
            positive_class="chatting",
            quiet=True,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]


def test_a_run_without_a_cache_tells_its_plan_and_its_progress_can_be_hushed(
    tmp_path, scratch, capsys
):
    told = []
    probecache.train(
        model=MODEL,
        data=PAIRS,
        output=tmp_path / "r",
        layers="1",
        quiet=True,
        announce=told.append,
    )
    assert [plan.layers for plan in told] == [(1,)]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_prompts_are_run_as_those_were_that_the_vectors_come_from(tmp_path, scratch):
    made = {"dtype": "float16", "system_prompt": "You are kind.", "quiet": True}
    run = probecache.train(model=MODEL, data=PAIRS, output=tmp_path / "r", layers="2", **made)
    assert run.info.identity.dtype == "float16"
    alike = probecache.validate(
        model=MODEL, data=PROMPTS, vectors=run, output=tmp_path / "alike", quiet=True
    )
    told = probecache.validate(
        model=MODEL, data=PROMPTS, vectors=run, output=tmp_path / "told", **made
    )
    assert np.array_equal(alike.layers[0].scores, told.layers[0].scores)
    with pytest.raises(MismatchError, match=r"dtype: expected 'float16', got 'float32'"):
        probecache.validate(
            model=MODEL,
            data=PROMPTS,
            vectors=run,
            output=tmp_path / "x",
            dtype="float32",
            quiet=True,
        )
    other = probecache.validate(
        model=MODEL,
        data=PROMPTS,
        vectors=run,
        output=tmp_path / "other",
        system_prompt="You are rude.",
        allow_mismatch=["system_prompt"],
        quiet=True,
    )
    assert not np.array_equal(other.layers[0].scores, told.layers[0].scores)


def test_raw_text_stays_raw_text(tmp_path, scratch):
    run = probecache.train(
        model=MODEL,
        data=PROMPTS,
        output=tmp_path / "r",
        layers="2",
        chat_template=False,
        quiet=True,
    )
    assert run.info.identity.chat_template is None
    raw = probecache.extract(
        model=MODEL,
        data=PROMPTS,
        output=tmp_path / "raw",
        layers="2",
        chat_template=False,
        quiet=True,
    )
    cached = probecache.validate(cache=raw, vectors=run, output=tmp_path / "cached")
    direct = probecache.validate(
        model=MODEL, data=PROMPTS, vectors=run, output=tmp_path / "direct", quiet=True
    )
    assert np.array_equal(cached.layers[0].scores, direct.layers[0].scores)


# ---------------------------------------------------------------- train and validate on a cache


def test_caches_and_vectors_may_be_objects_or_paths(pairs, prompts, vectors, tmp_path):
    by_path = probecache.train(cache=pairs.path, output=tmp_path / "r")
    assert by_path.layers == vectors.layers
    assert all(torch.equal(by_path[layer], vectors[layer]) for layer in vectors.layers)
    scores = [
        probecache.validate(cache=cache, vectors=v, output=tmp_path / f"v{n}").layers[0].scores
        for n, (cache, v) in enumerate(
            [
                (prompts, vectors),
                (str(prompts.path), vectors.path),
                (prompts.path, str(vectors.path.parent)),
                (prompts, probecache.load_vectors(vectors.path)),
            ]
        )
    ]
    assert all(np.array_equal(scores[0], other) for other in scores[1:])


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("1,2", (1, 2)), ([2, 1, 2], (1, 2)), ("1-2", (1, 2)), ((2,), (2,)), (" all ", None)],
)
def test_layers_of_a_cache_may_be_text_or_numbers(pairs, prompts, tmp_path, layers, expected):
    vectors = probecache.train(cache=pairs, output=tmp_path / "r", layers=layers)
    expected = expected or pairs.layers[1:]  # all that have a direction
    assert vectors.layers == expected
    result = probecache.validate(
        cache=prompts, vectors=vectors, output=tmp_path / "v", layers=layers
    )
    assert tuple(layer.layer for layer in result.layers) == expected


@pytest.mark.parametrize("layers", [None, "all"])
def test_the_embeddings_of_answers_that_end_alike_are_left_out(pairs, tmp_path, layers):
    # Every answer ends in the same full stop.
    vectors = probecache.train(cache=pairs, output=tmp_path / "r", layers=layers)
    assert vectors.info.layers_without_direction == [0]
    assert vectors.layers == pairs.layers[1:]
    with pytest.raises(NoDirectionError, match="layer 0 of"):
        probecache.train(cache=pairs, output=tmp_path / "x", layers="0-2")
    assert not list(tmp_path.glob("x*"))


def test_negative_layers_count_from_the_models_end(pairs, tmp_path):
    vectors = probecache.train(cache=pairs, output=tmp_path / "r", layers="-1")
    assert vectors.layers == (pairs.identity.num_hidden_layers,)


def test_layers_that_are_not_there_are_refused(pairs, prompts, vectors, tmp_path):
    few = probecache.extract(
        model=MODEL, data=PAIRS, output=tmp_path / "few", layers="2", quiet=True
    )
    for layers in ("1", [1, 2], "all,1", "99", "-99"):
        with pytest.raises((LayerNotCachedError, LayerError), match=r"[Ll]ayers? "):
            probecache.train(cache=few, output=tmp_path / "r", layers=layers)
    with pytest.raises(LayerNotCachedError, match="cached layers are 2"):
        probecache.validate(cache=few, vectors=vectors, output=tmp_path / "v")
    with pytest.raises(UsageError, match="at least one layer"):
        probecache.validate(cache=prompts, vectors=vectors, output=tmp_path / "v", layers=[])
    assert [path.name for path in tmp_path.iterdir()] == ["few"]


def test_the_other_class_may_be_the_positive_one(pairs, vectors, tmp_path):
    other = probecache.train(cache=pairs, output=tmp_path / "r", positive_class="testing")
    assert (vectors.info.positive_class, other.info.positive_class) == ("deployment", "testing")
    assert all(torch.equal(other[layer], -vectors[layer]) for layer in vectors.layers)


def test_a_cache_and_other_data_are_refused(pairs, prompts, vectors, tmp_path):
    probecache.train(cache=pairs, data=PAIRS, output=tmp_path / "r")
    probecache.validate(cache=prompts, data=PROMPTS, vectors=vectors, output=tmp_path / "v")
    with pytest.raises(MismatchError, match="3 found"):
        probecache.train(cache=pairs, data=PROMPTS[:3], output=tmp_path / "x")
    with pytest.raises(MismatchError, match="row 1 differs in its class"):
        probecache.validate(
            cache=prompts,
            data=[PROMPTS[1], PROMPTS[0], *PROMPTS[2:]],
            vectors=vectors,
            output=tmp_path / "x",
        )
    assert not list(tmp_path.glob("x*"))


def test_a_report_is_drawn_only_when_asked_for(prompts, vectors, tmp_path):
    plain = probecache.validate(cache=prompts, vectors=vectors, output=tmp_path / "p")
    drawn = probecache.validate(
        cache=prompts, vectors=vectors, output=tmp_path / "d", layers=[2], visualize=True
    )
    assert not (plain.path / "report.html").exists()
    assert drawn.path / "report.html" in drawn.files


# ---------------------------------------------------------------- what does not go together


@pytest.fixture(params=["train", "validate"])
def call(request, vectors):
    """Train or validate with what they need besides the source."""
    needs = {"vectors": vectors} if request.param == "validate" else {}
    return lambda **options: getattr(probecache, request.param)(**needs, **options)


def refused(error, call, tmp_path, **options):
    with pytest.raises(error) as caught:
        call(output=tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))
    return str(caught.value)


def test_neither_cache_nor_model_is_refused(call, tmp_path):
    message = refused(UsageError, call, tmp_path, data=PAIRS)
    assert message == "expected either --cache or --model, got neither"


def test_both_cache_and_model_are_refused(call, pairs, tmp_path):
    message = refused(UsageError, call, tmp_path, cache=pairs, model=MODEL, data=PAIRS)
    assert message == "expected either --cache or --model, got both"


def test_a_model_without_data_is_refused(call, tmp_path):
    assert "--data with --model" in refused(UsageError, call, tmp_path, model=MODEL)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"system_prompt": ""},
        {"chat_template": False},
        {"truncate": True},
        {"batch_tokens": 100},
        {"device": "cpu"},
    ],
)
def test_options_of_extraction_with_a_cache_are_refused_by_name(call, pairs, tmp_path, options):
    message = refused(UsageError, call, tmp_path, cache=pairs, **options)
    assert f"{next(iter(options))} with --model only" in message


def test_all_options_that_do_not_go_with_a_cache_are_named_at_once(call, pairs, tmp_path):
    message = refused(UsageError, call, tmp_path, cache=pairs, dtype="float32", adapter="x")
    assert "adapter, dtype with --model only" in message


def test_positions_that_a_cache_does_not_keep_are_refused(call, pairs, tmp_path):
    message = refused(MismatchError, call, tmp_path, cache=pairs, positions="mean")
    assert f"to take mean from, got {pairs.path}, which keeps last" in message
    assert "extract with --positions mean" in message


def test_positions_that_are_none_are_refused_with_those_that_there_are(call, pairs, tmp_path):
    message = refused(UsageError, call, tmp_path, cache=pairs, positions="first")
    assert "expected --positions to be last, mean, all, answer" in message
    assert "got 'first'" in message


def test_positions_that_a_cache_keeps_change_nothing(pairs, vectors, tmp_path):
    named = probecache.train(cache=pairs, output=tmp_path / "r", positions="last")
    assert content_of(named.path, "*.pt") == content_of(vectors.path, "*.pt")


def test_what_only_hushes_or_tells_goes_with_a_cache(call, prompts, tmp_path):
    call(
        output=tmp_path / "r",
        cache=prompts,
        quiet=True,
        announce=print,
        dtype=None,
        positions=None,
    )
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_no_cache_is_refused(call, tmp_path):
    assert "layer_info.json" in refused(StoreError, call, tmp_path, cache=tmp_path)
    assert "nothing there" in refused(StoreError, call, tmp_path, cache=tmp_path / "none")


def test_vectors_that_are_none_are_refused_before_a_model_runs(tmp_path):
    told = []
    with pytest.raises(StoreError, match="RUN/normalized_vectors"):
        probecache.validate(
            model=MODEL,
            data=PROMPTS,
            vectors=tmp_path,
            output=tmp_path / "v",
            announce=told.append,
        )
    assert told == []


# ---------------------------------------------------------------- names


def test_all_is_explicit_sorted_and_exists():
    for module in (probecache, api):
        assert module.__all__ == sorted(set(module.__all__))
        assert all(callable(getattr(module, name)) for name in module.__all__)
    assert set(api.__all__) < set(probecache.__all__)


@pytest.mark.parametrize("name", probecache.__all__)
def test_every_name_is_the_one_of_its_home(name):
    found = getattr(probecache, name)
    assert found.__module__.startswith("probecache.")
    assert getattr(importlib.import_module(found.__module__), name) is found


def test_a_star_import_brings_the_names_and_no_others():
    names = {}
    exec("from probecache import *", names)
    assert set(names) - {"__builtins__"} == set(probecache.__all__)


def test_dir_lists_the_names():
    assert set(probecache.__all__) <= set(dir(probecache))
    assert dir(probecache) == sorted(dir(probecache))
    assert {"__all__", "__doc__"} <= set(dir(probecache))


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'probecache' has no attribute 'steer_everything'"):
        _ = probecache.steer_everything
    assert not hasattr(probecache, "steer_everything")


@pytest.mark.parametrize(
    "code",
    [
        "import probecache",
        "import probecache; dir(probecache)",
        "import probecache.api",
        "from probecache import *",
    ],
)
def test_importing_brings_in_nothing_heavy(code):
    heavy = ["torch", "transformers", "matplotlib", "sklearn", "pandas", "peft"]
    check = f"{code}; import sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check, *heavy], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


@pytest.mark.parametrize("tokens", [0, -1])
def test_a_batch_of_no_tokens_is_refused_before_anything_is_read(tokens, tmp_path):
    with pytest.raises(UsageError, match=f"batch_tokens of at least 1, got {tokens}"):
        probecache.extract(
            model="none", data="none.json", output=tmp_path / "c", batch_tokens=tokens
        )


def test_a_plan_takes_what_an_extraction_takes():
    options = {"model": MODEL, "data": PAIRS, "layers": 2, "announce": print, "quiet": True}
    assert probecache.plan_extraction(**options).layers == (2,)
