"""Do vectors, cache and data belong together? Or else what differs, in words.

Guarantee: what was read in two ways, or from two models, is never scored together unless the
difference was allowed by its name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from probecache.errors import MismatchError, UsageError
from probecache.identity import SCORING, require_same

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from probecache.dataset import Dataset
    from probecache.store.reader import Cache
    from probecache.store.vectors import SavedVectors
    from probecache.types import Identity

__all__ = ["choose_layers", "require_data", "require_scorable", "trained_on"]


def choose_layers(vectors: SavedVectors, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers to score, rising; None takes all of the vectors'.

    Raises:
        MismatchError: the vectors lack one.
    """
    chosen = tuple(sorted(set(layers))) if layers is not None else vectors.layers
    if not chosen:
        raise UsageError("expected at least one layer to score, got none")
    for layer in chosen:
        if layer not in vectors.layers:
            raise MismatchError(
                f"expected vectors for layer {layer} in {vectors.path}, got those for layers "
                f"{', '.join(map(str, vectors.layers))}; train it or leave it out of --layers"
            )
    return chosen


def require_scorable(
    vectors: SavedVectors,
    identity: Identity,
    classes: Collection[str],
    where: str,
    layers: Collection[int],
    allowed: Collection[str] = (),
) -> list[str]:
    """Raise MismatchError unless vectors may score activations of this identity and these classes.

    Args:
        where: what is to be scored, for the message.
        layers: those that will be scored.
        allowed: identity fields that may differ.

    Returns:
        The differences that were allowed.
    """
    what, info = f"Vectors {vectors.path} and {where}", vectors.info
    # The vectors' own width, whatever their identity says.
    identity_of_vectors = replace(info.identity, hidden_size=info.hidden_size)
    differences = require_same(
        identity_of_vectors, identity, SCORING, what=what, allowed=allowed, layers=layers
    )
    if info.positive_class not in classes:
        raise MismatchError(
            f"expected examples of the vectors' positive class {info.positive_class!r} in {where}, "
            f"got the classes {', '.join(classes)}; label the data alike"
        )
    return differences


def trained_on(vectors: SavedVectors, cache: Cache) -> bool:
    """Whether these are the very prompts that the vectors were trained on."""
    return cache.identity.data == vectors.info.identity.data


def require_data(cache: Cache, dataset: Dataset) -> None:
    """Raise MismatchError unless the cache was made from these examples."""
    if dataset.fingerprint() != cache.identity.data:
        raise MismatchError(
            f"expected --data to be what the cache {cache.path} was made from, got "
            f"{dataset.source}: {_first_difference(cache, dataset)}; name the original file, or "
            "extract this one into a cache of its own"
        )


def _first_difference(cache: Cache, dataset: Dataset) -> str:
    if len(dataset) != len(cache.examples):
        return f"{len(cache.examples)} examples expected, {len(dataset)} found"
    for record, example in zip(cache.examples, dataset.examples, strict=True):
        for name, cached, found in (
            ("class", record.label, example.label),
            ("text", record.question, example.question),
            ("answer", record.answer, example.answer),
            ("id", record.id, example.id),
            ("group", record.group, example.group),
            ("category", record.category, example.category),
        ):
            if cached != found:
                return f"row {example.row} differs in its {name}"
    return "the messages differ"
