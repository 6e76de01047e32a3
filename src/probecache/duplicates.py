"""Which texts are nearly the same, so that copies never stand on both sides of a split.

Two texts are near-duplicates where their words, each as often as it stands there and in any order,
have a Jaccard similarity of 0.8 or more. Case, punctuation and white space do not count, and all
numbers are one word. So two prompts that differ in a number, or in a name among ten words, are
near-duplicates: a probe that learnt one knows the other. Two that share a template are not: words
that more than half of the data has in common are its template, and what is left must be similar as
well.

Guarantees: deterministic, whatever the order of the texts; NumPy alone; bounded time. Does not
find rephrasings, and joins what a chain of similar texts joins. Where more than WINDOW texts share
one of their rarest words, each meets the WINDOW nearest in the order of their words only.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probecache.errors import UsageError
from probecache.folds import group_numbers

__all__ = ["near_duplicates", "near_duplicates_of"]

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Numbers = NDArray[np.float64] | NDArray[np.int64]

# Scripts without spaces go character by character: a sentence would else be one word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"\d+(?:[.,:]\d+)*|[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+")
_NUMBER = "0"
# Of a longer text, as many words from either end: instructions stand in front, contents behind.
_MOST_WORDS_AT_AN_END = 400
_TEMPLATE_SHARE, _FEWEST_IN_TEMPLATE = 0.5, 12
_NUMBERED_SHARE = 0.2
_FEWEST_NUMBERED = 4  # texts that differ in their numbers alone, before these are their content
WINDOW = 60
# What is spent at most: some seconds for either, reached only where thousands of texts share much.
_MOST_PAIRS = 6_000_000
_MOST_LOOKUPS = 15_000_000
_PAIRS_AT_ONCE = 100_000
_LOOKUPS_AT_ONCE = 1_000_000
_BINS = 64


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> NDArray[np.intp]:
    """Number the clusters of near-duplicates.

    Args:
        texts: [n] texts, of any length.
        threshold: Jaccard similarity from which two texts are near-duplicates, above 0.5 (where the
            search by rare words stops paying) and at most 1.

    Returns:
        int [n]: clusters from 0 in order of appearance; a text without a near-duplicate has one of
        its own. Clusters are connected components.

    Raises:
        UsageError: a threshold outside (0.5, 1].

    Source: candidates from the rarest words of each text, Chaudhuri et al. 2006, ICDE (prefix
    filter).
    """
    if not 0.5 < threshold <= 1:
        raise UsageError(f"expected a similarity above 0.5 and at most 1, got {threshold}; try 0.8")
    bags = _bags(texts)
    copies = group_numbers(bags)
    distinct = list(dict.fromkeys(bags))
    # Sorted, so that the order of the texts decides nothing but the clusters' numbers.
    order = sorted(range(len(distinct)), key=distinct.__getitem__)
    place = np.empty(len(order), dtype=np.intp)
    place[order] = np.arange(len(order))
    clusters = _cluster(_Sets.of([distinct[i] for i in order]), threshold)
    return group_numbers(clusters[place[copies]].tolist())


def near_duplicates_of(
    known: Sequence[str], texts: Sequence[str], threshold: float = 0.8
) -> NDArray[np.bool_]:
    """Which of the texts have a near-duplicate among known ones, such as the training prompts.

    Returns:
        bool [texts].

    Raises:
        UsageError: as `near_duplicates`.
    """
    clusters = near_duplicates([*known, *texts], threshold)
    return np.isin(clusters[len(known) :], clusters[: len(known)])


def _bags(texts: Sequence[str]) -> list[tuple[str, ...]]:
    """The bag of every text: numbers count as one word, unless they are all that is told apart.

    Where much of the data is one text with other numbers, that text is a template and the numbers
    its content.
    """
    exact = [_words(text, "") for text in texts]
    loose = [_words(text, _NUMBER) for text in texts]
    kinds = Counter(of_loose for of_loose, _ in dict.fromkeys(zip(loose, exact, strict=True)))
    limit = max(_FEWEST_NUMBERED, _NUMBERED_SHARE * len(set(exact)))
    pairs = zip(loose, exact, strict=True)
    return [one if kinds[one] <= limit else numbered for one, numbered in pairs]


def _words(text: str, number: str) -> tuple[str, ...]:
    """The words that count, sorted; the k-th of a kind is marked by its k.

    A set of marked words is a bag: ten times the same word is not like once.

    Args:
        text: of any length.
        number: what stands for every number; empty: each for itself.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    found = _WORD.findall(plain)
    words = [number or word if word[0].isdecimal() else word for word in found]
    words = words or ["".join(plain.split())]
    if len(words) > 2 * _MOST_WORDS_AT_AN_END:
        words = words[:_MOST_WORDS_AT_AN_END] + words[-_MOST_WORDS_AT_AN_END:]
    counts = Counter(words)
    return tuple(sorted(f"{k} {word}" for word, many in counts.items() for k in range(many)))


