"""What is fitted: the methods, the examples' classes, groups and folds, and the answer's shape.

Guarantee: a method's name and a strength are refused here, before a row is read, or nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probecache.errors import EmptyClassError, FitError, ShapeError, UsageError
from probecache.probe import Probe

__all__ = [
    "Chunks",
    "Design",
    "FoldSet",
    "Method",
    "MethodFit",
    "held_out_and_inner",
    "parse_methods",
    "parse_strengths",
]

Floats = NDArray[np.float64]
# Rows [m, hidden] of one layer and the example that each is of, [m]; may be asked for repeatedly.
Chunks = Callable[[], Iterable[tuple[NDArray[np.int64], NDArray[Any]]]]
# Folds left out of a fit; in nested cross-validation the outer one stands first.
FoldSet = tuple[int, ...]


class Method(StrEnum):
    """A way to fit a direction; the value is its name on the command line and in files."""

    DIFFERENCE_OF_MEANS = "difference-of-means"
    LOGISTIC = "logistic"
    LDA = "lda"
    RIDGE = "ridge"
    PCA = "pca"

    @property
    def takes_strength(self) -> bool:
        """Whether the method is regularised."""
        return self in (Method.LOGISTIC, Method.LDA, Method.RIDGE)


_ALIASES = {
    "dom": Method.DIFFERENCE_OF_MEANS,
    "lat": Method.PCA,
    "mean-difference": Method.DIFFERENCE_OF_MEANS,
}


def parse_methods(given: str | Iterable[str]) -> tuple[Method, ...]:
    """Methods of `ridge,lda` or of a sequence of names, each once, in the order given.

    Raises:
        UsageError: an unknown name, or none; lists the names.
    """
    parts = given.split(",") if isinstance(given, str) else list(given)
    methods = dict.fromkeys(_method(part) for part in parts if part.strip())
    if not methods:
        raise UsageError(f"expected at least one method, got none; choose from {_names()}")
    return tuple(methods)


def _method(name: str) -> Method:
    plain = "-".join(name.strip().lower().replace("_", " ").replace("-", " ").split())
    try:
        return _ALIASES.get(plain) or Method(plain)
    except ValueError:
        raise UsageError(f"expected a method out of {_names()}, got {name!r}") from None


def _names() -> str:
    short = {method: alias for alias, method in _ALIASES.items() if len(alias) == 3}
    return ", ".join(f"{m} (or {short[m]})" if m in short else str(m) for m in Method)


def parse_strengths(
    methods: Iterable[Method], strength: float | Mapping[Method, float] | None
) -> dict[Method, float | None]:
    """The strength of every method; None is chosen from the data.

    Args:
        methods: which are fitted.
        strength: in scikit-learn's units, which differ: a single number is taken where only one of
            the methods has a strength.

    Raises:
        UsageError: one number for several methods, or one that a method cannot have.
    """
    methods = tuple(methods)
    regularised = [m for m in methods if m.takes_strength]
    if strength is None:
        return dict.fromkeys(methods, None)
    if not isinstance(strength, Mapping):
        if len(regularised) != 1:
            raise UsageError(
                "expected a strength for one regularised method, got one for "
                f"{', '.join(regularised) or 'methods that have none'}; ridge's alpha, logistic's "
                "C and lda's shrinkage are different things: fit them one by one"
            )
        strength = {regularised[0]: float(strength)}
    for method, value in strength.items():
        _check_strength(method, value)
    return {method: strength.get(method) for method in methods}


def _check_strength(method: Method, value: float) -> None:
    if not method.takes_strength:
        raise UsageError(f"expected no strength for {method}, got {value}; it has none")
    most = 1.0 if method is Method.LDA else np.inf
    if not 0 < value <= most or not np.isfinite(value):
        what = {Method.LDA: "a shrinkage above 0 and at most 1", Method.LOGISTIC: "a positive C"}
        raise UsageError(
            f"expected {what.get(method, 'a positive alpha')} for {method}, got {value}"
        )


@dataclass(frozen=True, eq=False)
class Design:
    """The examples, in data order.

    Attributes:
        is_positive: bool [n], True for the class that a higher score means.
        groups: int [n], one number for examples that belong together, as a pair's members do.
        folds: int [n] from 0, or None where nothing is held out; groups should not straddle them.
        nested: whether each two folds are left out, too, for `MethodFit.inner`.

    Raises:
        ShapeError: not of one length.
        EmptyClassError: a class has no examples, or without one fold, or two of three and more,
            there are none left to fit on.
        FitError: folds that are not numbered from 0 on, or a single one.
    """

    is_positive: NDArray[np.bool_]
    groups: NDArray[np.intp]
    folds: NDArray[np.intp] | None = None
    nested: bool = True

    def __post_init__(self) -> None:
        kinds = {"is_positive": np.bool_, "groups": np.intp, "folds": np.intp}
        for name, kind in kinds.items():
            given = getattr(self, name)
            if given is None:
                continue
            object.__setattr__(self, name, np.asarray(given, dtype=kind))
            if np.shape(given) != np.shape(self.is_positive) or np.ndim(given) != 1:
                raise ShapeError(
                    f"expected {name} for each of {np.size(self.is_positive)} examples, got "
                    f"{list(np.shape(given))}"
                )
        self._check_folds()

    def _check_folds(self) -> None:
        if self.folds is None:
            return
        numbers = np.unique(self.folds)
        if len(numbers) < 2 or not np.array_equal(numbers, np.arange(len(numbers))):
            raise FitError(
                f"expected two or more folds numbered from 0, got {numbers[:20].tolist()}; see "
                "probecache.folds.assign_folds"
            )
        for left_out in self.fold_sets:
            kept = self.is_positive[~np.isin(self.folds, left_out)]
            if kept.all() or not kept.any():
                raise EmptyClassError(
                    f"expected examples of both classes without the folds {list(left_out)}, got "
                    f"{int(kept.sum())} positive and {int((~kept).sum())} negative; take fewer "
                    "folds, or add texts"
                )

    @property
    def n_folds(self) -> int:
        """How many folds there are; 0 without."""
        return 0 if self.folds is None else int(self.folds.max()) + 1

    @property
    def has_inner(self) -> bool:
        """Whether something is left, and asked for, without two folds."""
        return self.nested and self.n_folds > 2

    @property
    def fold_sets(self) -> tuple[FoldSet, ...]:
        """Folds to leave out, one after the other: each, and where nested each two."""
        numbers = range(self.n_folds)
        pairs = combinations(numbers, 2) if self.has_inner else ()
        return (*((f,) for f in numbers), *pairs)


@dataclass(frozen=True, eq=False)
class MethodFit:
    """A method's answer at one layer.

    Attributes:
        probe: fitted on everything.
        held_out: float64 [n], or None without folds: each example's score by the probe fitted
            without its fold, that is the projection on its unit direction minus its threshold,
            averaged over the example's rows. NaN for an example without rows.
        inner: float64 [folds, n], or None with fewer than three folds or where not nested:
            inner[f, i] is the score of example i, of another fold g, by the probe fitted without
            the folds f and g; NaN where i is in f. What is chosen by row f has not seen fold f.
    """

    probe: Probe
    held_out: Floats | None = None
    inner: Floats | None = None


def held_out_and_inner(
    design: Design, scores: Mapping[FoldSet, Floats]
) -> tuple[Floats | None, Floats | None]:
    """`held_out` and `inner` of a `MethodFit`.

    Args:
        design: with folds or without.
        scores: float64 [n] of all examples by folds left out: those of `(g,)` are read for the
            examples of fold g, those of `(f, g)` for row f and the examples of g. Where `(f, g)`
            is missing, `(g, f)` is taken.
    """
    if design.folds is None:
        return None, None
    held_out = np.empty(len(design.folds))
    inner = np.full((design.n_folds, len(design.folds)), np.nan)
    for g, members in _members(design.folds, design.n_folds):
        held_out[members] = scores[(g,)][members]
        for f in range(design.n_folds):
            if f != g and design.has_inner:
                found = scores[f, g] if (f, g) in scores else scores[g, f]
                inner[f, members] = found[members]
    return held_out, inner if design.has_inner else None


def _members(folds: NDArray[np.intp], count: int) -> Iterator[tuple[int, NDArray[np.intp]]]:
    for fold in range(count):
        yield fold, np.flatnonzero(folds == fold)
