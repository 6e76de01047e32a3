"""What the page's panels say, as plain records for the template.

Guarantees: every text of data is cut and cleaned, none is escaped (the template does that); at most
a few hundred prompts and tokens are shown, however many there are. Words say no more than numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from probecache.report.classes import ClassGroup
from probecache.report.evidence import Artefacts
from probecache.report.fields import Interval, shown, shown_lines
from probecache.report.saved import LayerResult, Validation
from probecache.report.tokens import Piece, ScoredPrompt, TokenScores

__all__ = [
    "BaselineRow",
    "Fact",
    "Prompt",
    "Tile",
    "TokenPrompt",
    "artefact_facts",
    "baseline_rows",
    "calibration_text",
    "extremes",
    "prompt_table",
    "score_text",
    "signed",
    "tiles",
    "token_prompts",
    "training_facts",
    "verdict",
]

MOST_PROMPTS = 5
MOST_TABLED = 400
MOST_PIECES = 500
MOST_PIECE = 300
MOST_TOKEN_PROMPTS = 8
Fact = tuple[str, str]


@dataclass(frozen=True)
class Tile:
    """One of the figures that come first: what it is, how much, and what to know of it."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class BaselineRow:
    """A line of the artefact panel; `reaches` where its interval holds the probe's AUROC."""

    title: str
    estimate: Interval | None
    how: str
    best: bool
    reaches: bool


@dataclass(frozen=True)
class Prompt:
    """A prompt as the page shows it; `astray` on the wrong side of the threshold."""

    value: float
    label: str
    style: str
    question: str
    astray: bool

    @property
    def score(self) -> str:
        return score_text(self.value)


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt whose pieces carry a shade: u1 to u4 for high scores, d1 to d4 for low ones."""

    score: str
    label: str
    style: str
    pieces: tuple[tuple[str, str, str | None], ...]
    before: int
    after: int


def score_text(value: float | None) -> str:
    """Three decimals for usual sizes, an exponent for others, a real minus sign in front."""
    if value is None:
        return "–"
    usual = value == 0 or 5e-4 <= abs(value) < 1e4
    size = f"{abs(value):.3f}" if usual else f"{abs(value):.2e}"
    return f"−{size}" if value < 0 else size


def signed(value: float) -> str:
    """A difference, three decimals with its sign."""
    return f"{'−' if value < 0 else '+'}{abs(value):.3f}"


def verdict(validation: Validation) -> str:
    """What the best layer's interval, and the test that counts all layers, allow to say."""
    best, test = validation.best, validation.evidence.best_of_all
    if best.auroc_high < 0.5:
        return "below chance: the direction points the other way"
    if best.auroc_low <= 0.5:
        return "not told apart from chance (the interval holds 0.5)"
    if test is None:
        return "above chance"
    if test.p_value >= 0.05:
        return f"not told apart from the best of shuffled labels ({_p_text(test.p_value)})"
    return f"above chance ({_p_text(test.p_value)}, all layers counted)"


def tiles(validation: Validation) -> list[Tile]:
    """The figures to read first; those that the validation has."""
    best, evidence = validation.best, validation.evidence
    found = [Tile(f"AUROC at layer {best.layer}", f"{best.auroc:.3f}", _bounds(best))]
    fixed = evidence.training.best_layer if evidence.training else None
    if fixed is not None and fixed in validation.results and fixed != best.layer:
        chosen = validation.results[fixed]
        name = f"Layer {fixed}, chosen in training"
        found.append(Tile(name, f"{chosen.auroc:.3f}", _bounds(chosen)))
    if evidence.training and evidence.training.nested:
        nested = evidence.training.nested
        note = f"{_range(nested)}, layer chosen inside the folds"
        found.append(Tile("Training, cross-validated", f"{nested.value:.3f}", note))
    artefacts = evidence.artefacts
    if artefacts and artefacts.best and artefacts.best.estimate:
        title = shown(artefacts.best.title, 40)
        gain = "" if artefacts.gain is None else f"the probe's gain is {signed(artefacts.gain)}"
        found.append(Tile(f"Best baseline: {title}", f"{artefacts.best.estimate.value:.3f}", gain))
    if evidence.best_of_all:
        test = evidence.best_of_all
        note = f"best of all layers, {test.permutations:,} permutations"
        found.append(Tile("p-value", _p_text(test.p_value).removeprefix("p = "), note))
    return found


