"""Where the activations and the vectors of a call come from.

A cache that exists, or one that is built for the call and not kept; vectors of one method, or of
several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probecache.api_arguments import Data, Layers, make_request
from probecache.atomic import disk_errors_named, real_path, temporary_sibling
from probecache.errors import LayerError, MismatchError, OutputError, UsageError
from probecache.store.reader import Cache, open_cache
from probecache.store.vectors import SavedVectors, load_vectors, runs_in
from probecache.unrecorded import is_imported

if TYPE_CHECKING:
    from probecache.types import Identity

__all__ = ["as_trained", "by_method", "layers_of_vectors", "places_of", "source_of"]


@contextmanager
def source_of(
    cache: str | Path | Cache | None,
    model: str | None,
    data: Data | None,
    layers: Layers | None,
    extraction: dict[str, Any],
    output: Path,
    accept: Callable[[Identity, Sequence[str]], None],
) -> Iterator[tuple[Cache, str | None]]:
    """The cache to work on, and how to call it where its path means nothing to a reader.

    A cache that is not kept is built beside the output, which is where the user has room.
    """
    if (cache is None) == (model is None):
        raise UsageError(
            f"expected either --cache or --model, got {'neither' if cache is None else 'both'}"
        )
    if cache is not None:
        unused = {"quiet", "announce"}  # what only tells or hushes does no harm
        given = sorted(n for n, v in extraction.items() if v is not None and n not in unused)
        if given:
            raise UsageError(
                f"expected {', '.join(given)} with --model only, got it with --cache, where the "
                "activations are already made; leave it out"
            )
        yield cache if isinstance(cache, Cache) else open_cache(cache), None
        return
    if data is None:
        raise UsageError("expected --data with --model, got none; name the prompts to run it over")
    from probecache.workflow.extract import extract as run

    options = {name: value for name, value in extraction.items() if value is not None}
    announce = options.pop("announce", None)
    request = make_request(
        model=str(model), data=data, layers="all" if layers is None else layers, **options
    )
    with disk_errors_named(output), temporary_sibling(real_path(output)) as folder:
        yield run(request, folder / "cache", announce, accept), "(not kept)"


@contextmanager
def layers_of_vectors(vectors: SavedVectors, model: str | None) -> Iterator[None]:
    """Tell a model that is too shallow for some vectors as what it is."""
    try:
        yield
    except LayerError as error:
        raise MismatchError(
            f"Vectors {vectors.path} do not belong to model {model}: {error}; the vectors are of "
            f"{vectors.info.identity.model}"
        ) from error


def as_trained(vectors: SavedVectors) -> dict[str, Any]:
    """Options that render and run prompts as those that the vectors were trained on."""
    identity = vectors.info.identity
    if is_imported(identity):  # how its prompts were rendered is not recorded
        return {"dtype": identity.dtype}
    return {
        "dtype": identity.dtype,
        "system_prompt": identity.system_prompt,
        "chat_template": identity.chat_template is not None,
        "default_date": identity.template_date,
        "keep_special_tokens": identity.special_tokens_kept,
    }


def by_method(vectors: str | Path | Mapping[str, SavedVectors]) -> Mapping[str, SavedVectors]:
    """Vectors by method, of a run's folder or as they are.

    Raises:
        UsageError: none, or a folder of several runs in place of one.
    """
    if isinstance(vectors, str | Path):
        several = [load_vectors(run) for run in runs_in(vectors)] or [load_vectors(vectors)]
        found = {one.info.method: one for one in several}
        if len(found) < len(several):
            raise UsageError(
                f"expected one run in {vectors}, got {len(several)}, of which some are of one "
                f"method; name one of them: {runs_in(vectors)[0]}"
            )
        return found
    if not vectors:
        raise UsageError("expected vectors of at least one method, got none")
    return vectors


def places_of(output: Path, methods: Sequence[str]) -> dict[str, Path]:
    """Where each method's validation goes: of several, into a folder of its name.

    Raises:
        OutputError: several methods, where one validation lies already.
    """
    if len(methods) == 1:
        return {methods[0]: output}
    if (output / "summary.json").exists():
        raise OutputError(
            f"expected --output {output} to be free for the folders {', '.join(methods)}, but the "
            "validation of one method is there; choose another folder"
        )
    others = sorted({one.name for one in output.iterdir()} - {*methods}) if output.is_dir() else []
    if others:
        raise OutputError(
            f"expected --output {output} to be free or to hold validations of {', '.join(methods)} "
            f"alone, got {', '.join(others[:5])} there too, which would be taken for this run's; "
            "choose another folder"
        )
    return {method: output / method for method in methods}
