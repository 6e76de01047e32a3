"""A cache to a run: one direction per layer.

Guarantee: reads each row once, in bounded memory; the positive class is named, never guessed, and a
higher score means it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from probecache.atomic import require_place, sha256_of_file
from probecache.errors import (
    EmptyClassError,
    FitError,
    NoDirectionError,
    NonFiniteError,
    UsageError,
)
from probecache.fit import MeanDifferenceFitter
from probecache.store.layout import LAYER_INFO
from probecache.store.vectors import SavedVectors, load_vectors, save_run
from probecache.types import DEFAULT_POSITIVE_CLASS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from probecache.probe import Probe
    from probecache.store.reader import Cache

__all__ = ["require_class", "train"]

_METHOD = "difference of means"


def train(
    cache: Cache,
    output: str | Path,
    *,
    layers: Sequence[int] | None = None,
    positive_class: str = DEFAULT_POSITIVE_CLASS,
    source: str | None = None,
) -> SavedVectors:
    """Fit the difference of means at every layer and save the run.

    Args:
        cache: where the rows are.
        output: path of the run; `_<YYYYmmdd_HHMMSS>` is added.
        layers: which of the cached layers; None takes all that have a direction. Where the rows
            are those of an answer's last token, layer 0 has none: both answers end in one token.
        positive_class: the class that a higher score means; vectors are mean(positive) -
            mean(all other rows).
        source: what to record as the cache's name, where it is not its path.

    Returns:
        The run's normalised vectors; `.path.parent` is the run's folder.

    Raises:
        EmptyClassError: the cache has no such class.
        LayerNotCachedError, FitError, NonFiniteError, OutputError.
    """
    chosen = tuple(layers) if layers is not None else cache.layers
    if not chosen:
        raise UsageError("expected at least one layer to train on, got none")
    for layer in chosen:
        cache.require_layer(layer)
    require_class(positive_class, cache.classes, str(cache.path))
    require_place(Path(output))
    probes, without = _fit_all(cache, chosen, positive_class, skip=layers is None)
    about = {
        "method": _METHOD,
        "positive_class": positive_class,
        "negative_class": " + ".join(c for c in cache.classes if c != positive_class),
        "hidden_size": cache.hidden_size,
        "layers_without_direction": without,
        "source_cache": source or str(cache.path),
        "source_cache_sha256": sha256_of_file(cache.path / LAYER_INFO),
        "identity": cache.identity,
        "allowed_mismatch": cache.info.origin.allowed_mismatch,
    }
    run = save_run(output, probes, about)
    return load_vectors(run / "normalized_vectors")


def require_class(positive_class: str, classes: Collection[str], where: str) -> None:
    """Raise EmptyClassError unless there are examples of the positive class."""
    if positive_class not in classes:
        raise EmptyClassError(
            f"expected examples of the positive class {positive_class!r} in {where}, got the "
            f"classes {', '.join(classes)}; name one with --positive-class"
        )


def _fit_all(
    cache: Cache, layers: Sequence[int], positive_class: str, *, skip: bool
) -> tuple[dict[int, Probe], list[int]]:
    """Probes by layer, and with `skip` the layers left out because their classes' means are equal.

    Raises:
        NoDirectionError: a layer without direction, where none may be left out or all would be.
    """
    probes: dict[int, Probe] = {}
    without: list[int] = []
    for layer in layers:
        try:
            probes[layer] = _fit(cache, layer, positive_class)
        except NoDirectionError:
            if not skip or len(without) + 1 == len(layers):
                raise
            without.append(layer)
    return probes, without


def _fit(cache: Cache, layer: int, positive_class: str) -> Probe:
    fitter = MeanDifferenceFitter(cache.hidden_size)
    try:
        for label in cache.classes:
            for _, rows in cache.chunks(label, layer):
                fitter.update(rows, positive=label == positive_class)
        return fitter.finish()
    except (FitError, NonFiniteError) as error:
        raise type(error)(f"layer {layer} of {cache.path}: {error}") from error
