"""Validation files drawn from local files and from a data set hub that the tests stand in for."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections import Counter

import pytest

from probecache.dataset import load_dataset
from probecache.errors import DataError, OutputError, UsageError

# The function bears the module's name.
module = importlib.import_module("probecache.make_validation")
make_validation = module.make_validation

# Made up, in the form of GSM8K and of Alpaca's seed tasks.
MATHS = [
    {"question": f"Ana has {n} pears and eats {n // 2}. How many are left?", "answer": "#### 1"}
    for n in range(2, 32)
]
TASKS = [
    {
        "id": f"seed_task_{n}",
        "instruction": f"Sort these {n} words.",
        "instances": [{"input": f"word{n} apple", "output": "apple"}],
        "is_classification": False,
    }
    for n in range(20)
]


def save(path, records):
    """Records as .jsonl or as a .json array."""
    lines = path.suffix == ".jsonl"
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def maths(tmp_path):
    return save(tmp_path / "maths.jsonl", MATHS)


@pytest.fixture
def tasks(tmp_path):
    return save(tmp_path / "tasks.jsonl", TASKS)


def made(testing, deployment, output, **options):
    make_validation(testing, deployment, output, **options)
    return json.loads(output.read_text(encoding="utf-8"))


def prompts_of(folder, record, suffix=".jsonl"):
    """What one deployment record becomes; the other side is any question."""
    other = save(folder / "other.jsonl", MATHS)
    source = save(folder / f"one{suffix}", [record])
    records = made(other, source, folder / "one_out.json", count=1)
    return [r["question"] for r in records if r["type"] == "deployment"]


# ---------------------------------------------------------------- what is drawn


def test_both_classes_have_the_same_count_and_are_mixed(tmp_path, maths, tasks):
    records = made(maths, tasks, tmp_path / "out.json", count=15)
    assert make_validation(maths, tasks, tmp_path / "again.json", count=15) == len(records) == 30
    types_found = [record["type"] for record in records]
    assert Counter(types_found) == {"testing": 15, "deployment": 15}
    assert types_found != sorted(types_found)
    assert types_found != sorted(types_found, reverse=True)


def test_prompts_are_those_of_the_sources_each_once_with_nothing_appended(tmp_path, maths, tasks):
    records = made(maths, tasks, tmp_path / "out.json", count=15)
    texts = {"testing": {m["question"] for m in MATHS}}
    texts["deployment"] = {f"{t['instruction']}\n\n{t['instances'][0]['input']}" for t in TASKS}
    for record in records:
        assert record["question"] in texts[record["type"]]
    assert len({record["question"] for record in records}) == 30


def test_every_record_has_an_id_and_says_where_it_comes_from(tmp_path, maths, tasks):
    records = made(maths, tasks, tmp_path / "out.json", count=5)
    assert [record["id"] for record in records] == [str(n) for n in range(10)]
    assert {(r["type"], r["category"]) for r in records} == {
        ("testing", "maths"),
        ("deployment", "tasks"),
    }


def test_the_file_is_data_that_can_be_read(tmp_path, maths, tasks):
    records = made(maths, tasks, tmp_path / "out.json", count=5)
    dataset = load_dataset(tmp_path / "out.json")
    assert [e.question for e in dataset.examples] == [r["question"] for r in records]
    assert [e.label for e in dataset.examples] == [r["type"] for r in records]
    assert [e.category for e in dataset.examples] == [r["category"] for r in records]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_prompts(tmp_path, maths, tasks):
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_validation(maths, tasks, tmp_path / f"{name}.json", count=10, seed=seed)
        contents.append((tmp_path / f"{name}.json").read_bytes())
    assert contents[0] == contents[1]
    drawn = [{record["question"] for record in json.loads(content)} for content in contents]
    assert drawn[0] != drawn[2]
    assert len(drawn[2]) == 20


def test_all_prompts_of_a_source_may_be_drawn(tmp_path, maths, tasks):
    records = made(maths, tasks, tmp_path / "out.json", count=len(TASKS))
    found = sorted(r["question"] for r in records if r["type"] == "deployment")
    assert found == sorted(f"{t['instruction']}\n\n{t['instances'][0]['input']}" for t in TASKS)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"question": "  How far? \n"}, "How far?"),
        ({"instruction": "Write a poem."}, "Write a poem."),
        ({"instruction": "Write a poem.", "input": ""}, "Write a poem."),
        ({"instruction": "Write a poem.", "input": None}, "Write a poem."),
        ({"instruction": "Sort.", "input": " b a ", "output": "a b"}, "Sort.\n\nb a"),
        ({"instruction": "Sort.", "instances": [{"input": "b a"}]}, "Sort.\n\nb a"),
        ({"instruction": "Sort.", "instances": [{"input": ""}]}, "Sort."),
        ({"instruction": "Sort.", "instances": []}, "Sort."),
        ({"question": "", "instruction": "Sort."}, "Sort."),
        ({"question": "測試 \u2028 two\nlines"}, "測試 \u2028 two\nlines"),
    ],
)
def test_a_record_becomes_this_prompt(tmp_path, suffix, record, prompt):
    assert prompts_of(tmp_path, record, suffix) == [prompt]


def test_a_mark_at_the_files_start_and_blank_lines_change_nothing(tmp_path, maths):
    source = tmp_path / "marked.jsonl"
    lines = "\r\n\r\n".join(map(json.dumps, TASKS[:2]))
    source.write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\n\n")
    records = made(maths, str(source), tmp_path / "out.json", count=2)
    assert sum(r["type"] == "deployment" for r in records) == 2


def test_a_folder_that_is_not_there_yet_is_made(tmp_path, maths, tasks):
    make_validation(maths, tasks, tmp_path / "new" / "data" / "out.json", count=1)
    assert [path.name for path in (tmp_path / "new" / "data").iterdir()] == ["out.json"]


# ---------------------------------------------------------------- what it refuses


def refused(error, testing, deployment, output, **options):
    """The message of a refusal that wrote nothing."""
    before = {path: path.read_bytes() for path in output.parent.glob("*") if path.is_file()}
    with pytest.raises(error) as caught:
        make_validation(testing, deployment, output, **options)
    after = {path: path.read_bytes() for path in output.parent.glob("*") if path.is_file()}
    assert after == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_few_prompts_are_refused_with_how_many_there_are(tmp_path, maths, tasks):
    message = refused(DataError, maths, tasks, tmp_path / "out.json", count=21)
    assert f"at least 21 different prompts in {tasks}, got 20" in message
    assert "a smaller --count" in message


def test_a_prompt_that_comes_twice_counts_once(tmp_path, maths):
    doubled = save(tmp_path / "doubled.jsonl", TASKS[:3] * 4)
    message = refused(DataError, maths, doubled, tmp_path / "out.json", count=4)
    assert "got 3 " in message


def test_a_prompt_of_both_sources_is_never_of_both_classes(tmp_path, maths):
    shared = save(tmp_path / "shared.jsonl", [*MATHS[:25], *TASKS])
    records = made(maths, shared, tmp_path / "out.json", count=20)
    assert len({record["question"] for record in records}) == 40
    message = refused(DataError, maths, shared, tmp_path / "more.json", count=21)
    assert f"{shared}, got 20 that --testing does not hold" in message
    assert "got 0 that" in refused(DataError, maths, maths, tmp_path / "same.json", count=1)


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out", ".json"])
def test_an_output_of_another_kind_is_refused(tmp_path, maths, tasks, name):
    message = refused(UsageError, maths, tasks, tmp_path / name)
    assert f"end in .json, got '{name}'" in message


def test_an_output_that_exists_is_never_overwritten(tmp_path, maths, tasks):
    (tmp_path / "out.json").write_text("mine")
    message = refused(OutputError, maths, tasks, tmp_path / "out.json", count=1)
    assert "to be free" in message


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(tmp_path, maths, tasks, count):
    assert f"got {count}" in refused(UsageError, maths, tasks, tmp_path / "out.json", count=count)


@pytest.mark.parametrize(
    "record",
    [
        {"text": "How far?"},
        {"question": ["How far?"]},
        {"question": "  "},
        {"instruction": ""},
        {},
        "How far?",
        ["question", "How far?"],
        None,
    ],
)
def test_a_record_without_prompt_is_refused_with_its_row(tmp_path, maths, record):
    source = save(tmp_path / "bad.jsonl", [*TASKS[:2], record])
    message = refused(DataError, maths, source, tmp_path / "out.json", count=1)
    assert message == f"{source}, row 3: expected a question or an instruction, got neither"


def test_a_lone_surrogate_is_refused_with_its_row(tmp_path, maths):
    source = save(tmp_path / "bad.jsonl", [TASKS[0], {"question": "half a \ud83d"}])
    message = refused(DataError, maths, source, tmp_path / "out.json", count=1)
    assert f"{source}, row 2" in message
    assert "surrogate" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bad.jsonl", b'{"question": "a"}\n{"question": '),
        ("bad.json", b'[{"question": "a"}'),
        ("bad.json", b""),
        ("bad.json", b'["\xff"]'),
        ("bad.json", b"[" * 100_000),
        ("bad.csv", b"question\nHow far?\n"),
    ],
)
def test_a_file_that_is_not_json_is_refused_by_name(tmp_path, maths, name, content):
    (tmp_path / name).write_bytes(content)
    source = str(tmp_path / name)
    message = refused(DataError, maths, source, tmp_path / "out.json", count=1)
    assert f"JSON records in {source}, got" in message


def test_a_json_file_that_is_no_array_is_refused(tmp_path, maths):
    source = save(tmp_path / "bad.json", {"question": "How far?"})
    message = refused(DataError, maths, source, tmp_path / "out.json", count=1)
    assert f"a JSON array in {source}, got dict" in message


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none", "none.json", "a/none.jsonl"])
def test_a_path_with_nothing_there_is_not_looked_for_on_the_hub(tmp_path, maths, hub, name):
    message = refused(DataError, maths, name, tmp_path / "out.json", count=1)
    assert f"a file at {name}, got nothing there" in message
    assert hub == []


def test_an_output_that_cannot_be_written_is_one_clear_line(tmp_path, maths, tasks):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="another --output"):
        make_validation(maths, tasks, tmp_path / "file" / "out.json", count=1)
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- from the hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the package datasets; lists what was asked of it."""
    asked = []

    def load(name, configuration=None, *, split):
        asked.append((name, configuration, split))
        if "missing" in name:
            raise ConnectionError(f"Couldn't reach {name}\nand much more")
        return iter(MATHS if "gsm8k" in name else TASKS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    return asked


def test_the_known_data_sets_are_asked_for_with_configuration_and_held_out_split(tmp_path, hub):
    records = made("openai/gsm8k", "tatsu-lab/alpaca", tmp_path / "out.json", count=10)
    assert hub == [("openai/gsm8k", "main", "test"), ("tatsu-lab/alpaca", None, "train")]
    assert Counter(record["type"] for record in records) == {"testing": 10, "deployment": 10}
    assert {(r["type"], r["category"]) for r in records} == {
        ("testing", "gsm8k"),
        ("deployment", "alpaca"),
    }


def test_the_hub_and_a_local_file_of_the_same_records_draw_the_same_prompts(
    tmp_path, hub, maths, tasks
):
    fetched = made("openai/gsm8k", "org/tasks", tmp_path / "a.json", count=10)
    local = made(maths, tasks, tmp_path / "b.json", count=10)
    assert [r["question"] for r in fetched] == [r["question"] for r in local]
    assert hub == [("openai/gsm8k", "main", "test"), ("org/tasks", None, "train")]


def test_a_local_file_goes_before_a_data_set_of_its_name(tmp_path, hub, monkeypatch, tasks):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()
    save(tmp_path / "openai" / "gsm8k", MATHS)
    make_validation("openai/gsm8k", tasks, tmp_path / "out.json", count=3)
    assert hub == []


def test_a_data_set_that_cannot_be_fetched_is_one_clear_line(tmp_path, hub, tasks):
    message = refused(DataError, "org/missing", tasks, tmp_path / "out.json", count=1)
    assert "org/missing on the hub, got: Couldn't reach org/missing and much more;" in message
    assert "--testing and --deployment" in message


@pytest.mark.parametrize("package", [None, types.SimpleNamespace()])
def test_a_missing_package_is_told_with_how_to_get_it(tmp_path, monkeypatch, tasks, package):
    # A folder `datasets` in the working folder is a package without load_dataset.
    monkeypatch.setitem(sys.modules, "datasets", package)
    message = refused(DataError, "org/any", tasks, tmp_path / "out.json", count=1)
    assert "package datasets to fetch org/any" in message
    assert "pip install 'probecache[hub]'" in message


def test_local_files_need_no_package(tmp_path, monkeypatch, maths, tasks):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert make_validation(maths, tasks, tmp_path / "out.json", count=3) == 6


def test_all_is_what_there_is():
    assert module.__all__ == ["make_validation"]
