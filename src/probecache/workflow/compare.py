"""Validations and trainings side by side: models, methods, layers, and what may be compared.

Guarantees: two validations are set against one another, by DeLong's paired difference, only where
they scored the same prompts of the same classes and mean the same by a high score; else it is said
in words why not. Reads saved results only. Does not pay for having chosen the best layers on these
prompts, nor for setting many pairs against one another: it says so.
"""

from __future__ import annotations

import csv
import io
import itertools
import string
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probecache.atomic import disk_errors_named, real_path, require_place, write_bytes
from probecache.errors import OutputError, UsageError
from probecache.metrics import AurocDifference, paired_difference
from probecache.report.compared import ComparedRun, read_compared
from probecache.report.fields import Interval, shown
from probecache.report.saved import LayerScores, Validation
from probecache.store.seal import encode_json, folders_by_method

__all__ = ["Comparison", "Pairing", "compare", "lines"]

_FORMAT = "probecache-comparison"
_FILES = ("comparison.csv", "comparison.json", "comparison.html")
_MOST_RUNS = len(string.ascii_uppercase)
_FACTS = ("model", "method", "positions", "aggregate", "data")
# So many runs' layers stand beside one another in a terminal of 100 columns.
_COLUMNS = 10
_WIDTH = 100


@dataclass(frozen=True)
class Pairing:
    """Two validations set against one another at their best layers, or why they are not.

    `difference` is AUROC of the first minus that of the second on the same `n` prompts. `remark`
    is a sentence: why there is none, or what to keep in mind; empty where there is nothing to say.
    """

    first: str
    second: str
    difference: AurocDifference | None
    n: int
    remark: str


@dataclass(frozen=True)
class Comparison:
    """Runs under the letters A, B, ... in the order given, pairs of them, and plain remarks."""

    runs: tuple[ComparedRun, ...]
    pairings: tuple[Pairing, ...]
    remarks: tuple[str, ...]
    files: tuple[Path, ...] = ()


def compare(paths: Sequence[str | Path], output: str | Path | None = None) -> Comparison:
    """Read two or more folders and set them side by side.

    Args:
        paths: folders of validations, of runs, or of a run's vectors; a folder of several methods
            stands for each of them.
        output: folder for comparison.csv, .json and .html; free, or of an earlier comparison.
            None writes nothing.

    Raises:
        UsageError: fewer than two folders, or more than there are letters.
        StoreError: a folder is none of these, or malformed.
        OutputError: the output holds something else, or cannot be written.
    """
    each = [folders_by_method(path) or (path,) for path in map(Path, paths)]
    folders = [folder for several in each for folder in several]
    if not 2 <= len(folders) <= _MOST_RUNS:
        raise UsageError(
            f"expected from 2 to {_MOST_RUNS} folders to compare, got {len(folders)}; name "
            "validations, or runs, one after the other"
        )
    if output is not None:
        _require_output(Path(output))
    letters = string.ascii_uppercase
    runs = tuple(read_compared(path, letters[i]) for i, path in enumerate(folders))
    validations = [run for run in runs if run.validation is not None]
    fixed = all(_chosen_in_training(run) is not None for run in validations)
    pairings = tuple(
        _pairing(*pair, fixed=fixed) for pair in itertools.combinations(validations, 2)
    )
    found = Comparison(runs, pairings, tuple(_remarks(runs, pairings, fixed=fixed)))
    if output is None:
        return found
    files = _write(found, Path(output))
    return Comparison(found.runs, found.pairings, found.remarks, files)


# ---------------------------------------------------------------- pairs


def _chosen_in_training(run: ComparedRun) -> int | None:
    """The layer that training chose, where it was scored."""
    assert run.validation is not None
    layer = run.validation.evidence.chosen_in_training
    return layer if layer in run.validation.results else None