def training_facts(validation: Validation) -> list[Fact]:
    """How the vectors, the scores and the intervals were made, where that is recorded."""
    evidence, found = validation.evidence, []
    if evidence.training:
        training = evidence.training
        words = f"{training.n_positive} and {training.n_negative} rows"
        if training.folds:
            words += f"; cross-validated in {training.folds} folds of {training.groups} groups"
        found.append(("Training", words))
    if evidence.interval_method:
        found.append(("Intervals of AUROC", shown(evidence.interval_method)))
    if evidence.best_of_all and evidence.best_of_all.null_95 is not None:
        null = evidence.best_of_all.null_95
        found.append(("Best layer of shuffled labels", f"AUROC up to {null:.3f} in 95 of 100"))
    return found


def baseline_rows(validation: Validation) -> list[BaselineRow]:
    """Every baseline beside the probe's best layer."""
    artefacts, area = validation.evidence.artefacts, validation.best.auroc
    if artefacts is None:
        return []
    return [
        BaselineRow(
            title=shown(one.title, 60),
            estimate=one.estimate,
            how=shown(one.how, 300),
            best=one.name == artefacts.best_baseline,
            reaches=_reaches(one.name, one.estimate, area),
        )
        for one in artefacts.baselines
    ]


def _reaches(name: str, estimate: Interval | None, area: float) -> bool:
    """Whether a baseline explains the probe's AUROC, by the rules of the warnings."""
    if estimate is None:
        return False
    if name == "random-directions":  # their mean, not the best of them
        return estimate.value >= area - 0.02
    return estimate.low is not None and estimate.low > 0.5 and _top(estimate) >= area


def artefact_facts(artefacts: Artefacts) -> list[Fact]:
    """What else of the data and the directions could mislead; those that were measured."""
    found = []
    if artefacts.balance:
        positive, negative = artefacts.balance
        share = f" ({positive / (positive + negative):.0%} positive)" if positive + negative else ""
        found.append(("Class balance", f"{positive} against {negative}{share}"))
    if artefacts.pair_agreement is not None:
        words = f"mean cosine {signed(artefacts.pair_agreement)} (1 = all alike, 0 = unrelated)"
        found.append(("Agreement of pair differences", words))
    if artefacts.outlier_share is not None:
        found.append(("Outlier dimensions", _outliers(artefacts)))
    if artefacts.first_token_share is not None:
        found.append(("Owed to the first token", _first_token(artefacts.first_token_share)))
    if artefacts.rendered_alike is not None:
        found.append(("Training and validation", _rendering(artefacts)))
    return found


def calibration_text(validation: Validation) -> str:
    """How good the best layer's probabilities are, in figures."""
    known = validation.evidence.layers[validation.best_layer]
    parts = [
        ("slope", known.calibration_slope, "(1 = as sure as it may be)"),
        ("intercept", known.calibration_intercept, "(0 = no lean)"),
        ("Brier score", known.brier, ""),
        ("mean error of the bins", known.calibration_error, ""),
    ]
    words = [f"{name} {score_text(v)} {what}".strip() for name, v, what in parts if v is not None]
    text = ", ".join(words)
    return text[:1].upper() + text[1:]


