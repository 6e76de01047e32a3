"""Two identities belong together, or every difference is named with the flag that allows it."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from synthetic import IDENTITY

from probecache.errors import MismatchError, UsageError
from probecache.identity import EXTENDING, SCORING, merged_weights, require_same
from probecache.types import Identity
from probecache.unrecorded import unrecorded

HERE = replace(
    IDENTITY,
    weights={0: "a", 10: "b", 20: "c"},
    weight_samples={0: "as", 20: "cs"},
    positions="all",
)
NEVER = {"hidden_size"}  # no flag makes rows of two widths fit
NEVER_EXTENDING = NEVER | {
    *("num_hidden_layers", "dtype", "data", "token_ids", "positions", "layer_convention"),
}


def other(name):
    value = getattr(HERE, name)
    if name in ("weights", "weight_samples"):
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
    assert (f"--allow-mismatch {name}" in message) == (name not in NEVER)
    if name in NEVER:
        assert f"{name} cannot be allowed: rows" in message
        with pytest.raises(MismatchError, match=f"{name}: expected"):
            require_same(HERE, there, SCORING, what="", allowed=[name])
        return
    [told] = require_same(HERE, there, SCORING, what="", allowed=[name])
    assert told.startswith(f"{name}: expected ")
    assert told in message


@pytest.mark.parametrize("name", EXTENDING)
def test_adding_layers_needs_every_field_and_some_cannot_be_allowed(name):
    there = replace(HERE, **{name: other(name)})
    with pytest.raises(MismatchError, match=f"{name}: expected") as caught:
        require_same(HERE, there, EXTENDING, what="")
    assert (f"{name} cannot be allowed" in str(caught.value)) == (name in NEVER_EXTENDING)
    if name in NEVER_EXTENDING:
        with pytest.raises(MismatchError, match=f"{name} cannot be allowed"):
            require_same(HERE, there, EXTENDING, what="", allowed=[name])
    else:
        assert len(require_same(HERE, there, EXTENDING, what="", allowed=[name])) == 1


@pytest.mark.parametrize("name", ["model", "revision", "data", "token_ids", "positions"])
def test_scoring_takes_other_data_and_positions(name):
    assert require_same(HERE, replace(HERE, **{name: other(name)}), SCORING, what="") == []


def test_adding_layers_needs_all_but_where_the_weights_came_from():
    compared = {f.name for f in fields(Identity)} - {"model", "revision"}
    assert {*EXTENDING, "weight_samples"} == compared


@pytest.mark.parametrize("compared", [EXTENDING, SCORING])
def test_samples_of_weights_are_told_as_weights(compared):
    there = replace(HERE, weights={}, weight_samples=other("weight_samples"))
    with pytest.raises(MismatchError, match=r"weights: expected \{20: 'cs'\}, got \{20: 'other'\}"):
        require_same(HERE, there, compared, what="")


def test_special_tokens_count_not_where_one_side_keeps_a_last_token():
    last = replace(HERE, positions="last", special_tokens_kept=True)
    assert require_same(last, HERE, SCORING, what="") == []
    with pytest.raises(MismatchError, match="special_tokens_kept"):
        require_same(replace(last, positions="mean"), HERE, SCORING, what="")


@pytest.mark.parametrize(
    ("positions", "counts"),
    [("role:user", False), ("match:a", False), ("chars:0-1", False), ("last-2", True)],
)
def test_special_tokens_count_where_both_sides_may_keep_them(positions, counts):
    there = replace(HERE, positions=positions, special_tokens_kept=True)
    if not counts:
        assert require_same(there, HERE, SCORING, what="") == []
        return
    with pytest.raises(MismatchError, match="special_tokens_kept"):
        require_same(there, HERE, SCORING, what="")


def test_another_date_is_refused_with_the_option_that_mends_it():
    monday = replace(HERE, template_date="2026-11-23")
    tuesday = replace(HERE, template_date="2026-11-24")
    with pytest.raises(MismatchError, match=r"--template-date 2026-11-23\)"):
        require_same(monday, tuesday, SCORING, what="")


def test_a_date_that_is_not_recorded_is_no_remedy():
    imported = replace(HERE, template_date=unrecorded("a" * 64))
    with pytest.raises(MismatchError, match="template_date: expected 'not recorded") as caught:
        require_same(imported, HERE, SCORING, what="")
    assert "--template-date" not in str(caught.value)
    assert "--allow-mismatch template_date" in str(caught.value)


def test_weights_that_are_not_recorded_differ_from_any_that_are_still_to_be_read():
    note = unrecorded("a" * 64)
    imported = replace(HERE, weights={10: note, 20: note}, weight_samples={})
    words = r"weights: expected \{20: 'not recorded: .*'\}, got 'not read yet'.*--allow-mismatch we"
    for samples in ({}, HERE.weight_samples):
        to_read = replace(HERE, weights={}, weight_samples=samples)
        with pytest.raises(MismatchError, match=words):
            require_same(imported, to_read, SCORING, what="", layers=[20])
        assert require_same(imported, to_read, SCORING, what="", layers=[5]) == []
    assert require_same(imported, imported, EXTENDING, what="") == []


def test_a_layer_keeps_the_name_of_the_weights_that_made_it():
    old, new = {0: "a", 1: "b", 2: "c", 3: "d"}, {0: "a", 1: "B", 2: "C", 4: "E"}
    merged = merged_weights(old, new, cached=[1, 3], added=[2, 4])
    assert merged == {0: "a", 1: "b", 2: "C", 3: "d", 4: "E"}
    # Layer 1 lies between them, and is of one model or of the other.
    assert merged_weights(old, new, cached=[3], added=[2]) == {0: "a", 2: "C", 3: "d", 4: "E"}


def test_every_difference_is_shown_at_once():
    there = replace(HERE, dtype="bfloat16", hidden_size=5120)
    with pytest.raises(MismatchError, match=r"hidden_size: expected 1, got 5120; .*dtype: .*"):
        require_same(HERE, there, SCORING, what="x")
    with pytest.raises(MismatchError) as caught:
        require_same(HERE, there, SCORING, what="x", allowed=["dtype"])
    assert "dtype" not in str(caught.value)


def test_of_a_config_the_settings_that_differ_are_shown():
    here = {
        "rope.theta": 1e4,
        "rope.type": "default",
        "bias": False,
        "kinds": "7" * 64,
        "cap": None,
    }
    there = {"rope.theta": 5e5, "rope.type": "default", "kinds": "8" * 64, "cap": 30.0, "top": 1}
    with pytest.raises(MismatchError) as caught:
        require_same(
            replace(HERE, config=here), replace(HERE, config=there), SCORING, what="A and B"
        )
    assert str(caught.value).startswith(
        "A and B do not belong together: config: expected {bias: False, cap: None, "
        "kinds: content 77777777, rope.theta: 10000.0, and 1 more}, got {bias: 'no such setting', "
        "cap: 30.0, kinds: content 88888888, rope.theta: 500000.0, and 1 more} (model"
    )


def test_weights_are_compared_on_the_layers_that_both_know():
    deeper = replace(HERE, weights={10: "b", 30: "z"})
    require_same(HERE, deeper, SCORING, what="")
    with pytest.raises(MismatchError, match="weights"):
        require_same(HERE, replace(HERE, weights={10: "x", 30: "z"}), SCORING, what="")


def test_a_field_that_does_not_exist_cannot_be_allowed():
    with pytest.raises(UsageError, match=r"one of weights, .*got 'colour'"):
        require_same(HERE, HERE, SCORING, what="", allowed=["dtype", "colour"])
