"""A tree of prefixes against sets of prefixes: what a pack says of a token is held against the
prompts themselves, however the walk is cut.

Every token of a walk is named by the prefix that it ends, taken from the prompts; its ancestors are
the shorter prefixes of that name.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probecache.prefixes import PrefixTree
from probecache.types import TokenizedPrompt

# 256 and 65536 differ from 0 and 1 in another byte only.
IDS = [0, 1, 256, 65536]


def prompt(ids, kept=None):
    kept = range(len(ids)) if kept is None else kept
    return TokenizedPrompt(np.array(ids, dtype=np.int32), np.array(kept, dtype=np.int32))


@st.composite
def prompt_sets(draw):
    """Prompts of few different ids; some of them again, some cut short, some going on."""
    ids = st.lists(st.sampled_from(IDS), min_size=1, max_size=8)
    drawn = draw(st.lists(ids, min_size=1, max_size=8))
    for old in draw(st.lists(st.sampled_from(drawn), max_size=4)):
        more = draw(st.lists(st.sampled_from(IDS), max_size=2))
        drawn.append(old[: draw(st.integers(1, len(old)))] + more)
    drawn = draw(st.permutations(drawn))
    kept = [draw(st.sets(st.integers(0, len(ids) - 1), min_size=1)) for ids in drawn]
    return [prompt(ids, sorted(some)) for ids, some in zip(drawn, kept, strict=True)]


@st.composite
def cut_trees(draw):
    """A tree, and packs that its walk is cut into anywhere."""
    tree = PrefixTree(draw(prompt_sets()))
    cuts = draw(st.sets(st.integers(1, len(tree) - 1), max_size=6)) if len(tree) > 1 else set()
    tile = draw(st.integers(1, 9))
    return tree, packs_of(tree, cuts, tile)


def packs_of(tree, cuts, tile):
    bounds = [0, *sorted(cuts), len(tree)]
    return [tree.pack(start, stop, tile) for start, stop in pairwise(bounds)]


def prefix(tokenized, depth):
    return tuple(tokenized.ids[: depth + 1].tolist())


def own_names(tree, pack):
    """The prefix that each token of a pack ends, by the prompt that it is said to belong to."""
    return [
        prefix(tree.prompts[owner], depth)
        for owner, depth in zip(pack.owners, pack.depths, strict=True)
    ]


def named(tree, packs):
    """Every pack with the names of its coordinates, those of its context handed on as it says."""
    context = []
    for pack in packs:
        assert pack.context == len(context)
        names = context + own_names(tree, pack)
        yield pack, names
        context = [names[place] for place in pack.carried]
    assert context == []


def every_prefix(prompts):
    return {prefix(one, depth) for one in prompts for depth in range(len(one))}


@given(prompt_sets())
def test_a_tree_is_as_long_as_the_set_of_all_prefixes(prompts):
    assert len(PrefixTree(prompts)) == len(every_prefix(prompts))


@given(prompt_sets())
def test_no_prompt_keeps_a_token_before_the_first_kept_depth(prompts):
    assert PrefixTree(prompts).first_kept == min(one.kept.min() for one in prompts)


@given(cut_trees())
def test_every_distinct_prefix_is_in_exactly_one_pack(cut):
    tree, packs = cut
    names = [name for pack in packs for name in own_names(tree, pack)]
    assert sorted(names) == sorted(every_prefix(tree.prompts))


@given(cut_trees())
def test_ids_depths_and_owners_of_tokens_are_those_of_their_prefixes(cut):
    tree, packs = cut
    for pack in packs:
        names = own_names(tree, pack)
        assert pack.ids.tolist() == [name[-1] for name in names]
        assert pack.depths.tolist() == [len(name) - 1 for name in names]
        assert {array.dtype for array in (pack.ids, pack.depths, pack.owners)} == {np.dtype("i8")}


@given(cut_trees())
def test_tokens_see_all_their_ancestors_and_themselves_and_nothing_else(cut):
    tree, packs = cut
    for pack, names in named(tree, packs):
        for tile in pack.tiles:
            for row, token in enumerate(range(tile.start, tile.stop)):
                seen = [names[column] for column in tile.columns[tile.sees[row]]]
                name = names[pack.context + token]
                assert sorted(seen) == [name[:length] for length in range(1, len(name) + 1)]


@given(cut_trees())
def test_the_columns_of_a_tile_come_with_their_depths_and_end_with_its_own_tokens(cut):
    tree, packs = cut
    for pack, names in named(tree, packs):
        for tile in pack.tiles:
            assert tile.sees.shape == (tile.stop - tile.start, len(tile.columns))
            assert tile.depths.tolist() == [len(names[column]) - 1 for column in tile.columns]
            own = pack.context + np.arange(tile.start, tile.stop)
            assert tile.columns[-len(own) :].tolist() == own.tolist()


@given(prompt_sets(), st.integers(1, 9))
def test_tiles_cover_a_pack_without_gaps_and_keep_their_size(prompts, size):
    tree = PrefixTree(prompts)
    tiles = tree.pack(0, len(tree), size).tiles
    tokens = [token for tile in tiles for token in range(tile.start, tile.stop)]
    assert tokens == list(range(len(tree)))
    assert [tile.stop - tile.start for tile in tiles[:-1]] == [size] * (len(tiles) - 1)


@given(cut_trees())
def test_a_tile_brings_no_column_that_none_of_its_tokens_sees(cut):
    for pack in cut[1]:
        for tile in pack.tiles:
            assert tile.sees.any(axis=0).all()


@given(cut_trees())
def test_every_prompt_comes_out_once_with_rows_that_point_to_its_kept_tokens(cut):
    tree, packs = cut
    came_out = []
    for pack, names in named(tree, packs):
        for index, rows in zip(pack.prompts, pack.rows, strict=True):
            kept = tree.prompts[index].kept
            assert [names[row] for row in rows] == [prefix(tree.prompts[index], k) for k in kept]
            came_out.append(index)
    assert sorted(came_out) == list(range(len(tree.prompts)))


@given(cut_trees())
def test_a_prompt_comes_out_of_the_pack_that_computes_its_last_token(cut):
    tree, packs = cut
    for pack in packs:
        names = own_names(tree, pack)
        for index in pack.prompts:
            assert prefix(tree.prompts[index], len(tree.prompts[index])) in names


@given(cut_trees())
def test_what_is_carried_is_the_path_down_to_the_next_packs_first_token(cut):
    tree, packs = cut
    walk = list(named(tree, packs))
    for (pack, names), (after, _) in pairwise(walk):
        first = own_names(tree, after)[0]
        carried = [names[place] for place in pack.carried]
        assert carried == [first[:length] for length in range(1, len(first))]
    assert len(packs[-1].carried) == 0


def test_the_walk_of_the_modules_own_example_is_as_drawn():
    s, a, b, c, d, e, f = range(7)
    tree = PrefixTree([prompt([s, a, c, f]), prompt([s, a, b, c]), prompt([s, a, b, d, e])])
    pack = tree.pack(0, len(tree), 128)
    assert pack.ids.tolist() == [s, a, b, c, d, e, c, f]
    assert pack.depths.tolist() == [0, 1, 2, 3, 3, 4, 2, 3]
    assert pack.prompts == (1, 2, 0)
    assert [rows.tolist() for rows in pack.rows] == [[0, 1, 2, 3], [0, 1, 2, 4, 5], [0, 1, 6, 7]]


def test_duplicates_come_out_together_even_where_their_pack_ends_with_them():
    tree = PrefixTree([prompt([1, 2]), prompt([1, 2]), prompt([1, 3]), prompt([1, 2])])
    first, second = packs_of(tree, {2}, 4)
    assert sorted(first.prompts) == [0, 1, 3]
    assert second.prompts == (2,)
    assert second.context == 1


def test_a_token_per_pack_still_hands_whole_paths_on():
    prompts = [prompt([1, 2, 3, 4]), prompt([1, 2, 5]), prompt([6])]
    tree = PrefixTree(prompts)
    packs = packs_of(tree, range(1, len(tree)), 3)
    assert [pack.context for pack in packs] == [0, 1, 2, 3, 2, 0]
    assert [names for _, names in named(tree, packs)][3] == [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]


@pytest.mark.parametrize("size", [32, 128])
def test_long_prompts_over_many_tiles_and_packs_see_their_ancestors(size):
    drawn = np.random.default_rng(0)
    stem = drawn.integers(0, 50_000, 150)
    prompts = []
    for _ in range(30):
        branch = drawn.integers(0, 50_000, drawn.integers(1, 60))
        stem = np.concatenate([stem[: drawn.integers(1, 200)], branch])
        prompts.append(prompt(stem))
    tree = PrefixTree(prompts)
    assert len(tree) > 3 * 200
    for pack, names in named(tree, packs_of(tree, range(200, len(tree), 200), size)):
        for tile in pack.tiles:
            columns = [names[column] for column in tile.columns]
            for row, name in enumerate(names[pack.context :][tile.start : tile.stop]):
                ancestors = [name[: len(column)] == column for column in columns]
                assert tile.sees[row].tolist() == ancestors
                assert sum(ancestors) == len(name)


# ---------------------------------------------------------------- what a token stands under


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12))
def test_a_path_leads_from_the_root_along_the_tokens_own_prompt(texts):
    prompts = [
        TokenizedPrompt(np.array(ids, dtype=np.int32), np.arange(len(ids), dtype=np.int32))
        for ids in texts
    ]
    tree = PrefixTree(prompts)
    walk = [None] * len(tree)  # the prefix that each token ends
    for place, index in enumerate(tree.order):
        first, stop = tree.bounds[place : place + 2]
        for token in range(first, stop):
            depth = int(tree.shared[place]) + token - first
            walk[token] = tuple(texts[index][: depth + 1])
    for token, prefix in enumerate(walk):
        above = [walk[one] for one in tree.path(token)]
        assert above == [prefix[: depth + 1] for depth in range(len(prefix) - 1)]
    assert [walk[end] for end in tree.ends] == [tuple(ids) for ids in texts]
    for index, ids in enumerate(texts):
        depths = np.arange(len(ids))
        tokens = tree.tokens(np.full(len(ids), index), depths)
        assert [walk[token] for token in tokens] == [tuple(ids[: depth + 1]) for depth in depths]
