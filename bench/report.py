"""Markdown tables that can be pasted into docs/benchmarks.md, and what stands below them."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("probecache", "torch", "transformers")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(threads: int | None = None, device: str | None = None) -> str:
    """Processor, cores, memory, versions and date, as a table of one column of facts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        ("processor", processor()),
        ("cores", f"{cores}" + (f", {threads} threads" if threads else "")),
        ("memory", gigabytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))),
        *([("device", device)] if device else []),
        ("versions", ", ".join([f"Python {platform.python_version()}", *map(_version, _PACKAGES)])),
        ("date", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
    ]
    return table(("machine", ""), rows)


def processor() -> str:
    """The processor's name as the kernel gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    wide = any("avx512f" in line for line in lines)
    return (names[0] if names else platform.processor()) + (", AVX-512" if wide else "")


def gigabytes(count: float) -> str:
    """Bytes in the unit that suits them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def size_in_bytes(text: str) -> int:
    """`1.2GB`, `800MB` or plain bytes as a number, for argparse."""
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    unit = units.get(text[-2:].upper())
    return int(float(text[:-2]) * unit) if unit else int(text)


def progress(text: str) -> None:
    """A line for whoever waits; the tables alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


def _version(package: str) -> str:
    return f"{package} {version(package)}"
