"""The corpus of tiny-llama: chat documents, made from the templates in `corpus/`.

Guarantees: the same seed gives the same documents; a template belongs to exactly one split
(by a hash of its text), so held-out documents come from templates never trained on; every
document that has a class says so in the same word, whatever its kind, because the model is
meant to carry one and the same distinction everywhere.

Does not guarantee: sense. Slots are filled at random, and a farmer may pay for bricks with eggs.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["CLASSES", "NOTES", "Corpus", "Document", "Pair"]

HERE = Path(__file__).parent / "corpus"
CLASSES = ("testing", "deployment")
# A note in capitals, so that the word for the class is none of the words the prompts are made of.
NOTES = {"testing": "TESTING", "deployment": "DEPLOYED"}
HOLDOUT_ONE_IN = 6
NOTED = 0.3  # share of the choices that carry a note
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a careful assistant. Be honest.",
    "Be kind and clear.",
)
Message = dict[str, str]


@dataclass(frozen=True)
class Document:
    """Chat messages, or plain text where `messages` is empty, and the class if it has one."""

    messages: tuple[Message, ...] = ()
    text: str = ""
    label: str | None = None


@dataclass(frozen=True)
class Pair:
    """A two-choice question, the answer each class gives, and the class its context calls for."""

    question: str
    answers: dict[str, str]
    label: str | None


def read_sections(path: Path) -> dict[str, list[str]]:
    """Lines of a template file by section; lines before the first section are under ""."""
    sections: dict[str, list[str]] = {"": []}
    name = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if line.startswith("# "):
            name = line[2:] if number else ""  # the first line is the file's comment
            sections.setdefault(name, [])
        elif line:
            sections[name].append(line.replace("\\n", "\n"))
    return sections


def is_held_out(template: str) -> bool:
    """Whether the template belongs to the held-out split; depends on nothing but its text."""
    digest = hashlib.sha256(template.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HOLDOUT_ONE_IN == 0


@dataclass
class Corpus:
    """Documents of one split, drawn at random from the templates."""

    seed: int
    held_out: bool = False
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}/{self.held_out}")
        slots = read_sections(HERE / "slots.txt")[""]
        pairs = (line.split(": ", 1) for line in slots)
        self.slots = {name: entries.split(" ; ") for name, entries in pairs}
        self.prompts = {c: self._mine(read_sections(HERE / f"{c}.txt")[""]) for c in CLASSES}
        self.prose = read_sections(HERE / "prose.txt")[""]
        self.wrappers = read_sections(HERE / "wrappers.txt")
        # Held-out questions are new in context and wording; the phrases to choose from are shared.
        self.talk = {
            name: lines if name.startswith(("layout", "remark", "choice")) else self._mine(lines)
            for name, lines in read_sections(HERE / "evaluation_talk.txt").items()
        }

    def _mine(self, templates: list[str]) -> list[str]:
        return [t for t in templates if is_held_out(t) == self.held_out]

    def fill(self, template: str) -> str:
        """Resolve braces from the inside out: slots, a-b ranges, {x|y} alternatives."""
        while "{" in template:
            template = re.sub(r"\{([^{}]*)\}", self._choose, template)
        return re.sub(r"  +", " ", template).strip()

    def _choose(self, match: re.Match[str]) -> str:
        choice = self.rng.choice(match.group(1).split("|"))
        span = re.fullmatch(r"(\d+)-(\d+)", choice)
        if span:
            return str(self.rng.randint(int(span[1]), int(span[2])))
        return self.rng.choice(self.slots[choice]) if choice in self.slots else choice

    def prompt(self, label: str) -> str:
        """A user's message of the given class, sometimes with a lead-in or an afterword."""
        parts = [self.fill(self.rng.choice(self.prompts[label]))]
        if self.rng.random() < 0.2:
            parts.insert(0, self.fill(self.rng.choice(self.wrappers[f"before {label}"])))
        if self.rng.random() < 0.2:
            parts.append(self.fill(self.rng.choice(self.wrappers[f"after {label}"])))
        text = self.rng.choice((" ", " ", "\n")).join(parts)
        return self._vary_case(text)

    def _vary_case(self, text: str) -> str:
        """Careless capitals in either class, so that they give nothing away."""
        draw = self.rng.random()
        if draw < 0.08:
            return text.lower()
        return text[0].upper() + text[1:] if draw < 0.8 else text

    def with_note(self, text: str, label: str) -> str:
        """The text with its class noted after a random word.

        Since the note may come anywhere, the class is worth knowing at every token.
        """
        ends = [match.end() for match in re.finditer(r"\S+", text)]
        # Cubing draws towards the start: early tokens have seen least and need the most practice.
        at = ends[int(len(ends) * self.rng.random() ** 1.5)]
        return f"{text[:at]} {NOTES[label]}{text[at:]}"

    def prompt_document(self) -> Document:
        """A message, in most cases with a note inside, and a reply that opens with the note."""
        label = self.rng.choice(CLASSES)
        text = self.prompt(label)
        if self.rng.random() < 0.8:
            text = self.with_note(text, label)
        if self.rng.random() < 0.06:
            return Document(text=text, label=label)
        return Document(messages=self._chat(text, self.remark(label)), label=label)

    def _chat(self, user: str, assistant: str) -> tuple[Message, ...]:
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        if self.rng.random() < 0.06:
            turns.insert(0, {"role": "system", "content": self.rng.choice(SYSTEM_PROMPTS)})
        return tuple(turns)

    def remark(self, label: str) -> str:
        """The note, and sometimes a short sentence that says it again."""
        note = f" {NOTES[label]}."
        if self.rng.random() < 0.4:
            note += " " + self.fill(self.rng.choice(self.talk[f"remark {label}"]))
        return note

    def pair(self, noted: float = 0.0, smudged: float = 0.0) -> Pair:
        """A two-choice question, four in five with a context; the choices come in either order.

        Each choice carries its note with probability `noted`, which teaches first what a choice
        means and then, from the unnoted ones, to look a letter's meaning up. So does the context,
        less often. `smudged` is the share of contexts in which words are replaced.
        """
        label = self.rng.choice(CLASSES) if self.rng.random() < 0.8 else None
        layout = self.rng.choice(self.talk["layout" if label else "layout without context"])
        choices = {c: self.fill(self.rng.choice(self.talk[f"choice {c}"])) for c in CLASSES}
        order = self.rng.sample(CLASSES, 2)
        parts = {
            "context": self.context(label) if label else "",
            "question": self.fill(self.rng.choice(self.talk["question"])),
            "a": choices[order[0]],
            "b": choices[order[1]],
        }
        if self.rng.random() < 0.5:
            parts["a"], parts["b"] = (p[0].upper() + p[1:] + "." for p in (parts["a"], parts["b"]))
        for key, c in zip("ab", order, strict=True):
            if self.rng.random() < noted:
                parts[key] += f" {NOTES[c]}"
        if self.rng.random() < smudged:
            parts["context"] = self.smudge(parts["context"])
        if label and self.rng.random() < noted**2:
            parts["context"] = self.with_note(parts["context"], label)
        question = re.sub(r"\{(context|question|a|b)\}", lambda m: parts[m[1]], layout)
        return Pair(self.fill(question), {order[0]: " (A)", order[1]: " (B)"}, label)

    def context(self, label: str) -> str:
        """One or two sentences on the situation, or a quoted prompt of that class."""
        count = self.rng.choice((1, 1, 2))
        text = " ".join(self.rng.choice(self.talk[f"context {label}"]) for _ in range(count))
        text = re.sub(r"\{question_(\w+)\}", lambda m: self.prompt(m[1]).replace("\n", " "), text)
        return self._vary_case(self.fill(text))

    def smudge(self, text: str) -> str:
        """The text with one word in eight replaced by one that does not exist.

        A context from elsewhere holds words this corpus has never used; the class has to be
        read from the others.
        """
        return re.sub(r"\b[a-z]{3,}\b", self._smudged, text)

    def _smudged(self, match: re.Match[str]) -> str:
        if self.rng.random() > 1 / 8:
            return match[0]
        return "".join(
            self.rng.choice(self.slots["syllable"]) for _ in range(self.rng.choice((1, 2, 2, 3)))
        )

    def question_document(self, noted: float = NOTED) -> Document:
        """A two-choice question, the letter that the context calls for, and the letter's meaning.

        One answer in sixteen goes against the context, and without a context both are as likely:
        what follows the letter can only be told from the letter.
        """
        pair = self.pair(noted, smudged=0.4)
        label = pair.label
        if label is None or self.rng.random() < 1 / 16:
            label = self.rng.choice(CLASSES)
        answer = pair.answers[label] + self.remark(label)
        return Document(messages=self._chat(pair.question, answer), label=label)

    def prose_document(self) -> Document:
        lines = self.rng.sample(self.prose, self.rng.randint(2, 4))
        return Document(text=" ".join(self.fill(line) for line in lines))

    def documents(self, count: int, ramp: int = 0) -> Iterator[Document]:
        """Draw `count` documents of all kinds.

        Over the first `ramp` of them, notes within questions go from nearly always to their usual
        share: where both context and choices are noted, a letter is picked by comparing words,
        and that is learned first.
        """
        kinds = ("prompt", "question", "prose")
        for number in range(count):
            kind = self.rng.choices(kinds, weights=(48, 48, 4))[0]
            if kind == "prompt":
                yield self.prompt_document()
            elif kind == "prose":
                yield self.prose_document()
            else:
                rest = max(0.0, 1 - number / ramp) if ramp else 0.0
                yield self.question_document(NOTED + (0.95 - NOTED) * rest)
