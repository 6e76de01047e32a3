"""What `--positions` may say, and which tokens it means, against a plain loop over characters."""

from __future__ import annotations

import pickle
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from probecache.errors import UsageError
from probecache.positions import Positions, may_keep_special
from probecache.selection import Conversation, last_tokens, select_tokens
from probecache.store.layout import PositionsField
from probecache.types import Message

GOOD = [
    *("last", "mean", "all", "answer", "last-1", "last-12"),
    *("role:user", "role:assistant", "role:system"),
    *("match:a", "match:(?i)answer: ([AB])", "match::", "match: "),
    *("chars:0-5", "chars:-20-", "chars:-10", "chars:3-", "chars:-5--2", "chars:--5", "chars:2--2"),
]


@pytest.mark.parametrize("text", GOOD)
def test_positions_are_their_text_wherever_they_go(text):
    positions = Positions(text)
    assert positions == text
    assert f"{positions}" == text
    assert {positions} == {text}
    assert pickle.loads(pickle.dumps(positions)) == positions
    field = TypeAdapter(PositionsField)
    assert field.dump_json(positions) == field.dump_json(Positions(str(positions)))
    again = field.validate_json(field.dump_json(positions))
    assert (type(again), again) == (Positions, positions)


BAD = [
    *("", "first", "LAST", "last ", "last-", "last-0", "last-05", "last--1", "last-x"),
    *("role", "role:", "role:asistant", "role:user ", "role:tool"),
    *("match", "match:", "match:(", "match:a{2,1}", "match:" + "(" * 1500, "match:" + "a" * 3000),
    *("chars", "chars:", "chars:-", "chars:5", "chars:5-3", "chars:5-5", "chars:-0", "chars:-2--5"),
    *("chars:a-b", "chars:1-2-3", "chars:1_0-20", "chars:٣-٥", "chars:1-99999999999999"),
]


@pytest.mark.parametrize("text", BAD)
def test_anything_else_is_refused_with_what_there_is(text):
    with pytest.raises(UsageError, match=r"--positions to be last, mean, .* or chars:START-STOP"):
        Positions(text)
    with pytest.raises(ValueError, match="expected --positions"):
        TypeAdapter(PositionsField).validate_python(text)


def test_what_is_no_text_is_refused_as_well():
    with pytest.raises(UsageError, match=r"expected positions to be last, .* got 5"):
        Positions.parse(5, "positions")


def test_what_is_wrong_with_an_expression_is_told():
    with pytest.raises(UsageError, match=r"got 'match:\[a': unterminated character set"):
        Positions("match:[a")


@pytest.mark.parametrize("value", [None, 3, ["last"], b"last"])
def test_a_manifest_that_holds_no_text_for_positions_is_refused(value):
    with pytest.raises(ValueError, match="positions are text"):
        TypeAdapter(PositionsField).validate_python(value)


def test_positions_say_what_they_are():
    assert [text for text in GOOD if Positions(text).one_row] == ["last", "mean"]
    assert [t for t in GOOD if may_keep_special(t)] == ["mean", "all", "last-1", "last-12"]
    assert Positions("last-12").last_count == 12
    assert Positions("role:system").role == "system"
    assert Positions("chars:-5--2").characters == (-5, -2)
    assert Positions("chars:-10").characters == (None, 10)
    assert Positions("chars:-10-").characters == (-10, None)


# ---------------------------------------------------------------- which tokens


def wanted_characters(positions, talk):
    """Turn and number of every character that the positions ask for, one by one."""
    found = set()
    if positions.role:
        for number, turn in enumerate(talk.turns):
            if turn.role == positions.role:
                found |= {(number, place) for place in range(len(turn.content))}
    elif positions == "answer":
        found = {(len(talk.messages), place) for place in range(len(talk.answer or ""))}
    elif positions.startswith("match:"):
        expression = re.compile(positions[6:])
        for number, turn in enumerate(talk.turns):
            for match in expression.finditer(turn.content):
                span = match.span(1) if expression.groups else match.span()
                found |= {(number, place) for place in range(*span)}
    else:
        users = [n for n, m in enumerate(talk.messages) if m.role == "user"]
        question = users[-1] if users else len(talk.messages) - 1
        shown = [(question, n) for n in range(len(talk.messages[question].content))]
        shown += [(len(talk.messages), n) for n in range(len(talk.answer or ""))]
        found = set(shown[slice(*positions.characters)])
    return found


@st.composite
def conversations(draw):
    """Messages of few letters, maybe an answer, and tokens that cut them up in any way."""
    content = st.text("ab(A) ", min_size=1, max_size=8)
    roles = st.sampled_from(["user", "assistant", "system", "tool"])
    messages = draw(st.lists(st.builds(Message, roles, content), min_size=1, max_size=4))
    talk = Conversation(tuple(messages), draw(st.none() | content))
    places = []
    for number, turn in enumerate(talk.turns):
        cuts = sorted({0, len(turn.content), *draw(st.sets(st.integers(0, len(turn.content))))})
        places += [(number, a, b) for a, b in pairwise(cuts)]
        if draw(st.booleans()):
            places += [(number, 0, min(2, len(turn.content)))] * 2  # they share a character
        if draw(st.booleans()):
            places.append((-1, 0, 0))
    return talk, places


@given(
    st.lists(conversations(), min_size=1, max_size=5),
    st.sampled_from(
        [
            *("role:user", "role:assistant", "role:system", "answer"),
            *("match:a+", "match:\\((A)\\)", "match:a|", "match:(?=(ab))", "match:(b)?a"),
            *("chars:0-3", "chars:-2-", "chars:1--1", "chars:--3", "chars:5-"),
        ]
    ),
)
def test_chosen_tokens_are_those_that_share_a_wanted_character(cases, text):
    positions = Positions(text)
    talks = [talk for talk, _ in cases]
    places = np.array([place for _, of_talk in cases for place in of_talk], dtype=np.int32)
    owners = np.repeat(np.arange(len(cases)), [len(of_talk) for _, of_talk in cases])
    found = select_tokens(positions, places, owners, talks)
    expected = [
        any((message, place) in wanted for place in range(first, stop))
        for talk, of_talk in cases
        for wanted in [wanted_characters(positions, talk)]
        for message, first, stop in of_talk
    ]
    assert found.tolist() == expected


def test_an_empty_match_chooses_nothing():
    places = np.array([[0, 0, 3], [0, 3, 5]], dtype=np.int32)
    talk = Conversation((Message("user", "abcde"),))
    owners = np.zeros(2, dtype=np.int64)
    assert not select_tokens(Positions(r"match:\b|(?=c)"), places, owners, [talk]).any()


def test_a_system_prompt_put_first_is_the_systems_and_no_other_selectors():
    places = np.array([[-2, 0, 2], [0, 0, 2], [-1, 0, 0]], dtype=np.int32)
    owners, talks = np.zeros(3, dtype=np.int64), [Conversation((Message("user", "be"),))]
    chosen = {
        text: select_tokens(Positions(text), places, owners, talks).tolist()
        for text in ("role:system", "role:user", "match:be", "chars:0-")
    }
    assert chosen.pop("role:system") == [True, False, False]
    assert set(map(tuple, chosen.values())) == {(False, True, False)}


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(1, 4))
def test_the_last_tokens_are_the_ends_of_slices(sizes, count):
    owners = np.repeat(np.arange(len(sizes)), sizes)
    expected = [n >= size - count for size in sizes for n in range(size)]
    assert last_tokens(owners, count).tolist() == expected
