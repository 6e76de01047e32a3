"""Prompts as a tree of prefixes, and the tree cut into packs that go through a model one by one.

Tokens with the same tokens before them are the same to a causal model, so each distinct prefix is
computed once. Sorted by their ids, prompts stand in the order of a walk through the tree (every
token before those that follow it), and each adds to the walk what it does not share with the one
before it. A pack is a stretch of the walk:

    walk    <s> a b c | d e | c f ...       prompts <s>abc, <s>abde, <s>acf: tokens after branching
    depth    0  1 2 3 | 3 4 | 2 3 ...       how many tokens stand before each in its own prompt

What a pack's tokens see of earlier packs is one path from the root, the pack's context: as many
tokens as its first token is deep. Guarantee: each distinct prefix is in exactly one pack; packs in
the order of the walk find in their context all that they see. Packs may be left out, as long as
those stay that hold the path at which a later one begins: subtrees are stretches of the walk, so
that path is a beginning of every path in between. Knows token ids, no model.

Coordinates in a pack of context C and T tokens: 0..C-1 is the context by depth, C..C+T-1 the pack.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from probecache.types import TokenizedPrompt

__all__ = ["Pack", "PrefixTree", "Tile"]


@dataclass(frozen=True, eq=False)
class Tile:
    """Some tokens of a pack, one after another in the walk, and the tokens that they may see.

    Attributes:
        start, stop: the tokens, counted within the pack.
        columns: int64 [U], coordinates of their ancestors and of themselves.
        depths: int64 [U], the depths of those.
    """

    start: int
    stop: int
    columns: NDArray[np.int64]
    depths: NDArray[np.int64]

    @property
    def own_depths(self) -> NDArray[np.int64]:
        """Depths of the tokens themselves: int64 [stop - start]."""
        return self.depths[self.start - self.stop :]

    @property
    def is_chain(self) -> bool:
        """Whether each token follows the one before, so that it sees all columns up to its own."""
        # A step of the walk goes down by one, or back up.
        return bool(self.own_depths[-1] - self.own_depths[0] == self.stop - self.start - 1)

    @cached_property
    def sees(self) -> NDArray[np.bool_]:
        """Whether a column is an ancestor of a token, or itself: bool [stop - start, U]."""
        return _ancestry(self.own_depths)


@dataclass(frozen=True, eq=False)
class Pack:
    """A stretch of the walk, ready to be computed.

    Attributes:
        ids, depths: int64 [T].
        context: how many tokens of earlier packs it sees.
        tiles: the tokens in groups, for attention.
        prompts: the prompts that end here.
        rows: for each of them, the coordinates of its kept tokens.
        carried: coordinates of the next pack's context.
        owners: int64 [T], a prompt that each token belongs to.
    """

    ids: NDArray[np.int64]
    depths: NDArray[np.int64]
    context: int
    tiles: tuple[Tile, ...]
    prompts: tuple[int, ...]
    rows: tuple[NDArray[np.int64], ...]
    carried: NDArray[np.int64]
    owners: NDArray[np.int64]


class PrefixTree:
    """The distinct prefixes of some prompts. `len` is their number.

    Args:
        prompts: at least one, none empty.
    """

    def __init__(self, prompts: Sequence[TokenizedPrompt]) -> None:
        self.prompts = prompts
        # Big-endian bytes sort as the ids themselves do.
        keys = [prompt.ids.astype(">i4").tobytes() for prompt in prompts]
        self.order = sorted(range(len(prompts)), key=keys.__getitem__)
        del keys
        lengths = np.array([len(prompts[index]) for index in self.order], dtype=np.int64)
        self.shared = np.zeros(len(lengths), dtype=np.int64)
        for place in range(1, len(lengths)):
            before, after = self.order[place - 1], self.order[place]
            self.shared[place] = _common(prompts[before].ids, prompts[after].ids)
        # Prompt order[p] adds the tokens bounds[p]..bounds[p + 1]; none if it is a duplicate.
        self.bounds = np.concatenate([[0], np.cumsum(lengths - self.shared)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @cached_property
    def first_kept(self) -> int:
        """Depth above which no prompt keeps a token."""
        return min(int(prompt.kept[0]) for prompt in self.prompts)

    def pack(self, start: int, stop: int, tile: int, then: int | None = None) -> Pack:
        """The tokens start..stop of the walk, in tiles of so many tokens.

        Args:
            then: where the next pack begins; None: at `stop`.
        """
        return _Builder(self, start, stop, tile, stop if then is None else then).build()

    def path(self, token: int) -> NDArray[np.int64]:
        """The tokens of the walk that a token stands under: int64 [depth], rising."""
        place = self._place(token)
        depth = self.depth(token)
        path = np.empty(depth, dtype=np.int64)
        while depth:
            # A prompt adds to the walk what lies below its branch; what lies above it, the nearest
            # one before does that branches off higher.
            begin = int(self.shared[place])
            if begin < depth:
                first = int(self.bounds[place])
                path[begin:depth] = np.arange(first, first + depth - begin)
                depth = begin
            place = self._higher[place]
        return path

    def tokens(self, prompts: NDArray[np.int64], depths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in the walk tokens are that are given by prompt and place in it: int64 [n]."""
        ranks = np.empty(len(self.order), dtype=np.int64)
        ranks[self.order] = np.arange(len(self.order))
        places, higher = ranks[prompts], np.array(self._higher)
        while (above := depths < self.shared[places]).any():
            places[above] = higher[places[above]]
        found: NDArray[np.int64] = self.bounds[places] + depths - self.shared[places]
        return found

    @cached_property
    def _higher(self) -> list[int]:
        """For each place, the nearest one before that branches off higher; -1 at the root."""
        found: list[int] = []
        open_places: list[int] = []
        depths = self.shared.tolist()
        for place, depth in enumerate(depths):
            while open_places and depths[open_places[-1]] >= depth:
                open_places.pop()
            found.append(open_places[-1] if open_places else -1)
            open_places.append(place)
        return found

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Where in the walk each prompt's last token is: int64 [prompts]."""
        ends = np.empty(len(self.prompts), dtype=np.int64)
        ends[self.order] = self.bounds[1:] - 1
        return ends

    def _place(self, token: int) -> int:
        """The prompt, by its place in the order, that adds a token of the walk."""
        return int(np.searchsorted(self.bounds, token, side="right")) - 1

    def depth(self, token: int) -> int:
        """How many tokens stand before a token of the walk in its prompts."""
        place = self._place(token)
        return int(self.shared[place] + token - self.bounds[place])


