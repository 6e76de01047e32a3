"""Is everything as it was written? Reads every file of a cache, run or validation once.

Guarantee: any change of any byte of any file is found and the file is named; in activations the
rows are named, by the CRC-32 of every example's rows. Nothing is unpickled or run, memory does not
grow with the files.
Not covered: whoever may write the folder may write its manifest anew; there is no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from probecache.errors import ProbecacheError, StoreError
from probecache.foreign import open_regular
from probecache.store.commit import is_committed
from probecache.store.filling import non_finite_rows
from probecache.store.journal import find_unfinished
from probecache.store.layout import (
    LAYER_INFO,
    METADATA,
    UNFINISHED,
    ExampleRecord,
    LayerInfo,
    activations_path,
    checksums_path,
)
from probecache.store.place import TEMPORARY
from probecache.store.reader import Cache, read_manifest
from probecache.store.seal import SEALED, folders_by_method, is_intact, strangers_among
from probecache.store.tensorfile import FileRecord, data_offset
from probecache.types import Dtype

__all__ = ["Damage", "Report", "damaged_examples", "verify"]

_CHUNK = 4 << 20


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file.

    Attributes:
        file: relative to the folder that was verified.
        what: in words.
        examples: indices of the examples whose rows are not what was written.
    """

    file: str
    what: str
    examples: tuple[int, ...] = ()


