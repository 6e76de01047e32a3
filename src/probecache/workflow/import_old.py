"""A cache of an earlier tool to a cache: rows bit for bit, and no word that nobody has said.

Guarantee: what the old files do not record has to be told, or the import is refused; what nobody
can tell (weights, tokenizer, prompts) is stored as not recorded, which equals nothing else. The old
folder is only read; the new cache appears whole or not at all.
Not covered: whether what is told is true.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probecache.atomic import commit_folder, disk_errors_named, real_path, temporary_sibling
from probecache.dataset import Dataset, load_dataset
from probecache.errors import LayerError, MismatchError, NonFiniteError, OutputError, UsageError
from probecache.progress import Progress
from probecache.store.journal import Begun
from probecache.store.layout import Blueprint, Origin, class_prefixes, lay_out
from probecache.store.old_layouts import OldCache, OldShape, find_old_cache, measure, read_rows
from probecache.store.reader import Cache, open_cache
from probecache.store.writer import CacheWriter, open_writer
from probecache.types import Example, Identity, Positions
from probecache.unrecorded import unrecorded

if TYPE_CHECKING:
    import torch

__all__ = ["ImportPlan", "ImportRequest", "LayerConvention", "SpecialTokens", "import_cache"]

_DEEPEST = 10_000  # no model has more blocks
_NO_TOKEN = -1  # in tokens.pt, where a token's id is not recorded
_NO_QUESTION = "(question not recorded)"
_CLASS_OF_WORD = {"test": "testing", "deploy": "deployment"}
_WHAT_IS_TOLD = {
    "--model": "folder or hub id of the model, written down as told",
    "--layer-convention": "what layer_N holds: residual = the stream after N blocks, before the "
    "final norm; hidden_states = entry N of Hugging Face's hidden_states, whose last one is "
    "normed; block = the output of block N, counted from 0",
    "--num-hidden-layers": "how many blocks the model has",
    "--positions": "which tokens the rows stand for: last, mean, all or answer",
    "--special-tokens": "whether BOS, special and template tokens are in the mean or among all: "
    "kept or left-out",
}


class LayerConvention(StrEnum):
    """What an old tool counted."""

    RESIDUAL = "residual"
    HIDDEN_STATES = "hidden_states"
    BLOCK = "block"


class SpecialTokens(StrEnum):
    """Whether BOS, special and template tokens are among the rows."""

    KEPT = "kept"
    LEFT_OUT = "left-out"


@dataclass(frozen=True)
class ImportRequest:
    """What to import, and what is told of it; None is not told.

    Attributes:
        old: the folder.
        model: its name, written down and not looked at.
        layer_convention: what the numbers of its layers mean.
        num_hidden_layers: blocks of the model.
        positions: which tokens the rows stand for.
        special_tokens: whether `mean` and `all` include those of the template.
        data: what the old cache was made from, in its order; None: not known.
        allow_nonfinite: keep rows with NaN or Inf, counted, instead of stopping.
        quiet: no progress on stderr.
    """

    old: Path
    model: str | None = None
    layer_convention: LayerConvention | None = None
    num_hidden_layers: int | None = None
    positions: Positions | None = None
    special_tokens: SpecialTokens | None = None
    data: str | Path | Sequence[Mapping[str, Any]] | None = None
    allow_nonfinite: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class ImportPlan:
    """What will be imported.

    Attributes:
        layers: number of each layer in the old cache to that in the new one.
        normed: old layers that are left out, because they hold the normed hidden states.
        labels: class of each name in the old cache.
        members: of each name the indices of its examples, in its order.
    """

    request: ImportRequest
    old: OldCache
    layers: Mapping[int, int]
    normed: tuple[int, ...]
    labels: Mapping[str, str]
    members: Mapping[str, Sequence[int]]
    shape: OldShape
    blueprint: Blueprint
    data: str | None


def import_cache(
    request: ImportRequest,
    new: str | Path,
    announce: Callable[[ImportPlan], None] | None = None,
) -> Cache:
    """Read an old cache and write it as a cache.

    Args:
        new: the cache's folder: nothing, or an empty folder.
        announce: told what will be imported before a row is read.

    Raises:
        UsageError: something is not told, or does not go with the files; lists all that is missing.
        StoreError: files that are not understood, not whole or more than tensors.
        MismatchError: `data` is not what the old cache was made from.
        NonFiniteError, OutputError.
    """
    place = _free_place(Path(new), request.old)
    planned = _plan(request)
    if announce is not None:
        announce(planned)
    blueprint = planned.blueprint
    needed = blueprint.bytes_per_layer * len(blueprint.layers)
    with disk_errors_named(Path(new), needed), temporary_sibling(place) as folder:
        _write(planned, folder / "cache")
        commit_folder(folder / "cache", place)
    return open_cache(Path(new))


def _free_place(new: Path, old: Path) -> Path:
    place = real_path(new)
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise OutputError(f"expected {new} to be free for the new cache, got something there")
    if old.exists() and place.absolute().resolve().is_relative_to(old.resolve()):
        raise OutputError(
            f"expected the new cache outside {old}, which is only read, got {new}; choose another"
        )
    return place


# ---------------------------------------------------------------- what is told


def _plan(request: ImportRequest) -> ImportPlan:
    old = find_old_cache(request.old)
    _require_told(request, old)
    layers, normed = _renumbered(request, old)
    dataset = load_dataset(request.data) if request.data is not None else None
    labels = _labels(old, dataset)
    with Progress(
        sum(map(len, old.files.values())), "looking at", "files", quiet=request.quiet
    ) as progress:
        shape = measure(old, progress.update)
    _require_positions(request, old, shape)
    examples = _recorded(dataset, labels, shape) if dataset else _unnamed(labels, shape)
    members = {
        name: [place for place, example in enumerate(examples) if example.label == label]
        for name, label in labels.items()
    }
    return ImportPlan(
        request=request,
        old=old,
        layers=layers,
        normed=normed,
        labels=labels,
        members=members,
        shape=shape,
        blueprint=_blueprint(request, shape, layers, examples, members, dataset),
        data=dataset.fingerprint() if dataset else None,
    )


def _require_told(request: ImportRequest, old: OldCache) -> None:
    """Raise UsageError with everything that is missing at once."""
    positions = request.positions
    if positions is not None and (positions.by_place or positions.last_count is not None):
        raise UsageError(
            f"expected --positions last, mean, all or answer of a cache to import, got {positions}"
        )
    told = {
        "--model": request.model,
        "--layer-convention": request.layer_convention,
        "--num-hidden-layers": request.num_hidden_layers,
        "--positions": request.positions,
    }
    if request.positions in (None, Positions.MEAN, Positions.ALL):
        told["--special-tokens"] = request.special_tokens
    elif request.special_tokens is not None:
        raise UsageError(
            f"expected --special-tokens with positions mean or all alone, got it with "
            f"{request.positions}, which is a token of its own; leave it out"
        )
    missing = [name for name, value in told.items() if value is None or not str(value).strip()]
    if missing:
        raise UsageError(
            f"expected to be told what an old cache does not record, got no "
            f"{'; no '.join(f'{name} ({_WHAT_IS_TOLD[name]})' for name in missing)}. {old.folder} "
            f"holds {old.layout}"
        )
    if not 1 <= (request.num_hidden_layers or 0) <= _DEEPEST:
        raise UsageError(
            f"expected --num-hidden-layers from 1 to {_DEEPEST}, got {request.num_hidden_layers}"
        )


def _renumbered(request: ImportRequest, old: OldCache) -> tuple[dict[int, int], tuple[int, ...]]:
    """Old number of every layer to ours, and those that are the normed ones."""
    deepest = request.num_hidden_layers
    assert deepest is not None
    shift = 1 if request.layer_convention is LayerConvention.BLOCK else 0
    for layer in old.layers:
        if layer + shift > deepest:
            raise LayerError(
                f"expected layers 0 to {deepest - shift} in {old.folder} with --layer-convention "
                f"{request.layer_convention} and {deepest} blocks, got layer {layer}; check "
                "--layer-convention and --num-hidden-layers",
                layer,
            )
    normed: tuple[int, ...] = ()
    if request.layer_convention is LayerConvention.HIDDEN_STATES:
        normed = tuple(layer for layer in old.layers if layer == deepest)
    kept = {layer: layer + shift for layer in old.layers if layer not in normed}
    if not kept:
        raise UsageError(
            f"expected a layer of the residual stream in {old.folder}, got only layer {deepest}, "
            "which in hidden_states has gone through the final norm; nothing is left to import"
        )
    return kept, normed


def _require_positions(request: ImportRequest, old: OldCache, shape: OldShape) -> None:
    """Positions that fit the files: one row per example, or several."""
    positions = request.positions
    assert positions is not None
    if not old.per_example and not positions.one_row:
        raise UsageError(
            f"expected --positions last or mean for {old.folder}, whose files hold one row per "
            f"example, got {positions}"
        )
    most = max(max(rows) for rows in shape.rows.values())
    if positions.one_row and most > 1:
        raise UsageError(
            f"expected --positions all or answer for {old.folder}, whose files hold up to {most} "
            f"tokens per example, got {positions}"
        )


# ---------------------------------------------------------------- which examples


def _labels(old: OldCache, dataset: Dataset | None) -> dict[str, str]:
    """The class of each name of the old cache, the testing side first.

    Raises:
        MismatchError: names and the data's classes are not one to one.
    """
    names = {name: _CLASS_OF_WORD.get(name.lower(), name) for name in old.classes}
    if dataset is not None:
        prefixes = class_prefixes(dataset.labels)
        for name, told in names.items():
            same = [label for label in dataset.labels if name in (label, prefixes[label])]
            names[name] = same[0] if same else told
    found = Counter(names.values())
    expected = set(dataset.labels) if dataset is not None else set(found)
    if max(found.values()) > 1 or set(found) != expected:
        raise MismatchError(
            f"expected one name for each of the classes {', '.join(sorted(expected))} in "
            f"{old.folder}, got files of {', '.join(old.classes)}; "
            + (f"check {dataset.source}" if dataset else "keep one name of each class")
        )
    if len(found) < 2:
        raise MismatchError(
            f"expected two classes or more in {old.folder}, got only {old.classes[0]!r}; a probe "
            "has to tell one from another"
        )
    order = {"testing": 0, "deployment": 1}
    ranked = sorted(names.items(), key=lambda item: (order.get(item[1], 2), item[1]))
    return dict(ranked)


def _recorded(dataset: Dataset, labels: Mapping[str, str], shape: OldShape) -> tuple[Example, ...]:
    """The data's examples, if there are as many of each class as in the old cache."""
    counts = Counter(example.label for example in dataset.examples)
    for name, label in labels.items():
        if counts[label] != len(shape.rows[name]):
            raise MismatchError(
                f"expected the old cache's {len(shape.rows[name])} examples of class {label!r} in "
                f"{dataset.source}, got {counts[label]}; name the very file that the cache was "
                "made from, or leave --data out"
            )
    return dataset.examples


