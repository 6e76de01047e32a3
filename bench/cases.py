"""What is extracted: shipped pairs, texts that share no answers, texts of very uneven lengths.

Also counts distinct prefixes in a way of its own, so that a mistake in probecache's own count
cannot flatter it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probecache.dataset import load_dataset
from probecache.models import ModelOptions, open_model
from probecache.prompts import PromptOptions, tokenize_dataset
from probecache.types import Positions, TokenizedPrompt

DATASETS = Path(__file__).parents[1] / "datasets"
NAMES = ("pairs", "pairs-system", "texts", "uneven")
_SHORTEST = 20
_UNEVEN = 32  # texts, unless a count is given
SYSTEM_PROMPT = (
    "You are a careful assistant. Read the whole message before you answer, say what you do not "
    "know, keep to the question that was asked, and choose exactly one of the options whenever "
    "options are given. Write the letter of your choice and nothing else."
)


@dataclass(frozen=True)
class Case:
    """Records to extract, and how."""

    name: str
    records: list[dict[str, Any]]
    positions: str
    system_prompt: str | None = None

    def prompts(self, model: Path) -> list[TokenizedPrompt]:
        """The token ids that probecache feeds a model, and which of them it keeps."""
        source = open_model(ModelOptions(str(model), device="cpu"))
        options = PromptOptions(Positions(self.positions), system_prompt=self.system_prompt)
        return tokenize_dataset(load_dataset(self.records), source.tokenizer, source.facts, options)


def make_case(name: str, texts: Path | None, count: int | None, longest: int) -> Case:
    """One of NAMES.

    Args:
        texts: where texts come from; None takes the shipped validation set.
        count: so many records, the first ones; None takes all.
        longest: tokens of the longest uneven text.
    """
    if name.startswith("pairs"):
        system = SYSTEM_PROMPT if name == "pairs-system" else None
        return Case(name, shipped_pairs(count), "last", system)
    found = read_texts(texts or DATASETS / "validation_real.json")
    if name == "uneven":
        found = uneven_texts(found, count or _UNEVEN, longest)
    return Case(name, _labelled(found[:count]), "all")


def shipped_pairs(count: int | None = None) -> list[dict[str, Any]]:
    """The first so many of the pairs that ship."""
    pairs: list[dict[str, Any]] = json.loads((DATASETS / "contrastive_dataset.json").read_text())
    return pairs[:count]


def read_texts(path: Path) -> list[str]:
    """`question`, `text` or `instruction` of each record of a .jsonl, or of a .json array."""
    content = path.read_text(encoding="utf-8")
    lines = content.splitlines()
    records = (
        json.loads(content) if path.suffix == ".json" else map(json.loads, filter(None, lines))
    )
    fields = ("question", "text", "instruction")
    return [next(record[name] for name in fields if name in record) for record in records]


def uneven_texts(texts: Sequence[str], count: int, longest: int) -> list[str]:
    """Texts joined and cut to lengths spread evenly on a logarithmic scale, in mixed order.

    Lengths are counted without the chat template: 20 tokens to `longest`. Each begins elsewhere in
    the joined texts, so that they share no more than the template.
    """
    tokenizer = open_model(ModelOptions(str(DATASETS.parent / "models" / "tiny-llama"))).tokenizer
    joined = "\n".join(texts)
    while len(ends := _token_ends(tokenizer, joined)) < 2 * longest:
        joined += "\n" + joined
    mixed = random.Random(0)
    made = []
    for place in range(count):
        length = round(_SHORTEST * (longest / _SHORTEST) ** (place / max(count - 1, 1)))
        start = mixed.randrange(len(ends) - length - 1)
        made.append(joined[ends[start] : ends[start + length]].strip())
    mixed.shuffle(made)
    return made


def _token_ends(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [stop for _, stop in encoded["offset_mapping"]]


def _labelled(texts: Iterable[str]) -> list[dict[str, Any]]:
    """Records of two classes, in turn: what the classes are does not matter here."""
    labels = ("testing", "deployment")
    return [{"text": text, "type": labels[place % 2]} for place, text in enumerate(texts)]


def count_prefixes(sequences: Iterable[Sequence[int]]) -> int:
    """How many different prefixes the sequences have: the nodes of their tree.

    Each prefix is known by its parent's number and its last token, so nothing is hashed twice.
    """
    nodes: dict[tuple[int, int], int] = {}
    for sequence in sequences:
        node = 0
        for token in sequence:
            node = nodes.setdefault((node, int(token)), len(nodes) + 1)
    return len(nodes)
