"""python -m bench plan: the dry run over very many prompts, as a whole process.

Writes labelled prompts made of the shipped texts, or with --pairs half as many pairs, each with a
number in front so that no two are alike, and runs `probecache plan` on them with models/tiny-llama:
start-up, reading, rendering, tokenising, counting prefixes and planning batches. Nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.report import gigabytes, machine, progress, table

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "tiny-llama"


def records(count: int, pairs: bool) -> Iterator[dict[str, Any]]:
    """Records for so many prompts, made of what ships."""
    name = "contrastive_dataset" if pairs else "validation_real"
    shipped = json.loads((ROOT / "datasets" / f"{name}.json").read_text())
    # The file holds one class after the other; taken in turn, the first few are of both.
    half = len(shipped) // 2
    shipped = [
        record for both in zip(shipped[:half], shipped[half:], strict=True) for record in both
    ]
    turns = itertools.islice(itertools.cycle(shipped), -(-count // 2) if pairs else count)
    for number, record in enumerate(turns):
        yield {**record, "id": f"r{number}", "question": f"{number}. {record['question']}"}


def run(command: list[str]) -> tuple[float, int, str]:
    """Seconds, peak memory in bytes and output of a command.

    The peak is wait4's, which also counts what this process held when it started the command; this
    one stays small for that reason.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"expected {' '.join(command)} to run, got exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_maxrss * unit, printed


def main(words: Sequence[str] | None = None) -> None:
    """Write the data, run the command, print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench plan", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="prompts")
    parser.add_argument("--pairs", action="store_true", help="half as many pairs")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--layers", default="10,20,23")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "prompts.jsonl"
        with data.open("w", encoding="utf-8") as file:
            for record in records(options.count, options.pairs):
                file.write(json.dumps(record) + "\n")
        plan = ["-m", "probecache", "plan", "--model", str(MODEL), "--data", str(data)]
        runs = []
        for _ in range(options.repeats):
            runs.append(run([sys.executable, *plan, "--layers", options.layers]))
            progress(f"  {runs[-1][0]:.1f} s, {gigabytes(runs[-1][1])}")
    seconds = [seconds for seconds, _, _ in runs]
    rows = [
        ["prompts per second", f"{options.count / min(seconds):,.0f}"],
        ["seconds, minimum (median)", f"{min(seconds):.1f} ({statistics.median(seconds):.1f})"],
        ["peak memory", gigabytes(max(peak for _, peak, _ in runs))],
    ]
    what = f"`probecache plan`, {options.count:,} prompts" + (" of pairs" if options.pairs else "")
    print(table((what, ""), rows), runs[-1][2].rstrip(), machine(), sep="\n\n")