def extremes(validation: Validation, groups: list[ClassGroup]) -> tuple[list[Prompt], list[Prompt]]:
    """The best layer's highest and lowest scoring prompts; the two lists share none."""
    order = _order(validation)
    count = min(MOST_PROMPTS, order.size // 2)
    return (
        _prompts(validation, groups, order[::-1][:count], 240),
        _prompts(validation, groups, order[:count], 240),
    )


def prompt_table(validation: Validation, groups: list[ClassGroup]) -> list[Prompt]:
    """The best layer's prompts from the highest score down; of very many, those at both ends."""
    order = _order(validation)[::-1]
    if order.size > MOST_TABLED:
        order = np.concatenate([order[: MOST_TABLED // 2], order[-MOST_TABLED // 2 :]])
    return _prompts(validation, groups, order, 140)


def token_prompts(tokens: TokenScores, end: str, groups: list[ClassGroup]) -> list[TokenPrompt]:
    """The prompts of one end with their tokens shaded."""
    styles = _styles(groups)
    chosen = [prompt for prompt, _ in zip(tokens.at(end), range(MOST_TOKEN_PROMPTS), strict=False)]
    return [_token_prompt(prompt, tokens, styles) for prompt in chosen]


def _token_prompt(prompt: ScoredPrompt, tokens: TokenScores, styles: dict[str, str]) -> TokenPrompt:
    start, stop = _window(prompt)
    return TokenPrompt(
        score=score_text(prompt.score),
        label=shown(prompt.label, 28),
        style=styles.get(prompt.label, "class-6"),
        pieces=tuple(_piece(piece, tokens) for piece in prompt.pieces[start:stop]),
        before=start,
        after=len(prompt.pieces) - stop,
    )


def _window(prompt: ScoredPrompt) -> tuple[int, int]:
    """All pieces, or as many as are shown around the one that is furthest to the prompt's end."""
    count = len(prompt.pieces)
    if count <= MOST_PIECES:
        return 0, count
    sign = 1 if prompt.end == "highest" else -1
    scored = (
        (sign * piece.score, -place)
        for place, piece in enumerate(prompt.pieces)
        if piece.score is not None
    )
    peak = -max(scored, default=(0.0, 0))[1]
    start = min(max(0, peak - MOST_PIECES // 2), count - MOST_PIECES)
    return start, start + MOST_PIECES


def _piece(piece: Piece, tokens: TokenScores) -> tuple[str, str, str | None]:
    """Text, style and figure; a line end is made visible where it has a score of its own."""
    words = shown_lines(piece.text, MOST_PIECE)
    if piece.score is None:
        return words, "", None
    shade = tokens.shade(piece.score)
    style = f"u{shade}" if shade > 0 else f"d{-shade}" if shade else ""
    return words.replace("\n", "↵\n"), style, score_text(piece.score)


def _order(validation: Validation) -> np.ndarray:
    return np.argsort(validation.scores[validation.best_layer].scores, kind="stable")


def _prompts(
    validation: Validation, groups: list[ClassGroup], rows: Iterable[int], length: int
) -> list[Prompt]:
    layer, threshold = validation.scores[validation.best_layer], validation.best.threshold
    styles = _styles(groups)
    return [
        Prompt(
            value=float(layer.scores[row]),
            label=shown(layer.classes[row], 28),
            style=styles[layer.classes[row]],
            question=shown(layer.questions[row], length) or "(empty)",
            astray=threshold is not None
            and bool((layer.scores[row] > threshold) != layer.is_positive[row]),
        )
        for row in rows
    ]


def _styles(groups: list[ClassGroup]) -> dict[str, str]:
    return {name: group.style for group in groups for name in group.members}


def _bounds(result: LayerResult) -> str:
    return (
        f"95% interval {result.auroc_low:.3f} to {result.auroc_high:.3f}; "
        f"{result.n_positive} against {result.n_negative} prompts"
    )


def _range(estimate: Interval) -> str:
    if estimate.low is None or estimate.high is None:
        return "without an interval"
    return f"95% interval {estimate.low:.3f} to {estimate.high:.3f}"


def _top(estimate: Interval) -> float:
    return estimate.value if estimate.high is None else estimate.high


def _p_text(p_value: float) -> str:
    return f"p = {p_value:.3f}" if p_value >= 0.001 else f"p = {p_value:.1g}"


def _outliers(artefacts: Artefacts) -> str:
    named = artefacts.outlier_dimensions[:8]
    more = len(artefacts.outlier_dimensions) - len(named)
    names = ", ".join(map(str, named)) + (f" and {more} more" if more else "")
    where = f", in dimension {names}" if named else ""
    return f"{artefacts.outlier_share:.0%} of the squared norm{where}"


def _first_token(share: float) -> str:
    usual = abs(share) < 100
    size = f"{round(100 * share) + 0}%" if usual else score_text(share)
    return f"{size.replace('-', '−')} of the variance of the prompts' scores"


def _rendering(artefacts: Artefacts) -> str:
    if artefacts.rendered_alike:
        return "rendered alike"
    differences = [shown(one, 200).rstrip(".") for one in artefacts.rendering_differences[:8]]
    return (
        f"rendered differently: {'; '.join(differences)}" if differences else "not rendered alike"
    )
