"""Score a cache with vectors and say how well the classes part, and what else could explain it.

Guarantee: vectors and cache come from one model read in one way, or the run is refused; a higher
score means the vectors' positive class; every score is a real projection of the kept tokens; every
AUROC carries its interval and its sample sizes, a layer chosen by it is reported as chosen, and the
artefact panel stands beside it.
"""

from __future__ import annotations

from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from probecache.aggregate import MEAN, Aggregate
from probecache.controls import (
    RandomControl,
    chance_caution,
    few_examples_caution,
    permutation_caution,
    random_auroc,
    reversed_caution,
)
from probecache.errors import NoDirectionError
from probecache.folds import group_numbers
from probecache.foreign import csv_cell
from probecache.layers import format_layers
from probecache.store.rows import ExampleRows
from probecache.types import Positions
from probecache.workflow.belonging import (
    choose_layers,
    require_data,
    require_scorable,
    trained_on,
)
from probecache.workflow.judging import Category, Judged, LayerResult, by_category, judge
from probecache.workflow.layers_at_once import each_layer
from probecache.workflow.panel import Panel, make_panel
from probecache.workflow.results import csv_bytes, require_output, save_results
from probecache.workflow.scoring import (
    STATISTICS,
    TokenScores,
    bytes_of_scoring,
    score_layer,
)
from probecache.workflow.summary import about, findings
from probecache.workflow.token_scores import token_scores_json

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from probecache.dataset import Dataset
    from probecache.metrics import PermutationTest
    from probecache.store.reader import Cache
    from probecache.store.vectors import SavedVectors

__all__ = ["ValidateOptions", "Validation", "validate"]

_COLUMNS = ("mean", "max")  # aggregates that have a column among the statistics

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class ValidateOptions:
    """How to score.

    Attributes:
        positions: of a cache of `all` positions, which to score; None: every row that is kept.
        aggregate: how the scores of an example's tokens become one.
        control_count: random directions per layer; 0: none.
        allow_mismatch: identity fields in which vectors and cache may differ.
        visualize: plots and report.html too.
    """

    positions: str | None = None
    aggregate: Aggregate = MEAN
    control_count: int = 10
    allow_mismatch: Collection[str] = ()
    visualize: bool = False


@dataclass(frozen=True)
class Validation:
    """What `validate` found and wrote."""

    path: Path
    layers: tuple[LayerResult, ...]
    best: LayerResult
    chosen_in_training: LayerResult | None
    permutation: PermutationTest
    interval: str
    groups_by_class: tuple[int, int]
    categories: tuple[Category, ...]
    panel: Panel
    warnings: tuple[str, ...]
    positive_class: str
    method: str
    aggregate: str
    files: tuple[Path, ...]


def validate(
    cache: Cache,
    vectors: SavedVectors,
    output: str | Path,
    options: ValidateOptions,
    *,
    dataset: Dataset | None = None,
    layers: Sequence[int] | None = None,
    source: str | None = None,
) -> Validation:
    """Score every example at every layer; write statistics, summary and, if asked, the report.

    Args:
        cache: activations of the prompts to score.
        vectors: directions; their layers must be cached.
        output: folder to write, replaced if it holds an earlier validation.
        options: how to score.
        dataset: the data that the cache should have been made from; None skips the check.
        layers: which of the vectors' layers; None takes all.
        source: what to record as the cache's name; None stands for its path.

    Raises:
        MismatchError: vectors, cache and data do not belong together.
        LayerNotCachedError, NonFiniteError, OutputError.
    """
    output = Path(output)
    require_output(output)
    chosen, allowed = _require(cache, vectors, options, dataset, layers)
    scored = _Scored.of(ExampleRows(cache, options.positions), vectors, chosen, options)
    judged = _judge(scored, vectors)
    best = judged.best
    names = [record.category for record in cache.examples]
    categories = by_category(best, names, scored.groups)
    at_best = score_layer(scored.rows, best.layer, vectors.directions[best.layer])
    panel = make_panel(
        scored.rows,
        vectors,
        best,
        judged.permutation,
        scored.groups,
        at_best,
        control=options.control_count > 0,
        quoted=judged.chosen_in_training,
    )
    warnings = _warnings(judged, panel, vectors, scored.rows, allowed)
    summary = {
        **about(scored.rows, vectors, str(options.aggregate), dataset, source),
        **findings(judged, vectors, categories, panel),
        "allowed_mismatch": allowed,
        "warnings": warnings,
    }
    tables = _tables(scored, best, at_best.tokens)
    return Validation(
        path=output,
        layers=judged.layers,
        best=best,
        chosen_in_training=judged.chosen_in_training,
        permutation=judged.permutation,
        interval=judged.interval,
        groups_by_class=judged.groups_by_class,
        categories=categories,
        panel=panel,
        warnings=tuple(warnings),
        positive_class=vectors.info.positive_class,
        method=vectors.info.method,
        aggregate=str(options.aggregate),
        files=save_results(output, summary, tables, visualize=options.visualize),
    )