def _unnamed(labels: Mapping[str, str], shape: OldShape) -> tuple[Example, ...]:
    """Examples of which nothing but class and number is known."""
    prefixes = class_prefixes(tuple(labels.values()))
    names = [
        (f"{prefixes[label]}-{number}", label)
        for name, label in labels.items()
        for number in range(len(shape.rows[name]))
    ]
    return tuple(
        Example(row, identifier, identifier, label, _NO_QUESTION, ())
        for row, (identifier, label) in enumerate(names, start=1)
    )


def _blueprint(
    request: ImportRequest,
    shape: OldShape,
    layers: Mapping[int, int],
    examples: Sequence[Example],
    members: Mapping[str, Sequence[int]],
    dataset: Dataset | None,
) -> Blueprint:
    positions = request.positions
    assert positions is not None
    kept = [1] * len(examples)
    for name, places in members.items():
        for place, rows in zip(places, shape.rows[name], strict=True):
            kept[place] = rows
    classes, records = lay_out(examples, kept, [0] * len(examples), positions)
    return Blueprint(
        layers=tuple(sorted(layers.values())),
        hidden_size=shape.hidden_size,
        dtype=shape.dtype,
        positions=positions,
        num_examples=dataset.num_examples if dataset else len(examples),
        origin=Origin(data=dataset.source if dataset else "not recorded"),
        classes=classes,
        examples=records,
    )


