"""python -m bench extract | stream | plan | gpu | cached | probes; each takes --help.

A benchmark is imported only when it is named: those that measure the memory of other processes must
not be large themselves.
"""

from __future__ import annotations

import sys
from importlib import import_module

WHAT = {
    "extract": "extraction against hand-written loops and the matmul limit, one run, same ids",
    "stream": "layer-by-layer extraction against the resident one: seconds, memory, bytes read",
    "plan": "the dry run over 100,000 prompts: seconds and memory",
    "gpu": "a 70B shape on one GPU against its matmul limit; an 8B shape streamed from disk",
    "cached": "the commands that work from a cache, as whole processes",
    "probes": "fitting 80 layers with five methods, and a cache of 20 GB: seconds and memory",
}


def main(words: list[str]) -> int:
    """Run the benchmark that the first word names with the words after it."""
    if words and words[0] in WHAT:
        import_module(f"bench.{words[0]}").main(words[1:])
        return 0
    print("python -m bench NAME [options]\n")
    for name, what in WHAT.items():
        print(f"  {name:<8} {what}")
    return 0 if words[:1] in (["--help"], ["-h"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
