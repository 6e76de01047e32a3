"""Time fitting as whole commands, and its memory: python -m bench probes

Writes a cache of 204 pairs at 80 layers of 8,192 in bfloat16, and one of 20 GB (`all` positions,
one layer after the other), each with a planted direction, trains on them in processes of their own
and prints seconds and the most memory that each held. The first needs 0.6 GB of disk, the second
20 GB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from synthetic import labelled, write_cache

HIDDEN, PAIRS, PROMPTS = 8192, 204, 512
METHODS = "difference-of-means,logistic,lda,ridge,pca"
# Of the child alone: ru_maxrss would survive exec and report this process's.
CHILD = """
import sys
from probecache.cli import main
try:
    main(sys.argv[1:])
finally:
    status = open("/proc/self/status").read()
    print("peak", [line for line in status.splitlines() if line.startswith("VmHWM")][0])
"""


def planted(signs: torch.Tensor, hidden: int, seed: int) -> torch.Tensor:
    """Rows [len(signs), hidden]: noise around a common mean, and a direction with the sign."""
    made = torch.Generator().manual_seed(seed)
    common = 5 * torch.randn(hidden, generator=made)
    direction = 0.05 * torch.randn(hidden, generator=made)
    return (
        torch.randn(len(signs), hidden, generator=made) + common + signs[:, None] * direction
    ).bfloat16()


def write_pairs(folder: Path, layers: int) -> None:
    """204 pairs at many layers."""
    pairs = [
        {"question": f"question {n}", "positive": f"yes {n}", "negative": f"no {n}"}
        for n in range(PAIRS)
    ]
    signs = torch.tensor([-1.0, 1.0]).repeat(PAIRS)
    rows = {n: planted(signs, HIDDEN, n) for n in range(1, layers + 1)}
    write_cache(folder, pairs, rows, num_hidden_layers=layers)


def write_big(folder: Path, size: int) -> int:
    """A cache of all positions of `size` bytes, layers of 2 GB; returns how many layers."""
    tokens = (2 << 30) // (2 * HIDDEN * PROMPTS)
    signs = torch.tensor([-1.0, 1.0]).repeat(PROMPTS // 2).repeat_interleave(tokens)
    records, layers = labelled(*["testing", "deployment"] * (PROMPTS // 2)), size >> 31
    cache = None
    for layer in range(1, layers + 1):
        rows = {layer: planted(signs, HIDDEN, layer)}
        cache = write_cache(
            folder, records, rows, tokens=[tokens] * PROMPTS, positions="all", add_to=cache
        )
    return layers


def measure(what: str, *words: object) -> None:
    """Run a command and print its seconds and memory."""
    command = [sys.executable, "-c", CHILD, *map(str, words)]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    peak = int(done.stdout.split("peak VmHWM:")[1].split()[0]) / 1e3
    print(f"{what:<64} {seconds:7.1f} s  {peak:6.0f} MB", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Write the caches and train on them."""
    parser = argparse.ArgumentParser(prog="python -m bench probes", description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--gigabytes", type=int, default=20, help="of the large cache; 0: none")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "pairs", options.layers)
        train = ("train", "--cache", folder / "pairs", "--output", folder / "run")
        shape = f"{options.layers} layers x 204 pairs x {HIDDEN}"
        measure("9 layers, difference of means", *train, "--layers", "1-9")
        measure(f"{shape}, difference of means", *train)
        measure(f"{shape}, five methods", *train, "--method", METHODS)
        if options.gigabytes:
            layers = write_big(folder / "big", options.gigabytes << 30)
            train = ("train", "--cache", folder / "big", "--output", folder / "run")
            shape = f"{layers} layers of 2 GB"
            measure(f"{shape}, difference of means", *train)
            for method in ("ridge", "logistic"):
                one = ("--layers", "1", "--method", method)
                measure(f"one layer of 2 GB, {method}, every token a row", *train, *one)
            mean = ("--positions", "mean", "--method", METHODS)
            measure(f"{shape}, five methods on the mean of each prompt", *train, *mean)


if __name__ == "__main__":
    main()
