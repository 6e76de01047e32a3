"""Score a cache with vectors and say how well the classes part.

Guarantee: vectors and cache come from one model read in one way, or the run is refused; a higher
score means the vectors' positive class; every score is a real projection of the kept tokens; every
AUROC carries its interval and its sample sizes, and a layer chosen by it is reported as chosen.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probecache.atomic import (
    commit_folder,
    disk_errors_named,
    real_path,
    require_place,
    temporary_sibling,
    write_uncommitted,
)
from probecache.errors import MismatchError, NonFiniteError, OutputError, UsageError
from probecache.foreign import csv_cell, read_json
from probecache.identity import SCORING, require_same
from probecache.layers import format_layers
from probecache.metrics import accuracy_at, auroc
from probecache.store.seal import encode_json, record_files, seal_json

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from probecache.dataset import Dataset
    from probecache.metrics import AurocEstimate
    from probecache.store.reader import Cache
    from probecache.store.vectors import SavedVectors
    from probecache.types import Identity

__all__ = [
    "LayerResult",
    "Validation",
    "choose_layers",
    "require_data",
    "require_output",
    "require_scorable",
    "validate",
]

_FORMAT = "probecache-validation"
_OURS = re.compile(
    r"probe_stats_layer\d+\.csv|summary\.(json|csv)|report\.html|"
    r"visualizations(/(roc_curves|auroc_by_layer|score_distributions)\.(png|svg))?"
)
_MOST_BYTES = 64 << 20  # of a summary, far above any
# A threshold that leaves less than this share on one side has not carried over.
_ONE_SIDE = 0.05
_STATS = ("mean_score", "max_score", "min_score", "std_score")


@dataclass(frozen=True)
class LayerResult:
    """One layer's outcome. Scores are those of the examples' means, in data order."""

    layer: int
    auroc: AurocEstimate
    threshold: float
    accuracy: float
    scores: np.ndarray
    is_positive: np.ndarray

    @property
    def one_sided(self) -> bool:
        """Whether nearly all examples of both classes lie on one side of the threshold."""
        above = self.scores > self.threshold
        shares = [float(np.mean(above[side])) for side in (self.is_positive, ~self.is_positive)]
        return max(shares) < _ONE_SIDE or min(shares) > 1 - _ONE_SIDE


@dataclass(frozen=True)
class Validation:
    """What `validate` found and wrote."""

    path: Path
    layers: tuple[LayerResult, ...]
    best: LayerResult
    warnings: tuple[str, ...]
    positive_class: str
    files: tuple[Path, ...]


def validate(
    cache: Cache,
    vectors: SavedVectors,
    output: str | Path,
    *,
    dataset: Dataset | None = None,
    layers: Sequence[int] | None = None,
    visualize: bool = False,
    allow_mismatch: Collection[str] = (),
    source: str | None = None,
) -> Validation:
    """Score every example at every layer; write statistics, summary and, if asked, the report.

    Args:
        cache: activations of the prompts to score.
        vectors: directions; their layers must be cached.
        output: folder to write, replaced if it holds an earlier validation.
        dataset: the data that the cache should have been made from; None skips the check.
        layers: which of the vectors' layers; None takes all.
        visualize: plots and report.html too.
        allow_mismatch: identity fields in which vectors and cache may differ.
        source: what to record as the cache's name; None stands for its path.

    Raises:
        MismatchError: vectors, cache and data do not belong together.
        LayerNotCachedError, NonFiniteError, OutputError.
    """
    output = Path(output)
    require_output(output)
    chosen = choose_layers(vectors, layers)
    for layer in chosen:
        cache.require_layer(layer)
    where = f"cache {cache.path}"
    allowed = require_scorable(
        vectors, cache.identity, cache.classes, where, chosen, allow_mismatch
    )
    if dataset is not None:
        require_data(cache, dataset)
    is_positive = np.array(
        [record.label == vectors.info.positive_class for record in cache.examples]
    )
    stats = {layer: _score(cache, vectors, layer) for layer in chosen}
    results = [_judge(layer, found, vectors, is_positive) for layer, found in stats.items()]
    best = max(results, key=lambda result: result.auroc.auroc)
    warnings = [
        *(f"Scored across a difference in {one}." for one in allowed),
        *_warnings(results, best, vectors, cache),
    ]
    summary = {
        **_about(cache, vectors, dataset, source),
        "best_layer": best.layer,
        "allowed_mismatch": allowed,
        "warnings": warnings,
        "layers": [_summary_row(result, is_positive) for result in results],
    }
    _save(output, cache, stats, summary, visualize=visualize)
    files = tuple(sorted(path for path in output.rglob("*") if path.is_file()))
    positive = vectors.info.positive_class
    return Validation(output, tuple(results), best, tuple(warnings), positive, files)


# ---------------------------------------------------------------- do they belong together


def choose_layers(vectors: SavedVectors, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers to score, rising; None takes all of the vectors'.

    Raises:
        MismatchError: the vectors lack one.
    """
    chosen = tuple(sorted(set(layers))) if layers is not None else vectors.layers
    if not chosen:
        raise UsageError("expected at least one layer to score, got none")
    for layer in chosen:
        if layer not in vectors.layers:
            raise MismatchError(
                f"expected vectors for layer {layer} in {vectors.path}, got those for layers "
                f"{', '.join(map(str, vectors.layers))}; train it or leave it out of --layers"
            )
    return chosen


