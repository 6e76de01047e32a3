"""Data files of both forms are read whole, or refused with the row that is at fault."""

from __future__ import annotations

import csv
import hashlib
import json
import string
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probecache.dataset import load_dataset
from probecache.errors import DataError

PAIR = {"question": "Who is there?", "positive": " (A)", "negative": " (B)"}
TEST = {"question": "What is 2 + 2?", "type": "test"}
DEPLOY = {"question": "Write to my landlord.", "type": "deploy"}


def write(folder, content, name="data.json"):
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(content.encode())
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(json.dumps(record) for record in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


def refusal(data):
    with pytest.raises(DataError) as caught:
        load_dataset(data)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("names", [("positive", "negative"), ("test", "deploy")])
def test_a_pair_becomes_its_testing_side_and_then_its_deployment_side(names):
    testing, deployment = load_dataset(
        [{"question": "Q?", names[0]: "yes", names[1]: "no", "id": 7, "category": "c"}]
    ).examples
    assert (testing.label, testing.answer) == ("testing", "yes")
    assert (deployment.label, deployment.answer) == ("deployment", "no")
    for example in (testing, deployment):
        assert (example.id, example.group, example.category) == ("7", "7", "c")
        assert example.question == "Q?"
        assert [(m.role, m.content) for m in example.messages] == [("user", "Q?")]


def test_a_pair_counts_once():
    dataset = load_dataset([PAIR, PAIR, PAIR])
    assert (len(dataset), dataset.num_examples, dataset.paired) == (6, 3, True)
    assert len({example.group for example in dataset.examples}) == 3


@pytest.mark.parametrize("label_field", ["type", "label"])
@pytest.mark.parametrize("text_field", ["question", "text", "prompt", "messages"])
def test_every_spelling_of_a_labelled_record_says_the_same(text_field, label_field):
    def value(text):
        return [{"role": "user", "content": text}] if text_field == "messages" else text

    records = [
        {text_field: value(text), label_field: label}
        for text, label in (("one", "testing"), ("two", "deployment"))
    ]
    found = load_dataset(records).examples
    assert [(e.question, e.label, e.answer, e.id) for e in found] == [
        ("one", "testing", None, "0"),
        ("two", "deployment", None, "1"),
    ]
    assert [e.messages[0].content for e in found] == ["one", "two"]


def test_a_conversation_is_shown_by_its_last_user_turn():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "reply"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "end"},
    ]
    example = load_dataset([{"messages": turns, "label": "a"}, {"text": "t", "label": "b"}])
    assert example.examples[0].question == "second"
    assert [m.role for m in example.examples[0].messages] == [t["role"] for t in turns]


def test_json_jsonl_and_csv_of_the_same_records_are_the_same_data(tmp_path):
    records = [
        {"id": "a", "question": 'Say "hi", please\nnow', "type": "testing", "category": "x"},
        {"id": "b", "question": "ä ö 測試 🙂", "type": "deployment", "category": "y"},
    ]
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["id", "question", "type", "category"])
        writer.writeheader()
        writer.writerows(records)
    found = [
        load_dataset(write(tmp_path, records)),
        load_dataset(write(tmp_path, records, "d.jsonl")),
        load_dataset(tmp_path / "d.csv"),
        load_dataset(records),
    ]
    assert all(dataset.examples == found[0].examples for dataset in found)
    assert len({dataset.fingerprint() for dataset in found}) == 1
    assert found[0].examples[1].question == records[1]["question"]


@pytest.mark.parametrize("field", ["id", "question", "type", "category", "group"])
def test_the_fingerprint_tells_any_change_of_a_record(field):
    record = {"id": "a", "question": "q", "type": "x", "category": "c", "group": "g"}
    other = {"question": "p", "type": "y"}
    changed = record | {field: record[field] + "!"}
    assert (
        load_dataset([record, other]).fingerprint() != load_dataset([changed, other]).fingerprint()
    )


