"""Saved validation results, read back and checked.

Guarantees: a `Validation` has finite numbers, scores for every layer that the summary lists, of as
many prompts of each class, and an AUROC in the summary that its own scores reproduce; anything else
is a StoreError of one line.
Does not check that the texts are sane: they may hold any character, and whoever shows them cleans
them with `shown`.
"""

from __future__ import annotations

import csv
import io
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probecache.dataset import unlimited_csv_fields
from probecache.errors import FitError, StoreError
from probecache.foreign import csv_text, read_json, read_text_bytes
from probecache.metrics import auroc

__all__ = ["LayerResult", "LayerScores", "Validation", "read_validation", "shown"]

FORMAT, FORMAT_VERSION = "probecache-validation", 1
FACTS = (
    "model",
    "dtype",
    "data",
    "cache",
    "vectors",
    "method",
    "positions",
    "layer_convention",
    "created",
)
# Marks that turn the reading direction of what follows: a text must not rearrange its neighbours.
TURNING = {"LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
AGAIN = "run `probecache validate` again"
# The report shows three digits, so half of the last one is a difference that a reader could see.
AUROC_TOLERANCE = 5e-4
# A summary of a hundred layers has some 50 KB.
MOST_BYTES = 64 << 20
DEEPEST = 100_000  # no model has more blocks, and no axis is longer


@dataclass(frozen=True)
class LayerResult:
    """One layer's line of the summary. Means and threshold are in the scores' unit."""

    layer: int
    auroc: float
    auroc_low: float
    auroc_high: float
    n_positive: int
    n_negative: int
    mean_positive: float
    mean_negative: float
    threshold: float | None
    accuracy: float | None


@dataclass(frozen=True)
class LayerScores:
    """One layer's examples, in the order of its file; all of length n."""

    questions: tuple[str, ...]
    classes: tuple[str, ...]
    scores: NDArray[np.float64]
    is_positive: NDArray[np.bool_]


@dataclass(frozen=True)
class Validation:
    """A validation folder: what was run on what, and what came out.

    `facts` maps each of `FACTS` to its text, or None where it does not apply. `normalized` says
    that the scores are projections on unit vectors. `results` and `scores` hold the same layers,
    in ascending order.
    """

    folder: Path
    positive_class: str
    negative_class: str
    facts: dict[str, str | None]
    class_sizes: dict[str, int]
    normalized: bool
    warnings: tuple[str, ...]
    best_layer: int
    results: dict[int, LayerResult]
    scores: dict[int, LayerScores]

    @property
    def best(self) -> LayerResult:
        return self.results[self.best_layer]

    @property
    def score_meaning(self) -> str:
        """What a score is, as the end of a sentence."""
        return f"projection on the {'unit' if self.normalized else 'raw'} direction"


def shown(text: str, limit: int = 240) -> str:
    """Text on one line cut to `limit`, without control characters, direction marks, surrogates."""
    # Only the head is looked at: a prompt may be a whole document.
    head = "".join(_visible(c) for c in text[: 4 * limit])
    line = " ".join(head.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def read_validation(folder: Path) -> Validation:
    """Read `summary.json` and every layer's scores.

    Raises:
        StoreError: a file is missing or malformed, or summary and scores disagree.
    """
    path = folder / "summary.json"
    summary = _read_json(path)
    with _malformed(path):
        _check_format(summary)
        results = _layer_results(summary["layers"])
        best_layer = _member(summary["best_layer"], results)
        positive_class = _text(summary["positive_class"])
        negative_class = _text(summary["negative_class"])
        facts = {name: _optional_text(summary.get(name)) for name in FACTS}
        sizes = {_text(name): _count(size) for name, size in summary["classes"].items()}
        normalized = _flag(summary["normalized"])
        warnings = tuple(_text(warning) for warning in summary["warnings"])
    return Validation(
        folder=folder,
        positive_class=positive_class,
        negative_class=negative_class,
        facts=facts,
        class_sizes=sizes,
        normalized=normalized,
        warnings=warnings,
        best_layer=best_layer,
        results=results,
        scores={
            n: _checked_scores(folder, result, positive_class, sizes)
            for n, result in results.items()
        },
    )


def _visible(character: str) -> str:
    if unicodedata.bidirectional(character) in TURNING:
        return ""
    category = unicodedata.category(character)
    if category == "Cc":
        return " "
    unwritable = category == "Cs" or ord(character) & 0xFFFE == 0xFFFE  # XML has none of these
    return "\N{REPLACEMENT CHARACTER}" if unwritable else character


def _read_json(path: Path) -> Any:
    try:
        return read_json(path, MOST_BYTES)
    except FileNotFoundError:
        raise StoreError(
            f"expected a validation folder with summary.json, found none in {path.parent}; "
            "name a folder that `probecache validate` wrote"
        ) from None
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or error
        raise StoreError(f"expected JSON in {path}, got: {got}; {AGAIN}") from error


@contextmanager
def _malformed(path: Path) -> Iterator[None]:
    """Name the file when a value inside it is missing or of the wrong kind."""
    try:
        yield
    except KeyError as error:
        raise StoreError(f"expected {error} in {path}, found none; {AGAIN}") from error
    except (TypeError, ValueError, AttributeError, IndexError, csv.Error, FitError) as error:
        raise StoreError(f"malformed {path}: {error}; {AGAIN}") from error


def _check_format(summary: Any) -> None:
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        raise ValueError(f'expected an object with "format": "{FORMAT}"')
    if summary["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"expected format_version {FORMAT_VERSION}, "
            f"got {shown(repr(summary['format_version']), 60)}, "
            "written by another version of probecache"
        )


def _layer_results(rows: Any) -> dict[int, LayerResult]:
    if not isinstance(rows, list) or not rows:
        raise ValueError("expected a list of at least one layer")
    results = [_layer_result(row) for row in rows]
    by_layer = {result.layer: result for result in sorted(results, key=lambda r: r.layer)}
    if len(by_layer) < len(results):
        raise ValueError("expected every layer once, got one twice")
    if max(by_layer) > DEEPEST:
        raise ValueError(f"expected layers up to {DEEPEST}, got {shown(str(max(by_layer)), 60)}")
    return by_layer


def _layer_result(row: Any) -> LayerResult:
    return LayerResult(
        layer=_count(row["layer"]),
        auroc=_share(row["auroc"]),
        auroc_low=_share(row["auroc_low"]),
        auroc_high=_share(row["auroc_high"]),
        n_positive=_count(row["n_positive"]),
        n_negative=_count(row["n_negative"]),
        mean_positive=_number(row["mean_positive"]),
        mean_negative=_number(row["mean_negative"]),
        threshold=_optional_number(row.get("threshold")),
        accuracy=None if row.get("accuracy") is None else _share(row["accuracy"]),
    )


def _number(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Not math.isfinite: it fails over an integer of hundreds of digits.
    if not (number and -sys.float_info.max <= value <= sys.float_info.max):
        raise ValueError(f"expected a finite number, got {shown(repr(value), 60)}")
    return float(value)


def _share(value: Any) -> float:
    if not 0 <= _number(value) <= 1:
        raise ValueError(f"expected a number from 0 to 1, got {shown(repr(value), 60)}")
    return float(value)


def _optional_number(value: Any) -> float | None:
    return None if value is None else _number(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected a whole number from 0, got {shown(repr(value), 60)}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {shown(repr(value), 60)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {shown(repr(value), 60)}")
    return value


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _member(layer: Any, results: dict[int, LayerResult]) -> int:
    if layer not in results:
        raise ValueError(
            f"expected best_layer to be one of {shown(str(list(results)), 120)}, "
            f"got {shown(repr(layer), 60)}"
        )
    return _count(layer)


def _checked_scores(
    folder: Path, result: LayerResult, positive_class: str, sizes: dict[str, int]
) -> LayerScores:
    path = folder / f"probe_stats_layer{result.layer}.csv"
    scores = _read_scores(path, positive_class)
    with _malformed(path):
        _check_against_summary(scores, result)
        _check_classes(scores, sizes)
    return scores


def _read_scores(path: Path, positive_class: str) -> LayerScores:
    with _malformed(path):
        try:
            content = io.BytesIO(read_text_bytes(path))
        except OSError as error:
            raise StoreError(
                f"expected scores in {path}, got: {error.strerror}; {AGAIN}"
            ) from error
        # Lone surrogates cannot be written as UTF-8; the reader must not fall over one either.
        lines = io.TextIOWrapper(content, "utf-8", "surrogatepass", newline="")
        with unlimited_csv_fields():
            return _layer_scores(lines, positive_class)


def _layer_scores(lines: Iterable[str], positive_class: str) -> LayerScores:
    rows = csv.reader(lines, strict=True)
    question, name, score = _columns(next(rows, []))
    questions, classes, scores = [], [], []
    for row in rows:
        questions.append(csv_text(row[question]))
        classes.append(csv_text(row[name]))
        scores.append(float(row[score]))
    return LayerScores(
        questions=tuple(questions),
        classes=tuple(classes),
        scores=np.array(scores, dtype=np.float64),
        is_positive=np.array([name == positive_class for name in classes], dtype=np.bool_),
    )


def _columns(header: list[str]) -> list[int]:
    wanted = ("question", "type", "mean_score")
    missing = [name for name in wanted if name not in header]
    if missing:
        got = shown(", ".join(header), 120) or "none"
        raise ValueError(f"expected columns {', '.join(wanted)}, got {got}")
    return [header.index(name) for name in wanted]


def _check_against_summary(scores: LayerScores, result: LayerResult) -> None:
    n_positive = int(scores.is_positive.sum())
    got = (n_positive, scores.scores.size - n_positive)
    expected = (result.n_positive, result.n_negative)
    if got != expected:
        raise ValueError(
            f"expected {expected[0]} positive and {expected[1]} other rows as in summary.json, "
            f"got {got[0]} and {got[1]}"
        )
    area = auroc(scores.scores, scores.is_positive).auroc
    if abs(area - result.auroc) > AUROC_TOLERANCE:
        raise ValueError(
            f"expected scores with the AUROC in summary.json, {result.auroc:.4f}, got {area:.4f}"
        )


def _check_classes(scores: LayerScores, sizes: dict[str, int]) -> None:
    found = Counter(scores.classes)
    for name in {**sizes, **found}:
        if found[name] != sizes.get(name, 0):
            raise ValueError(
                f"expected {sizes.get(name, 0)} rows of class {shown(repr(name), 60)} as in "
                f"summary.json, got {found[name]}"
            )
