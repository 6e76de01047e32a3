"""Caches of earlier tools, made by plain torch.save from random numbers, and forged `.pt` files."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

LAYERS, CLASSES = (9, 10), {"test": 12, "deploy": 11}
HIDDEN = 6


def save(path: Path, content: Any) -> Path:
    """torch.save, with the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def random_rows(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """[count, HIDDEN]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HIDDEN, generator=generator).to(dtype)


def stacked(
    folder: Path,
    name: str = "layer_{layer}/{label}_activations.pt",
    *,
    dtype: torch.dtype = torch.float32,
    middle: bool = False,
    layers: tuple[int, ...] = LAYERS,
    classes: dict[str, int] = CLASSES,
) -> dict[tuple[int, str], torch.Tensor]:
    """One file per class; what was saved, as [n, HIDDEN]."""
    saved = {}
    for layer in layers:
        for seed, (label, count) in enumerate(classes.items()):
            rows = random_rows(count, dtype, seed + 100 * layer) + seed
            saved[layer, label] = rows
            path = folder / name.format(layer=layer, label=label)
            save(path, rows[:, None].clone() if middle else rows)
    return saved


def per_example(
    folder: Path, name: str = "layer_{layer}/{label}/{number}.pt", *, dtype=torch.float32
) -> dict[tuple[int, str], list[torch.Tensor]]:
    """One file per example, of [1, tokens, HIDDEN]; what was saved, as [tokens, HIDDEN]."""
    saved: dict[tuple[int, str], list[torch.Tensor]] = {}
    for layer in LAYERS:
        for seed, (label, count) in enumerate(CLASSES.items()):
            for number in range(count):
                rows = random_rows(1 + number % 4, dtype, 1000 * layer + 100 * seed + number)
                rows = rows + seed
                saved.setdefault((layer, label), []).append(rows)
                path = folder / name.format(layer=layer, label=label, number=number)
                save(path, rows[None])
    return saved


# ---------------------------------------------------------------- forgeries


def forge(path: Path, pickled: bytes, data: bytes = b"", **records: bytes) -> Path:
    """A `.pt` with a pickle of one's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", data)
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
    return path


class _Storage:
    """Stands for the numbers in a pickle."""


class Calls:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = (function, arguments)

    def __reduce__(self) -> Any:
        return self.what


def pickle_of(content: Any, claimed: int = 0) -> bytes:
    """The pickle of anything, as torch.save would write it; `claimed` numbers in the storage."""
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            if isinstance(thing, _Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", claimed)
            return None

    Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def tensor_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> Calls:
    """What a tensor of this shape pickles to."""
    return Calls(_rebuild_tensor_v2, _Storage(), 0, shape, stride, False, OrderedDict())