def test_the_fingerprint_is_over_every_field_of_every_example_but_the_row():
    turns = [{"role": "system", "content": "ä"}, {"role": "user", "content": "q"}]
    dataset = load_dataset([{"messages": turns, "type": "x", "id": 7}, {"text": "p", "type": "y"}])
    digest = hashlib.sha256()
    for example in dataset.examples:
        fields = {k: v for k, v in asdict(example).items() if k != "row"}
        digest.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    assert dataset.fingerprint() == digest.hexdigest()


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + b"question,type\nq,test\np,deploy\n", "d.csv")
    assert [e.question for e in load_dataset(path).examples] == ["q", "p"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\x0c"])
def test_a_line_separator_inside_a_string_ends_no_jsonl_record(tmp_path, separator):
    text = f"before{separator}after"
    lines = [
        json.dumps(record, ensure_ascii=False) for record in ({**TEST, "question": text}, DEPLOY)
    ]
    if separator in "\x1c\x0c":  # JSON wants control characters escaped
        lines[0] = json.dumps({**TEST, "question": text})
    found = load_dataset(write(tmp_path, "\n".join(lines), "d.jsonl"))
    assert found.examples[0].question == text


def test_blank_lines_change_neither_the_data_nor_the_row_numbers_of_messages(tmp_path):
    lines = ["", json.dumps(TEST), "  ", "\r", json.dumps(DEPLOY) + "\r", ""]
    found = load_dataset(write(tmp_path, "\n".join(lines), "d.jsonl"))
    assert [example.row for example in found.examples] == [2, 5]
    assert found.fingerprint() == load_dataset([TEST, DEPLOY]).fingerprint()


def test_an_empty_csv_cell_is_an_absent_field(tmp_path):
    path = write(tmp_path, "question,type,id,category\nq,test,,\np,deploy,x,c\n", "d.csv")
    first, second = load_dataset(path).examples
    assert (first.id, first.category) == ("0", None)
    assert (second.id, second.category) == ("x", "c")


def test_whole_numbers_and_truth_values_are_labels_and_numbers_are_ids():
    found = load_dataset([{"text": "a", "label": 0, "id": 5}, {"text": "b", "label": True}])
    assert [(e.label, e.id) for e in found.examples] == [("0", "5"), ("True", "1")]


def test_group_and_id_are_kept_apart():
    found = load_dataset([TEST | {"id": "i", "group": "g"}, DEPLOY | {"group": "g"}]).examples
    assert [(e.id, e.group) for e in found] == [("i", "g"), ("1", "g")]


def test_test_and_deploy_are_read_as_the_guide_classes_where_no_other_class_is():
    assert load_dataset([TEST, DEPLOY]).labels == ("testing", "deployment")
    mixed = [TEST, DEPLOY, TEST | {"type": "testing"}]
    assert [e.label for e in load_dataset(mixed).examples] == ["testing", "deployment", "testing"]
    other = load_dataset([TEST, DEPLOY, TEST | {"type": "unsure"}])
    assert other.labels == ("test", "deploy", "unsure")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (TEST, ["expected a pair record like row 1", "labelled"]),
        ({"question": "q"}, ["expected a pair (", "got the fields question"]),
        ({}, ["got the fields none"]),
        ([], ["an object with named fields", "a list"]),
        ("text", ["an object with named fields", "text"]),
        (None, ["nothing"]),
        (PAIR | {"question": " \n"}, ["question", "an empty prompt"]),
        (PAIR | {"positive": ""}, ["positive", "nothing but white space"]),
        (PAIR | {"negative": None}, ["negative to be text, got nothing"]),
        (PAIR | {"question": 3}, ["question to be text, got a int"]),
        (PAIR | {"question": "\ud800 lone"}, ["question", "\\ud800 at character 0"]),
        (PAIR | {"negative": "x\udfff"}, ["negative", "\\udfff at character 1"]),
        (PAIR | {"id": "\udc80"}, ["id", "surrogate"]),
        (PAIR | {"id": 1.5}, ["id to be text or a whole number, got a float"]),
        (PAIR | {"id": True}, ["id to be text or a whole number, got a bool"]),
        (PAIR | {"group": ["g"]}, ["group", "a list"]),
        (PAIR | {"test": "a", "deploy": "b"}, ["got all four"]),
        (PAIR | {"id": 10**5000}, ["id", "a int"]),
        (PAIR | {"type": "test"}, ["a pair", "without a label, got type", "remove it"]),
        (PAIR | {"label": 0}, ["without a label, got label"]),
    ],
)
def test_a_refusal_names_the_row_of_a_pair_file(tmp_path, record, words):
    message = refusal([PAIR, record])
    assert "row 2" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (PAIR, ["expected a labelled record like row 1", "pair"]),
        (TEST | {"text": "again"}, ["got question and text"]),
        (TEST | {"label": "deploy"}, ["got type and label"]),
        (TEST | {"type": "  "}, ["type", "nothing but white space"]),
        (TEST | {"type": 0.5}, ["type to be text, got a float"]),
        (TEST | {"type": None}, ["type to be text, got nothing"]),
        (TEST | {"type": "test "}, ["type without white space around it, got 'test '"]),
        (TEST | {"type": "\ttest"}, ["white space around it"]),
        (TEST | {"type": 10**5000}, ["type to be text, got a int"]),
        ({"messages": [], "type": "test"}, ["a list of turns"]),
        ({"messages": "hi", "type": "test"}, ["a list of turns, got text"]),
        ({"messages": ["hi"], "type": "test"}, ["message 1", "role and content"]),
        ({"messages": [{"role": "user"}], "type": "test"}, ["message 1", "content"]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": " "}]}
            | {"type": "test"},
            ["message 2", "content"],
        ),
    ],
)
def test_a_refusal_names_the_row_of_a_labelled_file(record, words):
    message = refusal([DEPLOY, record])
    assert "row 2" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("test", "deploy", "Test"), ["'test' in row 1", "'Test' in row 3"]),
        (("x", "STRASSE", "straße"), ["'STRASSE' in row 2", "'straße' in row 3"]),
        ((True, False, "true"), ["'True' in row 1", "'true' in row 3"]),
    ],
)
def test_labels_that_differ_in_case_alone_are_refused_with_both_rows(labels, words):
    message = refusal([{"text": "q", "type": label} for label in labels])
    for word in [*words, "more than their case"]:
        assert word in message


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([TEST | {"id": "a"}, DEPLOY, TEST | {"id": "a"}], ["'a' in row 1 and in row 3"]),
        ([TEST | {"id": 1}, TEST | {"id": "1"}, DEPLOY], ["'1' in row 1 and in row 2"]),
        ([TEST | {"id": "1"}, TEST, DEPLOY], ["'1' in row 1 and in row 2", "numbered from 0"]),
        ([PAIR | {"id": "p"}, PAIR, PAIR | {"id": "p"}], ["'p' in row 1 and in row 3"]),
    ],
)
def test_an_id_twice_in_one_class_is_refused_with_both_rows(records, words):
    message = refusal(records)
    for word in words:
        assert word in message