@dataclass(frozen=True)
class _Sets:
    """Texts as sets of word numbers, rarest first; text i's are words[starts[i]:starts[i + 1]]."""

    words: Ints
    starts: Ints
    holders: Ints  # of each word number: in how many texts it is

    @classmethod
    def of(cls, bags: Sequence[tuple[str, ...]]) -> _Sets:
        holders = Counter(word for bag in bags for word in bag)
        ranked = sorted(holders, key=lambda word: (holders[word], word))
        number = {word: rank for rank, word in enumerate(ranked)}
        sets = [sorted([number[word] for word in bag]) for bag in bags]
        return cls(
            words=np.array([word for one in sets for word in one], dtype=np.int64),
            starts=np.cumsum([0, *map(len, sets)], dtype=np.int64),
            holders=np.array([holders[word] for word in ranked], dtype=np.int64),
        )

    @property
    def sizes(self) -> Ints:
        return np.diff(self.starts)

    @property
    def owners(self) -> Ints:
        return np.repeat(np.arange(self.sizes.size), self.sizes)

    @property
    def in_template(self) -> Bools:
        """Of each word number, whether it belongs to what much of the data has in common."""
        limit = max(_FEWEST_IN_TEMPLATE, _TEMPLATE_SHARE * self.sizes.size)
        return np.asarray(self.holders > limit, dtype=np.bool_)


def _cluster(sets: _Sets, threshold: float) -> Ints:
    """A cluster's number for every set."""
    parents = list(range(sets.sizes.size))
    similar = _Similarity(sets, threshold)
    pairs, lookups = _MOST_PAIRS, _MOST_LOOKUPS
    for first, second in _candidates(sets, threshold):
        # A text that is joined already need not be compared: families of copies cost one round.
        roots = np.array([_root(parents, i) for i in range(len(parents))], dtype=np.int64)
        fresh = np.flatnonzero(roots[first] != roots[second])[: max(0, pairs)]
        pairs -= fresh.size
        first, second = similar.possible(first[fresh], second[fresh])
        affordable = np.cumsum(sets.sizes[first]) <= lookups
        first, second = first[affordable], second[affordable]
        lookups -= int(sets.sizes[first].sum())
        joined = similar(first, second)
        for a, b in zip(first[joined].tolist(), second[joined].tolist(), strict=True):
            parents[_root(parents, a)] = _root(parents, b)
        if pairs <= 0 or not affordable.all():
            break
    return np.array([_root(parents, i) for i in range(len(parents))], dtype=np.int64)


def _root(parents: list[int], node: int) -> int:
    while parents[node] != node:
        parents[node] = parents[parents[node]]  # halve the way for the next one
        node = parents[node]
    return node