def _pairing(first: ComparedRun, second: ComparedRun, *, fixed: bool) -> Pairing:
    """Two validations' difference, at the layers that training chose if `fixed`, or their best."""
    one, other = first.validation, second.validation
    assert one is not None
    assert other is not None
    if one.positive_class != other.positive_class:
        remark = (
            f"not comparable: a high score means {shown(one.positive_class, 40)} in "
            f"{first.letter} and {shown(other.positive_class, 40)} in {second.letter}"
        )
        return Pairing(first.letter, second.letter, None, 0, remark)
    layers = one.best_layer, other.best_layer
    if fixed:
        layers = _chosen_in_training(first) or 0, _chosen_in_training(second) or 0
    mine, theirs = one.scores[layers[0]], other.scores[layers[1]]
    order = _same_prompts(mine, theirs)
    if order is None:
        remark = _other_prompts(first, second, mine, theirs)
        return Pairing(first.letter, second.letter, None, 0, remark)
    difference = paired_difference(mine.scores, theirs.scores[order], mine.is_positive)
    remark = _aggregates(one, other)
    return Pairing(first.letter, second.letter, difference, mine.scores.size, remark)


def _same_prompts(mine: LayerScores, theirs: LayerScores) -> np.ndarray | None:
    """Where each of my prompts stands among theirs; None unless all do, in the same class."""
    keys, others = list(zip(mine.ids, mine.classes, strict=True)), _keys(theirs)
    if keys == others and mine.questions == theirs.questions:
        return np.arange(len(keys))
    places = {key: place for place, key in enumerate(others)}
    if len(places) < len(others) or set(places) != set(keys) or len(keys) != len(others):
        return None
    order = np.array([places[key] for key in keys])
    same = all(
        mine.questions[row] == theirs.questions[place] for row, place in enumerate(order.tolist())
    )
    return order if same else None


def _keys(scores: LayerScores) -> list[tuple[str, str]]:
    return list(zip(scores.ids, scores.classes, strict=True))


def _other_prompts(
    first: ComparedRun, second: ComparedRun, mine: LayerScores, theirs: LayerScores
) -> str:
    shared = len(
        set(zip(_keys(mine), mine.questions, strict=True))
        & set(zip(_keys(theirs), theirs.questions, strict=True))
    )
    return (
        f"not comparable: other prompts ({first.letter} scored {len(mine.ids)}, {second.letter} "
        f"{len(theirs.ids)}, {shared} the same in id, class and text)"
    )


def _aggregates(one: Validation, other: Validation) -> str:
    """Another way of reading the tokens is part of what differs, and has to be said."""
    mine, theirs = one.evidence.aggregate, other.evidence.aggregate
    if mine == theirs:
        return ""
    return (
        f"scores are made of tokens in two ways ({shown(mine, 20)}, {shown(theirs, 20)}): not the "
        "probes alone are compared"
    )


def _remarks(runs: Sequence[ComparedRun], pairings: Sequence[Pairing], *, fixed: bool) -> list[str]:
    found = []
    paired = [one for one in pairings if one.difference is not None]
    chosen = [run for run in runs if run.validation and len(run.validation.results) > 1]
    if paired and fixed:
        layers = ", ".join(
            f"{run.letter} {_chosen_in_training(run)}" for run in runs if run.validation
        )
        found.append(
            f"Differences are between the layers that training chose ({layers}), which these "
            "prompts had no part in."
        )
    elif paired and chosen:
        found.append(
            "Differences are between best layers, which were chosen on these very prompts: the "
            "intervals do not pay for that choice."
        )
    if len(paired) > 1:
        found.append(
            f"{len(paired)} pairs are set against one another: of so many, one may differ by "
            f"chance; hold p against {0.05 / len(paired):.2g}."
        )
    methods = {run.validation.evidence.interval_method for run in runs if run.validation}
    if paired and any(method and "group" in method for method in methods):
        found.append(
            "The differences take prompts as independent, although some intervals here are "
            "resampled over groups: where prompts of a group are alike, they are too narrow."
        )
    if len({run.positive_class for run in runs}) > 1:
        found.append("The runs do not mean the same class by a high score.")
    if len({run.facts["model"] for run in runs}) > 1:
        found.append("The models differ: a layer's number does not mean the same depth in each.")
    if len({run.kind for run in runs}) > 1:
        found.append(
            "Vectors stand with their cross-validated estimate on training prompts, validations "
            "with the AUROC on theirs."
        )
    return found


# ---------------------------------------------------------------- for a terminal


