"""May this run add to what is there, and how did the interrupted one go that it goes on from?

Guarantee: a run goes on only with the same identity, from an interrupted one with the same layers
too; asked for with the same options it goes the same way as it was begun, so that the cache comes
out the same to the byte.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probecache.atomic import free_bytes, real_path
from probecache.errors import Interrupted, MismatchError
from probecache.identity import EXTENDING, require_same
from probecache.layers import format_layers
from probecache.store.claim import require_unclaimed
from probecache.store.journal import Begun, find_unfinished
from probecache.store.layout import LAYER_INFO
from probecache.streaming import Snapshot
from probecache.workflow.execution import EngineName, Execution

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from probecache.store.journal import Unfinished
    from probecache.store.reader import Cache
    from probecache.store.writer import CacheWriter
    from probecache.types import Identity
    from probecache.workflow.prepare import ExtractRequest, Plan, Preparation
    from probecache.workflow.running import Run

__all__ = [
    "KeptSnapshots",
    "begin",
    "execution_of",
    "identity_before",
    "require_same_cache",
    "require_same_run",
    "require_unchanged",
    "stops_told",
]


# Hidden states between streamed blocks are kept this often,
_SNAPSHOT_S = 5.0
# and not oftener than leaves the disk so many times as long as the last ones took.
_SNAPSHOT_REST = 9.0


def begin(
    prepared: Preparation, planned: Plan, identity: Identity, *, repairs: bool = False
) -> Begun:
    """What is written down before the first row."""
    assert planned.execution is not None
    return Begun.of(
        replace(prepared.blueprint, layers=planned.layers),
        identity,
        execution=asdict(planned.execution),
        asked=_asked(prepared.request),
        repairs=repairs,
    )


def execution_of(unfinished: Unfinished | None, request: ExtractRequest) -> Execution | None:
    """How the interrupted run went, if this one is asked to go alike."""
    if unfinished is None or unfinished.begun.asked != _asked(request):
        return None
    execution = unfinished.begun.execution
    return Execution(**{**execution, "engine": EngineName(execution["engine"])})


def identity_before(output: Path, existing: Cache | None) -> Identity | None:
    """The identity that a run into this place goes on from, of a cache or of what is unfinished."""
    unfinished = find_unfinished(real_path(output))
    if unfinished is not None:
        return unfinished.begun.identity
    return existing.identity if existing is not None else None


def require_same_cache(existing: Cache, identity: Identity, allowed: Sequence[str]) -> list[str]:
    """Raise MismatchError where the cache that layers are added to differs.

    Args:
        existing: the cache.
        identity: of this run, as far as it is known.
        allowed: fields that may differ, as named by --allow-mismatch.

    Returns:
        The differences that were allowed.
    """
    return require_same(
        existing.identity,
        identity,
        EXTENDING,
        what=f"Cache {existing.path} and this run",
        allowed=allowed,
        remedy="ask for the same again, or extract into another --output",
    )


def require_same_run(planned: Plan, identity: Identity) -> None:
    """Raise MismatchError where another extraction is unfinished in the same place.

    Args:
        identity: as far as it is known; attention is known only when the model is loaded.

    Raises:
        OutputError: instead, where it is being written.
    """
    unfinished = find_unfinished(real_path(Path(planned.output)))
    if unfinished is None:
        return
    try:
        _require_same_as_begun(unfinished, planned, identity)
    except MismatchError:
        require_unclaimed(unfinished.folder)  # nobody is told to remove what is being written
        raise


def _require_same_as_begun(unfinished: Unfinished, planned: Plan, identity: Identity) -> None:
    begun, remedy = unfinished.begun, f"or remove {unfinished.folder} to drop what it computed"
    require_same(
        begun.identity,
        replace(identity, attention=begun.identity.attention),
        EXTENDING,
        what=f"The unfinished extraction in {planned.output} and this run",
        allowed=None,  # one layer's rows are of one run
        remedy=f"finish it with the options it was begun with, {remedy}",
    )
    if begun.layers != planned.layers:
        raise MismatchError(
            f"expected the layers {format_layers(begun.layers)} of the unfinished extraction in "
            f"{planned.output}, got {format_layers(planned.layers)}; finish it with --layers "
            f"{','.join(map(str, begun.layers))} first, {remedy}"
        )


def require_unchanged(begun: Identity | None, found: Identity) -> None:
    """Raise MismatchError where model or weights are not those that the interrupted run read."""
    if begun is not None:
        require_same(
            begun,
            found,
            EXTENDING,
            what="The model of the interrupted run and that of this one",
            allowed=None,
            remedy="go on with the model it was begun with",
        )


@contextmanager
def stops_told(output: Path) -> Iterator[None]:
    """Let the KeyboardInterrupt that stops a run say what is kept of it: as Interrupted."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(_words_to_resume(output)) from stop