def _require(
    cache: Cache,
    vectors: SavedVectors,
    options: ValidateOptions,
    dataset: Dataset | None,
    layers: Sequence[int] | None,
) -> tuple[tuple[int, ...], list[str]]:
    """The layers to score, and the differences that were allowed; or what does not belong."""
    chosen = choose_layers(vectors, layers)
    for layer in chosen:
        cache.require_layer(layer)
    where = f"cache {cache.path}"
    allowed = require_scorable(
        vectors, cache.identity, cache.classes, where, chosen, options.allow_mismatch
    )
    if dataset is not None:
        require_data(cache, dataset)
    return chosen, allowed


# ---------------------------------------------------------------- scores


@dataclass(frozen=True)
class _Layer:
    """One layer's scores: of each example the statistics of its tokens, and their aggregate."""

    statistics: dict[str, Floats]
    scores: Floats
    random: RandomControl | None


@dataclass(frozen=True)
class _Scored:
    """Scores of all layers."""

    rows: ExampleRows
    is_positive: Bools
    groups: NDArray[np.intp]
    layers: dict[int, _Layer]
    aggregate: str

    @classmethod
    def of(
        cls,
        rows: ExampleRows,
        vectors: SavedVectors,
        layers: Sequence[int],
        options: ValidateOptions,
    ) -> _Scored:
        examples = rows.cache.examples
        positive = np.array([r.label == vectors.info.positive_class for r in examples])
        work = partial(_score, rows, vectors=vectors, positive=positive, options=options)
        groups = group_numbers([record.group for record in examples])
        with closing(each_layer(layers, work, bytes_of_scoring(rows))) as scored:
            found = {layer: future.result() for layer, future in scored}
        return cls(rows, positive, groups, found, str(options.aggregate))


def _score(
    rows: ExampleRows,
    layer: int,
    *,
    vectors: SavedVectors,
    positive: Bools,
    options: ValidateOptions,
) -> _Layer:
    scored = score_layer(rows, layer, vectors.directions[layer])
    random = None
    # Where all examples are equal, as at layer 0 where all end in one token, there are none.
    with suppress(NoDirectionError):
        if options.control_count:
            random = random_auroc(scored.means, positive, options.control_count)
    tokens = scored.tokens
    return _Layer(tokens.statistics(), tokens.aggregated(options.aggregate), random)


# ---------------------------------------------------------------- judgement


def _judge(scored: _Scored, vectors: SavedVectors) -> Judged:
    held_out = vectors.info.cross_validation
    if trained_on(vectors, scored.rows.cache):  # there, the choice was made on these very prompts
        held_out = None
    return judge(
        {layer: one.scores for layer, one in scored.layers.items()},
        scored.is_positive,
        scored.groups,
        vectors.info.layers,
        {layer: one.random for layer, one in scored.layers.items()},
        None if held_out is None else held_out.best_layer,
    )


