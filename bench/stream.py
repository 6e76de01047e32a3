"""python -m bench stream: layer by layer against the whole model in memory.

A Llama larger than the memory that streaming is given is written to disk (or an earlier one of the
same shape is used), and the shipped pairs are extracted by both engines, each in a process of its
own, in turn. Told of each: seconds, peak memory, bytes read against the bytes that the wanted
layers need, and whether both caches hold the same bytes.

Bytes read are counted in a run of their own that is not timed, for which the weight files are
dropped from the page cache: `read()` is what read and pread returned (rchar), `disk` is what came
from the disk (read_bytes), memory-mapped weights included, read-ahead too.

--memory-limit is a hard one on the streaming process: RLIMIT_DATA, whatever it allocates or maps
privately and writably, code and shared file maps left out. The resident one runs without.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.report import gigabytes, machine, progress, size_in_bytes, table
from bench.shapes import (
    MEDIUM,
    Shape,
    add_shape_options,
    is_written,
    layer_numbers,
    shape_of,
)

ROOT = Path(__file__).parents[1]
DATA = ROOT / "datasets" / "contrastive_dataset.json"
Run = dict[str, float]


class ChildError(Exception):
    """A measured process ended badly; the message is its last words."""


def child(task: dict[str, Any], timeout: float | None = None) -> tuple[dict[str, Any], float]:
    """What `bench.child` answers, and its seconds from start to end."""
    started = time.perf_counter()
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "bench.child", json.dumps(task)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        # Under a hard limit a library may try for ever to get what it cannot have.
        raise ChildError(f"did not end within {timeout:.0f} s") from None
    seconds = time.perf_counter() - started
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or [f"ended with {ran.returncode}"]
        raise ChildError(said[-1])
    return json.loads(ran.stdout.splitlines()[-1]), seconds


def needed_bytes(folder: Path, depth: int) -> int:
    """Bytes of the embeddings and of the first `depth` blocks, from the headers of the files."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, tensor in header.items():
            words = name.split(".")
            in_block = "layers" in words and int(words[words.index("layers") + 1]) < depth
            if in_block or "embed_tokens" in words:
                start, stop = tensor["data_offsets"]
                total += stop - start
    return total


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that reading them reads the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not on disk yet stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_engine(engine: str, model: Path, output: Path, options: argparse.Namespace) -> Run:
    """One extraction in a process of its own."""
    streaming = engine == "stream"
    arguments = {
        "model": str(model),
        "data": str(DATA) if options.count is None else _first_pairs(options.count),
        "layers": list(options.layers),
        "output": str(output),
        "positions": options.positions,
        "dtype": options.shape.dtype,
        "device": options.device,
    }
    # The resident engine is what a version with only one engine has.
    if streaming:
        arguments |= {"engine": "stream"}
        arguments |= {"memory": options.memory} if options.memory else {}
    elif options.name_engines:
        arguments |= {"engine": "resident"}
    limit = options.memory_limit if streaming else None
    found, seconds = child({"extract": arguments, "limit": limit}, options.timeout)
    return {**found, "process_s": seconds}


def _first_pairs(count: int) -> list[dict[str, Any]]:
    pairs: list[dict[str, Any]] = json.loads(DATA.read_text())
    return pairs[:count]


def measure(model: Path, options: argparse.Namespace, folder: Path) -> dict[str, list[Run]]:
    """Runs of every engine by its column's name; the first of each is the one that counts bytes."""
    runs: dict[str, list[Run]] = {name: [] for name in options.columns}
    for number in range(options.repeats + 1):
        for column, engine in options.columns.items():
            if number == 0:
                forget(model)
            try:
                run = run_engine(engine, model, folder / f"{column}_{number}", options)
            except ChildError as error:
                sys.exit(f"{column}: {error}")
            runs[column].append(run)
            what = "counted" if number == 0 else "timed"
            progress(f"  {column}, {what}: {run['process_s']:.2f} s, {run['extract_s']:.2f} s of "
                     f"it extraction, {gigabytes(run['peak_rss'])}")  # fmt: skip
    return runs


def same_bytes(first: Path, second: Path) -> tuple[int, int]:
    """Activation files of two caches: how many are equal byte for byte, of how many."""
    names = sorted(path.relative_to(first) for path in first.rglob("layer_*/*.pt"))
    others = sorted(path.relative_to(second) for path in second.rglob("layer_*/*.pt"))
    if names != others or not names:
        sys.exit(f"expected both caches to hold the same files, got {names} and {others}")
    equal = [filecmp.cmp(first / name, second / name, shallow=False) for name in names]
    return sum(equal), len(names)


def largest_difference(first: Path, second: Path) -> float:
    """The largest |a - b| / |b| of a row, over all files of two caches."""
    import numpy as np

    from probecache.store.reader import open_cache

    a, b, worst = open_cache(first), open_cache(second), 0.0
    for layer in a.layers:
        for label in a.classes:
            pairs = zip(a.chunks(label, layer), b.chunks(label, layer), strict=True)
            for (_, left), (_, right) in pairs:
                lengths = np.linalg.norm(right.astype(np.float64), axis=1)
                apart = np.linalg.norm(left.astype(np.float64) - right, axis=1)
                worst = max(worst, float((apart / lengths).max()))
    return worst


# ---------------------------------------------------------------- what is printed