def require_scorable(
    vectors: SavedVectors,
    identity: Identity,
    classes: Collection[str],
    where: str,
    layers: Collection[int],
    allowed: Collection[str] = (),
) -> list[str]:
    """Raise MismatchError unless vectors may score activations of this identity and these classes.

    Args:
        where: what is to be scored, for the message.
        layers: those that will be scored.
        allowed: identity fields that may differ.

    Returns:
        The differences that were allowed.
    """
    what, info = f"Vectors {vectors.path} and {where}", vectors.info
    # The vectors' own width, whatever their identity says.
    identity_of_vectors = replace(info.identity, hidden_size=info.hidden_size)
    differences = require_same(
        identity_of_vectors, identity, SCORING, what=what, allowed=allowed, layers=layers
    )
    if info.positive_class not in classes:
        raise MismatchError(
            f"expected examples of the vectors' positive class {info.positive_class!r} in {where}, "
            f"got the classes {', '.join(classes)}; label the data alike"
        )
    return differences


def require_data(cache: Cache, dataset: Dataset) -> None:
    """Raise MismatchError unless the cache was made from these examples."""
    if dataset.fingerprint() != cache.identity.data:
        raise MismatchError(
            f"expected --data to be what the cache {cache.path} was made from, got "
            f"{dataset.source}: {_first_difference(cache, dataset)}; name the original file, or "
            "extract this one into a cache of its own"
        )


def _first_difference(cache: Cache, dataset: Dataset) -> str:
    if len(dataset) != len(cache.examples):
        return f"{len(cache.examples)} examples expected, {len(dataset)} found"
    for record, example in zip(cache.examples, dataset.examples, strict=True):
        for name, cached, found in (
            ("class", record.label, example.label),
            ("text", record.question, example.question),
            ("answer", record.answer, example.answer),
            ("id", record.id, example.id),
            ("group", record.group, example.group),
            ("category", record.category, example.category),
        ):
            if cached != found:
                return f"row {example.row} differs in its {name}"
    return "the messages differ"


def require_output(output: Path) -> None:
    """Raise OutputError unless results can go there: a free place, or an earlier validation."""
    require_place(real_path(output))
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        ours = read_json(output / "summary.json", _MOST_BYTES)["format"] == _FORMAT
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


# ---------------------------------------------------------------- scores


def _score(cache: Cache, vectors: SavedVectors, layer: int) -> dict[str, np.ndarray]:
    """Statistics of every example's token scores, float64 [examples], in data order."""
    direction = vectors.directions[layer].astype(np.float64)
    stats = {name: np.empty(len(cache.examples)) for name in _STATS}
    for label in cache.classes:
        scores = np.concatenate(
            [rows.astype(np.float64) @ direction for _, rows in cache.chunks(label, layer)]
        )
        members = [record for record in cache.examples if record.label == label]
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise NonFiniteError(
                f"expected finite activations, got NaN or Inf in row {bad} of class {label!r} at "
                f"layer {layer} of {cache.path}; extract again in bfloat16 or float32"
            )
        places = [record.idx for record in members]
        for name, values in _over_tokens(scores, [record.rows for record in members]).items():
            stats[name][places] = values
    return stats


