"""Token scores to example scores, against a loop written out."""

import numpy as np
import pytest

from probecache.aggregate import MEAN, parse_aggregate
from probecache.errors import UsageError

COUNTS = np.array([1, 7, 3, 20, 8])
SCORES = np.random.default_rng(0).normal(size=COUNTS.sum())
PIECES = np.split(SCORES, np.cumsum(COUNTS)[:-1])

BY_HAND = {
    "mean": lambda s: sum(s) / len(s),
    "max": max,
    "last": lambda s: s[-1],
    "top-1": max,
    "top-3": lambda s: np.mean(sorted(s)[-3:]),
    "rolling-1": max,
    "rolling-4": lambda s: max(np.mean(s[i : i + 4]) for i in range(max(1, len(s) - 3))),
    "rolling-100": np.mean,
    "top-100": np.mean,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_each_aggregate_is_what_a_loop_gives(name):
    found = parse_aggregate(name).over(SCORES, COUNTS)
    assert found == pytest.approx([BY_HAND[name](list(piece)) for piece in PIECES], abs=1e-12)


@pytest.mark.parametrize("name", ["mean", "max", "last", "top-5", "rolling-8"])
def test_an_aggregate_is_written_as_it_is_read(name):
    assert str(parse_aggregate(name)) == name
    assert parse_aggregate("mean") == MEAN


def test_a_bare_name_has_a_width_that_is_told():
    assert str(parse_aggregate("top-k")) == "top-5"
    assert str(parse_aggregate("rolling")) == "rolling-8"


@pytest.mark.parametrize("name", ["", "median", "top-0", "top--1", "rolling-x", "MEAN", "top-5 "])
def test_other_names_are_refused_with_those_there_are(name):
    with pytest.raises(UsageError, match="expected --aggregate to be mean, max, last"):
        parse_aggregate(name)