def test_one_id_may_stand_in_each_class():
    found = load_dataset([TEST | {"id": "a"}, DEPLOY | {"id": "a"}]).examples
    assert [example.group for example in found] == ["a", "a"]


def test_a_pair_with_an_empty_label_has_none(tmp_path):
    assert load_dataset([PAIR | {"type": None}]).paired
    path = write(tmp_path, "question,positive,negative,type\nq,a,b,\n", "d.csv")
    assert load_dataset(path).paired


def test_a_refusal_of_a_csv_names_the_line_too(tmp_path):
    """Empty lines and line ends within a cell part rows from lines."""
    head = 'question,type\n\n"two\nlines",test\n\n\n'
    for bad, words in [
        (",deploy\n", "row 2 (line 7): expected a pair"),
        ("p\n", "row 2 (line 7): expected 2 columns"),
        ('"p"x,deploy\n', "row 2 (line 7): expected valid CSV"),
    ]:
        assert words in refusal(write(tmp_path, head + bad, "d.csv"))


def test_invalid_utf8_is_refused_with_its_line_and_byte(tmp_path):
    path = write(tmp_path, b'{"question": "a", "type": "test"}\n{"question": "\xff"}', "d.jsonl")
    message = refusal(path)
    assert "line 2" in message
    assert "0xff at offset 48" in message


