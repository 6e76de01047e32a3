"""Which words and word pairs each text holds, and the logistic regression on them.

Guarantees: deterministic; bounded memory, whatever the texts' length. A few hundred texts, the
usual case, are fitted in milliseconds and without scikit-learn, whose import (1.6 s measured) every
validation would pay: with fewer texts than words the regression needs only the number of words that
each two texts share. More texts go to scikit-learn's sparse solver, where the import no longer
counts. Both minimise the same function.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Presence"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

# The usual pattern drops one-letter words, but "(A)" and "(B)" are what answer pairs differ in.
_WORD = re.compile(r"\w+")
# Of all texts together: 300 words of each of 20,000 texts, half of them from either end.
_MOST_WORDS, _FEWEST_WORDS_EACH = 6_000_000, 100
# Up to here the dense fit takes less time than importing scikit-learn does.
MOST_DENSE = 1200
_FEATURES_AT_ONCE = 1024
_NEWTON_STEPS = 100
_CONVERGED = 1e-10
# Beyond that a score is rounding: equal texts must tie, however a matrix product was blocked.
_DECIMALS = 9


@dataclass(frozen=True, eq=False)
class Presence:
    """Texts as sets of 1- and 2-grams, lowercased; single letters are words.

    Attributes:
        size: texts.
        texts, features: [entries] which text holds which feature, for features that two texts or
            more hold; sorted by feature, features numbered from 0.
        alone: float64 [size], how many features a text holds that no other one does. They take
            part in the fit (they are ways to learn a text by heart) and need no number each: under
            an L2 penalty they act as one feature of value sqrt(alone).
    """

    size: int
    texts: Ints
    features: Ints
    alone: Floats

    @classmethod
    def of(cls, texts: Sequence[str]) -> Presence:
        """Gather the features of texts."""
        owners, words, kinds = _words(texts)
        follows = owners[:-1] == owners[1:]
        pairs = kinds * (1 + words[:-1][follows]) + words[1:][follows]
        held = np.concatenate([words, pairs]) * len(texts)
        held += np.concatenate([owners, owners[:-1][follows]])
        held.sort()
        held = held[np.append(True, held[1:] != held[:-1])] if held.size else held
        features, holders = held // max(1, len(texts)), held % max(1, len(texts))
        new = np.append(True, features[1:] != features[:-1])[: features.size]
        numbers = np.cumsum(new) - 1
        shared = np.bincount(numbers)[numbers] > 1
        alone = np.bincount(holders[~shared], minlength=len(texts)).astype(np.float64)
        numbers = np.cumsum(new[shared]) - 1
        return cls(len(texts), holders[shared], numbers, alone)

    @property
    def width(self) -> int:
        """Features that two texts or more hold."""
        return int(self.features[-1]) + 1 if self.features.size else 0

    def scores(self, fits: Sequence[tuple[Ints, Bools, Ints]]) -> list[Floats]:
        """Decision values of texts by regressions on other texts.

        The regression is L2-regularised (C = 1), weighs the classes equally and has a free
        intercept. Texts that share nothing with those it was fitted on all score the same.

        Args:
            fits: for each regression the texts that it is fitted on, whether each of them is
                positive (both classes must be there), and the texts that it scores.

        Returns:
            For each regression float64 [scored].
        """
        if self.size > MOST_DENSE:
            matrix = self._sparse()
            return [_sparse_scores(matrix, *fit) for fit in fits]
        kernel = self._kernel()
        return [_dense_scores(kernel, *fit) for fit in fits]

    def _kernel(self) -> Floats:
        """[size, size] features that two texts share; a text's own on the diagonal."""
        holders = np.bincount(self.features)
        # A product over all texts pays from about that many holders; most features have two.
        common = holders[self.features] > self.size / 16
        kernel = self._shared_rare(self.texts[~common], self.features[~common])
        kernel += kernel.T
        kernel[np.diag_indices(self.size)] = self.alone
        kernel += np.diag(np.bincount(self.texts[~common], minlength=self.size))
        numbers = (np.cumsum(holders > self.size / 16) - 1)[self.features[common]]
        for start in range(0, int(numbers[-1]) + 1 if numbers.size else 0, _FEATURES_AT_ONCE):
            first, last = np.searchsorted(numbers, (start, start + _FEATURES_AT_ONCE))
            # float32 holds whole numbers exactly up to 16 million.
            block = np.zeros((self.size, _FEATURES_AT_ONCE), dtype=np.float32)
            block[self.texts[common][first:last], numbers[first:last] - start] = 1
            kernel += block @ block.T
        return kernel

    def _shared_rare(self, texts: Ints, features: Ints) -> Floats:
        """[size, size], above the diagonal, counted pair by pair."""
        shared = np.zeros(self.size**2)
        for step in range(1, texts.size):
            together = np.flatnonzero(features[step:] == features[:-step])
            if not together.size:
                break
            pairs = texts[together] * self.size + texts[together + step]
            shared += np.bincount(pairs, minlength=shared.size)
        return shared.reshape(self.size, self.size)

    def _sparse(self) -> Any:
        """CSR [size, width + size], the last block holding what each text has alone."""
        from scipy.sparse import csr_matrix

        rows = np.arange(self.size)
        values = np.concatenate([np.ones(self.texts.size), np.sqrt(self.alone)])
        at = np.concatenate([self.texts, rows]), np.concatenate([self.features, self.width + rows])
        return csr_matrix((values, at), shape=(self.size, self.width + self.size))


