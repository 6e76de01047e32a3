"""Examples to token ids, and which of the tokens are kept.

A pair's prompt is the chat template with the generation prompt on, then the answer's tokens; a
labelled record is the chat template with nothing appended. The template is rendered to text once
and that text is tokenised without adding special tokens, so nothing doubles.

Guarantees, checked on every example: a prompt's ids are a strict prefix of prompt + answer; where
the tokenizer opens with BOS there is exactly one, at the start; the input fits the context; at
least one token is kept. A refusal names the row.

Knows a tokenizer only by what it can do (`Tokenizer`); transformers is not imported here.
"""

from __future__ import annotations

import hashlib
import struct
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from probecache.dates import frozen
from probecache.errors import PromptError, UsageError, one_line
from probecache.inputs import ANSWER, END, TEXT, Inputs, Piece, join_inputs
from probecache.positions import may_keep_special
from probecache.selection import NO_MESSAGE, Conversation, last_tokens, select_tokens
from probecache.spans import Shown, characters_of, message_places, spans_between, special_ids
from probecache.types import Example, Message, Positions, TokenizedPrompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from probecache.dataset import Dataset

__all__ = ["PromptOptions", "Tokenizer", "TokenizerFacts", "default_positions", "tokenize_dataset"]

# Examples that are rendered and tokenised together. A larger chunk is no faster: its offsets,
# two numbers in a tuple per token, outlive the collector's young generation.
_CHUNK = 256


class Tokenizer(Protocol):
    """What is asked of a Hugging Face tokenizer."""

    is_fast: bool
    chat_template: Any
    all_special_ids: list[int]
    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: Any, **options: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class PromptOptions:
    """How examples become prompts.

    Attributes:
        positions: None stands for `last` on pairs and `all` on labelled data.
        system_prompt: text of a system turn put first, or None.
        chat_template: False feeds raw text.
        keep_special_tokens: let `all` and `mean` keep BOS, special and template tokens too.
        truncate: cut the end of a text that is too long for the model instead of refusing it.
        template_date: ISO date that a chat template is told which asks for one; None: the day's.
    """

    positions: Positions | None = None
    system_prompt: str | None = None
    chat_template: bool = True
    keep_special_tokens: bool = False
    truncate: bool = False
    template_date: str | None = None


@dataclass(frozen=True)
class TokenizerFacts:
    """What the model says of its input: longest context (None: no limit), causal or not."""

    context_length: int | None
    causal: bool


def default_positions(options: PromptOptions, paired: bool) -> Positions:
    """The positions that these options stand for on pairs or on labelled data."""
    if options.positions is not None:
        return options.positions
    return Positions.LAST if paired else Positions.ALL


def tokenize_dataset(
    dataset: Dataset, tokenizer: Tokenizer, facts: TokenizerFacts, options: PromptOptions
) -> list[TokenizedPrompt]:
    """Render and tokenise every example, in order.

    Raises:
        UsageError: the options do not fit the data or the tokenizer.
        PromptError: an example breaks one of the module's guarantees; names the first such row.
    """
    positions = default_positions(options, dataset.paired)
    _check_options(dataset, tokenizer, options, positions)
    templated = _uses_template(dataset, tokenizer, options)
    renderer = _Renderer(tokenizer, facts, options, positions, templated, dataset.source)
    return [
        prompt
        for start in range(0, len(dataset), _CHUNK)
        for prompt in _tokenize_chunk(renderer, dataset.examples[start : start + _CHUNK])
    ]


def _tokenize_chunk(renderer: _Renderer, examples: Sequence[Example]) -> list[TokenizedPrompt]:
    # A chunk goes through one check after the other, so what it stumbles over need not be its
    # first bad row; one by one it is.
    with suppress(PromptError):
        return renderer.tokenize(examples)
    return [prompt for example in examples for prompt in renderer.tokenize([example])]