@dataclass
class Report:
    """What `verify` found.

    Attributes:
        path: what was verified.
        kind: cache, run, vectors or validation.
        files: how many were read.
        bytes: how many were read.
        damages: empty where all is as it was written.
        notes: what is worth knowing and no damage.
    """

    path: Path
    kind: str
    files: int = 0
    bytes: int = 0
    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether everything is as it was written."""
        return not self.damages


def verify(path: str | Path) -> Report:
    """Read every file and hold it against the records.

    Raises:
        StoreError: the folder holds nothing of ours.
    """
    path = Path(path)
    if (path / LAYER_INFO).is_file():
        return _verify_cache(path)
    folders = folders_by_method(path)
    found = [_verify_one(folder) for folder in folders]
    if len(found) == 1 and found[0].path == path:
        return found[0]
    if found:
        return _together(path, found, strangers_among(path, folders))
    if find_unfinished(path) is not None:
        raise StoreError(
            f"expected a finished cache at {path}, got one whose extraction has not finished; "
            "the same extract command again goes on, and checks every row that is there"
        )
    raise StoreError(
        f"expected a cache, a run or a validation at {path}, got "
        f"{'a folder without their manifests' if path.is_dir() else 'no folder'}"
    )


def _verify_one(path: Path) -> Report:
    return _verify_sealed(path, next(name for name in SEALED if (path / name).is_file()))


def _together(path: Path, reports: list[Report], strangers: list[str]) -> Report:
    """One report on the runs or validations of several methods that lie in one folder."""
    whole = Report(path, " and ".join(sorted({f"{report.kind}s" for report in reports})))
    for report in reports:
        whole.files += report.files
        whole.bytes += report.bytes
        place = report.path.name
        whole.damages += [replace(one, file=f"{place}/{one.file}") for one in report.damages]
        whole.notes += [f"{place}: {note}" for note in report.notes]
    what = "neither a run nor a validation, and not recorded"
    whole.damages += [Damage(name, what) for name in strangers]
    return whole


# ---------------------------------------------------------------- caches


def _verify_cache(path: Path) -> Report:
    while True:
        before = _state(path / LAYER_INFO)
        report = _look_at_cache(path)
        # Where layers were committed meanwhile, their files look like ones that nobody recorded.
        if report.whole or _state(path / LAYER_INFO) == before:
            return report


def _state(manifest: Path) -> tuple[int, int] | None:
    """What tells a manifest from the one that is renamed over it; None where there is none."""
    try:
        found = manifest.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _look_at_cache(path: Path) -> Report:
    report = Report(path, "cache")
    if not _check_seal(report, LAYER_INFO):
        return report
    info = read_manifest(path / LAYER_INFO, LayerInfo)
    _check_recorded(report, {name: (r.bytes, r.sha256) for name, r in info.files.items()})
    damaged = {damage.file for damage in report.damages}
    examples = _examples(report, info) if METADATA not in damaged else None
    for layer in info.layers:
        _check_layer(report, info, layer, damaged, examples)
    for name, record in info.tensors.items():
        if name not in damaged:
            _check_shape(report, name, record)
    unfinished = find_unfinished(path)
    begun = () if unfinished is None else unfinished.begun.layers
    _check_foreign(report, {LAYER_INFO, *info.files, *_coming(info, begun)}, unfinished_too=False)
    if unfinished is not None and not is_committed(unfinished):
        report.notes.append(
            f"layers {', '.join(map(str, begun))} are being "
            f"{'repaired' if unfinished.begun.repairs else 'added'}: "
            f"{unfinished.share():.1%} of their rows are on disk"
        )
    return report


def _coming(info: LayerInfo, layers: Sequence[int]) -> Iterator[str]:
    """Files of layers that are put in their places before the manifest names them."""
    for layer in layers:
        yield checksums_path(layer)
        yield from (activations_path(layer, record.prefix) for record in info.classes.values())


def _examples(report: Report, info: LayerInfo) -> tuple[ExampleRecord, ...] | None:
    """The entries of metadata.json, which must share out all rows."""
    try:
        return Cache(report.path, info).examples
    except StoreError as error:
        report.damages.append(Damage(METADATA, str(error)))
        return None


def _check_layer(
    report: Report,
    info: LayerInfo,
    layer: int,
    damaged: set[str],
    examples: tuple[ExampleRecord, ...] | None,
) -> None:
    """Name the rows of damaged files; count NaN and Inf in whole ones."""
    names = {label: activations_path(layer, r.prefix) for label, r in info.classes.items()}
    if not damaged & set(names.values()):
        found = sum(_non_finite(report.path / name, info.tensors[name]) for name in names.values())
        recorded = info.non_finite.get(layer, 0)
        if found != recorded:
            report.damages.append(
                Damage(
                    f"layer_{layer}",
                    f"{found} rows hold NaN or Inf, where {recorded} were counted",
                )
            )
        return
    if examples is None or checksums_path(layer) in damaged:
        return  # then nothing tells which rows they are
    for label, bad in damaged_examples(report.path, info, examples, layer).items():
        name = names[label]
        if name in damaged:
            place = next(n for n, d in enumerate(report.damages) if d.file == name)
            old = report.damages[place]
            report.damages[place] = Damage(name, f"{old.what}{_rows(examples, bad)}", tuple(bad))


def damaged_examples(
    path: Path, info: LayerInfo, examples: tuple[ExampleRecord, ...], layer: int
) -> dict[str, list[int]]:
    """Examples of each class whose rows at a layer do not have their CRC-32, as indices.

    A file that is missing or shorter has all those damaged that do not lie in it whole.
    """
    checksums = np.frombuffer((path / checksums_path(layer)).read_bytes(), dtype="<u4")
    found: dict[str, list[int]] = {}
    at = 0
    for label, record in info.classes.items():
        name = activations_path(layer, record.prefix)
        members = [example for example in examples if example.label == label]
        expected = checksums[at : at + len(members)]
        at += len(members)
        found[label] = _mismatching(path / name, info.tensors[name], members, expected.tolist())
    return found


def _mismatching(
    file: Path, record: FileRecord, members: list[ExampleRecord], expected: list[int]
) -> list[int]:
    row_bytes = record.shape[1] * Dtype(record.dtype).itemsize
    try:
        opened = open_regular(file)
    except OSError:
        return [example.idx for example in members]
    bad = []
    with opened:
        for example, checksum in zip(members, expected, strict=True):
            start, stop = (record.offset + row * row_bytes for row in example.rows)
            crc = 0
            for place in range(start, stop, _CHUNK):
                piece = os.pread(opened.fileno(), min(_CHUNK, stop - place), place)
                crc = zlib.crc32(piece, crc)
            if crc != checksum:
                bad.append(example.idx)
    return bad


def _rows(examples: tuple[ExampleRecord, ...], bad: list[int]) -> str:
    """Rows in words."""
    if not bad:
        return "; its rows are whole, what lies around them is not"
    ranges: list[list[int]] = []
    for index in bad:
        start, stop = examples[index].rows
        if ranges and ranges[-1][1] == start:
            ranges[-1][1] = stop
        else:
            ranges.append([start, stop])
    words = [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in ranges]
    names = [examples[index].id for index in bad]
    more = f" and {len(words) - 20} more ranges" if len(words) > 20 else ""
    others = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f": rows {', '.join(words[:20])}{more} "
        f"(examples {', '.join(map(repr, names[:5]))}{others}) are not what was written"
    )


def _non_finite(file: Path, record: FileRecord) -> int:
    row_bytes = record.shape[1] * Dtype(record.dtype).itemsize
    step = max(1, _CHUNK // row_bytes)
    count = 0
    with open_regular(file) as opened:
        for row in range(0, record.shape[0], step):
            size = min(step, record.shape[0] - row) * row_bytes
            data = os.pread(opened.fileno(), size, record.offset + row * row_bytes)
            count += non_finite_rows(memoryview(data), record.shape[1], record.dtype)
    return count


def _check_shape(report: Report, name: str, record: FileRecord) -> None:
    """The .pt's own directory must put the numbers where the record does."""
    with (report.path / name).open("rb") as file:
        try:
            offset = data_offset(file)
        except (OSError, ValueError, KeyError, ProbecacheError) as error:
            report.damages.append(Damage(name, f"no .pt file: {error}"))
            return
    if offset != record.offset:
        report.damages.append(
            Damage(name, f"its numbers begin at byte {offset}, not {record.offset} as recorded")
        )


