"""A process of its own whose seconds, memory and reads are measured; `stream.py` starts it.

python -m bench.child JSON, with {"make": folder and shape} or {"extract": arguments of
`probecache.extract`, "limit": bytes or null}. The last line of its output is JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.shapes import Shape, write_llama

if TYPE_CHECKING:
    from probecache.workflow.extract import Took


def extract(arguments: dict[str, Any], limit: int | None) -> dict[str, float]:
    """Extract under a hard limit on data; seconds, peak memory and bytes read.

    rchar counts what read() and pread() returned, from disk or from the page cache, and nothing
    that was read through a memory map. read_bytes counts what came from the disk for this process,
    through maps too, but nothing that was in the page cache already. Libraries are imported before
    the counting starts; data, tokenizer and config are in it, and samples that identify the
    weights.
    """
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import probecache

    before, started = _io(), time.perf_counter()
    took: list[Took] = []
    cache = probecache.extract(**arguments, quiet=True, finished=took.append)
    seconds, after = time.perf_counter() - started, _io()
    on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated()
    return {
        **cache.info.timing,
        **asdict(took[0]),
        "call_s": seconds,
        "peak_rss": peak_rss(),
        "peak_gpu": int(on_gpu),
        **{name: after[name] - before[name] for name in after},
    }


def peak_rss() -> int:
    """Most bytes that this process held in memory, pages of mapped files included.

    Not ru_maxrss: that survives exec, so a child would report its parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _io() -> dict[str, int]:
    path = Path("/proc/self/io")
    if not path.is_file():
        return {}
    found = dict(line.split(": ") for line in path.read_text().splitlines())
    return {name: int(found[name]) for name in ("rchar", "read_bytes")}


def main() -> None:
    """Do what the first argument says."""
    task = json.loads(sys.argv[1])
    if "make" in task:
        make = task["make"]
        write_llama(Path(make["folder"]), Shape(**make["shape"]), make["device"])
        print("{}")
    else:
        print(json.dumps(extract(task["extract"], task["limit"])))


if __name__ == "__main__":
    main()