def ratios(runs: dict[str, list[Run]], folder: Path, needed: int) -> str:
    """The second engine against the first."""
    (first, one), (second, two) = runs.items()
    rows = [
        [f"{second} / {first}: {what}", " ".join(
            wrap.format(by(run[key] for run in _timed(two)) / by(run[key] for run in _timed(one)))
            for wrap, by in (("{:.2f}", min), ("({:.2f})", statistics.median)))]
        for what, key in (("extraction", "extract_s"), ("whole process", "process_s"))
    ]  # fmt: skip
    rows.append([f"{second} / {first}: peak memory", f"{_peak(two) / _peak(one):.2f}"])
    for column, column_runs in runs.items():
        read = max(column_runs[0].get("rchar", math.nan), column_runs[0].get("read_bytes", 0))
        rows.append([f"{column}: bytes read / bytes needed", f"{read / needed:.3f}"])
    equal, files = same_bytes(folder / f"{first}_0", folder / f"{second}_0")
    differ = largest_difference(folder / f"{first}_0", folder / f"{second}_0")
    rows.append(["files of activations equal byte for byte", f"{equal} of {files}"])
    rows.append(["largest relative difference of a row", f"{differ:.1e}"])
    return table(("ratio: of minima (of medians)", ""), rows)


def details(runs: dict[str, list[Run]], needed: int) -> str:
    """Seconds, memory and bytes of each engine."""
    rows = [
        [what, *(_seconds(found, key) for found in runs.values())]
        for what, key in (
            ("extraction", "extract_s"),
            ("loading", "load_s"),
            ("writing", "write_s"),
            ("whole process", "process_s"),
        )
    ]
    rows.append(["peak memory of the process", *(gigabytes(_peak(f)) for f in runs.values())])
    if any(found[0]["peak_gpu"] for found in runs.values()):
        peaks = (max(run["peak_gpu"] for run in found) for found in runs.values())
        rows.append(["peak memory of the GPU", *map(gigabytes, peaks)])
    rows.append(["bytes needed", *[gigabytes(needed)] * len(runs)])
    for what, key in (("by read()", "rchar"), ("from disk", "read_bytes")):
        if key in next(iter(runs.values()))[0]:
            rows.append([f"bytes read {what}", *(gigabytes(f[0][key]) for f in runs.values())])
    return table(("seconds: minimum (median)", *runs), rows)


def _timed(found: list[Run]) -> list[Run]:
    return found[1:] or found


def _seconds(found: list[Run], key: str) -> str:
    values = [run[key] for run in _timed(found) if key in run]
    return f"{min(values):.2f} ({statistics.median(values):.2f})" if values else "not told"


def _peak(found: list[Run]) -> float:
    """The worst of the timed runs."""
    return max(run["peak_rss"] for run in _timed(found))


def takes_engine() -> bool:
    """Whether this version of probecache has engines to choose from."""
    import inspect

    import probecache

    return "engine" in inspect.signature(probecache.extract).parameters


def parse(words: Sequence[str] | None, default: Shape) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench stream",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, where = parser.add_argument, Path(tempfile.gettempdir()) / "probecache-bench"
    add("--folder", type=Path, help=f"where the model is, or goes [a folder in {where}]")
    add("--engines", nargs=2, choices=("resident", "stream"), default=["resident", "stream"])
    add("--layers", type=layer_numbers, help="[a third, two thirds and all but two blocks]")
    add("--count", type=int, help="so many pairs, the first [all]")
    add("--positions", default="last")
    add("--repeats", type=int, default=3,
        help="timed rounds; one more counts bytes, and with 0 is the only one")  # fmt: skip
    add("--memory", help="passed to probecache.extract when it streams")
    add("--memory-limit", type=size_in_bytes, help="hard limit on the streaming process: 1.2GB")
    add("--timeout", type=float, default=1800, help="seconds that one process may take")
    add("--device", default="cpu")
    add_shape_options(parser, str(default))
    options = parser.parse_args(words)
    options.shape = shape_of(options, default)
    deep = options.shape.blocks
    options.layers = options.layers or tuple(sorted({max(deep // 3, 1), deep * 2 // 3, deep - 2}))
    if not 0 <= options.layers[0] <= options.layers[-1] <= deep or options.repeats < 0:
        parser.error(f"expected --layers from 0 to {deep} ")
    options.folder = (options.folder or where / _name(options.shape)).resolve()
    options.name_engines = takes_engine()
    if "stream" in options.engines and not options.name_engines:
        parser.error("expected a probecache that takes engine=, got one without; to try this "
                     "benchmark: --engines resident resident")  # fmt: skip
    first, second = options.engines
    options.columns = {first: first, second if second != first else f"{second} again": second}
    return options


def _name(shape: Shape) -> str:
    return "-".join(str(value) for value in ("llama", *asdict(shape).values())).lower()


def main(words: Sequence[str] | None = None, default: Shape = MEDIUM) -> None:
    """Make the model, run both engines in turn, print the tables."""
    options = parse(words, default)
    progress(f"{options.shape} in {options.folder}")
    if not is_written(options.folder, options.shape):
        # In another process: a large parent would be counted with its children.
        folder, shape = str(options.folder), asdict(options.shape)
        child({"make": {"folder": folder, "shape": shape, "device": options.device}})
    needed = needed_bytes(options.folder, options.layers[-1])
    with tempfile.TemporaryDirectory() as name:
        runs = measure(options.folder, options, Path(name))
        print(ratios(runs, Path(name), needed), details(runs, needed), sep="\n\n", end="\n\n")
    limit = options.memory_limit
    print(
        f"{options.shape}; layers {', '.join(map(str, options.layers))} of {options.shape.blocks}; "
        f"{options.repeats} rounds; memory {options.memory or 'as it chooses'}, hard limit "
        f"{gigabytes(limit) if limit else 'none'}.\n"
    )
    print(machine(device=options.device))