class _Builder:
    """Walks through one pack, with the path from the root to where it stands."""

    def __init__(self, tree: PrefixTree, start: int, stop: int, tile: int, then: int) -> None:
        self.tree, self.start, self.stop, self.tile, self.then = tree, start, stop, tile, then
        self.context = tree.depth(start)
        self.ids = np.empty(stop - start, dtype=np.int64)
        self.depths = np.empty(stop - start, dtype=np.int64)
        self.owners = np.empty(stop - start, dtype=np.int64)
        self.path = np.arange(self.context, dtype=np.int64)  # coordinates by depth
        self.paths: list[NDArray[np.int64]] = []  # what each tile's first token stands under
        self.prompts: list[int] = []
        self.rows: list[NDArray[np.int64]] = []

    def build(self) -> Pack:
        for place, begin, end in self._stretches():
            self._add(place, begin, end)
        after = self.tree.depth(self.then) if self.then < len(self.tree) else 0
        return Pack(
            ids=self.ids,
            depths=self.depths,
            context=self.context,
            tiles=tuple(self._tiles()),
            prompts=tuple(self.prompts),
            rows=tuple(self.rows),
            carried=self.path[:after],
            owners=self.owners,
        )

    def _stretches(self) -> Iterator[tuple[int, int, int]]:
        """Which prompts add which tokens; duplicates add none but end where their twin does."""
        bounds = self.tree.bounds
        place = self.tree._place(self.start)
        while place < len(bounds) - 1:
            begin, end = int(bounds[place]), int(bounds[place + 1])
            if begin >= self.stop and end > begin:
                return
            yield place, max(begin, self.start), min(end, self.stop)
            place += 1

    def _add(self, place: int, begin: int, end: int) -> None:
        tree, index = self.tree, self.tree.order[place]
        depth = int(tree.shared[place] + begin - tree.bounds[place])
        own = slice(begin - self.start, end - self.start)
        deeper = np.arange(depth, depth + end - begin)
        before, within = self.path[:depth], np.arange(own.start, own.stop) + self.context
        self.path = np.concatenate([before, within])
        self.ids[own] = tree.prompts[index].ids[depth : depth + end - begin]
        self.depths[own] = deeper
        self.owners[own] = index
        for first in range(-(-own.start // self.tile) * self.tile, own.stop, self.tile):
            self.paths.append(self.path[: depth + first - own.start])
        if end == tree.bounds[place + 1]:
            self.prompts.append(index)
            self.rows.append(self.path[tree.prompts[index].kept])

    def _tiles(self) -> Iterator[Tile]:
        for number, path in enumerate(self.paths):
            start = number * self.tile
            stop = min(start + self.tile, len(self.ids))
            own = self.depths[start:stop]
            yield Tile(
                start=start,
                stop=stop,
                columns=np.concatenate([path, np.arange(start, stop) + self.context]),
                depths=np.concatenate([np.arange(len(path)), own]),
            )


def _ancestry(depths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of a tile's path and tokens each token stands under, from the depths of a walk.

    A token is an ancestor of a later one exactly if all between, the later one included, are
    deeper: the walk leaves a subtree for good when it comes back up.
    """
    lowest = np.minimum.accumulate(depths)
    path = np.arange(depths[0])[None, :] < lowest[:, None]
    later = np.triu(np.ones((len(depths), len(depths)), dtype=bool), k=1)
    between = np.minimum.accumulate(np.where(later, depths, np.iinfo(np.int64).max), axis=1)
    own = (between > depths[:, None]) & np.triu(np.ones_like(later))
    return np.concatenate([path, own.T], axis=1)


def _common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens two prompts share from the start."""
    most = min(len(a), len(b))
    differs = a[:most] != b[:most]
    first = int(differs.argmax())
    return first if differs[first] else most
