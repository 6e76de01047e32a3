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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from probecache.errors import PromptError, UsageError
from probecache.types import Example, Message, Positions, TokenizedPrompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from probecache.dataset import Dataset

__all__ = ["PromptOptions", "Tokenizer", "TokenizerFacts", "default_positions", "tokenize_dataset"]


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
    """

    positions: Positions | None = None
    system_prompt: str | None = None
    chat_template: bool = True
    keep_special_tokens: bool = False
    truncate: bool = False


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
        PromptError: an example breaks one of the module's guarantees; names its row.
    """
    positions = default_positions(options, dataset.paired)
    _check_options(dataset, tokenizer, options, positions)
    renderer = _Renderer(tokenizer, facts, options, _uses_template(dataset, tokenizer, options))
    return [
        _keep(renderer.render(example, dataset.source), positions, options, dataset.source)
        for example in dataset.examples
    ]


def fingerprint(prompts: Sequence[TokenizedPrompt]) -> str:
    """SHA-256 over all ids and all kept indices."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(np.array([len(prompt.ids), len(prompt.kept)], dtype="<i8").tobytes())
        digest.update(prompt.ids.astype("<i4").tobytes())
        digest.update(prompt.kept.astype("<i4").tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- options against data


def _uses_template(dataset: Dataset, tokenizer: Tokenizer, options: PromptOptions) -> bool:
    return options.chat_template and bool(tokenizer.chat_template)


def _check_options(
    dataset: Dataset, tokenizer: Tokenizer, options: PromptOptions, positions: Positions
) -> None:
    if positions is Positions.ANSWER and not dataset.paired:
        raise UsageError(
            "expected pairs for --positions answer, got labelled data, which has no answers; "
            "use last, mean or all"
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
    needs_offsets = positions in (Positions.ALL, Positions.MEAN) and not options.keep_special_tokens
    if (needs_offsets or options.truncate) and not tokenizer.is_fast:
        raise UsageError(
            f"expected a fast tokenizer to tell text from template for --positions {positions}, "
            "got a slow one; use --positions last or --keep-special-tokens"
        )


# ---------------------------------------------------------------- rendering


@dataclass(frozen=True)
class _Rendered:
    """An input before positions are chosen: `content` marks the text's tokens, `answer` its end."""

    ids: np.ndarray
    content: np.ndarray
    answer: np.ndarray
    last: int
    row: int


