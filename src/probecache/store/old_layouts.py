"""Caches of earlier tools of this workflow: which files are what, and the rows in them.

Two layouts, each with its layers and classes in either order, at every layer the same classes:

    layer_10/test_activations.pt   [examples, hidden] or [examples, 1, hidden], or a list of
                                   [hidden]; also layer_10/test.pt, test/layer_10.pt,
                                   layer_10_test.pt, test_activations_layer10.pt
    layer_10/test/0.pt, 1.pt ...   [1, tokens, hidden] or [tokens, hidden], or a list of one of
                                   them: one file per example; also test/layer_10/0.pt

Guarantee: every tensor file has its place, or the cache is refused with a list of those that have
none; numbers count as numbers (9 before 10) and without a gap. Nothing in the folder is changed.
Not covered: what the files do not say (which model, what a layer's number means, which tokens).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from probecache.errors import StoreError
from probecache.layers import format_layers
from probecache.store.old_tensors import content_of, load_old
from probecache.store.reader import WIDEST
from probecache.types import Dtype

if TYPE_CHECKING:
    import torch

__all__ = ["OldCache", "OldShape", "find_old_cache", "measure", "read_rows"]

_CHUNK_BYTES = 16 << 20
_LAYER = r"layer[_-]?(?P<layer>\d{1,6})"
_CLASS = (
    r"(?:activations[_-])?(?P<name>(?!activations?\b|activations[_-])[A-Za-z][A-Za-z0-9_-]{0,63}?)"
    r"(?:[_-]activations)?"
)
_STACKED = [
    re.compile(pattern + r"\.pt")
    for pattern in (
        f"{_LAYER}/{_CLASS}",
        f"{_CLASS}/{_LAYER}(?:[_-]activations)?",
        f"{_LAYER}[_-]{_CLASS}",
        f"{_CLASS}[_-]{_LAYER}(?:[_-]activations)?",
    )
]
_PER_EXAMPLE = [
    re.compile(pattern + r"/(?P<number>\d{1,9})\.pt")
    for pattern in (f"{_LAYER}/{_CLASS}", f"{_CLASS}/{_LAYER}")
]
_TENSORS = (".pt", ".pth", ".bin", ".npy", ".npz", ".safetensors", ".pkl")
_OURS = b'"format": "probecache"'


@dataclass(frozen=True)
class OldCache:
    """What an old folder holds, by names alone.

    Attributes:
        per_example: one file per example and not per class.
        files: by layer and class as the folder calls them: names relative to it, in order.
        unread: other files, which hold no tensors.
    """

    folder: Path
    per_example: bool
    files: Mapping[tuple[int, str], tuple[str, ...]]
    unread: tuple[str, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """As the folder numbers them, rising."""
        return tuple(sorted({layer for layer, _ in self.files}))

    @property
    def classes(self) -> tuple[str, ...]:
        """As the folder calls them."""
        return tuple(sorted({name for _, name in self.files}))

    @property
    def layout(self) -> str:
        """In words."""
        kind = "one file per example" if self.per_example else "one file per class"
        return f"{kind} at layers {format_layers(self.layers)}, classes {', '.join(self.classes)}"


@dataclass(frozen=True)
class OldShape:
    """What an old cache's files hold. `rows[name]` are the rows of each example of a class."""

    hidden_size: int
    dtype: Dtype
    rows: Mapping[str, tuple[int, ...]]


# ---------------------------------------------------------------- names


