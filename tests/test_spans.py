"""What is vectorised over many texts is compared with the plain loop over the tokens of one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probecache.spans import locate_tokens, spans_between


def by_hand(offsets, spans):
    """Tokens that overlap a span; one of no width reaches from one neighbour to the other."""
    wide = [list(pair) for pair in offsets]
    for index, (start, stop) in enumerate(offsets):
        if start == stop:
            wide[index][0] = wide[index - 1][1] if index else 0
            if wide[index][0] == stop and index + 1 < len(offsets):
                wide[index][1] = max(stop, offsets[index + 1][0])
    return [any(a < stop and b > start for start, stop in spans) for a, b in wide]


@st.composite
def tokenised(draw):
    """A text's length, its tokens' offsets, many of no width, and rising spans in it."""
    length = draw(st.integers(1, 12))
    place = st.integers(0, length)
    pairs = [sorted(pair) for pair in draw(st.lists(st.tuples(place, place), max_size=10))]
    if draw(st.booleans()):
        pairs.sort()
    cuts = sorted(draw(st.sets(place, max_size=6)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    return length, [tuple(pair) for pair in pairs], spans


@given(st.lists(tokenised(), min_size=1, max_size=6))
def test_many_texts_at_once_are_each_what_the_loop_makes_of_it(cases):
    lengths, offsets, spans = zip(*cases, strict=True)
    texts = ["x" * length for length in lengths]
    found = locate_tokens(iter(offsets), list(map(len, offsets)), spans, texts)
    assert [(marks[:, 0] >= 0).tolist() for marks in found] == list(map(by_hand, offsets, spans))


def test_a_run_of_tokens_without_width_belongs_to_the_text_between_its_neighbours():
    offsets = [(0, 2), (3, 3), (4, 4), (5, 7), (7, 7)]
    found = locate_tokens([offsets], [5], [[(2, 5)]], ["x" * 7])
    assert np.flatnonzero(found[0][:, 0] >= 0).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<a>one</a><a>two</a>", [(3, 6), (13, 16)]),
        ("<a>one</a><a> two </a>", [(3, 6), (13, 18)]),
        ("<a>one</a><a>other</a>", None),
        ("<a>one</a><a>two</a>!", None),
        ("one</a><a>two</a>", None),
    ],
)
def test_messages_are_found_between_the_templates_words(text, expected):
    content = " two " if " two " in text else "two"
    assert spans_between(text, ["<a>", "</a><a>", "</a>"], ["one", content]) == expected