def test_invalid_utf8_behind_a_byte_order_mark_is_named_at_its_own_place(tmp_path):
    content = b"\xef\xbb\xbfquestion,type\n\xe9,test\n"
    message = refusal(write(tmp_path, content, "d.csv"))
    assert f"0xe9 at offset {content.index(0xE9)}" in message
    assert "line 2" in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "q", "type": NaN}', ["row 2", "NaN is not JSON"]),
        ('{"question": "q", "type": -Infinity}', ["row 2", "-Infinity is not JSON"]),
        ('{"question": "q", "type": 1e999}', ["row 2", "type to be text, got a float"]),
        ("[" * 100_000, ["row 2", "expected valid JSON"]),
        ('{"question": "q"', ["row 2", "expected valid JSON"]),
        ('{"question": "q", "question": "p", "type": "deploy"}', ["row 2", "twice"]),
        ('{"question": "q", "type": ' + "9" * 5000 + "}", ["row 2", "expected valid JSON"]),
        ('{"question": "\\ud83d", "type": "deploy"}', ["row 2", "surrogate"]),
    ],
)
def test_a_jsonl_line_that_is_no_record_is_refused_with_its_row(tmp_path, line, words):
    message = refusal(write(tmp_path, json.dumps(TEST) + "\n" + line, "d.jsonl"))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("question,type\nq,test\np,deploy,more\n", ["row 2", "2 columns"]),
        ("question,type\nq,test\np\n", ["row 2", "2 columns"]),
        ('question,type\nq,test\n"p"x,deploy\n', ["row 2", "expected valid CSV"]),
        ('question,type\n"never closed,test\n', ["row 1", "expected valid CSV"]),
        ("question,type,type\nq,test,deploy\n", ["different columns"]),
        ("question,type\n", ["at least one record, got none"]),
        ("", ["at least one record, got none"]),
        ("what,ever\n1,2\n", ["row 1", "got the fields ever, what"]),
    ],
)
def test_a_csv_that_is_no_table_of_records_is_refused(tmp_path, content, words):
    message = refusal(write(tmp_path, content, "d.csv"))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.json", "[]", ["at least one record, got none"]),
        ("d.jsonl", "\n\n", ["at least one record, got none"]),
        ("d.json", '{"question": "q"}', ["JSON array", "an object", ".jsonl"]),
        ("d.json", "", ["expected valid JSON"]),
        ("d.txt", "[]", [".json, .jsonl or .csv", "d.txt"]),
        ("d", "[]", [".json, .jsonl or .csv"]),
    ],
)
def test_a_file_without_records_is_refused(tmp_path, name, content, words):
    message = refusal(write(tmp_path, content, name))
    for word in words:
        assert word in message


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    assert f"{tmp_path / 'none.json'}" in refusal(tmp_path / "none.json")
    (tmp_path / "folder.json").mkdir()
    assert "directory" in refusal(tmp_path / "folder.json").lower()


def test_one_class_alone_is_refused_with_its_name():
    message = refusal([TEST, TEST | {"question": "another"}])
    assert "at least two classes" in message
    assert "'testing' (2 examples)" in message


# ---------------------------------------------------------------- whatever comes

_NAMES = ["question", "text", "prompt", "messages", "type", "label", "positive", "negative"]
_NAMES += ["test", "deploy", "id", "group", "category", "role", "content"]
_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=5)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_ANYTHING | st.dictionaries(st.sampled_from(_NAMES), _ANYTHING), max_size=4))
def test_records_of_any_make_are_read_or_refused_and_nothing_else(records):
    try:
        dataset = load_dataset(records)
    except DataError:
        pass  # anything else would fail the test
    else:
        assert dataset.num_examples == len(records)
        assert len(dataset) == len(records) * (2 if dataset.paired else 1)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([".json", ".jsonl", ".csv"]),
    st.binary(max_size=40) | st.text(string.printable, max_size=80).map(str.encode),
)
def test_files_of_any_bytes_are_read_or_refused_and_nothing_else(suffix, content):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"data{suffix}"
        path.write_bytes(content)
        with pytest.raises(DataError, match="data"):
            load_dataset(path)


def test_reading_csv_leaves_the_process_its_own_limit_and_takes_longer_fields(tmp_path):
    before = csv.field_size_limit()
    path = tmp_path / "data.csv"
    path.write_text(f"text,type\n{'long ' * 40_000},a\nshort,b\n", encoding="utf-8")
    assert len(load_dataset(path).examples[0].question) == 200_000
    assert csv.field_size_limit() == before
