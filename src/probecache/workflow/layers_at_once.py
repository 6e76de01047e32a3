"""Work on several layers at once, one thread each.

Guarantee: results come in the order of the layers; the first error in that order is raised, and
nothing that was not begun is begun after it. Layers at once use one thread each in the linear
algebra underneath: its own threads on small matrices mostly wait for one another, and two such
crowds on two cores were measured to take ten times as long.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from importlib import import_module
from threading import Event
from typing import TypeVar

from threadpoolctl import threadpool_limits

__all__ = ["each_layer"]

_Result = TypeVar("_Result")
# What all layers in work may take together; a cache of any size goes through within 1 GB.
_MOST_BYTES = 600 << 20


def each_layer(
    layers: Sequence[int],
    work: Callable[[int], _Result],
    bytes_each: int,
    libraries: Sequence[str] = (),
    stopped: Event | None = None,
) -> Generator[tuple[int, Future[_Result]], None, None]:
    """Do the work of every layer; yields each with its outcome once that is there.

    Close it where an outcome raises: threads end with it, and not whenever it is collected.

    Args:
        layers: in the order wanted.
        work: what to do, thread-safe.
        bytes_each: memory that the work of a layer takes.
        libraries: modules that the work imports, with a linear algebra of their own: one that is
            loaded later is not held to one thread.
        stopped: set once no outcome is wanted any more, for work that takes long to end by. Python
            interrupts the main thread alone, and that waits for the others.
    """
    for name in libraries:
        import_module(name)
    workers = max(1, min(len(layers), _cores(), _MOST_BYTES // max(1, bytes_each)))
    limits = threadpool_limits(1) if workers > 1 else nullcontext()
    with limits, ThreadPoolExecutor(workers) as pool:
        try:  # submitting too: whoever is interrupted there must not wait for all layers
            futures = [pool.submit(work, layer) for layer in layers]
            for layer, future in zip(layers, futures, strict=True):
                future.exception()  # waits
                yield layer, future
        finally:
            if stopped is not None:
                stopped.set()
            pool.shutdown(cancel_futures=True)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
