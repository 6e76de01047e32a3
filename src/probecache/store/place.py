"""Where a cache is written: claimed by one run at a time, swept of what killed runs left.

Guarantee: rows that are recorded stay, until they are in the cache.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from probecache.atomic import disk_errors_named, real_path
from probecache.errors import OutputError
from probecache.store.claim import Claim, claimed
from probecache.store.commit import finish, is_committed
from probecache.store.journal import find_unfinished
from probecache.store.layout import UNFINISHED

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TEMPORARY", "claimed_place", "finish_complete"]

# What a killed run of ours may leave half done, by its name.
TEMPORARY = re.compile(
    rf"\.({UNFINISHED}|(layer_info|metadata|begun|progress|finished|owner)\.json)"
    r"\.\d+(-[0-9a-f]+)?\.tmp"
)


def finish_complete(final: Path) -> None:
    """Commit an extraction that was killed when all its rows were there; sweep what is left."""
    final = real_path(final)
    unfinished = find_unfinished(final)
    if unfinished is not None and unfinished.complete:
        needed = unfinished.bytes_to_finish
        with claimed_place(final, needed) as (_, claim):
            unfinished = find_unfinished(final)  # another run may have finished it meanwhile
            if unfinished is not None and unfinished.complete:
                finish(unfinished, claim)
    elif final.is_dir() and (
        any(TEMPORARY.fullmatch(path.name) for path in final.iterdir())
        or ((final / UNFINISHED).is_dir() and unfinished is None)
        or (unfinished is not None and is_committed(unfinished))
    ):
        # Of a run that was killed while it tidied up; or of one that is alive, which says so.
        with suppress(OutputError), claimed_place(final):
            pass


@contextmanager
def claimed_place(final: Path, needed: int | None = None) -> Iterator[tuple[Path, Claim]]:
    """The folder for unfinished files and the claim on it; removed at the end unless it holds rows.

    Args:
        final: the cache's folder.
        needed: bytes that have to fit there in all, for the error where they do not.

    Raises:
        OutputError: another run is writing there, or nothing can be written.
    """
    final = real_path(final)
    folder = final / UNFINISHED
    if folder.is_symlink():
        raise OutputError(f"expected {folder} to be a folder, got a link; remove it")
    with disk_errors_named(final, needed):
        is_new = not final.exists()
        try:
            with claimed(folder) as claim:
                _sweep(final)
                try:
                    yield folder, claim
                finally:
                    if claim.held:
                        _leave(folder)
        finally:
            # Only what is empty goes: where no claim was had, or nothing is left.
            for empty in [folder, final] if is_new else [folder]:
                with suppress(OSError):
                    empty.rmdir()


def _leave(folder: Path) -> None:
    """Remove the folder unless the next run can go on from it."""
    final = folder.parent
    unfinished = find_unfinished(final)
    if unfinished is not None and not is_committed(unfinished) and unfinished.share() > 0:
        return
    # Renamed first: another run may begin a new one while this is being removed.
    aside = final / f".{UNFINISHED}.{os.getpid()}.tmp"
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _sweep(final: Path) -> None:
    """Remove what killed runs were just writing; only who holds the claim may."""
    for folder in (final, final / UNFINISHED):
        for path in folder.iterdir():
            if TEMPORARY.fullmatch(path.name) and not path.is_symlink():
                # A run that is refused, or has just ended, removes its own at the same moment.
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