# ---------------------------------------------------------------- the rows


def _write(planned: ImportPlan, folder: Path) -> None:
    """Fill and commit a cache: the only place that knows the writer."""
    blueprint, content = planned.blueprint, hashlib.sha256()
    content.update(f"{planned.request.layer_convention}\n".encode())

    def begin() -> Begun:
        return Begun.of(blueprint, _identity(planned, "0" * 64))

    def seen(name: str, digest: str) -> None:
        content.update(f"{name!r} {digest}\n".encode())

    with open_writer(folder, blueprint, begin) as writer:
        writer.write_tokens(np.full(blueprint.rows, _NO_TOKEN, dtype=np.int32))
        _fill(planned, writer, seen)
        execution = {"imported": planned.old.layout}
        writer.commit(_identity(planned, content.hexdigest()), {}, execution)


def _fill(planned: ImportPlan, writer: CacheWriter, seen: Callable[[str, str], None]) -> None:
    request, blueprint = planned.request, planned.blueprint
    total = len(blueprint.examples) * len(planned.layers)
    with Progress(total, "importing", "examples x layers", quiet=request.quiet) as progress:
        for layer, ours in planned.layers.items():
            for name, members in planned.members.items():
                for first, count, rows in read_rows(planned.old, planned.shape, layer, name, seen):
                    if not request.allow_nonfinite:
                        _require_finite(rows, f"class {name!r} at layer {layer}", first, request)
                    writer.write(ours, members[first : first + count], rows)
                    progress.update(count)


