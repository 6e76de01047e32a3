"""Files and texts of strangers, one at a time; whole caches and folders are in test_hostile.py."""

from __future__ import annotations

import json
import os
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from probecache.errors import DataError, LayerError, printable
from probecache.foreign import (
    csv_cell,
    csv_text,
    json_items,
    open_regular,
    parse_json,
    read_json,
    read_text_bytes,
    require_sane_density,
)

# ---------------------------------------------------------------- files


def test_a_file_and_a_link_to_one_are_read_whole(tmp_path):
    content = os.urandom(5_000_000).replace(b"\0", b"x")
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert read_text_bytes(tmp_path / name) == content
        with open_regular(tmp_path / name) as file:
            assert file.read() == content


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "folder"])
def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path, kind):
    path = tmp_path / "there"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "link to a device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
    with pytest.raises(OSError, match=r"regular|directory"):
        open_regular(path)
    with pytest.raises(OSError, match=r"regular|directory"):
        read_text_bytes(path)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_text_bytes(tmp_path / "none")


def test_a_file_larger_than_its_kind_is_refused_by_its_size(tmp_path):
    (tmp_path / "file").write_bytes(b"[1, 2]")
    assert read_json(tmp_path / "file", 6) == [1, 2]
    with pytest.raises(OSError, match="6 bytes, more than the 5"):
        read_json(tmp_path / "file", 5)


def test_a_hole_ends_the_reading_of_a_text_but_a_single_zero_does_not(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a\0b")
    assert read_text_bytes(path) == b"a\0b"
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match="zeros from byte 3 on"):
        read_text_bytes(path)


# ---------------------------------------------------------------- JSON

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
).filter(lambda value: "Infinity" not in json.dumps(value))


@given(_VALUES, st.sampled_from([None, 1]), st.booleans())
def test_json_is_read_as_by_the_standard_library(value, indent, escaped):
    text = json.dumps(value, indent=indent, ensure_ascii=escaped)
    assert parse_json(text) == json.loads(text)


@given(st.lists(_VALUES), st.sampled_from([None, 0, 2]))
def test_items_of_an_array_are_those_of_the_whole(values, indent):
    assert list(json_items(f" \n{json.dumps(values, indent=indent)}\t")) == values


@given(st.text('[]{},:"\\ 1a\n', max_size=12))
def test_an_array_is_refused_item_by_item_where_it_is_refused_as_a_whole(text):
    def outcome(read):
        try:
            return read(text)
        except ValueError:
            return "refused"

    whole = outcome(parse_json)
    assert outcome(lambda t: list(json_items(t))) == (
        whole if isinstance(whole, list) else "refused"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "a field twice among a, a"),
        ("[NaN]", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ("9" * 5000, "integer string conversion"),
        ("\ufeff[]", "Unexpected UTF-8 BOM|Expecting"),
    ],
)
def test_what_is_no_json_is_refused_with_its_fault(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)
    with pytest.raises(ValueError, match=f"{words}|Expecting an array"):
        list(json_items(text))


def test_json_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "file").write_bytes('["é"]'.encode("utf-16"))
    with pytest.raises(ValueError, match="utf-8"):
        read_json(tmp_path / "file", 1000)


@pytest.mark.parametrize("unit", [b"[],", b"{},", b"[[", b'{"a":[', b'"",[],'])
def test_many_values_in_few_bytes_are_refused_before_they_are_parsed(unit):
    with pytest.raises(ValueError, match="too many values"):
        require_sane_density(b"[" + unit * (2_000_000 // len(unit)))


@pytest.mark.parametrize(
    "content",
    [
        b'[{"text":"a","type":"b"},' * 100_000,
        b'{"text": "' + b"[{," * 1_000_000 + b'", "type": "b"}',
        b'{"text": "' + b'\\"[\\"{' * 400_000 + b'", "type": "b"}',
        b"text without any mark " * 100_000,
        b"[]" * 1000,
    ],
)
def test_short_records_and_brackets_inside_of_texts_are_no_bomb(content):
    require_sane_density(content)


def test_a_quote_that_nothing_closes_is_looked_for_once():
    started = time.monotonic()
    require_sane_density(b"[," * 500_000 + b'"\\' * 1_000_000)
    assert time.monotonic() - started < 5


# ---------------------------------------------------------------- terminals

COMMANDS = ["\x1b[2J", "\x1b]0;title\x07", "\x9b2J", "\r", "\b", "\n", "\x00", "\x7f", "\x85"]
COMMANDS += ["\u2028", "\u2029", "\u202e", "\u2066", "\u200f", "\u061c", "\ufeff", "\U000e0041"]
COMMANDS += ["\ud800", "\udc80"]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_commands_a_terminal_is_spelt_out(command):
    shown = printable(f"a{command}b")
    assert shown == f"a{ascii(command[0])[1:-1]}{command[1:]}b".replace("\x07", "\\x07")
    shown.encode()


@pytest.mark.parametrize(
    "text", ["naïve 測試", "🙂 👩\u200d🔬 ❤\ufe0f", "می\u200cخواهم", "a\u3000b", "\\x1b"]
)
def test_ordinary_text_stays_as_it_is(text):
    assert printable(text) == text


@given(
    st.text(st.characters(codec=None), max_size=50)
    | st.lists(st.sampled_from(COMMANDS)).map("".join)
)
def test_printable_text_holds_nothing_but_characters_that_are_shown(text):
    shown = printable(text)
    categories = {unicodedata.category(c) for c in shown if c not in "\u200c\u200d"}
    assert not categories & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert "\n" not in shown


def test_of_a_text_without_end_the_middle_is_left_out():
    shown = printable("expected " + "x" * 10_000_000 + "; do this")
    assert len(shown) < 2100
    assert shown.startswith("expected x")
    assert shown.endswith("x; do this")


def test_every_error_is_harmless_as_it_is_raised():
    assert str(DataError("got \x1b[31mred\n")) == "got \\x1b[31mred\\n"
    error = LayerError("layer \x9b", 7)
    assert (str(error), error.layer) == ("layer \\x9b", 7)


# ---------------------------------------------------------------- spreadsheets

_CELLS = st.text(st.sampled_from("'=+-@＝\t\r\n 1.eEx\ufeff"), max_size=8) | st.text(max_size=8)


@given(_CELLS)
@example("'-1")
@example("''=")
def test_a_cell_gives_back_its_text_and_no_other(text):
    assert csv_text(csv_cell(text)) == text
    assert csv_cell(text) in (text, f"'{text}")


@given(_CELLS)
def test_no_cell_begins_as_a_formula_does_unless_it_is_a_number(text):
    cell = csv_cell(text)
    if not cell.lstrip("\ufeff \t\r\n\x0b\x0c").startswith(
        ("=", "+", "-", "@", "＝", "＋", "－", "＠")
    ):
        assert not cell.startswith(("\t", "\r", "\n"))
    else:
        float(cell)


@pytest.mark.parametrize("number", ["-1", "+1", "-2.5", "1e5", "-1e-7", "0"])
def test_numbers_stay_numbers(number):
    assert csv_cell(number) == number


@pytest.mark.parametrize("text", ["-1+1", "-", "+", "-1 ", "-٣", "-1e", "-0x10", "=1"])
def test_what_only_begins_as_a_number_is_none(text):
    assert csv_cell(text) == f"'{text}"
