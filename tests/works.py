"""The families' texts as work of both kinds, and the rows that an engine gives, sorted out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from families import TEXTS, relative_difference, token_ids

from probecache.feeds import PaddedWork, TreeWork
from probecache.plan import plan_batches, plan_stretches
from probecache.prefixes import PrefixTree
from probecache.types import TokenizedPrompt

# With prefixes in common: pairs, one text twice, and one that begins another.
BRANCHING = [
    *TEXTS,
    "Is this a test? yes",
    "Is this a test? no",
    "hello world",
    "The quick brown fox sleeps under the lazy dog",
    "The quick",
]


def prompts_of(folder, kept=lambda count: range(count), texts=BRANCHING):
    """Texts as prompts; kept(number of tokens) gives the kept indices."""
    found = []
    for text in texts:
        ids = np.array(token_ids(folder, text), dtype=np.int32)
        found.append(TokenizedPrompt(ids, np.array(kept(len(ids)), dtype=np.int32)))
    return found


def padded(prompts, budget=150, *, mean=False):
    """Batches within a budget of tokens."""
    return PaddedWork(prompts, plan_batches([*map(len, prompts)], budget), mean)


def shared(prompts, budget=50, *, tile=16, mean=False):
    """Packs of the prefix tree within a budget of tokens."""
    tree = PrefixTree(prompts)
    return TreeWork(tree, plan_stretches(tree.bounds, tree.shared, budget), tile, mean)


KINDS = {"padded": padded, "shared": shared}


def sorted_out(found, work):
    """Rows by (layer, prompt); fails if any come out twice or in another number than are kept."""
    pieces = {}
    for rows in found:
        sizes = [1 if work.mean else len(work.prompts[index].kept) for index in rows.prompts]
        assert len(rows.values) == sum(sizes)
        assert rows.values.device.type == "cpu"
        for index, piece in zip(rows.prompts, rows.values.split(sizes), strict=True):
            assert (rows.layer, index) not in pieces
            pieces[rows.layer, index] = piece
    return pieces


def run(engine, work, layers, *more: Any):
    """What an engine gives of a work, by (layer, prompt), complete."""
    pieces = sorted_out(engine.run(work, layers, *more), work)
    assert pieces.keys() == {(layer, n) for layer in layers for n in range(len(work.prompts))}
    return pieces


def largest_difference(found, expected):
    assert found.keys() == expected.keys()
    return max(relative_difference(found[key], expected[key]) for key in expected)


def equal(found, expected):
    """Whether all rows are the same, bit for bit."""
    assert found.keys() == expected.keys()
    return all(torch.equal(found[key], expected[key]) for key in expected)


class Known:
    """A `Start`: the rows of every token at a layer, out of what an engine gave."""

    def __init__(self, layer, found):
        self.layer = layer
        self._rows = {index: rows for (at, index), rows in found.items() if at == layer}

    def rows(self, prompts, depths):
        none = torch.ones_like(self._rows[0][0])
        pairs = zip(prompts.tolist(), depths.tolist(), strict=True)
        return torch.stack([none if p < 0 else self._rows[p][depth] for p, depth in pairs])
