"""The residual stream of every token between two blocks: in memory, or in a file.

A file is read ahead of the step that needs it and written behind the one that made it, by a thread
that does one thing after another. It has no name, so that nothing is left of it after a kill; where
a snapshot is wanted, rows go there too, or in its place. A pass takes all rows through one block
and reads each before it writes it. Guarantee: `read` gives what was last written there, bit for
bit.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from probecache.snapshots import RowFile, SnapshotWriter, no_room

if TYPE_CHECKING:
    import torch

__all__ = ["HiddenStates"]

_PENDING = 2  # writes that may wait: more would only take memory


class HiddenStates:
    """Rows of one width and dtype, as the first ones written have them.

    Args:
        tokens: how many rows.
        folder: where the file goes; None keeps the rows in memory, on the device they come from.
    """

    def __init__(self, tokens: int, folder: Path | None = None) -> None:
        self.tokens, self._folder = tokens, folder
        self._rows: torch.Tensor | None = None
        self._source: RowFile | None = None  # what is read, and written too but for snapshots
        self._target: RowFile | None = None  # what is written
        self._row: torch.Tensor | None = None  # an empty one, for width and dtype
        self._snapshot: SnapshotWriter | None = None
        self._finished: Future[None] | None = None
        self._pool, self._flusher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._ahead: dict[tuple[int, int], Future[torch.Tensor]] = {}
        self._behind: list[Future[None]] = []

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)  # of what waits a part closes files
        self._flusher.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self._rows = None
        copied = self._snapshot.rows if self._snapshot is not None else None
        for file in (self._source, self._target, copied):
            if file is not None:
                file.close()

    # -- rows

    def write(self, offset: int, rows: torch.Tensor) -> None:
        """Put rows [count, width] at an offset; they must not be changed afterwards."""
        self._prepare(rows)
        if self._rows is not None:
            self._rows[offset : offset + len(rows)] = rows
        if self._rows is not None and self._snapshot is None:
            return
        for first, count in [*self._ahead]:  # what was read ahead of this is old now
            if first < offset + len(rows) and offset < first + count:
                del self._ahead[first, count]
        while len(self._behind) >= _PENDING:
            self._behind.pop(0).result()
        target = self._snapshot or self._target
        assert target is not None
        self._behind.append(self._pool.submit(target.write, offset, rows.cpu()))

    def expect(self, offset: int, count: int) -> None:
        """Say that these rows will be read next."""
        if self._rows is None:
            self._ahead[offset, count] = self._later(offset, count)

    def read(self, offset: int, count: int) -> torch.Tensor:
        """The rows [count, width] at an offset: on the CPU from a file, else where they lie."""
        if self._rows is not None:
            # A copy begins where memory is aligned, and alignment decides how sums are rounded.
            return self._rows[offset : offset + count].clone()
        ahead = self._ahead.pop((offset, count), None)
        rows = (ahead or self._later(offset, count)).result()
        for write in self._behind:
            if write.done():
                write.result()  # of one that failed the rows are still those before it
        return rows

    # -- passes and snapshots

    def begin(self, snapshot: SnapshotWriter | None = None) -> None:
        """Begin a pass: what is written to now on goes into a snapshot, if one is given."""
        followed, self._snapshot = self._snapshot, snapshot
        if self._folder is None:
            if followed is not None:
                self._pool.submit(followed.rows.close)
            return
        previous, self._source = self._source, self._target
        self._ahead.clear()
        if snapshot is not None:
            self._target = snapshot.rows
        elif followed is not None:
            self._target = None  # what a snapshot holds must stay
        if previous is not None and previous is not self._source:
            self._pool.submit(previous.close)

    def keep(self) -> None:
        """End a pass with its snapshot: see that it gets on disk, behind whatever comes."""
        snapshot, writes = self._snapshot, list(self._behind)
        assert snapshot is not None

        def finish() -> None:
            for write in writes:
                write.result()
            snapshot.finish()

        self._finished = self._flusher.submit(finish)

    def is_kept(self) -> bool:
        """Whether the snapshot of the last `keep` is complete on disk.

        Raises:
            OutputError: it did not get there.
        """
        if self._finished is None or not self._finished.done():
            return False
        self._finished.result()
        return True

    # -- files

    def _later(self, offset: int, count: int) -> Future[torch.Tensor]:
        source = self._source or self._target
        assert source is not None
        assert self._row is not None
        return self._pool.submit(source.read, offset, count, self._row)

    def _prepare(self, rows: torch.Tensor) -> None:
        import torch

        if self._row is None:
            self._row = rows.new_empty((0, rows.shape[1]), device="cpu")
            if self._folder is None:
                self._rows = torch.empty(
                    (self.tokens, rows.shape[1]), dtype=rows.dtype, device=rows.device
                )
        if self._folder is not None and self._target is None:
            try:
                file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            except OSError as error:
                needed = self.tokens * rows.shape[1] * rows.element_size()
                raise no_room(self._folder, needed, error) from error
            self._target = RowFile(file, self._folder, self.tokens)