def _words(texts: Sequence[str]) -> tuple[Ints, Ints, int]:
    """The text and the number of every word, and how many different words there are."""
    most = max(_FEWEST_WORDS_EACH, _MOST_WORDS // max(1, len(texts)))
    numbers: dict[str, int] = {}
    counts, found = [], []
    for text in texts:
        words = _WORD.findall(text.lower())
        if len(words) > most:
            words = words[: most // 2] + words[-(most // 2) :]
        counts.append(len(words))
        found.append(np.array([numbers.setdefault(w, len(numbers)) for w in words], np.int64))
    every = np.concatenate(found) if found else np.empty(0, np.int64)
    return np.repeat(np.arange(len(texts)), counts), every, len(numbers)


def _sparse_scores(matrix: Any, train: Ints, is_positive: Bools, test: Ints) -> Floats:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    with warnings.catch_warnings():
        # A baseline that is a thousand steps along says what it has to say.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(matrix[train], is_positive)
    values: Floats = np.round(model.decision_function(matrix[test]), _DECIMALS)
    return values


def _dense_scores(kernel: Floats, train: Ints, is_positive: Bools, test: Ints) -> Floats:
    dual, intercept = _fit_dual(kernel[np.ix_(train, train)], is_positive)
    values: Floats = np.round(kernel[np.ix_(test, train)] @ dual + intercept, _DECIMALS)
    return values


def _fit_dual(kernel: Floats, is_positive: Bools) -> tuple[Floats, float]:
    """Newton's method for 1/2 a'Ka + sum of weighted log losses at Ka + b, halved where it rises.

    Source: Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, section 3.4; the
    free intercept takes up the constant direction.
    """
    weights = is_positive.size / (
        2 * np.where(is_positive, is_positive.sum(), (~is_positive).sum())
    )
    dual, intercept = np.zeros(is_positive.size), 0.0
    value = np.inf
    for _ in range(_NEWTON_STEPS):
        step, shift = _newton(kernel, weights, is_positive, dual, intercept)
        step, shift = step - dual, shift - intercept
        while (new := _objective(kernel, weights, is_positive, dual + step, intercept + shift)) > (
            value + _CONVERGED
        ):
            step, shift = step / 2, shift / 2
        dual, intercept, value = dual + step, intercept + shift, new
        if max(float(np.abs(kernel @ step).max()), abs(shift)) < _CONVERGED:
            break
    return dual, intercept


def _newton(
    kernel: Floats, weights: Floats, is_positive: Bools, dual: Floats, intercept: float
) -> tuple[Floats, float]:
    """Where the quadratic approximation has its minimum."""
    values = kernel @ dual + intercept
    chance = 0.5 * (1 + np.tanh(values / 2))
    curvature = np.maximum(weights * chance * (1 - chance), 1e-12)
    target = values - weights * (chance - is_positive) / curvature
    root = np.sqrt(curvature)
    inner = root[:, None] * kernel * root + np.eye(root.size)
    sides = np.stack([root * target, root], axis=1)
    to_target, to_one = (root[:, None] * np.linalg.solve(inner, sides)).T
    found = float(to_target.sum() / to_one.sum())
    return to_target - found * to_one, found


def _objective(
    kernel: Floats, weights: Floats, is_positive: Bools, dual: Floats, intercept: float
) -> float:
    shared = kernel @ dual
    margins = np.where(is_positive, 1, -1) * (shared + intercept)
    return float(dual @ shared / 2 + weights @ np.logaddexp(0, -margins))
