"""A cache or a run in words, from its manifests alone."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from probecache.errors import StoreError, printable
from probecache.layers import format_layers
from probecache.store.commit import is_committed
from probecache.store.journal import Unfinished, find_unfinished
from probecache.store.layout import LAYER_INFO
from probecache.store.reader import Cache, open_cache, what_is_at
from probecache.store.vectors import SavedVectors, load_vectors, runs_in
from probecache.types import Identity
from probecache.unrecorded import is_imported, is_recorded

__all__ = ["describe"]


def describe(path: Path) -> list[str]:
    """Lines for a terminal; control characters of foreign names are shown, not obeyed.

    Raises:
        StoreError: neither a cache nor vectors.
    """
    unfinished = find_unfinished(path)
    if unfinished is not None and is_committed(unfinished):
        unfinished = None  # of a run that was killed while it tidied up
    if (path / LAYER_INFO).is_file():
        lines = _cache_or_damage(path, repaired=unfinished is not None)
    elif unfinished is not None:
        lines = [("unfinished cache", str(path))]
    elif runs := runs_in(path):
        lines = [line for run in runs for line in _vectors(load_vectors(run))]
    else:
        raise StoreError(
            f"expected a cache or a run at {path}, got "
            f"{'a folder without their manifests' if path.is_dir() else what_is_at(path)}; "
            "name a folder made by probecache extract or train"
        )
    if unfinished is not None:
        lines += _unfinished(unfinished)
    return [f"{name:<17} {printable(value)}" for name, value in lines]


def _unfinished(unfinished: Unfinished) -> list[tuple[str, str]]:
    """How far an interrupted extraction is."""
    begun = unfinished.begun
    done = unfinished.counts()
    whole = [layer for layer, count in done.items() if count == begun.examples]
    part = {layer: count for layer, count in done.items() if 0 < count < begun.examples}
    by_count = {n: [layer for layer, c in part.items() if c == n] for n in {*part.values()}}
    started = (f"{n} of {begun.examples} prompts at {_list(la)}" for n, la in by_count.items())
    lines = [
        (
            "unfinished repair" if begun.repairs else "unfinished",
            f"{unfinished.share():.1%} of the rows; the same command goes on",
        ),
        ("  model", begun.identity.model),
        ("  data", begun.origin.data),
        ("  layers", ",".join(map(str, begun.layers))),
        ("  complete", _list(whole)),
        ("  begun", "; ".join(started) or "none"),
    ]
    if unfinished.recorded is not None:
        lines.append(("  recorded", _moment(unfinished.recorded)))
    return lines


def _list(layers: list[int]) -> str:
    return format_layers(layers) or "none"


def _written(manifest: Path) -> str:
    return _moment(manifest.stat().st_mtime)


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def _cache_or_damage(path: Path, repaired: bool) -> list[tuple[str, str]]:
    """A cache that is being repaired may be one that does not open."""
    try:
        return _cache(open_cache(path))
    except StoreError as error:
        if not repaired:
            raise
        return [("damaged cache", str(error))]


def _cache(cache: Cache) -> list[tuple[str, str]]:
    info = cache.info
    size = sum(record.bytes for record in info.tensors.values())
    classes = (f"{c} {r.examples} examples, {r.rows} rows" for c, r in info.classes.items())
    return [
        ("cache", str(cache.path)),
        *_identity(cache.identity, info.origin.adapter),
        *_allowed(info.origin.allowed_mismatch),
        ("data", info.origin.data + (", texts truncated" if info.origin.truncate else "")),
        ("layers", ",".join(map(str, cache.layers))),
        ("positions", str(info.positions)),
        ("examples", f"{info.num_examples} ({'; '.join(classes)})"),
        ("tensors", f"{size:,} bytes in {len(info.tensors)} files"),
        ("rows with NaN/Inf", str(sum(info.non_finite.values()))),
        ("computed by", _execution(info.execution)),
        ("written", _written(cache.path / LAYER_INFO)),
        ("layer convention", info.layer_convention),
    ]


def _execution(execution: dict[str, str]) -> str:
    if not execution:
        return "not recorded"
    if "imported" in execution:
        return f"not recorded: imported from {execution['imported']}"
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
        ("held-out AUROC", _held_out(vectors)),
        ("trained on", info.source_cache),
        ("layer convention", info.layer_convention),
    ]


def _held_out(vectors: SavedVectors) -> str:
    validated = vectors.info.cross_validation
    if validated is None:
        return f"none: {vectors.info.not_cross_validated}"
    area, best = validated.nested, f"best layer {validated.best_layer} of {validated.folds} folds"
    if area is None:
        return best
    interval = f"{area.auroc:.3f} [{area.low:.3f}, {area.high:.3f}]"
    return f"{interval} with the layer chosen in each fold; {best}"


def _imported(identity: Identity) -> list[tuple[str, str]]:
    """What is known of the model of an imported cache, and the names of what is not."""
    unknown = [name for name in Identity.__dataclass_fields__ if not _is_known(identity, name)]
    return [
        ("model", f"{identity.model} (as told; {identity.num_hidden_layers} blocks)"),
        ("hidden size", str(identity.hidden_size)),
        ("dtype", f"{identity.dtype} of the rows; the model's own is not recorded"),
        ("not recorded", ", ".join(sorted(unknown))),
    ]


def _is_known(identity: Identity, name: str) -> bool:
    value = getattr(identity, name)
    values = value.values() if isinstance(value, Mapping) else [value]
    return all(is_recorded(one) for one in values if isinstance(one, str))


def _identity(identity: Identity, adapter: str | None = None) -> list[tuple[str, str]]:
    if is_imported(identity):
        return _imported(identity)
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