class _Renderer:
    """Renders examples one by one; remembers what the template puts around the messages."""

    def __init__(
        self, tokenizer: Tokenizer, facts: TokenizerFacts, options: PromptOptions, templated: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.facts = facts
        self.options = options
        self.templated = templated
        self.special = np.array(sorted(_special_ids(tokenizer)), dtype=np.int64)
        self.head, self.tail = self._added_tokens()
        self._layouts: dict[tuple[tuple[str, ...], bool], tuple[list[str], list[int]]] = {}

    def render(self, example: Example, source: str) -> _Rendered:
        where = f"{source}, row {example.row}"
        if self.templated:
            ids, content = self._templated(example, where)
        else:
            ids, content = self._raw(example)
        answer_ids = self._answer_ids(example, where)
        tail = [] if self.templated or self.facts.causal else self.tail
        ids, content = self._fit(ids, content, len(answer_ids) + len(tail), where)
        inside = np.concatenate([content, np.ones(len(answer_ids), dtype=bool)])
        self._check_one_bos(np.concatenate([ids, answer_ids]), inside, example, where)
        count = len(ids) + len(answer_ids)
        everything = np.concatenate([ids, answer_ids, np.array(tail, dtype=np.int64)])
        is_answer = np.zeros(len(everything), dtype=bool)
        is_answer[len(ids) : count] = True
        is_content = is_answer.copy()
        is_content[: len(ids)] = content
        is_content &= ~np.isin(everything, self.special)
        return _Rendered(everything, is_content, is_answer, count - 1, example.row)

    def _added_tokens(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer itself puts before and after a text."""
        plain = _ids(self.tokenizer("a", add_special_tokens=False))
        full = _ids(self.tokenizer("a"))
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    def _tokenize(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and, per token, the characters [start, end) it stands for (zeros if unknown)."""
        if not self.tokenizer.is_fast:
            ids = _ids(self.tokenizer(text, add_special_tokens=False))
            return np.array(ids, dtype=np.int64), np.zeros((len(ids), 2), dtype=np.int64)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return np.array(_ids(encoded), dtype=np.int64), _widened(offsets)

    def _raw(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        body, _ = self._tokenize(example.messages[0].content)
        ids = np.concatenate([np.array(self.head, dtype=np.int64), body])
        content = np.ones(len(ids), dtype=bool)
        content[: len(self.head)] = False
        return ids, content

    def _answer_ids(self, example: Example, where: str) -> np.ndarray:
        if example.answer is None:
            return np.array([], dtype=np.int64)
        answer, question = example.answer, example.messages[-1].content
        if not self.templated and not (answer[0].isspace() or question[-1].isspace()):
            answer = " " + answer  # raw text: keep the question's last word and the answer apart
        ids = _ids(self.tokenizer(answer, add_special_tokens=False))
        if not ids:
            raise PromptError(f"{where}: expected the answer {answer!r} to have tokens, got none")
        return np.array(ids, dtype=np.int64)

    # -- chat template

    def _templated(self, example: Example, where: str) -> tuple[np.ndarray, np.ndarray]:
        messages = self._with_system(example)
        generation = example.answer is not None
        text = self._apply(messages, generation, where)
        literals, order = self._layout_of(messages, generation, where)
        spans = _spans_between(text, literals, [messages[number].content for number in order])
        if spans is None:
            raise PromptError(
                f"{where}: expected the chat template to show every message as it is, but it "
                "changes or drops some of the text, so text and template cannot be told apart; "
                "use --no-chat-template"
            )
        if self.options.system_prompt is not None:
            # The experimenter's frame, not the example's text.
            spans = [span for span, number in zip(spans, order, strict=True) if number]
        ids, offsets = self._tokenize(text)
        content = np.zeros(len(ids), dtype=bool)
        for start, stop in spans:
            content |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
        if self.head and list(ids[: len(self.head)]) != self.head:
            # The tokenizer opens every text with BOS and this template forgot it.
            ids = np.concatenate([np.array(self.head, dtype=np.int64), ids])
            content = np.concatenate([np.zeros(len(self.head), dtype=bool), content])
        return ids, content

    def _with_system(self, example: Example) -> list[Message]:
        if self.options.system_prompt is None:
            return list(example.messages)
        return [Message("system", self.options.system_prompt), *example.messages]

    def _apply(self, messages: Sequence[Message], generation: bool, where: str) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation
            )
        except Exception as error:  # jinja2's errors, and whatever a template raises by itself
            raise PromptError(
                f"{where}: expected the chat template to render the roles "
                f"{', '.join(m.role for m in messages)}, but it refused: {error}"
            ) from error
        return str(text)

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
            rest = self._apply(marked, generation, where)
            literals, order = [], sorted(range(len(marks)), key=lambda n: rest.find(marks[n]))
            for number in order:
                literal, _, rest = rest.partition(marks[number])
                literals.append(literal)
            self._layouts[key] = [*literals, rest], order
        return self._layouts[key]

    # -- limits

    def _fit(
        self, ids: np.ndarray, content: np.ndarray, extra: int, where: str
    ) -> tuple[np.ndarray, np.ndarray]:
        limit = self.facts.context_length
        excess = 0 if limit is None else len(ids) + extra - limit
        if excess <= 0:
            return ids, content
        if not self.options.truncate:
            raise PromptError(
                f"{where}: expected at most {limit} tokens, the model's context, "
                f"got {len(ids) + extra}; shorten the text or pass --truncate to cut its end"
            )
        text = np.flatnonzero(content)
        if len(text) <= excess:
            raise PromptError(
                f"{where}: expected the template and the answer to leave room for text within "
                f"{limit} tokens, but they fill it; shorten the answer or the system prompt"
            )
        keep = np.ones(len(ids), dtype=bool)
        keep[text[-excess:]] = False
        return ids[keep], content[keep]

    def _check_one_bos(
        self, ids: np.ndarray, inside: np.ndarray, example: Example, where: str
    ) -> None:
        bos = self.tokenizer.bos_token_id
        if not len(ids):
            raise PromptError(
                f"{where}: expected the text to have tokens, got none; remove the row"
            )
        if bos is None or bos == self.tokenizer.eos_token_id:
            # Where one token both opens and closes, more of them are right; two in front are not.
            wrong = bos is not None and bool(np.all(ids[:2] == bos)) and len(ids) > 1
        else:
            turns = sum(message.role == "user" for message in example.messages)
            most = max(turns, 1) if self.templated else 1  # some templates open every turn with it
            count = int(np.sum(ids == bos))
            expected_first = bos in self.head or count > 0
            wrong = count > most or (expected_first and int(ids[0]) != bos)
        if wrong or bool(np.any(ids[inside] == bos)):
            count = int(np.sum(ids == bos))
            raise PromptError(
                f"{where}: expected exactly one BOS token, at the start, got {count}; remove the "
                "tokenizer's special tokens from the text, or mend the chat template"
            )


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that stand for no text. UNK does stand for text, unless it also opens or closes."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    special = set(tokenizer.all_special_ids)
    return special - ({unknown} - {tokenizer.bos_token_id, tokenizer.eos_token_id})


def _ids(encoded: Any) -> list[int]:
    return list(encoded["input_ids"])


def _widened(offsets: np.ndarray) -> np.ndarray:
    """Offsets with their width given back to tokens of spaces alone.

    Llama 3's tokenizer among others leaves spaces out of offsets, and such tokens nothing.
    """
    wide = offsets.copy()
    for index in np.flatnonzero(offsets[:, 0] == offsets[:, 1]):
        wide[index, 0] = wide[index - 1, 1] if index else 0
        if wide[index, 0] == wide[index, 1] and index + 1 < len(offsets):
            wide[index, 1] = max(wide[index, 1], offsets[index + 1, 0])
    return wide


def _spans_between(
    text: str, literals: Sequence[str], contents: Sequence[str]
) -> list[tuple[int, int]] | None:
    """Where each content stands in `text` = literal content literal ... literal, or None.

    A template may strip a content's white space on one side or both.
    """
    if not text.startswith(literals[0]):
        return None
    spans, at = [], len(literals[0])
    for number, (content, literal) in enumerate(zip(contents, literals[1:], strict=True)):
        is_last = number == len(contents) - 1
        for variant in (content, content.strip(), content.rstrip(), content.lstrip()):
            stop = at + len(variant)
            if not text.startswith(variant, at) or not text.startswith(literal, stop):
                continue
            if not is_last or stop + len(literal) == len(text):
                spans.append((at, stop))
                at = stop + len(literal)
                break
        else:
            return None
    return spans


# ---------------------------------------------------------------- positions


def _keep(
    rendered: _Rendered, positions: Positions, options: PromptOptions, source: str
) -> TokenizedPrompt:
    if positions is Positions.LAST:
        kept = np.array([rendered.last])
    elif positions is Positions.ANSWER:
        kept = np.flatnonzero(rendered.answer)
    elif options.keep_special_tokens:
        kept = np.arange(len(rendered.ids))
    else:
        kept = np.flatnonzero(rendered.content)
    if not len(kept):
        raise PromptError(
            f"{source}, row {rendered.row}: expected text tokens to keep for --positions "
            f"{positions}, got only special or template tokens; remove the row"
        )
    return TokenizedPrompt(rendered.ids.astype(np.int32), kept.astype(np.int32))