def _words_to_resume(output: Path) -> str:
    unfinished = find_unfinished(real_path(output))
    if unfinished is None or not unfinished.share():
        if (real_path(output) / LAYER_INFO).is_file():
            return f"stopped; the cache at {output} is as it was"
        return "stopped before any rows were on disk; nothing is kept"
    return (
        f"stopped with {unfinished.share():.1%} of the rows on disk in {output}; the same command "
        "again goes on from there"
    )


class KeptSnapshots:
    """Snapshots of hidden states between streamed blocks, in the folder of the unfinished files.

    See `streaming.Snapshots`. One is kept at a time, and the one that replaces it.

    Args:
        writer: of the rows.
        run: the passage.
        settle: called before a snapshot counts: rows up to its layer have to be with the writer.
    """

    def __init__(self, writer: CacheWriter, run: Run, settle: Callable[[int], None]) -> None:
        self._writer, self._passage, self._settle = writer, run.passage, settle
        passages = writer.unfinished.progress.passages
        before = passages.get(run.passage.start)
        self._record = passages[run.passage.start] = run.record()
        if before is not None and before.batches == self._record.batches:
            self._record.snapshot = before.snapshot
        self._size = (
            self._record.computed_tokens * run.source.hidden_size * run.source.dtype.itemsize
        )
        self._last, self._rest = time.monotonic(), _SNAPSHOT_S

    def latest(self) -> Snapshot | None:
        """Where to go on; None: at the beginning."""
        layer = self._record.snapshot
        if layer is None:
            return None
        below = [one for one in self._passage.layers if one <= layer]
        if self._path(layer).is_file() and self._writer.done(below).all():
            return Snapshot(layer, self._path(layer))
        self._record.snapshot = None
        return None

    def place(self, layer: int) -> Path | None:
        """See `Snapshots.place`: every few seconds, where there is room to spare."""
        if time.monotonic() - self._last < self._rest:
            return None
        roomy = free_bytes(self._writer.folder) > 2 * self._size
        return self._path(layer) if roomy else None

    def saved(self, layer: int, seconds: float) -> None:
        """See `Snapshots.saved`."""
        self._settle(layer)
        before, self._record.snapshot = self._record.snapshot, layer
        self._writer.record()
        if before is not None:
            self._path(before).unlink(missing_ok=True)
        self._last, self._rest = time.monotonic(), max(_SNAPSHOT_S, _SNAPSHOT_REST * seconds)

    def _path(self, layer: int) -> Path:
        return self._writer.folder / f"hidden_{self._passage.start}_{layer}"


def _asked(request: ExtractRequest) -> dict[str, Any]:
    """The options that decide how a run goes, as JSON has them."""
    return {
        "engine": str(request.engine),
        "memory": request.memory,
        "batch_tokens": request.batch_tokens,
        "share_prefixes": request.share_prefixes,
        "device": request.model.device,
        "device_map": request.model.device_map,
    }