def lines(comparison: Comparison) -> list[str]:
    """The comparison as lines of at most 100 columns."""
    parts = [
        _described(comparison.runs),
        _summary_lines(comparison.runs),
        *_layer_blocks(comparison.runs),
        _pairing_lines(comparison.pairings),
        _wrapped_all("Note: ", comparison.remarks),
    ]
    joined = [["", *part] for part in parts if part]
    return list(itertools.chain.from_iterable(joined))[1:]


def _described(runs: Sequence[ComparedRun]) -> list[str]:
    """Each run's place and what it was made of; facts that all share are told once."""
    shared = [name for name in _FACTS if _is_shared(runs, name)]
    own = [name for name in _FACTS if name not in shared]
    found = []
    for run in runs:
        found.append(f"{run.letter}  {shown(str(run.path), _WIDTH - 16)} ({run.kind})")
        found += _wrapped("   ", _facts(run, own))
    return found + _wrapped("All: ", _facts(runs[0], shared))


def _facts(run: ComparedRun, names: Sequence[str]) -> str:
    return "; ".join(f"{name} {shown(run.facts[name], 70)}" for name in names if run.facts[name])


def _is_shared(runs: Sequence[ComparedRun], name: str) -> bool:
    return len({run.facts[name] for run in runs}) == 1


def _summary_lines(runs: Sequence[ComparedRun]) -> list[str]:
    head = (
        f"   {'best layer':>10}  {'AUROC':<20}  {'p-value':>7}  {'cross-validated':<20}  "
        f"{'gain':>6}  best baseline"
    )
    rows = []
    for run in runs:
        layer = "–" if run.best_layer is None else str(run.best_layer)
        p_value = "–" if run.p_value is None else f"{run.p_value:.2g}"
        gain = "–" if run.gain is None else f"{run.gain:+.3f}"
        name, value = run.best_baseline or ("–", None)
        baseline = shown(name, 16) + ("" if value is None else f" {value:.3f}")
        rows.append(
            f"{run.letter}  {layer:>10}  {_interval(run.best):<20}  {p_value:>7}  "
            f"{_interval(run.nested):<20}  {gain:>6}  {baseline}"
        )
    return [head, *rows]


def _interval(estimate: Interval | None) -> str:
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _layer_blocks(runs: Sequence[ComparedRun]) -> list[list[str]]:
    """AUROC of every layer, so many runs at a time as a terminal holds."""
    layers = sorted({layer for run in runs for layer in run.layers})
    blocks = []
    for start in range(0, len(runs), _COLUMNS):
        shown_runs = runs[start : start + _COLUMNS]
        head = f"{'layer':>6}" + "".join(f"{run.letter:>8} " for run in shown_runs)
        rows = [_layer_line(layer, shown_runs) for layer in layers]
        blocks.append([head.rstrip(), *rows])
    return blocks


def _layer_line(layer: int, runs: Sequence[ComparedRun]) -> str:
    cells = []
    for run in runs:
        value = _figure(run, layer)
        mark = "*" if layer == run.best_layer else " "
        cells.append(f"{'–' if value is None else f'{value:.3f}':>8}{mark}")
    return (f"{layer:>6}" + "".join(cells)).rstrip()


def _figure(run: ComparedRun, layer: int) -> float | None:
    """A run's AUROC at a layer: validated, or else cross-validated."""
    figures = run.layers.get(layer)
    if figures is None:
        return None
    estimate = figures.cross_validated if run.validation is None else figures.validated
    return None if estimate is None else estimate.value


def _pairing_lines(pairings: Sequence[Pairing]) -> list[str]:
    found = []
    for one in pairings:
        name = f"{one.first} - {one.second}: "
        if one.difference is None:
            found += _wrapped(name, one.remark)
            continue
        gap = one.difference
        words = (
            f"{gap.difference:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], p = {gap.p_value:.2g}, "
            f"on the same {one.n} prompts"
        )
        found += _wrapped(name, words + (f"; {one.remark}" if one.remark else ""))
    return found


def _wrapped_all(name: str, sentences: Sequence[str]) -> list[str]:
    return [line for sentence in sentences for line in _wrapped(name, sentence)]


