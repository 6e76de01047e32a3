"""Two identities belong together, or every difference is named with the flag that allows it."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from synthetic import IDENTITY

from probecache.errors import MismatchError, UsageError
from probecache.identity import EXTENDING, SCORING, require_same
from probecache.types import Identity

HERE = replace(IDENTITY, weights={0: "a", 10: "b", 20: "c"})


def other(name):
    value = getattr(HERE, name)
    if name == "weights":
        return {**value, 20: "other"}
    if isinstance(value, dict):
        return {**value, "more": "1"}
    return not value if isinstance(value, bool) else f"{value}!" if value else "set"


@pytest.mark.parametrize("name", SCORING)
def test_scoring_needs_every_field_that_decides_what_a_direction_means(name):
    there = replace(HERE, **{name: other(name)})
    with pytest.raises(MismatchError) as caught:
        require_same(HERE, there, SCORING, what="Vectors V and cache C")
    message = str(caught.value)
    assert message.startswith("Vectors V and cache C do not belong together")
    assert f"{name}: expected" in message
    assert f"--allow-mismatch {name}" in message
    require_same(HERE, there, SCORING, what="", allowed=[name])


@pytest.mark.parametrize("name", sorted({f.name for f in fields(Identity)} - set(SCORING)))
def test_scoring_takes_other_data_and_positions(name):
    require_same(HERE, replace(HERE, **{name: other(name)}), SCORING, what="")


def test_adding_layers_needs_all_but_where_the_weights_came_from():
    assert set(EXTENDING) == {f.name for f in fields(Identity)} - {"model", "revision"}


def test_every_difference_is_shown_at_once():
    there = replace(HERE, dtype="bfloat16", hidden_size=5120)
    with pytest.raises(MismatchError, match=r"hidden_size: expected 1, got 5120; .*dtype: .*"):
        require_same(HERE, there, SCORING, what="x")
    with pytest.raises(MismatchError) as caught:
        require_same(HERE, there, SCORING, what="x", allowed=["dtype"])
    assert "dtype" not in str(caught.value)


def test_weights_are_compared_on_the_layers_that_both_know():
    deeper = replace(HERE, weights={10: "b", 30: "z"})
    require_same(HERE, deeper, SCORING, what="")
    with pytest.raises(MismatchError, match="weights"):
        require_same(HERE, replace(HERE, weights={10: "x", 30: "z"}), SCORING, what="")


def test_a_field_that_does_not_exist_cannot_be_allowed():
    with pytest.raises(UsageError, match=r"one of layer_convention, .*got 'colour'"):
        require_same(HERE, HERE, SCORING, what="", allowed=["dtype", "colour"])
