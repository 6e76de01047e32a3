"""The methods as scikit-learn estimators: `fit`, `decision_function`, `predict_proba` on rows.

    RidgeProbe(alpha=10.0).fit(rows, labels, groups=pairs).predict_proba(others)

Guarantee: coefficients are in the rows' own units, and a higher decision means `classes_[1]`. The
numbers are those of the all-layers fitters; nothing is fitted here but the slope
of the probabilities. The one module
that imports scikit-learn as it is imported itself.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_consistent_length
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from probecache.errors import EmptyClassError
from probecache.fit import Design, Method, fit_layer
from probecache.folds import assign_folds, group_numbers

__all__ = [
    "DifferenceOfMeansProbe",
    "LDAProbe",
    "LogisticProbe",
    "PairPCAProbe",
    "RidgeProbe",
]

Floats = NDArray[np.float64]


class _LinearProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A direction and a threshold on it.

    Attributes:
        classes_: the two labels; a higher decision means the second.
        coef_: float64 [1, n_features], in the rows' units; the unit direction times `raw_norm`.
        intercept_: float64 [1].
        probe_: the frozen `Probe`.
    """

    _method: ClassVar[Method]

    def fit(self, X: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Self:
        """Fit the direction.

        Args:
            X: rows [n, n_features].
            y: labels [n] of two classes; the one that sorts last is the positive one.
            groups: [n] labels of what belongs together, as a pair's two rows do; None takes each
                row for itself. Groups are held out whole.

        Raises:
            ValueError: not two classes, or what scikit-learn refuses in rows and labels.
            NoDirectionError: the classes' means are equal.
        """
        rows, labels = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(labels)
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        _require_two(self.classes_)
        members = (
            np.arange(len(rows)) if groups is None else group_numbers(list(np.asarray(groups)))
        )
        check_consistent_length(rows, members)
        positive = numbers == 1
        folds = _folds(positive, members) if self._held_out_wanted else None
        found = fit_layer(
            lambda: [(np.arange(len(rows)), rows)],
            rows.shape[1],
            Design(positive, members, folds, nested=False),
            [self._method],
            self._strength(),
            standardize=getattr(self, "standardize", False),
        )[self._method]
        self.probe_ = found.probe
        self.coef_ = found.probe.direction.astype(np.float64)[None, :] * found.probe.raw_norm
        self.intercept_ = np.array([-found.probe.threshold * found.probe.raw_norm])
        if self._held_out_wanted:
            scores = found.held_out if found.held_out is not None else self._unit_scores(rows)
            self._slope = _slope(scores, positive)
        return self

    _held_out_wanted: ClassVar[bool] = True

    def _strength(self) -> float | None:
        return None

    def decision_function(self, X: ArrayLike) -> Floats:
        """Decisions [n] of rows [n, n_features]; above 0 is `classes_[1]`."""
        check_is_fitted(self)
        rows = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return np.asarray(rows @ self.coef_[0] + self.intercept_[0])

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Labels [n]."""
        check_is_fitted(self)
        return np.asarray(self.classes_[(self.decision_function(X) > 0).astype(np.intp)])

    def predict_proba(self, X: ArrayLike) -> Floats:
        """Probabilities [n, 2] by Platt's logistic curve, fitted on held-out decisions.

        The curve has a slope alone and is 1/2 at the threshold, so that the more probable class is
        the one that `predict` names. Where a class has fewer than two groups nothing can be held
        out: the slope is then that of the fitted rows, and too steep.

        Source: Platt 1999, Probabilistic outputs for support vector machines.
        """
        check_is_fitted(self)
        return _probabilities(self._slope * self._unit_scores(X))

    def _unit_scores(self, X: ArrayLike) -> Floats:
        return self.decision_function(X) / self.probe_.raw_norm

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


def _require_two(classes: NDArray[Any]) -> None:
    if len(classes) > 2:
        # The first sentence is the one that scikit-learn's own checks look for.
        raise ValueError(
            "Only binary classification is supported. The type of the target is multiclass: "
            f"expected labels of two classes, got {len(classes)}"
        )
    if len(classes) < 2:
        raise ValueError(f"expected labels of two classes, got one class: {classes[0]!r}")


def _folds(positive: NDArray[np.bool_], members: NDArray[np.intp]) -> NDArray[np.intp] | None:
    try:
        return assign_folds(positive, members)
    except EmptyClassError:
        return None


def _probabilities(logits: Floats) -> Floats:
    # By tanh: exp of a large number would overflow.
    return np.stack([0.5 * (1 + np.tanh(0.5 * side * logits)) for side in (-1, 1)], axis=1)


def _slope(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Slope of the logistic curve through 1/2 at 0 that Platt's smoothed targets make likeliest.

    By bisection of the likelihood's derivative, which falls all the way. Scores that tell nothing,
    or the contrary, get a slope just above 0, which says 1/2 of every row.
    """
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    targets = np.where(positive, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    unit = float(np.median(np.abs(scores))) or 1.0
    low, high = 1e-6 / unit, 1e6 / unit
    for _ in range(100):
        middle = (low * high) ** 0.5
        steeper = float((targets - _probabilities(middle * scores)[:, 1]) @ scores) > 0
        low, high = (middle, high) if steeper else (low, middle)
    return low


class DifferenceOfMeansProbe(_LinearProbe):
    """The direction from the mean of `classes_[0]` to that of `classes_[1]`.

    Args:
        standardize: divide each dimension by its standard deviation, and fold that back.
    """

    _method = Method.DIFFERENCE_OF_MEANS

    def __init__(self, *, standardize: bool = False) -> None:
        self.standardize = standardize


class LogisticProbe(_LinearProbe):
    """L2 logistic regression; coefficients are those of scikit-learn's `LogisticRegression`.

    Args:
        C: inverse strength of the penalty; None chooses it by leaving out each group.
        standardize: divide each dimension by its standard deviation, and fold that back.
    """

    _method = Method.LOGISTIC
    _held_out_wanted = False

    def __init__(self, C: float | None = 1.0, *, standardize: bool = False) -> None:
        self.C = C
        self.standardize = standardize

    def _strength(self) -> float | None:
        return self.C

    def predict_proba(self, X: ArrayLike) -> Floats:
        """Probabilities [n, 2], the model's own."""
        return _probabilities(self.decision_function(X))


class LDAProbe(_LinearProbe):
    """Shrinkage linear discriminant analysis with equal priors.

    Args:
        shrinkage: above 0 and at most 1; None takes Ledoit and Wolf's.
        standardize: divide each dimension by its standard deviation, and fold that back.
    """

    _method = Method.LDA

    def __init__(self, shrinkage: float | None = None, *, standardize: bool = False) -> None:
        self.shrinkage = shrinkage
        self.standardize = standardize

    def _strength(self) -> float | None:
        return self.shrinkage


class RidgeProbe(_LinearProbe):
    """Ridge regression on +1 and -1; coefficients are those of scikit-learn's `Ridge`.

    Args:
        alpha: strength of the penalty; None chooses it by leaving out each fold.
        standardize: divide each dimension by its standard deviation, and fold that back.
    """

    _method = Method.RIDGE

    def __init__(self, alpha: float | None = 1.0, *, standardize: bool = False) -> None:
        self.alpha = alpha
        self.standardize = standardize

    def _strength(self) -> float | None:
        return self.alpha


class PairPCAProbe(_LinearProbe):
    """First principal direction of the differences between the classes' members of each group.

    Args:
        standardize: divide each dimension by its standard deviation, and fold that back.
    """

    _method = Method.PCA

    def __init__(self, *, standardize: bool = False) -> None:
        self.standardize = standardize
