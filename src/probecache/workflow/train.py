"""A cache to a run: one direction per layer and method, and what held-out examples say of it.

Guarantee: reads each layer's rows in bounded memory; the positive class is named, never guessed,
and a higher score means it; every layer carries an estimate from examples that it was not fitted
on, or the run says why there is none.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from probecache.atomic import require_place, sha256_of_file
from probecache.controls import answer_letter_baseline, length_baseline, pair_cosine
from probecache.errors import (
    EmptyClassError,
    FitError,
    NoDirectionError,
    NonFiniteError,
    UsageError,
)
from probecache.fit import Design, Method, fit_layer, parse_strengths
from probecache.store.layout import LAYER_INFO
from probecache.store.rows import ExampleRows
from probecache.store.vectors import (
    SavedVectors,
    TrainedLayer,
    TrainedRun,
    load_vectors,
    save_run,
)
from probecache.types import DEFAULT_POSITIVE_CLASS
from probecache.workflow.cross_validation import (
    layer_estimate,
    nested_estimate,
    platt_of,
    split_examples,
    texts_of,
)
from probecache.workflow.layers_at_once import each_layer

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from numpy.typing import NDArray

    from probecache.fit import MethodFit
    from probecache.store.reader import Cache
    from probecache.workflow.cross_validation import Split

__all__ = ["TrainOptions", "require_class", "train"]

_GIVEN_AWAY = 0.75  # of a baseline's AUROC, at its lower end
_CHUNK = 2 << 20  # numbers of a chunk of rows


@dataclass(frozen=True)
class TrainOptions:
    """How to fit.

    Attributes:
        methods: which of the fitters.
        positive_class: the class that a higher score means; vectors point from all others to it.
        positions: of a cache of `all` positions, which to fit on; None: every row that is kept.
        folds: of the cross-validation, at most; 0: none.
        strength: the methods' regularisation in scikit-learn's units; None: chosen from the data.
        standardize: divide every dimension by its spread before fitting; folded back afterwards.
    """

    methods: tuple[Method, ...] = (Method.DIFFERENCE_OF_MEANS,)
    positive_class: str = DEFAULT_POSITIVE_CLASS
    positions: str | None = None
    folds: int = 5
    strength: float | None = None
    standardize: bool = False

    def __post_init__(self) -> None:
        if self.folds < 0 or self.folds == 1:
            raise UsageError(f"expected --folds of at least 2, or 0 for none, got {self.folds}")
        parse_strengths(self.methods, self.strength)  # refused before a model is run


def train(
    cache: Cache,
    output: str | Path,
    options: TrainOptions,
    *,
    layers: Sequence[int] | None = None,
    source: str | None = None,
) -> dict[Method, SavedVectors]:
    """Fit every method at every layer and save the run.

    Args:
        cache: where the rows are.
        output: path of the run; `_<YYYYmmdd_HHMMSS>` is added.
        options: how to fit.
        layers: which of the cached layers; None takes all that have a direction. Where the rows
            are those of an answer's last token, layer 0 has none: both answers end in one token.
        source: what to record as the cache's name, where it is not its path.

    Returns:
        Each method's normalised vectors; `.path.parent` is the folder of its run.

    Raises:
        EmptyClassError: the cache has no such class.
        LayerNotCachedError, FitError, NonFiniteError, OutputError.
    """
    chosen = tuple(layers) if layers is not None else cache.layers
    if not chosen:
        raise UsageError("expected at least one layer to train on, got none")
    for layer in chosen:
        cache.require_layer(layer)
    require_class(options.positive_class, cache.classes, str(cache.path))
    require_place(Path(output))
    rows = ExampleRows(cache, options.positions)
    split = _split(cache, options)
    fits, without = _fit_all(rows, chosen, split, options, skip=layers is None)
    about = _about(rows, options, source or str(cache.path), without)
    about["notes"] = _notes(cache, split)
    runs = {method: _run(fits, split, about, method) for method in options.methods}
    saved = save_run(output, {str(method): run for method, run in runs.items()})
    return {method: load_vectors(saved[method] / "normalized_vectors") for method in runs}


def require_class(positive_class: str, classes: Collection[str], where: str) -> None:
    """Raise EmptyClassError unless there are examples of the positive class."""
    if positive_class not in classes:
        raise EmptyClassError(
            f"expected examples of the positive class {positive_class!r} in {where}, got the "
            f"classes {', '.join(classes)}; name one with --positive-class"
        )


def _split(cache: Cache, options: TrainOptions) -> Split:
    labels = [record.label == options.positive_class for record in cache.examples]
    return split_examples(cache.examples, np.array(labels, dtype=np.bool_), options.folds)


def _notes(cache: Cache, split: Split) -> list[str]:
    """What of the training texts alone gives the classes away, beyond their words.

    Pairs share their question, so words that differ are their answers; a letter or a length that
    goes with the class is what a direction fitted on answers may stand for.
    """
    if split.folds is None or not any(record.question for record in cache.examples):
        return []
    texts, labels = texts_of(cache.examples), split.is_positive.tolist()
    groups = split.groups.tolist()
    baselines = (
        length_baseline([len(text) for text in texts], labels, groups, "characters"),
        answer_letter_baseline(texts, labels, groups),
    )
    return [
        f"The training texts give the class away: {one.title.lower()} alone has AUROC "
        f"{one.auroc:.3f} [{one.low:.3f}, {one.high:.3f}]. What is fitted may stand for that: "
        "balance it between the classes."
        for one in baselines
        if one.auroc is not None and one.low is not None and one.low > _GIVEN_AWAY
    ]


def _about(
    rows: ExampleRows, options: TrainOptions, source: str, without: list[int]
) -> dict[str, Any]:
    cache, positive = rows.cache, options.positive_class
    return {
        "positive_class": positive,
        "negative_class": " + ".join(c for c in cache.classes if c != positive),
        "hidden_size": cache.hidden_size,
        "layers_without_direction": without,
        "positions": str(rows.positions),
        "answered": any(record.answer for record in cache.examples),
        "standardized": options.standardize,
        "source_cache": source,
        "source_cache_sha256": sha256_of_file(cache.path / LAYER_INFO),
        "identity": cache.identity,
        "allowed_mismatch": cache.info.origin.allowed_mismatch,
    }


def _run(
    fits: dict[int, _FittedLayer], split: Split, about: dict[str, Any], method: Method
) -> TrainedRun:
    own = {layer: fitted.methods[method] for layer, fitted in fits.items()}
    layers = {
        layer: TrainedLayer(
            probe=fit.probe,
            cross_validation=layer_estimate(fit, split),
            calibration=platt_of(fit, split),
            pair_agreement=fits[layer].pair_agreement,
        )
        for layer, fit in own.items()
    }
    validated = nested_estimate(own, split)
    return TrainedRun(
        layers,
        {
            **about,
            "method": str(method),
            "cross_validation": validated,
            "not_cross_validated": split.why_not,
        },
    )


def _fit_all(
    rows: ExampleRows, layers: Sequence[int], split: Split, options: TrainOptions, *, skip: bool
) -> tuple[dict[int, _FittedLayer], list[int]]:
    """Probes by layer, and with `skip` the layers left out because their classes' means are equal.

    Raises:
        NoDirectionError: a layer without direction, where none may be left out or all would be.
    """
    fits: dict[int, _FittedLayer] = {}
    without: list[int] = []
    stopped = Event()
    work = partial(_fit, rows, split=split, options=options, stopped=stopped)
    plain = options.methods == (Method.DIFFERENCE_OF_MEANS,)
    libraries = () if plain else ("scipy.linalg",)
    each = each_layer(layers, work, _bytes_of_a_fit(rows, plain), libraries, stopped)
    with closing(each):
        for layer, future in each:
            try:
                fits[layer] = future.result()
            except NoDirectionError:
                if not skip or len(without) + 1 == len(layers):
                    raise
                without.append(layer)
    return fits, without


def _bytes_of_a_fit(rows: ExampleRows, plain: bool) -> int:
    """Memory that fitting a layer takes: two wide chunks, and some matrices of the rows' size."""
    count = int(rows.counts.sum())
    chunk = 3 * 8 * min(count * rows.cache.hidden_size, _CHUNK)
    return chunk if plain else chunk + 6 * 8 * count**2


@dataclass(frozen=True)
class _FittedLayer:
    """What one layer gives: a fit per method, and how far its pairs agree."""

    methods: dict[Method, MethodFit]
    pair_agreement: float | None


def _fit(
    rows: ExampleRows, layer: int, *, split: Split, options: TrainOptions, stopped: Event
) -> _FittedLayer:
    design = Design(split.is_positive, split.pairs, split.folds, nested=split.nested)
    chunks = partial(_chunks, rows, layer, stopped)
    try:
        methods = fit_layer(
            chunks,
            rows.cache.hidden_size,
            design,
            options.methods,
            strength=options.strength,
            standardize=options.standardize,
        )
    except (FitError, NonFiniteError) as error:
        raise type(error)(f"layer {layer} of {rows.cache.path}: {error}") from error
    return _FittedLayer(methods, pair_cosine(chunks, split.is_positive, split.pairs))


def _chunks(
    rows: ExampleRows, layer: int, stopped: Event
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """A layer's rows, until the run is interrupted."""
    for chunk in rows.chunks(layer):
        if stopped.is_set():
            raise KeyboardInterrupt
        yield chunk