def find_old_cache(folder: Path) -> OldCache:
    """Sort a folder's files by layer and class.

    Raises:
        StoreError: not a folder, one of probecache itself, or files that fit neither layout.
    """
    if not folder.is_dir():
        raise StoreError(f"expected the folder of an old cache at {folder}, got none")
    _require_foreign(folder)
    placed: dict[tuple[int, str], dict[int, str]] = {}
    kinds: set[bool] = set()
    strange: list[str] = []
    unread: list[str] = []
    twins: list[tuple[str, str]] = []
    for name in _names(folder):
        place = _place(name)
        if place is not None:
            layer, class_name, number = place
            kinds.add(number is not None)
            numbered = placed.setdefault((layer, class_name), {})
            twins += [(numbered[number or 0], name)] if (number or 0) in numbered else []
            numbered[number or 0] = name
        else:
            (strange if name.lower().endswith(_TENSORS) else unread).append(name)
    if strange or len(kinds) != 1:
        raise StoreError(_not_understood(folder, strange, unread, mixed=len(kinds) > 1))
    if twins:
        raise StoreError(
            f"expected one file in place of {twins[0][0]!r} and {twins[0][1]!r} in {folder}; keep "
            "one"
        )
    files = {key: tuple(n for _, n in sorted(found.items())) for key, found in placed.items()}
    old = OldCache(folder, kinds.pop(), files, tuple(unread))
    _require_complete(old, placed)
    return old


def _require_foreign(folder: Path) -> None:
    manifest = folder / "layer_info.json"
    if manifest.is_file():
        with manifest.open("rb") as file:
            if _OURS in file.read(200):
                raise StoreError(
                    f"expected an old cache at {folder}, got one of probecache itself, which needs "
                    "no import; open it as it is"
                )


def _names(folder: Path) -> list[str]:
    """Relative names of all regular files, sorted; anything but files and folders is refused."""
    found = []
    for inner, folders, files in os.walk(folder, onerror=_raise):
        for name in [*folders, *files]:
            path = Path(inner) / name
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise StoreError(
                    f"expected only files and folders in {folder}, got {relative!r}, a link or a "
                    "device; copy what it stands for"
                )
            if name in files:
                found.append(relative)
    return sorted(found)


def _raise(error: OSError) -> None:
    raise StoreError(
        f"expected to read the folder {error.filename}, got: {error.strerror}"
    ) from error


def _place(name: str) -> tuple[int, str, int | None] | None:
    """Layer, class and, of one file per example, number of a file; None where it has none."""
    for pattern in (*_STACKED, *_PER_EXAMPLE):
        if found := pattern.fullmatch(name):
            number = found.groupdict().get("number")
            return int(found["layer"]), found["name"], None if number is None else int(number)
    return None


