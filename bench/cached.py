"""Time the commands that work from a cache, as whole processes: python -m bench cached

Writes a cache of 204 pairs (`last`) and one of 240 prompts of 60 tokens (`all`), 9 layers of 8,192
in bfloat16, with a planted direction, and prints the median of several runs of each command,
start-up included, beside the time of starting Python, of importing torch, and of reading the files.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from synthetic import labelled, write_cache

LAYERS, HIDDEN, PAIRS, PROMPTS, TOKENS = range(10, 19), 8192, 204, 240, 60


def planted(signs: torch.Tensor, hidden: int) -> dict[int, torch.Tensor]:
    """Rows [len(signs), hidden] per layer: noise, and a direction with the row's sign."""
    made = torch.Generator().manual_seed(0)
    return {
        layer: (
            torch.randn(len(signs), hidden, generator=made)
            + 0.05 * signs[:, None] * torch.randn(hidden, generator=made)
        ).bfloat16()
        for layer in LAYERS
    }


def write_caches(folder: Path, hidden: int) -> None:
    """The cache to train on and the cache to score."""
    pairs = [
        {"question": f"question {n}", "positive": f"yes {n}", "negative": f"no {n}"}
        for n in range(PAIRS)
    ]
    write_cache(folder / "pairs", pairs, planted(torch.tensor([-1.0, 1.0]).repeat(PAIRS), hidden))
    classes = ["testing", "deployment"] * (PROMPTS // 2)
    signs = torch.tensor([-1.0, 1.0]).repeat(PROMPTS // 2).repeat_interleave(TOKENS)
    write_cache(
        folder / "prompts",
        labelled(*classes),
        planted(signs, hidden),
        tokens=[TOKENS] * PROMPTS,
        positions="all",
    )


def median(run: Callable[[], object], count: int) -> float:
    """Seconds, the middle one of `count` after one that is not counted (of that one, if 0)."""
    seconds = []
    for _ in range(count + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:] or seconds)


def process(*words: object) -> Callable[[], object]:
    """A command of this Python, as something to time."""
    command = [sys.executable, *map(str, words)]
    return lambda: subprocess.run(command, check=True, capture_output=True)


def read_files(folder: Path) -> None:
    for path in folder.rglob("*.pt"):
        path.read_bytes()


def main(words: Sequence[str] | None = None) -> None:
    """Write the caches and time the commands."""
    parser = argparse.ArgumentParser(prog="python -m bench cached", description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    options = parser.parse_args(words)
    count, hidden = options.runs, options.hidden
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_caches(folder, hidden)
        command = ("-m", "probecache")
        train = (*command, "train", "--cache", folder / "pairs", "--output", folder / "run")
        process(*train)()
        score = (*command, "validate", "--vectors", next(folder.glob("run_*")))
        into = ("--output", folder / "validation")
        pairs, prompts = ("--cache", folder / "pairs"), ("--cache", folder / "prompts")
        for what, run in (
            ("python alone", process("-c", "pass")),
            ("import torch", process("-c", "import torch")),
            ("import probecache", process("-c", "import probecache")),
            ("probecache --help", process(*command, "--help")),
            ("reading the pairs' files", lambda: read_files(folder / "pairs")),
            ("reading the prompts' files", lambda: read_files(folder / "prompts")),
            (f"train, 204 pairs x 9 layers x {hidden}", process(*train)),
            ("validate, the same 408 rows per layer", process(*score, *pairs, *into)),
            ("the same with --visualize", process(*score, *pairs, *into, "--visualize")),
            ("validate, 240 prompts x 60 tokens", process(*score, *prompts, *into)),
        ):
            print(f"{what:<40} {median(run, count):6.2f} s", flush=True)
