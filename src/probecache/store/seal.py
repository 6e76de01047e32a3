"""Manifests that tell when a byte of theirs was changed.

A sealed JSON document holds its own SHA-256: that of its bytes with 64 zeros in the seal's place.
Guarantee: `is_intact` is False after any change, be it in white space. Opening a cache does not
ask, `probecache verify` does, and so does whoever would write a manifest on from an old one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from probecache.atomic import sha256_of_file

__all__ = [
    "NO_SEAL",
    "SEALED",
    "encode_json",
    "folders_by_method",
    "is_intact",
    "record_files",
    "seal_json",
    "strangers_among",
]

NO_SEAL = "0" * 64
# The manifests of a run, of a folder of vectors, and of a validation.
SEALED = ("run.json", "vectors.json", "summary.json")
# Within a JSON string the quotes would be escaped, so a text that looks like a seal is none.
_SEAL = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')


def encode_json(content: Any) -> bytes:
    """Readable JSON in UTF-8, the same bytes for the same content."""
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def seal_json(content: dict[str, Any], size: int = 0) -> bytes:
    """A sealed document, padded with blanks to at least `size` bytes."""
    blank = encode_json({**content, "manifest_sha256": NO_SEAL}).ljust(size)
    start, stop = _place(blank)
    return blank[:start] + hashlib.sha256(blank).hexdigest().encode() + blank[stop:]


def record_files(folder: Path, but: str) -> dict[str, dict[str, int | str]]:
    """Bytes and SHA-256 of every file below a folder but one, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for name, path in names.items()
        if name != but
    }


def folders_by_method(path: Path) -> tuple[Path, ...]:
    """The runs, vectors or validations that a path stands for: itself, or one for each method.

    Empty where there is neither.
    """
    if any((path / name).is_file() for name in SEALED):
        return (path,)
    if not path.is_dir():
        return ()
    held = ("run.json", "summary.json")
    return tuple(
        child for child in sorted(path.iterdir()) if any((child / n).is_file() for n in held)
    )


def strangers_among(path: Path, found: Sequence[Path]) -> list[str]:
    """What lies in a folder of several methods besides their folders, by name."""
    if tuple(found) == (path,) or not found:
        return []
    return sorted({child.name for child in path.iterdir()} - {one.name for one in found})


def is_intact(document: bytes) -> bool:
    """Whether a sealed document is as it was written."""
    try:
        start, stop = _place(document)
    except ValueError:
        return False
    blank = document[:start] + NO_SEAL.encode() + document[stop:]
    return hashlib.sha256(blank).hexdigest().encode() == document[start:stop]


def _place(document: bytes) -> tuple[int, int]:
    places = [match.span(1) for match in _SEAL.finditer(document)]
    if len(places) != 1:
        raise ValueError(f"expected one seal, got {len(places)}")
    return places[0]