def _not_understood(folder: Path, strange: list[str], unread: list[str], *, mixed: bool) -> str:
    got = f"these tensor files that fit neither: {_listed(strange)}"
    if not strange:
        got = "both layouts" if mixed else f"no such files, but: {_listed(unread) or 'nothing'}"
    return (
        f"expected {folder} to hold layer_N/CLASS_activations.pt, or layer_N/CLASS/0.pt, 1.pt and "
        f"so on, and no other tensors; got {got}; give it only what is to be imported"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more


def _require_complete(old: OldCache, placed: Mapping[tuple[int, str], Mapping[int, str]]) -> None:
    """Every class at every layer, and examples numbered from 0 without a gap, alike everywhere."""
    for name in old.classes:
        for layer in old.layers:
            if (layer, name) not in placed:
                raise StoreError(
                    f"expected every class at every layer of {old.folder}, got nothing of class "
                    f"{name!r} at layer {layer}; is a file missing?"
                )
            numbers = placed[layer, name]
            # Not a set of all numbers: a forged name may claim a billion of them.
            if missing := [n for n in range(len(numbers)) if n not in numbers]:
                raise StoreError(
                    f"expected files 0.pt to {max(numbers)}.pt of class {name!r} at layer {layer} "
                    f"of {old.folder}, got no {missing[0]}.pt; is a file missing?"
                )
            first = old.layers[0]
            if len(numbers) != len(placed[first, name]):
                raise StoreError(
                    f"expected as many examples of class {name!r} at every layer of {old.folder}, "
                    f"got {len(placed[first, name])} at layer {first} and {len(numbers)} at layer "
                    f"{layer}"
                )


# ---------------------------------------------------------------- rows


def measure(old: OldCache, advance: Callable[[int], None]) -> OldShape:
    """Width, dtype and rows of all files, without reading a number.

    Args:
        advance: told how many files were looked at.

    Raises:
        StoreError: a file that is none of the layout, or that differs from the others in width,
            dtype or number of rows.
    """
    rows: dict[str, tuple[int, ...]] = {}
    common: tuple[str, int, str] | None = None
    for (layer, name), names in sorted(old.files.items()):
        counts: list[int] = []
        for file in names:
            pieces = _pieces(old, file)
            width, dtype = pieces[0].shape[1], str(pieces[0].dtype).removeprefix("torch.")
            common = common or (file, width, dtype)
            if (width, dtype) != common[1:]:
                raise StoreError(
                    f"expected {old.folder / file} to be of width {common[1]} and {common[2]} like "
                    f"{common[0]}, got width {width} and {dtype}; one cache has one model and dtype"
                )
            if old.per_example:
                counts.append(len(pieces[0]))
            else:
                counts += [1] * sum(map(len, pieces))
            advance(1)
            if width > WIDEST:
                raise StoreError(
                    f"expected rows of at most {WIDEST} numbers in {old.folder / file}, got "
                    f"{width}; no model has wider ones: were rows joined?"
                )
        if (known := rows.setdefault(name, tuple(counts))) != tuple(counts):
            raise StoreError(_unequal(old, layer, name, known, counts))
    assert common is not None
    return OldShape(common[1], Dtype(common[2]), rows)


def _unequal(
    old: OldCache, layer: int, name: str, known: tuple[int, ...], counts: list[int]
) -> str:
    where = f"class {name!r} at layer {layer} of {old.folder}"
    if len(known) != len(counts):
        return (
            f"expected {len(known)} examples of {where} as at layer {old.layers[0]}, got "
            f"{len(counts)}"
        )
    bad = next(n for n, pair in enumerate(zip(known, counts, strict=True)) if pair[0] != pair[1])
    return (
        f"expected {known[bad]} tokens in {bad}.pt of {where} as at layer {old.layers[0]}, got "
        f"{counts[bad]}"
    )


def read_rows(
    old: OldCache, shape: OldShape, layer: int, name: str, seen: Callable[[str, str], None]
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Rows of a class at a layer, as the folder calls them, in order.

    Args:
        shape: what `measure` found.
        seen: told every file's name and content (`content_of`) before its rows are handed out.

    Yields:
        first example, number of examples, and their rows [rows, hidden]: a chunk of a class, or an
        example.
    """
    step = max(1, _CHUNK_BYTES // (shape.hidden_size * shape.dtype.itemsize))
    example = 0
    for file in old.files[layer, name]:
        seen(file, content_of(old.folder / file))
        for piece in _pieces(old, file):
            size = len(piece) if old.per_example else step
            for start in range(0, len(piece), size):
                rows = piece[start : start + size]
                count = 1 if old.per_example else len(rows)
                yield example, count, rows
                example += count


def _pieces(old: OldCache, file: str) -> list[torch.Tensor]:
    """The rows of a file as tensors [rows, hidden] that lie in it."""
    path = old.folder / file
    content = load_old(path)
    tensors = content if isinstance(content, list) else [content]
    if old.per_example:
        wanted = "[1, tokens, hidden] or [tokens, hidden]"
        whole = [one[0] if one.ndim == 3 and len(one) == 1 else one for one in tensors]
        pieces = [one for one in whole if one.ndim == 2 and len(tensors) == 1]
    elif isinstance(content, list):
        wanted = "a list of [hidden]"
        pieces = [
            one.reshape(1, -1) for one in content if one.ndim and one.numel() == one.shape[-1]
        ]
    else:
        wanted = "[examples, hidden] or [examples, 1, hidden]"
        squeezed = content.squeeze(1) if content.ndim == 3 else content
        pieces = [squeezed] if squeezed.ndim == 2 else []
    if len(pieces) != len(tensors) or not all(one.numel() for one in pieces):
        shapes = [str(list(one.shape)) for one in tensors]
        raise StoreError(
            f"expected {wanted} in {path}, got {', '.join(shapes[:3])}; what was padded or joined "
            "in another way cannot be told apart: save it in this form"
        )
    if len({one.shape[1] for one in pieces}) > 1:
        raise StoreError(f"expected rows of one width in {path}, got several")
    return pieces
