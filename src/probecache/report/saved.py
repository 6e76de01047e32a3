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
from probecache.report.evidence import Evidence, read_evidence
from probecache.report.fields import count, flag, number, optional, probability, shown, text
from probecache.report.tokens import TOKEN_SCORES, TokenScores, token_scores

__all__ = [
    "LayerResult",
    "LayerScores",
    "Validation",
    "malformed",
    "read_validation",
    "shown",
]

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
AGAIN = "run `probecache validate` again"
# The report shows three digits, so half of the last one is a difference that a reader could see.
AUROC_TOLERANCE = 5e-4
# A summary of a hundred layers has some 50 KB.
MOST_BYTES = 64 << 20
# What an AUROC is of stands in "score"; older tables have it by the name of its aggregate alone.
SCORE = "score"
OLDER_SCORES = {"mean": "mean_score", "max": "max_score"}
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
    """One layer's examples, in the order of its file; all of length n.

    `scores` are those that the AUROC is of: the mean over an example's tokens, or another
    aggregate. `ids` are empty texts in a file without them.
    """

    ids: tuple[str, ...]
    questions: tuple[str, ...]
    classes: tuple[str, ...]
    scores: NDArray[np.float64]
    is_positive: NDArray[np.bool_]


@dataclass(frozen=True)
class Validation:
    """A validation folder: what was run on what, and what came out.

    `facts` maps each of `FACTS` to its text, or None where it does not apply. `normalized` says
    that the scores are projections on unit vectors. `results` and `scores` hold the same layers,
    in ascending order. `tokens` is None where an example has one token, and in older validations.
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
    evidence: Evidence
    tokens: TokenScores | None

    @property
    def best(self) -> LayerResult:
        return self.results[self.best_layer]

    @property
    def score_meaning(self) -> str:
        """What a token's score is, as the end of a sentence."""
        return f"projection on the {'unit' if self.normalized else 'raw'} direction"


def read_validation(folder: Path) -> Validation:
    """Read `summary.json` and every layer's scores.

    Raises:
        StoreError: a file is missing or malformed, or summary and scores disagree.
    """
    path = folder / "summary.json"
    summary = _read_json(path)
    with malformed(path):
        _check_format(summary)
        results = _layer_results(summary["layers"])
        best_layer = _member(summary["best_layer"], results)
        positive_class = text(summary["positive_class"])
        negative_class = text(summary["negative_class"])
        facts = {name: optional(summary.get(name), text) for name in FACTS}
        sizes = {text(name): count(size) for name, size in summary["classes"].items()}
        normalized = flag(summary["normalized"])
        warnings = tuple(text(warning) for warning in summary["warnings"])
        evidence = read_evidence(summary, results)
    column = OLDER_SCORES.get(evidence.aggregate, SCORE)
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
            n: _checked_scores(folder, result, positive_class, sizes, column)
            for n, result in results.items()
        },
        evidence=evidence,
        tokens=_token_scores(folder / TOKEN_SCORES),
    )


def _token_scores(path: Path) -> TokenScores | None:
    """The prompts at both ends with their tokens, where the validation has saved them."""
    if not path.exists():
        return None
    try:
        record = read_json(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or error
        raise StoreError(f"expected JSON in {path}, got: {got}; {AGAIN}") from error
    with malformed(path):
        return token_scores(record)


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
def malformed(path: Path, advice: str = AGAIN) -> Iterator[None]:
    """Name the file when a value inside it is missing or of the wrong kind."""
    try:
        yield
    except KeyError as error:
        raise StoreError(f"expected {error} in {path}, found none; {advice}") from error
    except (TypeError, ValueError, AttributeError, IndexError, csv.Error, FitError) as error:
        raise StoreError(f"malformed {path}: {error}; {advice}") from error


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
        layer=count(row["layer"]),
        auroc=probability(row["auroc"]),
        auroc_low=probability(row["auroc_low"]),
        auroc_high=probability(row["auroc_high"]),
        n_positive=count(row["n_positive"]),
        n_negative=count(row["n_negative"]),
        mean_positive=number(row["mean_positive"]),
        mean_negative=number(row["mean_negative"]),
        threshold=optional(row.get("threshold"), number),
        accuracy=optional(row.get("accuracy"), probability),
    )


def _member(layer: Any, results: dict[int, LayerResult]) -> int:
    if layer not in results:
        raise ValueError(
            f"expected best_layer to be one of {shown(str(list(results)), 120)}, "
            f"got {shown(repr(layer), 60)}"
        )
    return count(layer)


def _checked_scores(
    folder: Path, result: LayerResult, positive_class: str, sizes: dict[str, int], column: str
) -> LayerScores:
    path = folder / f"probe_stats_layer{result.layer}.csv"
    scores = _read_scores(path, positive_class, column)
    with malformed(path):
        _check_against_summary(scores, result)
        _check_classes(scores, sizes)
    return scores


def _read_scores(path: Path, positive_class: str, column: str) -> LayerScores:
    with malformed(path):
        try:
            content = io.BytesIO(read_text_bytes(path))
        except OSError as error:
            raise StoreError(
                f"expected scores in {path}, got: {error.strerror}; {AGAIN}"
            ) from error
        # Lone surrogates cannot be written as UTF-8; the reader must not fall over one either.
        lines = io.TextIOWrapper(content, "utf-8", "surrogatepass", newline="")
        with unlimited_csv_fields():
            return _layer_scores(lines, positive_class, column)


def _layer_scores(lines: Iterable[str], positive_class: str, column: str) -> LayerScores:
    rows = csv.reader(lines, strict=True)
    header = next(rows, [])
    question, name, score = _columns(header, column)
    id_column = header.index("question_id") if "question_id" in header else None
    ids, questions, classes, scores = [], [], [], []
    for row in rows:
        ids.append("" if id_column is None else csv_text(row[id_column]))
        questions.append(csv_text(row[question]))
        classes.append(csv_text(row[name]))
        scores.append(float(row[score]))
    return LayerScores(
        ids=tuple(ids),
        questions=tuple(questions),
        classes=tuple(classes),
        scores=np.array(scores, dtype=np.float64),
        is_positive=np.array([name == positive_class for name in classes], dtype=np.bool_),
    )


def _columns(header: list[str], column: str) -> list[int]:
    wanted = ("question", "type", SCORE if SCORE in header else column)
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