def _over_tokens(scores: np.ndarray, spans: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    pieces = [scores[start:stop] for start, stop in spans]
    rows = [(piece.mean(), piece.max(), piece.min(), piece.std()) for piece in pieces]
    return dict(zip(_STATS, np.array(rows).T, strict=True))


def _judge(
    layer: int, stats: dict[str, np.ndarray], vectors: SavedVectors, is_positive: np.ndarray
) -> LayerResult:
    scores, threshold = stats["mean_score"], vectors.info.layers[layer].threshold
    return LayerResult(
        layer=layer,
        auroc=auroc(scores, is_positive),
        threshold=threshold,
        accuracy=accuracy_at(scores, is_positive, threshold),
        scores=scores,
        is_positive=is_positive,
    )


def _warnings(
    results: list[LayerResult], best: LayerResult, vectors: SavedVectors, cache: Cache
) -> list[str]:
    """Plain words on what a reader of the table could miss."""
    found = []
    if cache.identity.data == vectors.info.identity.data:
        found.append(
            "These are the very prompts that the vectors were trained on: the AUROC says how well "
            "they were learnt, not how well it carries over. Score other prompts."
        )
    reversed_ = [result.layer for result in results if result.auroc.high < 0.5]
    if reversed_:
        found.append(
            f"At layer {format_layers(reversed_)} the scores are reversed: examples of "
            f"{vectors.info.positive_class!r} score lower than the others. Check the positive "
            "class of the vectors and the labels of the data."
        )
    if best.auroc.low <= 0.5 <= best.auroc.high:
        found.append(
            f"Even at the best layer ({best.layer}) the interval of the AUROC reaches chance (0.5)."
        )
    one_sided = [result.layer for result in results if result.one_sided]
    if one_sided:
        trained, scored = vectors.info.identity.positions, str(cache.info.positions)
        why = f" (trained on positions {trained}, scored on {scored})" if trained != scored else ""
        found.append(
            f"Nearly all scores lie on one side of the threshold fixed in training{why}: read the "
            f"AUROC, not the accuracy, at layer {format_layers(one_sided)}."
        )
    if len(results) > 1:
        found.append(
            f"Layer {best.layer} was chosen as the best of {len(results)} on these very prompts, "
            "so its AUROC is optimistic: score prompts that played no part in the choice before "
            "quoting it."
        )
    return found


# ---------------------------------------------------------------- files


def _save(
    output: Path,
    cache: Cache,
    stats: dict[int, dict[str, np.ndarray]],
    summary: dict[str, Any],
    *,
    visualize: bool,
) -> None:
    place, rows = real_path(output), summary["layers"]
    files = {
        "summary.json": encode_json(summary),
        "summary.csv": _csv(list(rows[0]), [row.values() for row in rows]),
    }
    # Not all tables at once: they repeat every text. All layers' are about as long.
    tables = len(stats) * len(_stats_csv(cache, stats[summary["best_layer"]]))
    needed = tables + sum(map(len, files.values()))
    with disk_errors_named(output, needed), temporary_sibling(place) as folder:
        for layer, found in stats.items():
            path = folder / f"probe_stats_layer{layer}.csv"
            write_uncommitted(path, _stats_csv(cache, found))
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


def _draw(folder: Path) -> dict[str, bytes]:
    from probecache.report import draw_report

    return draw_report(folder)


def _about(
    cache: Cache, vectors: SavedVectors, dataset: Dataset | None, source: str | None
) -> dict[str, Any]:
    info = vectors.info
    return {
        "format": _FORMAT,
        "format_version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "positive_class": info.positive_class,
        "negative_class": " + ".join(c for c in cache.classes if c != info.positive_class),
        "positions": str(cache.info.positions),
        "layer_convention": info.layer_convention,
        "model": cache.identity.model,
        "dtype": str(cache.info.dtype),
        "data": dataset.source if dataset else None,
        "cache": source or str(cache.path),
        "vectors": str(vectors.path),
        "normalized": info.normalized,
        "method": info.method,
        "num_examples": cache.info.num_examples,
        "classes": {label: record.examples for label, record in cache.info.classes.items()},
    }


def _summary_row(result: LayerResult, is_positive: np.ndarray) -> dict[str, Any]:
    positive, negative = result.scores[is_positive], result.scores[~is_positive]
    return {
        "layer": result.layer,
        "auroc": result.auroc.auroc,
        "auroc_low": result.auroc.low,
        "auroc_high": result.auroc.high,
        "n_positive": result.auroc.n_positive,
        "n_negative": result.auroc.n_negative,
        "threshold": result.threshold,
        "accuracy": result.accuracy,
        "mean_positive": float(positive.mean()),
        "mean_negative": float(negative.mean()),
        "std_positive": float(positive.std()),
        "std_negative": float(negative.std()),
    }


def _stats_csv(cache: Cache, stats: dict[str, np.ndarray]) -> bytes:
    header = ["question_id", "question", "type", *_STATS, "n_tokens"]
    columns = [stats[name].tolist() for name in _STATS]
    rows = [
        [*map(csv_cell, (record.id, record.question, record.label)), *scores, record.n_tokens]
        for record, *scores in zip(cache.examples, *columns, strict=True)
    ]
    return _csv(header, rows)


def _csv(header: list[str], rows: Any) -> bytes:
    buffer = io.StringIO(newline="")
    plain = csv.writer(buffer, lineterminator="\n")
    quoted = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    plain.writerow(header)
    for row in map(list, rows):
        # Python 3.11 leaves a lone carriage return unquoted, and readers take it for a line's end.
        bare = any(isinstance(cell, str) and "\r" in cell for cell in row)
        (quoted if bare else plain).writerow(row)
    return buffer.getvalue().encode()