def _warnings(
    judged: Judged, panel: Panel, vectors: SavedVectors, rows: ExampleRows, allowed: Sequence[str]
) -> list[str]:
    """Plain words on what a reader of the table could miss."""
    best, areas = judged.best, {result.layer: result.auroc for result in judged.layers}
    found = [f"Scored across a difference in {one}." for one in allowed]
    if trained_on(vectors, rows.cache):
        found.append(
            "These are the very prompts that the vectors were trained on: the AUROC says how well "
            "they were learnt, not how well it carries over. Score other prompts."
        )
    turned = reversed_caution(areas, vectors.info.positive_class)
    # Scores that are all reversed are no chance result, which a one-sided p-value calls them.
    chance = not (turned and best.auroc.high < 0.5)
    cautions = (
        turned,
        chance_caution(best.layer, best.auroc),
        permutation_caution(judged.permutation.p_value, len(areas)) if chance else None,
        few_examples_caution(*judged.groups_by_class),
        *panel.warnings,
    )
    found += [one for one in cautions if one is not None]
    one_sided = [result.layer for result in judged.layers if result.one_sided]
    if one_sided:
        trained, scored = vectors.info.positions, str(rows.positions)
        why = f" (trained on positions {trained}, scored on {scored})" if trained != scored else ""
        found.append(
            f"Nearly all scores lie on one side of the threshold fixed in training{why}: read the "
            f"AUROC, not the accuracy, at layer {format_layers(one_sided)}."
        )
    fixed = judged.chosen_in_training
    if len(areas) > 1 and (fixed is None or fixed is not best):
        found.append(
            f"Layer {best.layer} was chosen as the best of {len(areas)} on these very prompts, "
            f"so its AUROC is optimistic: {_instead(fixed)}"
        )
    return found


def _instead(fixed: LayerResult | None) -> str:
    """What to quote in place of a layer that was chosen on the prompts that it is quoted for."""
    if fixed is None:
        return "score prompts that played no part in the choice before quoting it."
    area = fixed.auroc
    return (
        f"quote layer {fixed.layer}, which training chose: {area.auroc:.3f} [{area.low:.3f}, "
        f"{area.high:.3f}]."
    )


# ---------------------------------------------------------------- files


def _tables(
    scored: _Scored, best: LayerResult, tokens: TokenScores
) -> dict[str, Callable[[], bytes]]:
    """What makes each file beside the summary."""
    tables: dict[str, Callable[[], bytes]] = {
        f"probe_stats_layer{layer}.csv": partial(_stats_csv, scored, layer)
        for layer in scored.layers
    }
    content = token_scores_json(scored.rows, best.layer, tokens, best.scores)
    if content is not None:
        tables["token_scores.json"] = lambda: content
    return tables


def _stats_csv(scored: _Scored, layer: int) -> bytes:
    """One layer's table; what was made of the tokens has a column where no other one is it."""
    own = scored.aggregate not in _COLUMNS
    header = ["question_id", "question", "type", *STATISTICS, "n_tokens", *["score"] * own]
    columns = [scored.layers[layer].statistics[name].tolist() for name in STATISTICS]
    columns += [_token_counts(scored.rows), *[scored.layers[layer].scores.tolist()] * own]
    rows = [
        [*map(csv_cell, (record.id, record.question, record.label)), *values]
        for record, *values in zip(scored.rows.cache.examples, *columns, strict=True)
    ]
    return csv_bytes(header, rows)


def _token_counts(rows: ExampleRows) -> list[int]:
    """Of how many tokens each example's score is made."""
    if rows.positions in (rows.cache.info.positions, Positions.MEAN):
        return [record.n_tokens for record in rows.cache.examples]
    return [int(count) for count in rows.counts]