def _candidates(sets: _Sets, threshold: float) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of sets that share one of their rarest words, some of them several times.

    Two sets of Jaccard similarity t share a word among the first |a| - ceil(t |a|) + 1 of the one
    and of the other, in any order that both are sorted by: the first one that they share. As the
    words of the template come last and the rest must be similar as well, it is among the first of
    the rest too, which is what keeps a common template cheap.
    """
    sizes, owners = sets.sizes, sets.owners
    content = np.bincount(owners[~sets.in_template[sets.words]], minlength=sizes.size)
    prefix = _prefix(sizes, threshold)
    prefix = np.where(content > 0, np.minimum(prefix, _prefix(content, threshold)), prefix)
    early = np.arange(sets.words.size) - sets.starts[owners] < prefix[owners]
    kept = early & (sets.holders[sets.words] > 1)
    words, texts = sets.words[kept], owners[kept]
    order = np.lexsort((_nearness(sets)[texts], words))
    words, texts = words[order], texts[order]
    for step in range(1, min(WINDOW, words.size - 1) + 1):
        together = words[step:] == words[:-step]
        if not together.any():
            return
        first, second = texts[:-step][together], texts[step:][together]
        yield np.minimum(first, second), np.maximum(first, second)


def _prefix(sizes: Ints, threshold: float) -> Ints:
    # A little less than asked: a product such as 0.8 * 5 must not be rounded up to 5.
    needed: Ints = np.ceil(threshold * sizes - 1e-9).astype(np.int64)
    return sizes - needed + 1


def _nearness(sets: _Sets) -> Ints:
    """Place of every set in the order of their words, those that no other text has left out."""
    shared = [
        [word for word in one.tolist() if sets.holders[word] > 1]
        for one in np.split(sets.words, sets.starts[1:-1])
    ]
    place = np.empty(len(shared), dtype=np.int64)
    place[sorted(range(len(shared)), key=shared.__getitem__)] = np.arange(len(shared))
    return place


class _Similarity:
    """Tells which pairs of sets are similar, by exact counts."""

    def __init__(self, sets: _Sets, threshold: float) -> None:
        self._sets, self._threshold = sets, threshold
        self._content = ~sets.in_template
        self._kinds = max(1, sets.holders.size)
        # Sorted, because texts follow one another and a text's words rise.
        self._held = sets.owners * self._kinds + sets.words
        content = self._content[sets.words]
        self._contents = np.bincount(sets.owners[content], minlength=sets.sizes.size)
        self._bins = _binned(sets, np.ones_like(content)), _binned(sets, content)

    def possible(self, first: Ints, second: Ints) -> tuple[Ints, Ints]:
        """The pairs, each once, that a look at the numbers of words in 64 bins does not rule out.

        Every word that only one of the two has changes one bin by one, so the bins' absolute
        differences add up to no more words than there are. Nine of ten pairs end here.
        """
        for bins, sizes in zip(self._bins, (self._sets.sizes, self._contents), strict=True):
            near = np.zeros(first.size, dtype=np.bool_)
            for start in range(0, first.size, _PAIRS_AT_ONCE):
                part = slice(start, start + _PAIRS_AT_ONCE)
                a, b = first[part], second[part]
                apart = np.abs(bins[a] - bins[b]).sum(axis=1, dtype=np.int64)
                total = sizes[a] + sizes[b]
                near[part] = self._reaches((total - apart) / 2, total)
            first, second = first[near], second[near]
        keys = np.sort(first * self._sets.sizes.size + second)
        # Not np.unique: its hashing took 28 of 30 seconds on keys like these.
        keys = keys[np.append(True, np.diff(keys) > 0)] if keys.size else keys
        return keys // self._sets.sizes.size, keys % self._sets.sizes.size

    def __call__(self, first: Ints, second: Ints) -> Bools:
        """bool [pairs]."""
        found = np.zeros(first.size, dtype=np.bool_)
        batch = np.cumsum(self._sets.sizes[first]) // _LOOKUPS_AT_ONCE
        for part in np.split(np.arange(first.size), np.flatnonzero(np.diff(batch)) + 1):
            if part.size:
                found[part] = self._judge(first[part], second[part])
        return found

    def _judge(self, first: Ints, second: Ints) -> Bools:
        sizes, starts = self._sets.sizes, self._sets.starts
        many = sizes[first]
        pair = np.repeat(np.arange(first.size), many)
        within = np.arange(pair.size) - np.repeat(np.cumsum(many) - many, many)
        words = self._sets.words[starts[first][pair] + within]
        wanted = second[pair] * self._kinds + words
        at = np.minimum(np.searchsorted(self._held, wanted), self._held.size - 1)
        shared = self._held[at] == wanted
        return self._reaches(
            np.bincount(pair, weights=shared, minlength=first.size),
            sizes[first] + sizes[second],
        ) & self._reaches(
            np.bincount(pair, weights=shared & self._content[words], minlength=first.size),
            self._contents[first] + self._contents[second],
        )

    def _reaches(self, shared: Numbers, total: Numbers) -> Bools:
        """Whether shared / union reaches the threshold; nothing at all is like nothing at all."""
        return np.asarray(shared >= self._threshold * (total - shared) - 1e-9, dtype=np.bool_)


def _binned(sets: _Sets, counted: Bools) -> NDArray[np.int16]:
    """[texts, bins] how many of the counted entries fall into each bin."""
    at = sets.owners[counted] * _BINS + sets.words[counted] % _BINS
    found = np.bincount(at, minlength=sets.sizes.size * _BINS)
    return found.astype(np.int16).reshape(-1, _BINS)
