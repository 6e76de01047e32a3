"""The Python API over activations: fit, score, compare.

With `model=` in place of `cache=`, `train` and `validate` extract into a temporary cache and go on
from there: the same code and the same numbers, without the files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probecache.aggregate import parse_aggregate
from probecache.api_arguments import Data, Layers, as_names, cached_layers, layer_numbers
from probecache.api_sources import (
    as_trained,
    by_method,
    layers_of_vectors,
    places_of,
    source_of,
)
from probecache.atomic import require_place
from probecache.dataset import load_dataset
from probecache.errors import UsageError
from probecache.store.vectors import SavedVectors, load_vectors
from probecache.types import DEFAULT_POSITIVE_CLASS
from probecache.workflow.belonging import choose_layers, require_data, require_scorable
from probecache.workflow.results import require_output
from probecache.workflow.train import TrainOptions, require_class
from probecache.workflow.train import train as train_on_cache
from probecache.workflow.validate import ValidateOptions, Validation
from probecache.workflow.validate import validate as validate_on_cache

if TYPE_CHECKING:
    from probecache.store.reader import Cache
    from probecache.types import Identity
    from probecache.workflow.compare import Comparison

__all__ = ["compare", "train", "train_methods", "validate", "validate_methods"]


def train(
    *,
    output: str | Path,
    cache: str | Path | Cache | None = None,
    model: str | None = None,
    data: Data | None = None,
    layers: Layers | None = None,
    method: str = "difference-of-means",
    positive_class: str = DEFAULT_POSITIVE_CLASS,
    positions: str | None = None,
    folds: int = 5,
    strength: float | None = None,
    standardize: bool = False,
    **extraction: Any,
) -> SavedVectors:
    """Fit a direction per layer, and estimate on held-out examples what it is worth.

    Args:
        output: path of the run; `_<YYYYmmdd_HHMMSS>` is added.
        cache: a cache's folder; or leave it out and give `model` and `data`.
        model: folder or hub id of the model to run instead.
        data: what to run the model over, or what the cache was made from (checked).
        layers: which layers; None or "all": all that are cached and have a direction.
        method: "difference-of-means", "logistic", "lda", "ridge" or "pca".
        positive_class: the class that a higher score means.
        positions: of a cache of `all` positions, which tokens to fit on; with `model`, which to
            extract.
        folds: of the cross-validation, at most; 0: none.
        strength: regularisation in scikit-learn's units (ridge's alpha, logistic regression's C,
            LDA's shrinkage); None: chosen from the data.
        standardize: divide every dimension by its spread before fitting. Directions are of
            activations all the same.
        extraction: with `model`: further arguments of `extract`.

    Returns:
        The normalised vectors; `.path.parent` is the run's folder.

    Raises:
        ProbecacheError: see `extract`; or layers or classes that the cache does not hold.
    """
    found = train_methods(
        [method],
        output=output,
        cache=cache,
        model=model,
        data=data,
        layers=layers,
        positive_class=positive_class,
        positions=positions,
        folds=folds,
        strength=strength,
        standardize=standardize,
        **extraction,
    )
    return next(iter(found.values()))


def train_methods(
    methods: Sequence[str],
    *,
    output: str | Path,
    cache: str | Path | Cache | None = None,
    model: str | None = None,
    data: Data | None = None,
    layers: Layers | None = None,
    positive_class: str = DEFAULT_POSITIVE_CLASS,
    positions: str | None = None,
    folds: int = 5,
    strength: float | None = None,
    standardize: bool = False,
    **extraction: Any,
) -> dict[str, SavedVectors]:
    """The same with several methods in one passage over the cache.

    Args:
        methods: their names. Of several, each gets a folder of its name within the run's.

    Returns:
        The normalised vectors of each method.
    """
    from probecache.fit import parse_methods

    def accept(_identity: Identity, classes: Sequence[str]) -> None:
        require_class(positive_class, classes, "--data")

    options = TrainOptions(
        methods=parse_methods(methods),
        positive_class=positive_class,
        positions=positions if model is None else None,
        folds=folds,
        strength=strength,
        standardize=standardize,
    )
    if model is not None:
        require_place(Path(output))
        extraction["positions"] = positions
    with source_of(cache, model, data, layers, extraction, Path(output), accept) as (opened, name):
        if cache is not None and data is not None:
            require_data(opened, load_dataset(data))
        trained = train_on_cache(
            opened, output, options, layers=cached_layers(layers, opened), source=name
        )
    return {str(method): vectors for method, vectors in trained.items()}


def validate(
    *,
    vectors: str | Path | SavedVectors,
    output: str | Path,
    cache: str | Path | Cache | None = None,
    model: str | None = None,
    data: Data | None = None,
    layers: Layers | None = None,
    positions: str | None = None,
    aggregate: str = "mean",
    control: bool = True,
    control_count: int = 10,
    visualize: bool = False,
    allow_mismatch: Collection[str] = (),
    **extraction: Any,
) -> Validation:
    """Score prompts with vectors: statistics per prompt, AUROC per layer, artefact panel, report.

    Args:
        vectors: RUN/normalized_vectors or RUN/vectors.
        output: folder to write; an earlier validation there is replaced.
        cache: a cache's folder; or leave it out and give `model` and `data`.
        data: what the cache was made from (checked), or what to run the model over.
        layers: which of the vectors' layers; None: all.
        positions: of a cache of `all` positions, which tokens to score; with `model`, which to
            extract.
        aggregate: "mean", "max", "last", "top-5" or "rolling-8": how the scores of a prompt's
            tokens become one.
        control: score random directions beside the vectors.
        control_count: how many.
        visualize: plots and report.html too.
        allow_mismatch: identity fields in which vectors and cache may differ.
        extraction: with `model`: further arguments of `extract`; dtype, system prompt, chat
            template, the date it is told and keep_special_tokens are by default those that the
            vectors were made with.

    Raises:
        ProbecacheError: see `extract`; or vectors, cache and data that do not belong together.
    """
    loaded = vectors if isinstance(vectors, SavedVectors) else load_vectors(vectors)
    found = validate_methods(
        {loaded.info.method: loaded},
        output=output,
        cache=cache,
        model=model,
        data=data,
        layers=layers,
        positions=positions,
        aggregate=aggregate,
        control=control,
        control_count=control_count,
        visualize=visualize,
        allow_mismatch=allow_mismatch,
        **extraction,
    )
    return next(iter(found.values()))


def validate_methods(
    vectors: str | Path | Mapping[str, SavedVectors],
    *,
    output: str | Path,
    cache: str | Path | Cache | None = None,
    model: str | None = None,
    data: Data | None = None,
    layers: Layers | None = None,
    positions: str | None = None,
    aggregate: str = "mean",
    control: bool = True,
    control_count: int = 10,
    visualize: bool = False,
    allow_mismatch: Collection[str] = (),
    **extraction: Any,
) -> dict[str, Validation]:
    """The same with the vectors of several methods.

    Args:
        vectors: a run of several methods, or the vectors of each by its name.
        output: folder to write; of several methods, each gets a folder of its name within it.

    Returns:
        What was found, by method.
    """
    if control_count < 1:
        raise UsageError(f"expected --control-count of at least 1, got {control_count}")
    options = ValidateOptions(
        positions=positions if model is None else None,
        aggregate=parse_aggregate(aggregate),
        control_count=control_count if control else 0,
        allow_mismatch=as_names(allow_mismatch),
        visualize=visualize,
    )
    loaded = by_method(vectors)
    places = places_of(Path(output), list(loaded))
    for place in places.values():  # all of them before the first is written
        require_output(place)
    one = next(iter(loaded.values()))
    scored: tuple[int, ...] = ()
    if model is not None:
        given = {name: value for name, value in extraction.items() if value is not None}
        extraction = {**as_trained(one), **given, "positions": positions}
        scored = choose_layers(one, layer_numbers(layers, one.info.identity.num_hidden_layers))

    def accept(identity: Identity, classes: Sequence[str]) -> None:
        require_scorable(one, identity, classes, f"model {model}", scored, options.allow_mismatch)

    with (
        layers_of_vectors(one, model) if model is not None else nullcontext(),
        source_of(cache, model, data, scored, extraction, Path(output), accept) as (opened, name),
    ):
        dataset = load_dataset(data) if data is not None else None
        chosen = cached_layers(layers, opened)
        return {
            method: validate_on_cache(
                opened,
                of_method,
                places[method],
                options,
                dataset=dataset,
                layers=chosen,
                source=name,
            )
            for method, of_method in loaded.items()
        }


def compare(paths: Sequence[str | Path], *, output: str | Path | None = None) -> Comparison:
    """Set validations or runs side by side; where they scored the same prompts, in pairs.

    Args:
        paths: folders of `validate`, or runs of `train`; two or more, or one of several methods.
        output: folder for comparison.csv, comparison.json and comparison.html.

    Raises:
        ProbecacheError: a folder is neither, or is damaged.
    """
    from probecache.workflow.compare import compare as run

    return run([Path(path) for path in paths], None if output is None else Path(output))