def _wrapped(name: str, words: str) -> list[str]:
    """A paragraph behind its name; nothing where there are no words."""
    indent = " " * len(name)
    return textwrap.wrap(words, _WIDTH, initial_indent=name, subsequent_indent=indent)


# ---------------------------------------------------------------- files


def _require_output(output: Path) -> None:
    """Raise OutputError unless the folder is free or holds an earlier comparison alone."""
    require_place(real_path(output))
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"expected --output {output} to be a folder, got a file; choose another")
    foreign = sorted(path.name for path in output.iterdir() if path.name not in _FILES)
    if foreign:
        raise OutputError(
            f"expected --output {output} to be free or an earlier comparison, but it holds "
            f"{foreign[0]}; choose another folder"
        )


def _write(comparison: Comparison, output: Path) -> tuple[Path, ...]:
    from probecache.report.comparison import render_comparison

    page = render_comparison(
        comparison.runs, [_pair_text(one) for one in comparison.pairings], comparison.remarks
    )
    contents = {
        "comparison.csv": _table(comparison.runs).encode(),
        "comparison.json": encode_json(_record(comparison)),
        "comparison.html": page.encode(),
    }
    with disk_errors_named(output, sum(map(len, contents.values()))):
        output.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_bytes(output / name, content)
    return tuple(output / name for name in contents)


def _pair_text(one: Pairing) -> tuple[str, str]:
    """A pair's name and what is said of it, for the page."""
    words = " ".join(" ".join(_pairing_lines([one])).split())
    name = f"{one.first} - {one.second}"
    return name.replace("-", "−"), words.removeprefix(f"{name}: ")


def _table(runs: Sequence[ComparedRun]) -> str:
    """One row per run and layer; letters, numbers and nothing of a stranger's text."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    kinds = ("auroc", "low", "high")
    writer.writerow(["run", "layer", *kinds, *(f"cv_{kind}" for kind in kinds), "best"])
    for run in runs:
        for layer, figures in run.layers.items():
            cells = [*_cells(figures.validated), *_cells(figures.cross_validated)]
            writer.writerow([run.letter, layer, *cells, int(layer == run.best_layer)])
    return buffer.getvalue()


def _cells(estimate: Interval | None) -> list[float | None]:
    return [None] * 3 if estimate is None else [estimate.value, estimate.low, estimate.high]


def _record(comparison: Comparison) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "format_version": 1,
        "runs": [_run_record(run) for run in comparison.runs],
        "pairings": [_pairing_record(one) for one in comparison.pairings],
        "remarks": list(comparison.remarks),
    }


def _run_record(run: ComparedRun) -> dict[str, Any]:
    name, value = run.best_baseline or (None, None)
    return {
        "run": run.letter,
        "kind": run.kind,
        "path": _writable(str(run.path)),
        **{fact: _writable(run.facts[fact]) for fact in _FACTS},
        "positive_class": _writable(run.positive_class),
        "best_layer": run.best_layer,
        "auroc": _estimate_record(run.best),
        "p_value": run.p_value,
        "cross_validated": _estimate_record(run.nested),
        "best_baseline": None if name is None else {"title": _writable(name), "auroc": value},
        "gain": run.gain,
        "layers": [
            {
                "layer": layer,
                "validated": _estimate_record(figures.validated),
                "cross_validated": _estimate_record(figures.cross_validated),
            }
            for layer, figures in run.layers.items()
        ],
    }


def _writable(words: str) -> str:
    """A text that UTF-8 can hold: lone surrogates are spelt out."""
    return words.encode("utf-8", "backslashreplace").decode()


def _estimate_record(estimate: Interval | None) -> dict[str, float | None] | None:
    if estimate is None:
        return None
    return {"auroc": estimate.value, "low": estimate.low, "high": estimate.high}


def _pairing_record(one: Pairing) -> dict[str, Any]:
    gap = one.difference
    found = None
    if gap is not None:
        found = {
            "difference": gap.difference,
            "low": gap.low,
            "high": gap.high,
            "p_value": gap.p_value,
        }
    return {
        "first": one.first,
        "second": one.second,
        "n": one.n,
        "difference": found,
        "remark": _writable(one.remark),
    }
