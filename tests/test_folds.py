"""Folds: checked by what scikit-learn's own splitters accept, and by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.model_selection import GroupKFold, PredefinedSplit, StratifiedGroupKFold

from probecache import folds as module
from probecache.errors import EmptyClassError, FitError, ShapeError
from probecache.folds import assign_folds, group_numbers, joined_groups

PAIRS = np.repeat(np.arange(30), 2)
BOTH = np.tile([True, False], 30)


@st.composite
def groupings(draw):
    """Examples of two classes in groups of any size and make-up."""
    n = draw(st.integers(2, 40))
    positive = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    groups = draw(st.lists(st.integers(0, 12), min_size=n, max_size=n))
    return np.array(positive), np.array(groups)


def may_be_divided(positive, groups, folds):
    """Whether every fold holds, and leaves, both classes."""
    held = [{bool(p) for p in positive[folds == f]} for f in np.unique(folds)]
    return all(one == {True, False} for one in held) and len(held) > 1


def any_halves(positive, groups):
    """Whether some two folds would do, by trying all of them."""
    members = list(np.unique(groups))
    for bits in range(1, 2 ** len(members) - 1):
        chosen = [g for place, g in enumerate(members) if bits >> place & 1]
        if may_be_divided(positive, groups, np.isin(groups, chosen).astype(int)):
            return True
    return False


@given(groupings(), st.integers(2, 8), st.integers(0, 3))
def test_groups_stay_whole_and_each_fold_holds_and_leaves_both_classes(case, most, seed):
    positive, groups = case
    try:
        folds = assign_folds(positive, groups, most, seed)
    except EmptyClassError:
        assume(False)
    assert sorted(set(folds.tolist())) == list(range(folds.max() + 1))
    assert 2 <= folds.max() + 1 <= most
    assert all(len(set(folds[groups == group])) == 1 for group in groups)
    assert may_be_divided(positive, groups, folds)


def refusal(positive, groups):
    """Why two folds are refused; None where they are not."""
    try:
        assign_folds(positive, groups, 2)
    except EmptyClassError as error:
        return str(error)
    return None


@given(groupings())
def test_what_is_refused_could_not_be_divided_or_nearly_not(case):
    positive, groups = case
    told, fewest = refusal(*case), min(len(set(groups[side])) for side in (positive, ~positive))
    if fewest < 2:
        assert f"got {len(set(groups[positive]))} positive" in told
    elif told is None:
        assert any_halves(positive, groups)
    else:
        assert "very unequal make-up" in told
        # Dealing groups out is greedy: it may miss a division only where groups are few.
        assert not any_halves(positive, groups) or fewest <= 3


def test_scikit_learns_group_folds_find_nothing_to_object_to():
    folds = assign_folds(BOTH, PAIRS)
    for train, test in PredefinedSplit(folds).split():
        assert not set(PAIRS[train]) & set(PAIRS[test])
    ours = sorted(np.bincount(folds).tolist())
    theirs = [len(test) for _, test in GroupKFold(5).split(BOTH, BOTH, PAIRS)]
    assert ours == sorted(theirs) == [12] * 5


def test_classes_are_shared_out_as_evenly_as_by_scikit_learn():
    rng = np.random.default_rng(0)
    groups = np.sort(rng.integers(0, 60, 400))
    positive = rng.random(400) < rng.random(60)[groups]
    theirs = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    held_by_them = [positive[test].sum() for _, test in theirs.split(positive, positive, groups)]
    folds = assign_folds(positive, groups)
    held = [positive[folds == f].sum() for f in range(5)]
    assert np.ptp(held) <= np.ptp(held_by_them) + 2
    assert np.ptp([(folds == f).sum() for f in range(5)]) <= 4


def test_folds_are_the_same_for_a_seed_and_others_for_another():
    first = assign_folds(BOTH, PAIRS, seed=1)
    assert np.array_equal(first, assign_folds(BOTH, PAIRS, seed=1))
    assert not np.array_equal(first, assign_folds(BOTH, PAIRS, seed=2))


def test_the_numbers_of_groups_do_not_matter():
    named = assign_folds(BOTH, PAIRS * 1000 + 7)
    assert np.array_equal(named, assign_folds(BOTH, PAIRS))


@pytest.mark.parametrize(("most", "expected"), [(2, 2), (3, 3), (30, 30), (1000, 30)])
def test_there_are_as_many_folds_as_asked_for_or_as_groups(most, expected):
    assert assign_folds(BOTH, PAIRS, most).max() + 1 == expected


@pytest.mark.parametrize("most", [1, 0, -3])
def test_fewer_than_two_folds_are_refused(most):
    with pytest.raises(FitError, match=f"at least 2 folds, got {most}; try 5"):
        assign_folds(BOTH, PAIRS, most)


@pytest.mark.parametrize(
    ("positive", "groups", "words"),
    [
        ([True, True, False], [0, 0, 1], "got 1 positive and 1 negative"),
        ([True, False, False], [0, 1, 2], "got 1 positive and 2 negative"),
        ([False, False, False], [0, 1, 2], "got 0 positive and 3 negative"),
        ([True, False], [0, 0], "got 1 positive and 1 negative"),
    ],
)
def test_a_class_of_one_group_is_refused_with_both_numbers(positive, groups, words):
    with pytest.raises(EmptyClassError, match=words):
        assign_folds(positive, groups)


def test_groups_are_numbered_as_they_appear_whatever_their_type():
    assert group_numbers(["b", 3, "b", None, "3", 3]).tolist() == [0, 1, 0, 2, 3, 1]
    assert group_numbers([]).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=25))
def test_joined_groups_are_what_can_be_reached_through_either(links):
    first, second = [a for a, _ in links], [b for _, b in links]
    joined = joined_groups(first, second)
    n = len(links)
    together = np.array([[a == c or b == d for c, d in links] for a, b in links]).reshape(n, n)
    for _ in range(n):  # the closure, by squaring as often as could be needed
        together = (together.astype(int) @ together.astype(int)) > 0
    assert np.array_equal(joined[:, None] == joined[None, :], together)


def test_groupings_of_different_lengths_are_refused():
    with pytest.raises(ShapeError, match="got 2 and 3"):
        joined_groups([0, 1], [0, 1, 2])


def test_all_is_sorted_and_exists():
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
