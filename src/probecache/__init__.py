"""probecache: run a language model once, cache its activations, probe them in seconds.

    cache = probecache.extract(model="org/name", data="pairs.json", output="cache", layers="10,20")
    vectors = probecache.train(cache="cache", output="run")
    result = probecache.validate(cache="other", vectors=vectors.path, output="validation")
    rows = probecache.open_cache("cache")["testing", 20]      # memory-mapped torch tensor

Importing this package imports neither torch, transformers nor matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probecache import errors as errors

if TYPE_CHECKING:
    from probecache.api import (
        compare,
        extract,
        import_cache,
        plan_extraction,
        repair,
        train,
        train_methods,
        validate,
        validate_methods,
        verify,
    )
    from probecache.fit import fit_difference_of_means
    from probecache.store.reader import Cache, open_cache
    from probecache.store.vectors import SavedVectors, load_vectors

__all__ = [
    "Cache",
    "SavedVectors",
    "compare",
    "extract",
    "fit_difference_of_means",
    "import_cache",
    "load_vectors",
    "open_cache",
    "plan_extraction",
    "repair",
    "train",
    "train_methods",
    "validate",
    "validate_methods",
    "verify",
]

_HOME = {
    "Cache": "probecache.store.reader",
    "SavedVectors": "probecache.store.vectors",
    "compare": "probecache.api",
    "extract": "probecache.api",
    "fit_difference_of_means": "probecache.fit",
    "import_cache": "probecache.api",
    "load_vectors": "probecache.store.vectors",
    "open_cache": "probecache.store.reader",
    "plan_extraction": "probecache.api",
    "repair": "probecache.api",
    "train": "probecache.api",
    "train_methods": "probecache.api",
    "validate": "probecache.api",
    "validate_methods": "probecache.api",
    "verify": "probecache.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