def _require_finite(rows: torch.Tensor, where: str, first: int, request: ImportRequest) -> None:
    import torch

    bad = ~torch.isfinite(rows).all(dim=1)
    if bad.any():
        raise NonFiniteError(
            f"expected finite activations in {where} of {request.old}, got NaN or Inf in "
            f"{int(bad.sum())} of {len(bad)} rows from example {first} on; import them all the "
            "same, counted, with --allow-nonfinite"
        )


def _identity(planned: ImportPlan, content: str) -> Identity:
    """What is told and what the tensors say; all else is a note that equals nothing else.

    Args:
        content: hex hash of all that was read, and of how its layers were counted.
    """
    request, unknown = planned.request, unrecorded(content)
    assert request.model is not None
    assert request.num_hidden_layers is not None
    assert request.positions is not None
    return Identity(
        model=request.model,
        revision=None,
        weights=dict.fromkeys(planned.blueprint.layers, unknown),
        weight_samples={},
        config={"all": unknown},
        architecture=unknown,
        num_hidden_layers=request.num_hidden_layers,
        hidden_size=planned.shape.hidden_size,
        dtype=str(planned.shape.dtype),
        quantization=unknown,
        adapter=unknown,
        attention=unknown,
        tokenizer=unknown,
        chat_template=unknown,
        template_date=unknown,
        system_prompt=unknown,
        data=planned.data or unknown,
        token_ids=unknown,
        positions=str(request.positions),
        special_tokens_kept=request.special_tokens is SpecialTokens.KEPT,
        versions={"imported by probecache": version("probecache")},
    )