def fingerprint(prompts: Sequence[TokenizedPrompt]) -> str:
    """SHA-256 over all ids and all kept indices."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(struct.pack("<qq", len(prompt.ids), len(prompt.kept)))
        digest.update(prompt.ids.astype("<i4", copy=False).tobytes())
        digest.update(prompt.kept.astype("<i4", copy=False).tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- options against data


def _uses_template(dataset: Dataset, tokenizer: Tokenizer, options: PromptOptions) -> bool:
    return options.chat_template and bool(tokenizer.chat_template)


def _check_options(
    dataset: Dataset, tokenizer: Tokenizer, options: PromptOptions, positions: Positions
) -> None:
    if positions == Positions.ANSWER and not dataset.paired:
        raise UsageError(
            "expected pairs for --positions answer, got labelled data, which has no answers; "
            "use last, mean, all or role:assistant"
        )
    templated = _uses_template(dataset, tokenizer, options)
    if dataset.paired and options.chat_template and not templated:
        raise UsageError(
            "expected a tokenizer with a chat template to render pairs, but this one has none; "
            "pass --no-chat-template to feed raw text"
        )
    if options.system_prompt is not None and not templated:
        raise UsageError(
            "expected a chat template for --system-prompt, but raw text is used here; "
            "leave --system-prompt out or put its text into the data"
        )
    if not templated:
        turns = [e for e in dataset.examples if len(e.messages) > 1 or e.messages[0].role != "user"]
        if turns:
            raise PromptError(
                f"{dataset.source}, row {turns[0].row}: expected a chat template to render "
                "messages, but raw text is used here; give the record as text, or use a tokenizer "
                "with a chat template"
            )
    tells_text = may_keep_special(positions) and not options.keep_special_tokens
    needs_offsets = tells_text or positions.by_place or options.truncate
    if needs_offsets and not tokenizer.is_fast:
        raise UsageError(
            f"expected a fast tokenizer to tell text from template for --positions {positions}, "
            "got a slow one; use --positions last, or all with --keep-special-tokens"
        )


# ---------------------------------------------------------------- rendering


class _Renderer:
    """Renders and tokenises examples; remembers what the template puts around the messages."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        facts: TokenizerFacts,
        options: PromptOptions,
        positions: Positions,
        templated: bool,
        source: str,
    ) -> None:
        self.tokenizer = tokenizer
        self.facts = facts
        self.options = options
        self.positions = positions
        self.templated = templated
        self.source = source
        self.tells_places = tokenizer.is_fast and not positions.one_row
        self.special = np.array(sorted(special_ids(tokenizer)), dtype=np.int32)
        self.head, self.tail = self._added_tokens()
        day = options.template_date
        self.dated = {} if day is None else frozen(tokenizer.chat_template, day)
        self._layouts: dict[tuple[tuple[str, ...], bool], tuple[list[str], list[int]]] = {}

    def tokenize(self, examples: Sequence[Example]) -> list[TokenizedPrompt]:
        """The inputs of examples of one dataset, in order.

        Raises:
            PromptError: names a row at fault; of several not always the first.
        """
        tail = [] if self.templated or self.facts.causal else self.tail
        bodies = self._bodies(examples)
        chunk = join_inputs(bodies, self._answers(examples), tail)
        chunk = self._fit(chunk, examples)
        self._check_one_bos(chunk, examples)
        return self._keep(chunk, examples)

    def _where(self, example: Example) -> str:
        return f"{self.source}, row {example.row}"

    def _added_tokens(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer itself puts before and after a text."""
        plain = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        full = list(self.tokenizer("a")["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    def _encoded(self, texts: list[str]) -> Any:
        unused = {"return_attention_mask": False, "return_token_type_ids": False}
        return self.tokenizer(texts, add_special_tokens=False, **unused)

    def _bodies(self, examples: Sequence[Example]) -> list[Piece]:
        # The two sides of a pair have one prompt.
        distinct: dict[tuple[Message, ...], Example] = {}
        for example in examples:
            distinct.setdefault(example.messages, example)
        make = self._templated if self.templated else self._raw
        made = dict(zip(distinct, make(list(distinct.values())), strict=True))
        return [made[example.messages] for example in examples]

    def _raw(self, examples: Sequence[Example]) -> list[Piece]:
        texts = [example.messages[0].content for example in examples]
        return [Piece(*one).behind(self.head) for one in self._plain(texts)]

    def _plain(self, texts: list[str]) -> list[tuple[list[int], np.ndarray]]:
        """Tokens of texts without a template, and their places in a message 0."""
        encoded = self._encoded(texts)
        ids = encoded["input_ids"]
        places = [np.zeros((len(tokens), 3), dtype=np.int32) for tokens in ids]
        if self.tells_places:
            offsets = (encoding.offsets for encoding in encoded.encodings)
            found = characters_of(offsets, list(map(len, ids)), texts)
            for of_text, characters in zip(places, found, strict=True):
                of_text[:, 1:] = characters
        return list(zip(ids, places, strict=True))

    def _answers(self, examples: Sequence[Example]) -> list[Piece]:
        texts = [self._answer(example) for example in examples]
        distinct = list(dict.fromkeys(filter(None, texts)))
        made = dict(zip(distinct, self._plain(distinct), strict=True)) if distinct else {}
        for example, text in zip(examples, texts, strict=True):
            if text and not made[text][0]:
                where = self._where(example)
                raise PromptError(f"{where}: expected the answer {text!r} to have tokens, got none")
        return [
            self._answered(example, text, *made[text]) if text else Piece.of_no_text([])
            for example, text in zip(examples, texts, strict=True)
        ]

    def _answered(self, example: Example, text: str, ids: list[int], places: np.ndarray) -> Piece:
        """The answer is one more message; what was put before it is none of its characters."""
        answer, moved = example.answer or "", places.copy()
        moved[:, 0] = len(example.messages)
        moved[:, 1:] = np.clip(moved[:, 1:] - (len(text) - len(answer)), 0, len(answer))
        return Piece(ids, moved)

    def _answer(self, example: Example) -> str | None:
        answer, question = example.answer, example.messages[-1].content
        if answer is None or self.templated or answer[0].isspace() or question[-1].isspace():
            return answer
        return " " + answer  # raw text: keep the question's last word and the answer apart

    # -- chat template

    def _templated(self, examples: Sequence[Example]) -> list[Piece]:
        conversations = [self._with_system(example) for example in examples]
        generation = examples[0].answer is not None  # the same for all examples of a dataset
        texts = self._apply(conversations, generation, self._where(examples[0]))
        shown = [
            self._shown_spans(text, messages, generation, self._where(example))
            for text, messages, example in zip(texts, conversations, examples, strict=True)
        ]
        encoded = self._encoded(texts)
        # A template may have forgotten the BOS that the tokenizer opens every text with.
        return [
            Piece(ids, places)
            if ids[: len(self.head)] == self.head
            else Piece(ids, places).behind(self.head)
            for ids, places in zip(
                encoded["input_ids"], self._places(encoded, texts, shown), strict=True
            )
        ]

    def _places(
        self, encoded: Any, texts: Sequence[str], shown: Sequence[Sequence[Shown]]
    ) -> list[np.ndarray]:
        """Message and characters of every token of some renderings."""
        ids = encoded["input_ids"]
        if not self.tokenizer.is_fast:
            # It does not say where its tokens stand; nor do the options allowed with it ask.
            return [Piece.of_no_text(tokens).places for tokens in ids]
        # Asked for with the ids, the offsets of all texts would stand in memory together.
        offsets = (encoding.offsets for encoding in encoded.encodings)
        return message_places(offsets, list(map(len, ids)), shown, texts)

    def _with_system(self, example: Example) -> list[Message]:
        if self.options.system_prompt is None:
            return list(example.messages)
        return [Message("system", self.options.system_prompt), *example.messages]

    def _apply(
        self, conversations: Sequence[Sequence[Message]], generation: bool, where: str
    ) -> list[str]:
        turns = [[{"role": m.role, "content": m.content} for m in c] for c in conversations]
        try:
            texts = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation, **self.dated
            )
        except Exception as error:  # jinja2's errors, and whatever a template raises by itself
            raise PromptError(
                f"{where}: expected the chat template to render the roles "
                f"{', '.join(m.role for m in conversations[0])}, but it refused: "
                f"{one_line(error)}"
            ) from error
        return [str(text) for text in texts]

    def _shown_spans(
        self, text: str, messages: Sequence[Message], generation: bool, where: str
    ) -> list[Shown]:
        """Where the messages stand in their rendering."""
        literals, order = self._layout_of(messages, generation, where)
        spans = spans_between(text, literals, [messages[number].content for number in order])
        if spans is None:
            raise PromptError(
                f"{where}: expected the chat template to show every message as it is, but it "
                "changes or drops some of the text, so text and template cannot be told apart; "
                "use --no-chat-template"
            )
        # A system prompt is the experimenter's frame, not the example's text.
        before = 0 if self.options.system_prompt is None else 1
        return [
            Shown(span, number - before, messages[number].content.find(text[slice(*span)]))
            for span, number in zip(spans, order, strict=True)
        ]

    def _layout_of(
        self, messages: Sequence[Message], generation: bool, where: str
    ) -> tuple[list[str], list[int]]:
        """The text that the template puts before, between and after messages of these roles, and
        the messages in the order in which it shows them.

        Found by rendering the same conversation with marks for messages: searching the real
        rendering for the message could hit the same words in the template's own text.
        """
        key = (tuple(message.role for message in messages), generation)
        if key not in self._layouts:
            marks = [f"\ue000{number}\ue001" for number in range(len(messages))]
            marked = [Message(m.role, mark) for m, mark in zip(messages, marks, strict=True)]
            rest = self._apply([marked], generation, where)[0]
            literals, order = [], sorted(range(len(marks)), key=lambda n: rest.find(marks[n]))
            for number in order:
                literal, _, rest = rest.partition(marks[number])
                literals.append(literal)
            self._layouts[key] = [*literals, rest], order
        return self._layouts[key]

    # -- limits

    def _fit(self, chunk: Inputs, examples: Sequence[Example]) -> Inputs:
        limit = self.facts.context_length
        lengths = np.diff(chunk.bounds)
        if limit is None or not (lengths > limit).any():
            return chunk
        keep = np.ones(len(chunk.ids), dtype=bool)
        for index in np.flatnonzero(lengths > limit).tolist():
            where, length = self._where(examples[index]), int(lengths[index])
            if not self.options.truncate:
                raise PromptError(
                    f"{where}: expected at most {limit} tokens, the model's context, "
                    f"got {length}; shorten the text or pass --truncate to cut its end"
                )
            start, stop = chunk.bounds[index : index + 2]
            text = start + np.flatnonzero(chunk.parts[start:stop] == TEXT)
            if len(text) <= length - limit:
                raise PromptError(
                    f"{where}: expected the template and the answer to leave room for text within "
                    f"{limit} tokens, but they fill it; shorten the answer or the system prompt"
                )
            keep[text[limit - length :]] = False
        return chunk.only(keep)

    def _check_one_bos(self, chunk: Inputs, examples: Sequence[Example]) -> None:
        before_end = chunk.parts != END
        lengths = chunk.per_example(before_end)
        if not lengths.all():
            raise PromptError(
                f"{self._where(examples[int(lengths.argmin())])}: expected the text to have "
                "tokens, got none; remove the row"
            )
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return
        is_bos = chunk.ids == bos
        counts = chunk.per_example(is_bos & before_end)
        first = is_bos[chunk.bounds[:-1]]
        if bos == self.tokenizer.eos_token_id:
            # Where one token both opens and closes, more of them are right; two in front are not.
            second = is_bos[chunk.bounds[:-1] + (lengths > 1)]
            wrong = first & second & (lengths > 1)
        else:
            expected_first = (counts > 0) | (bos in self.head)
            wrong = (counts > self._most_bos(examples)) | (expected_first & ~first)
        wrong |= chunk.per_example(is_bos & chunk.inside) > 0
        for index in np.flatnonzero(wrong).tolist():
            raise PromptError(
                f"{self._where(examples[index])}: expected exactly one BOS token, at the start, "
                f"got {counts[index]}; remove the tokenizer's special tokens from the text, or "
                "mend the chat template"
            )

    def _most_bos(self, examples: Sequence[Example]) -> np.ndarray:
        """Most BOS tokens that each example may have: some templates open every turn with one."""
        if not self.templated:
            return np.ones(len(examples), dtype=np.int64)
        turns = [sum(message.role == "user" for message in e.messages) for e in examples]
        return np.maximum(turns, 1)

    # -- positions

    def _keep(self, chunk: Inputs, examples: Sequence[Example]) -> list[TokenizedPrompt]:
        chunk.places[np.isin(chunk.ids, self.special)] = (NO_MESSAGE, 0, 0)
        flat = np.flatnonzero(self._kept(chunk, examples))
        owners = chunk.owners[flat]
        counts = np.bincount(owners, minlength=chunk.count)
        if not counts.all():
            raise self._none_kept(examples[int(counts.argmin())])
        kept = (flat - chunk.bounds[owners]).astype(np.int32)
        places = chunk.places[flat] if self.tells_places else None
        # Views into arrays of the chunk: an array's own header weighs as much as its numbers.
        ids_at, kept_at = chunk.bounds.tolist(), [0, *np.cumsum(counts).tolist()]
        return [
            TokenizedPrompt(chunk.ids[a:b], kept[c:d], None if places is None else places[c:d])
            for (a, b), (c, d) in zip(pairwise(ids_at), pairwise(kept_at), strict=True)
        ]

    def _none_kept(self, example: Example) -> PromptError:
        expected = f"{self._where(example)}: expected text tokens to keep for --positions"
        if self.positions.by_place:
            return PromptError(
                f"{expected} {self.positions}, got none that it chooses; remove the row or choose "
                "other positions"
            )
        return PromptError(
            f"{expected} {self.positions}, got only special or template tokens; remove the row"
        )

    def _kept(self, chunk: Inputs, examples: Sequence[Example]) -> np.ndarray:
        """Which tokens' residuals are wanted; bool [tokens]."""
        if self.positions == Positions.LAST:
            kept = np.zeros(len(chunk.ids), dtype=bool)
            kept[chunk.bounds[:-1] + chunk.per_example(chunk.parts != END) - 1] = True
            return kept
        if self.positions == Positions.ANSWER:
            of_answer: np.ndarray = chunk.parts == ANSWER
            return of_answer
        if self.positions.by_place:
            talks = [Conversation(example.messages, example.answer) for example in examples]
            return select_tokens(self.positions, chunk.places, chunk.owners, talks)
        if self.options.keep_special_tokens:
            kept = np.ones(len(chunk.ids), dtype=bool)
        else:
            kept = chunk.inside & ~np.isin(chunk.ids, self.special)
        if self.positions.last_count is not None:
            kept[kept] = last_tokens(chunk.owners[kept], self.positions.last_count)
        return kept
