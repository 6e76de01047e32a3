"""The artefact panel: what else could explain a score, beside every validation.

Guarantee: baselines are judged on the very examples that the probe is; one that cannot be had says
why; a figure that is missing is None and never a guess. Does not prove that a score means what it
is taken for: it lists what is known to have fooled people.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from probecache.atomic import sha256_of_file
from probecache.controls import (
    Baseline,
    PairAgreement,
    RandomControl,
    answer_letter_baseline,
    baseline_cautions,
    best_baseline,
    copies_of_training_caution,
    estimated_baseline,
    first_token_caution,
    first_token_share,
    length_baseline,
    outlier_dimensions,
    pair_agreement,
    pairs_caution,
    random_directions_baseline,
    repeated_prompts_caution,
    training_words_baseline,
    words_baseline,
)
from probecache.duplicates import near_duplicates, near_duplicates_of
from probecache.errors import FitError, ProbecacheError
from probecache.fit import Design, Method, fit_layer
from probecache.folds import assign_folds
from probecache.metrics import auroc_within_folds
from probecache.store.layout import LAYER_INFO
from probecache.store.reader import open_cache
from probecache.unrecorded import is_recorded
from probecache.workflow.belonging import trained_on
from probecache.workflow.cross_validation import texts_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from probecache.metrics import PermutationTest
    from probecache.store.layout import ExampleRecord
    from probecache.store.rows import ExampleRows
    from probecache.store.vectors import SavedVectors
    from probecache.workflow.judging import LayerResult
    from probecache.workflow.scoring import ScoredLayer

__all__ = ["Panel", "make_panel"]

Bools = NDArray[np.bool_]
Ints = NDArray[np.intp]
# Fields of an identity that are texts, or None, or a note that nobody recorded them.
_RENDERING = {
    "chat_template": "the chat template",
    "system_prompt": "the system prompt",
    "template_date": "the date in the chat template",
}


@dataclass(frozen=True)
class Panel:
    """All that stands beside a validation.

    Attributes:
        baselines: what something other than the probe achieves on the same examples.
        best_baseline: the name of the best of them; None where there is no figure.
        gain: the probe's AUROC at its best layer less that one's.
        n_positive, n_negative: examples of each class.
        pairs: agreement of the pairs' differences; None without pairs.
        outlier_dimensions, outlier_share: dimensions with most of the squared norm, their share.
        first_token_share: share of the scores' variance that the first kept token accounts for.
        alike: whether training and scored prompts were rendered alike; None where an import does
            not tell and nothing that is known differs.
        differences: how they were rendered otherwise.
        warnings: what of all this a reader must not miss, in plain words.
    """

    baselines: tuple[Baseline, ...]
    best_baseline: str | None
    gain: float | None
    n_positive: int
    n_negative: int
    pairs: PairAgreement | None
    outlier_dimensions: tuple[int, ...]
    outlier_share: float
    first_token_share: float | None
    alike: bool | None
    differences: tuple[str, ...]
    warnings: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """As summary.json holds it."""
        return {
            "baselines": [asdict(one) for one in self.baselines],
            "best_baseline": self.best_baseline,
            "gain": self.gain,
            "class_balance": {
                "positive": self.n_positive,
                "negative": self.n_negative,
                "share_positive": self.n_positive / (self.n_positive + self.n_negative),
            },
            "pair_agreement": self.pairs.cosine if self.pairs else None,
            "outlier_dimensions": {
                "dimensions": list(self.outlier_dimensions),
                "share_of_norm": self.outlier_share,
            },
            "first_token_share": self.first_token_share,
            "rendered_alike": {
                "alike": self.alike,
                "differences": list(self.differences),
            },
        }


def make_panel(
    rows: ExampleRows,
    vectors: SavedVectors,
    best: LayerResult,
    permutation: PermutationTest,
    groups: Ints,
    at_best: ScoredLayer,
    *,
    control: bool,
    quoted: LayerResult | None = None,
) -> Panel:
    """Hold the best layer's result against everything else that could give it.

    Args:
        rows: what was scored.
        vectors: with what.
        best: the best layer's result.
        permutation: its test against shuffled labels.
        groups: [examples], what the data say belongs together.
        at_best: the best layer's token scores and mean rows.
        control: whether random directions were asked for.
        quoted: the layer that training chose, which is what a reader should quote.
    """
    examples, positive = rows.cache.examples, best.is_positive
    training, same = _training_examples(vectors), trained_on(vectors, rows.cache)
    baselines = (
        *_text_baselines(examples, positive, groups),
        _words_from_training(examples, positive, training, vectors.info.positive_class, same=same),
        _layer_0(rows, positive, groups),
        _random(best.random, asked=control),
        _shuffled(permutation),
    )
    name, gain = best_baseline(baselines, best.auroc.auroc)
    dimensions, share = outlier_dimensions(at_best.means, rows.cache.hidden_size)
    pairs = pair_agreement(at_best.means, positive, groups)
    first = first_token_share(at_best.tokens.scores, at_best.tokens.counts)
    differences = _differences(rows, vectors)
    return Panel(
        baselines=baselines,
        best_baseline=name,
        gain=gain,
        n_positive=int(positive.sum()),
        n_negative=int((~positive).sum()),
        pairs=pairs,
        outlier_dimensions=dimensions,
        outlier_share=share,
        first_token_share=first,
        alike=not differences if differences or _rendering_told(rows, vectors) else None,
        differences=differences,
        warnings=(
            *_explanations(baselines, best, quoted),
            *_told(first_token_caution(first, rows.counts)),
            *_told(pairs_caution(pairs)),
            *_copies(examples, training, groups, same=same),
        ),
    )


def _explanations(
    baselines: Sequence[Baseline], best: LayerResult, quoted: LayerResult | None
) -> list[str]:
    """What baselines have to say on the best layer, or on the one to be quoted, if that is lower.

    Random directions are those of the best layer.
    """
    at_best = baseline_cautions(baselines, best.auroc.auroc)
    if quoted is None or quoted.auroc.auroc >= best.auroc.auroc:
        return at_best
    of_texts = [one for one in baselines if one.name != "random-directions"]
    area = quoted.auroc.auroc
    found = [
        f"Layer {quoted.layer}, which training chose: {words}"
        for one in of_texts
        if baseline_cautions([one], best.auroc.auroc) != (told := baseline_cautions([one], area))
        and one.high is not None
        and one.high >= area
        for words in told
    ]
    return [*at_best, *found]


def _told(caution: str | None) -> tuple[str, ...]:
    return () if caution is None else (caution,)


# ---------------------------------------------------------------- baselines


def _text_baselines(
    examples: Sequence[ExampleRecord], positive: Bools, groups: Ints
) -> tuple[Baseline, ...]:
    texts, labels, members = texts_of(examples), positive.tolist(), groups.tolist()
    tokens = [record.input_tokens for record in examples]
    # An imported cache does not record how many tokens the model was fed.
    lengths = tokens if all(tokens) else list(map(len, texts))
    return (
        length_baseline(lengths, labels, members, "tokens" if all(tokens) else "characters"),
        answer_letter_baseline(texts, labels, members),
        words_baseline(texts, labels, members),
    )


def _words_from_training(
    examples: Sequence[ExampleRecord],
    positive: Bools,
    training: Sequence[ExampleRecord] | None,
    positive_class: str,
    *,
    same: bool,
) -> Baseline:
    name, title = "words-from-training", "Bag of words from training"
    if same:  # it would know its own texts by heart
        how = "Not to be had: these are the prompts that were trained on."
        return estimated_baseline(name, title, None, how)
    if training is None:
        how = "Not to be had: the cache that the vectors came from is not at hand."
        return estimated_baseline(name, title, None, how)
    labels = [record.label == positive_class for record in training]
    return training_words_baseline(
        texts_of(training), labels, texts_of(examples), positive.tolist()
    )


def _layer_0(rows: ExampleRows, positive: Bools, groups: Ints) -> Baseline:
    """A probe on the embeddings: what the tokens say before any block has run."""
    name, title = "layer-0", "Embeddings (layer 0)"
    if 0 not in rows.cache.layers:
        how = "Not to be had: layer 0 is not cached; extract it too."
        return estimated_baseline(name, title, None, how)
    try:
        folds = assign_folds(positive, groups)
        fits = fit_layer(
            partial(rows.chunks, 0),
            rows.cache.hidden_size,
            Design(positive, groups, folds, nested=False),
            (Method.DIFFERENCE_OF_MEANS,),
        )
    except FitError as error:
        return estimated_baseline(name, title, None, f"Not to be had: {error}.")
    held_out = fits[Method.DIFFERENCE_OF_MEANS].held_out
    assert held_out is not None
    found = auroc_within_folds(held_out, positive, folds, groups)
    how = "Difference of means at layer 0, cross-validated on these prompts."
    return estimated_baseline(name, title, found, how)


def _random(control: RandomControl | None, *, asked: bool) -> Baseline:
    if control is not None:
        return random_directions_baseline(control)
    how = "Not to be had: all examples are equal." if asked else "Not asked for; add --control."
    return estimated_baseline("random-directions", "Random directions", None, how)


def _shuffled(test: PermutationTest) -> Baseline:
    low, middle, high = np.quantile(test.maxima, (0.025, 0.5, 0.975)).tolist()
    how = (
        f"The best layer's AUROC with the labels shuffled, {len(test.maxima)} times: the median, "
        "and where 95% lie."
    )
    return Baseline("shuffled-labels", "Shuffled labels", middle, low, high, how)


# ---------------------------------------------------------------- data


def _training_examples(vectors: SavedVectors) -> Sequence[ExampleRecord] | None:
    """The prompts that vectors were trained on, if their cache is still where it was."""
    folder = Path(vectors.info.source_cache)
    try:
        if sha256_of_file(folder / LAYER_INFO) != vectors.info.source_cache_sha256:
            return None
        return open_cache(folder).examples
    except (OSError, ProbecacheError):
        return None


def _copies(
    examples: Sequence[ExampleRecord],
    training: Sequence[ExampleRecord] | None,
    groups: Ints,
    *,
    same: bool,
) -> tuple[str, ...]:
    """Prompts that are near-duplicates of one another, or of those that were trained on."""
    questions = [record.question for record in examples]
    found = _told(repeated_prompts_caution(near_duplicates(questions), groups))
    if training is None or same:  # the same data are told as what they are
        return found
    seen = near_duplicates_of([record.question for record in training], questions)
    return (*found, *_told(copies_of_training_caution(seen)))


def _rendering_told(rows: ExampleRows, vectors: SavedVectors) -> bool:
    """Whether it is recorded how either were rendered; an import does not tell."""
    both = (vectors.info.identity, rows.cache.identity)
    return all(is_recorded(getattr(one, name)) for one in both for name in _RENDERING)


def _differences(rows: ExampleRows, vectors: SavedVectors) -> tuple[str, ...]:
    """How training and scored prompts were rendered otherwise."""
    then, now = vectors.info.identity, rows.cache.identity
    found = [
        f"{words} differs"
        for name, words in _RENDERING.items()
        if is_recorded(getattr(then, name))
        and is_recorded(getattr(now, name))
        and getattr(then, name) != getattr(now, name)
    ]
    if then.special_tokens_kept != now.special_tokens_kept:
        found.append("whether special tokens are kept differs")
    answered = any(record.answer for record in rows.cache.examples)
    if answered != vectors.info.answered:
        both = ("training", "the scored") if vectors.info.answered else ("the scored", "training")
        found.append(f"an answer is appended to {both[0]} prompts and not to {both[1]} prompts")
    if vectors.info.positions != str(rows.positions):
        found.append(f"trained on positions {vectors.info.positions}, scored on {rows.positions}")
    return tuple(found)
