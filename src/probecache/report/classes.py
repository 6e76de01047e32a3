"""Which classes a report shows on their own, and in which colour.

Guarantees: a class has one colour in every figure and on the page; six colours at most, apart in
the common forms of colour blindness (a difference of at least 17 in CIELAB under Machado's
simulation) and with a contrast of at least 3 to the page, light and dark. Does not touch the
scores: the ROC curve is the positive class against all the others, however many these are.
"""

from __future__ import annotations

from dataclasses import dataclass

from probecache.report.saved import Validation, shown

__all__ = ["NEGATIVE", "POSITIVE", "VARIABLES", "ClassGroup", "class_groups"]

# Okabe and Ito's vermilion and blue: apart in all common forms of colour blindness and in print.
POSITIVE, NEGATIVE = "#d55e00", "#0072b2"
# For more classes their green and purple; their yellows, too pale for a line, give way to a brown.
OTHERS = {
    "negative": NEGATIVE,
    "class-3": "#009e73",
    "class-4": "#6e3b00",
    "class-5": "#cc79a7",
    "class-6": "#4d535c",
}
COLOURS = {"positive": POSITIVE, **OTHERS}
# The page's name for each colour; what it stands for there depends on light and dark.
VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
MOST_COLOURS = len(COLOURS)


@dataclass(frozen=True)
class ClassGroup:
    """What one colour stands for: a class, or the smallest ones together.

    `style` names the colour on the page, `size` counts the prompts.
    """

    label: str
    members: frozenset[str]
    size: int
    style: str

    @property
    def colour(self) -> str:
        return COLOURS[self.style]


def class_groups(validation: Validation) -> list[ClassGroup]:
    """At most six groups, the positive class the last; smaller classes share the last colour."""
    sizes = {name: size for name, size in validation.class_sizes.items() if size}
    positive = validation.positive_class
    others = [name for name in sizes if name != positive]
    own = _shown_on_their_own(others, sizes)
    parts = [(shown(name), [name]) for name in others if name in own]
    if rest := [name for name in others if name not in own]:
        parts.append((f"{len(rest)} other classes", rest))
    styles = [*OTHERS][: len(parts) - bool(rest)] + [*OTHERS][-1:] * bool(rest)
    parts.append((shown(positive), [positive]))
    return [
        ClassGroup(label, frozenset(names), sum(sizes[name] for name in names), style)
        for (label, names), style in zip(parts, [*styles, "positive"], strict=True)
    ]


def _shown_on_their_own(others: list[str], sizes: dict[str, int]) -> set[str]:
    """All, or so many of the largest that one colour is left for the rest."""
    if len(others) < MOST_COLOURS:
        return set(others)
    return set(sorted(others, key=lambda name: -sizes[name])[: MOST_COLOURS - 2])
