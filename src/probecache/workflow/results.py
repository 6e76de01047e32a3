"""The folder of a validation: what may stand there, what is written, and how it appears.

Guarantee: results appear whole or not at all; an earlier validation goes only once the new one is
complete; nothing that is not ours is ever removed.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from probecache.atomic import (
    commit_folder,
    disk_errors_named,
    real_path,
    require_place,
    temporary_sibling,
    write_uncommitted,
)
from probecache.errors import OutputError
from probecache.foreign import read_json
from probecache.store.seal import encode_json, record_files, seal_json

__all__ = ["FORMAT", "csv_bytes", "require_output", "save_results"]

FORMAT = "probecache-validation"
_OURS = re.compile(
    r"probe_stats_layer\d+\.csv|summary\.(json|csv)|report\.html|token_scores\.json|"
    r"visualizations(/(roc_curves|auroc_by_layer|score_distributions|calibration)\.(png|svg))?"
)
# Of a layer's record, the estimates that have parts; the first is the estimate itself.
_PARTS = {
    "below_best": ("difference", "low", "high", "p_value"),
    "tpr_at_1": ("tpr", "low", "high"),
    "tpr_at_5": ("tpr", "low", "high"),
}
_MOST_BYTES = 64 << 20  # of a summary, far above any


def require_output(output: Path) -> None:
    """Raise OutputError unless results can go there: a free place, or an earlier validation."""
    require_place(real_path(output))
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        ours = read_json(output / "summary.json", _MOST_BYTES)["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise OutputError(
            f"expected --output {output} to be free or an earlier validation, but it holds "
            "something else; choose another folder"
        )
    # Replacing removes the folder: nothing in it may be the user's own.
    names = (path.relative_to(output).as_posix() for path in output.rglob("*"))
    foreign = sorted(name for name in names if not _OURS.fullmatch(name))
    if foreign:
        raise OutputError(
            f"expected --output {output} to hold an earlier validation alone, but {foreign[0]} is "
            "there too and would be lost; move it, or choose another folder"
        )


def _replace(folder: Path, output: Path) -> None:
    """Commit the new results; an earlier validation goes only once they are complete."""
    if not output.exists():
        commit_folder(folder, output)
        return
    with temporary_sibling(output) as aside:
        output.rename(aside / "old")
        try:
            commit_folder(folder, output)
        except BaseException:
            (aside / "old").rename(output)
            raise
        shutil.rmtree(aside / "old", ignore_errors=True)


def save_results(
    output: Path,
    summary: dict[str, Any],
    tables: Mapping[str, Callable[[], bytes]],
    *,
    visualize: bool,
) -> tuple[Path, ...]:
    """Write a validation and commit it.

    Args:
        output: its folder; an earlier validation there is replaced.
        summary: what summary.json will hold, but for the records of the files.
        tables: what makes each of the other files, by name; made one after the other, because
            all layers' tables repeat every text.
        visualize: figures and report.html too.

    Returns:
        Every file, by its final path.

    Raises:
        OutputError: no room, or not writable; nothing is left.
    """
    place, rows = real_path(output), summary["layers"]
    flat = [_flat(row) for row in rows]
    files = {
        "summary.json": encode_json(summary),
        "summary.csv": csv_bytes(list(flat[0]), [row.values() for row in flat]),
    }
    needed = len(tables) * len(next(iter(tables.values()))()) + sum(map(len, files.values()))
    with disk_errors_named(output, needed), temporary_sibling(place) as folder:
        for name, make in tables.items():
            write_uncommitted(folder / name, make())
        for name, content in files.items():
            write_uncommitted(folder / name, content)
        report = _draw(folder) if visualize else {}
        with disk_errors_named(output, needed + sum(map(len, report.values()))):
            for name, content in report.items():
                (folder / name).parent.mkdir(exist_ok=True)
                write_uncommitted(folder / name, content)
            # Last, because it records every other file.
            sealed = seal_json({**summary, "files": record_files(folder, but="summary.json")})
            write_uncommitted(folder / "summary.json", sealed)
            _replace(folder, place)
    return tuple(sorted(path for path in output.rglob("*") if path.is_file()))


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's record with a column for each figure, whether it has it or not."""
    columns: dict[str, Any] = {}
    for name, value in row.items():
        if name not in _PARTS:
            columns[name] = value
            continue
        first, *others = (None if value is None else value[part] for part in _PARTS[name])
        columns[name] = first
        for part, other in zip(_PARTS[name][1:], others, strict=True):
            columns[f"{name}_{part}"] = other
    return columns


def _draw(folder: Path) -> dict[str, bytes]:
    from probecache.report import draw_report

    return draw_report(folder)


def csv_bytes(header: list[str], rows: Iterable[Iterable[Any]]) -> bytes:
    """A CSV file in UTF-8."""
    buffer = io.StringIO(newline="")
    plain = csv.writer(buffer, lineterminator="\n")
    quoted = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    plain.writerow(header)
    for row in map(list, rows):
        # Python 3.11 leaves a lone carriage return unquoted, and readers take it for a line's end.
        bare = any(isinstance(cell, str) and "\r" in cell for cell in row)
        (quoted if bare else plain).writerow(row)
    return buffer.getvalue().encode()
