"""A cache or a run in words, from its manifests alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from probecache.errors import StoreError
from probecache.store.layout import LAYER_INFO
from probecache.store.reader import Cache, open_cache, what_is_at
from probecache.store.vectors import SavedVectors, load_vectors
from probecache.types import Identity

__all__ = ["describe"]


def describe(path: Path) -> list[str]:
    """Lines for a terminal; control characters of foreign names are shown, not obeyed.

    Raises:
        StoreError: neither a cache nor vectors.
    """
    if (path / LAYER_INFO).is_file():
        lines = _cache(open_cache(path))
    elif any((path / name).is_file() for name in ("vectors.json", "run.json")):
        lines = _vectors(load_vectors(path))
    else:
        raise StoreError(
            f"expected a cache or a run at {path}, got "
            f"{'a folder without their manifests' if path.is_dir() else what_is_at(path)}; "
            "name a folder made by probecache extract or train"
        )
    return [f"{name:<17} {_printable(value)}" for name, value in lines]


def _cache(cache: Cache) -> list[tuple[str, str]]:
    info, timing = cache.info, cache.info.timing
    size = sum(record.bytes for record in info.files.values())
    classes = (f"{c} {r.examples} examples, {r.rows} rows" for c, r in info.classes.items())
    return [
        ("cache", str(cache.path)),
        *_identity(cache.identity, info.origin.adapter),
        *_allowed(info.origin.allowed_mismatch),
        ("data", info.origin.data + (", texts truncated" if info.origin.truncate else "")),
        ("layers", ",".join(map(str, cache.layers))),
        ("positions", str(info.positions)),
        ("examples", f"{info.num_examples} ({'; '.join(classes)})"),
        ("tensors", f"{size:,} bytes in {len(info.files)} files"),
        ("rows with NaN/Inf", str(sum(info.non_finite.values()))),
        ("computed by", _execution(info.execution)),
        ("created", f"{info.created}, extracted in {timing.get('extract_s', 0.0):.1f} s"),
        ("layer convention", info.layer_convention),
    ]


def _execution(execution: dict[str, str]) -> str:
    if not execution:
        return "not recorded"
    return f"{execution.get('engine')} engine, {execution.get('batches')}"


def _vectors(vectors: SavedVectors) -> list[tuple[str, str]]:
    info = vectors.info
    return [
        ("vectors", f"{vectors.path} ({'unit norm' if info.normalized else 'raw'})"),
        ("method", info.method),
        ("higher means", f"{info.positive_class} (against {info.negative_class})"),
        *_identity(info.identity),
        *_allowed(info.allowed_mismatch),
        ("layers", ",".join(map(str, vectors.layers))),
        ("no direction at", ",".join(map(str, info.layers_without_direction)) or "none"),
        ("trained on", info.source_cache),
        ("layer convention", info.layer_convention),
    ]


def _identity(identity: Identity, adapter: str | None = None) -> list[tuple[str, str]]:
    name = identity.model + (f" @ {identity.revision}" if identity.revision else "")
    versions = ", ".join(f"{name} {number}" for name, number in identity.versions.items())
    return [
        ("model", f"{name} ({identity.architecture}, {identity.num_hidden_layers} blocks)"),
        ("hidden size", str(identity.hidden_size)),
        ("dtype", identity.dtype + (" quantised" if identity.quantization else "")),
        ("adapter", " ".join(filter(None, (adapter, identity.adapter))) or "none"),
        ("prompts", _prompts(identity)),
        ("system prompt", repr(identity.system_prompt) if identity.system_prompt else "none"),
        ("versions", versions),
        ("weights", f"content {_deepest(identity.weights)}"),
        ("attention", identity.attention),
    ]


def _deepest(weights: Mapping[int, str]) -> str:
    """What names the weights of the deepest layer: two caches of one depth can be held together."""
    return f"{weights[max(weights)]} up to layer {max(weights)}" if weights else "not recorded"


def _prompts(identity: Identity) -> str:
    if not identity.chat_template:
        return "raw text"
    day = identity.template_date
    return "chat template" + (f", told that today is {day}" if day else "")


def _allowed(differences: list[str]) -> list[tuple[str, str]]:
    return [("made across", "; ".join(differences))] if differences else []


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
