"""Layers are named as the guide names them, and written back in the same form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probecache.errors import LayerError, UsageError
from probecache.layers import format_layers, parse_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("10,20,23", (10, 20, 23)),
        ("23, 10 ,10", (10, 23)),
        ("all", tuple(range(25))),
        ("5-8", (5, 6, 7, 8)),
        ("0-24:10", (0, 10, 20)),
        ("4-24:10", (4, 14, 24)),
        ("-1", (24,)),
        ("-25", (0,)),
        ("-3--1", (22, 23, 24)),
        ("20--2", (20, 21, 22, 23)),
        ("1,-1,3-4", (1, 3, 4, 24)),
        ([3, -1], (3, 24)),
        ((7,), (7,)),
        (7, (7,)),
    ],
)
def test_layers_are_read_from_lists_ranges_and_the_end(text, layers):
    assert parse_layers(text, 24) == layers


@pytest.mark.parametrize("text", ["25", "-26", "20-30", "1,99", "-30-5", [25]])
def test_a_layer_that_the_model_lacks_is_refused_with_the_range(text):
    with pytest.raises(LayerError, match=r"from 0 \(embeddings\) to 24 \(after the last block\)"):
        parse_layers(text, 24)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "1,,2",
        "1.5",
        "8-5",
        "1-5:0",
        "1:2",
        "-",
        "--1",
        "²",
        "9" * 5000,
        [],
        [True],
        [1.5],
        1.5,
        None,
        ["1"],
    ],
)
def test_text_that_names_no_layers_is_refused(text):
    with pytest.raises(UsageError, match="expected"):
        parse_layers(text, 24)


@given(st.sets(st.integers(0, 80), min_size=1))
def test_what_is_written_is_read_back(layers):
    assert parse_layers(format_layers(sorted(layers)), 80) == tuple(sorted(layers))


def test_three_or_more_in_a_row_are_written_as_a_range():
    assert format_layers([1, 2, 4, 5, 6, 9]) == "1,2,4-6,9"