# ---------------------------------------------------------------- runs and validations


def _verify_sealed(path: Path, name: str) -> Report:
    kinds = {"run.json": "run", "vectors.json": "vectors", "summary.json": "validation"}
    report = Report(path, kinds[name])
    if _check_seal(report, name):
        content = json.loads((path / name).read_bytes())
        try:
            records = {n: (int(r["bytes"]), str(r["sha256"])) for n, r in _records(content)}
        except (KeyError, TypeError, AttributeError, ValueError):
            report.damages.append(Damage(name, "it does not record the files of its folder"))
            return report
        _check_recorded(report, records)
        for inner in records:
            if Path(inner).name in SEALED:
                _check_seal(report, inner)
        _check_foreign(report, {name, *records}, unfinished_too=True)
    return report


def _records(content: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Names and records of the files that a manifest knows."""
    if "files" in content:
        files = content["files"]
    else:
        files = {f"layer_{layer}.pt": one["file"] for layer, one in content["layers"].items()}
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"a file outside the folder: {name!r}")
    return list(files.items())


# ---------------------------------------------------------------- files


def _check_seal(report: Report, name: str) -> bool:
    """Whether a manifest is as it was written; one that is not says nothing of other files."""
    try:
        with open_regular(report.path / name) as file:
            content = file.read()
    except OSError as error:
        _blame(report, name, _why_unread(report.path / name, error))
        return False
    report.files, report.bytes = report.files + 1, report.bytes + len(content)
    if is_intact(content):
        return True
    _blame(report, name, "not as it was written, and so no record of the other files either")
    return False


def _blame(report: Report, name: str, what: str) -> None:
    if all(damage.file != name for damage in report.damages):
        report.damages.append(Damage(name, what))


def _check_recorded(report: Report, records: dict[str, tuple[int, str]]) -> None:
    """Size and SHA-256 of every recorded file."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _fault(report.path / name, *records[name]), records)
        for name, fault in zip(records, found, strict=True):
            report.files += 1
            report.bytes += records[name][0]
            if fault is not None:
                _blame(report, name, fault)


def _fault(file: Path, size: int, sha256: str) -> str | None:
    try:
        with open_regular(file) as opened:
            actual = os.fstat(opened.fileno()).st_size
            if actual != size:
                return f"{actual:,} bytes, where {size:,} were written"
            digest = hashlib.sha256()
            while piece := opened.read(_CHUNK):
                digest.update(piece)
            return None if digest.hexdigest() == sha256 else "other content than was written"
    except OSError as error:
        return _why_unread(file, error)


def _why_unread(file: Path, error: OSError) -> str:
    if file.exists() and not file.is_file():
        return "no regular file"
    return f"cannot be read: {error.strerror}"


def _check_foreign(report: Report, known: set[str], *, unfinished_too: bool) -> None:
    """Files that nobody recorded; what is unfinished and what a kill left of it may be spared."""
    left = 0
    for inner, folders, names in os.walk(report.path):
        if not unfinished_too and Path(inner) == report.path:
            spared = {name for name in (*folders, *names) if TEMPORARY.fullmatch(name)}
            left, spared = len(spared), spared | {UNFINISHED}
            folders[:] = [name for name in folders if name not in spared]
            names = [name for name in names if name not in spared]
        for name in names:
            relative = (Path(inner) / name).relative_to(report.path).as_posix()
            if relative not in known:
                _blame(report, relative, "not recorded: it was put here by somebody else")
    if left:
        report.notes.append(
            f"{left} leftovers of a run that was killed: whatever is next written here removes them"
        )
