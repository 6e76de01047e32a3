"""Caches whose answer is known: what was planted in them, and the texts that stand beside it."""

from __future__ import annotations

import json
from statistics import NormalDist

import numpy as np
import torch
from synthetic import write_cache

from probecache.shipped import shipped

__all__ = [
    "cache_of",
    "classes",
    "composed_texts",
    "phi",
    "records_of",
    "rows_along",
    "shipped_texts",
    "unit",
]

# Twelve words of 120 in any order: hardly two texts share half of theirs.
_SYLLABLES = [f"{a}{b}" for a in "bdfgklmnprstvz" for b in ("ap", "eno", "iri", "ot", "umba")]
phi = NormalDist().cdf


def classes(each):
    """[2 each] booleans, the classes in turn."""
    return np.arange(2 * each) % 2 == 1


def unit(values):
    """Along the last axis, of norm 1."""
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def composed_texts(seed, count, words=12):
    """Texts that tell nothing, all of one length."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(_SYLLABLES, words)) for _ in range(count)]


def shipped_texts(seed, count):
    """Questions from the validation data that ship, drawn without regard to their class."""
    data = json.loads(shipped("datasets/validation_real.json").read_text(encoding="utf-8"))
    chosen = np.random.default_rng(seed).permutation(len(data))[:count]
    assert len(chosen) == count
    return [data[place]["question"] for place in chosen]


def records_of(positive, texts=None, groups=None, prefix="p", categories=None):
    """Labelled records; the positives are of class deployment."""
    fields = {"group": groups, "category": categories}
    return [
        {
            "id": f"{prefix}{place}",
            "question": texts[place] if texts is not None else f"{prefix} question {place}",
            "type": "deployment" if label else "testing",
            **{name: str(all_[place]) for name, all_ in fields.items() if all_ is not None},
        }
        for place, label in enumerate(np.asarray(positive, dtype=bool))
    ]


def rows_along(rng, positive, axis, spacing):
    """Unit normal noise around two means that lie `spacing` apart along a unit axis [hidden]."""
    noise = rng.standard_normal((len(positive), len(axis)), dtype=np.float32)
    side = np.where(positive, spacing / 2, -spacing / 2)[:, None]
    return noise + (side * axis).astype(np.float32)


def cache_of(folder, positive, layers, *, texts=None, groups=None, **options):
    """A cache of these examples; `layers` holds rows [n, hidden] by layer."""
    prefix = options.pop("prefix", folder.name)
    categories = options.pop("categories", None)
    options.setdefault("num_hidden_layers", max(24, *layers))
    records = records_of(positive, texts, groups, prefix, categories)
    return write_cache(
        folder, records, {n: torch.from_numpy(rows) for n, rows in layers.items()}, **options
    )
