"""Data files to examples.

Reads .json (an array), .jsonl and .csv, holding records of one of two forms:

    pair      {"question", "positive", "negative"} or {"question", "test", "deploy"}
    labelled  {"question" | "text" | "prompt" | "messages", "type" | "label"}

Guarantee: every record becomes examples (a pair two, the testing side first) in file order, or the
whole file is refused with the row that is at fault. Nothing is dropped, repaired or guessed; fields
of other names are not read.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probecache.errors import DataError
from probecache.foreign import json_items, parse_json, read_text_bytes, require_sane_density
from probecache.types import Example, Message

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = ["IN_MEMORY", "Dataset", "load_dataset", "parse_records", "unlimited_csv_fields"]

IN_MEMORY = "records in memory"
TESTING, DEPLOYMENT = "testing", "deployment"

_PAIR_ANSWERS = (("positive", "negative"), ("test", "deploy"))
_TEXT_FIELDS = ("question", "text", "prompt", "messages")
_LABEL_FIELDS = ("type", "label")
# The guide's data says either word; one class must not become two.
_CLASS_OF_WORD = {"test": TESTING, "testing": TESTING, "deploy": DEPLOYMENT, DEPLOYMENT: DEPLOYMENT}
_NOT_BLANK = re.compile(r"\S")
_FORMS = (
    "a pair (question, positive, negative; or question, test, deploy) or a labelled record "
    "(question, text, prompt or messages; and type or label)"
)


@dataclass(frozen=True)
class Dataset:
    """Examples in file order, and where they came from."""

    source: str
    examples: tuple[Example, ...]
    paired: bool

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes in order of first appearance."""
        return tuple(dict.fromkeys(example.label for example in self.examples))

    @property
    def num_examples(self) -> int:
        """Records: a pair counts once."""
        return len({example.row for example in self.examples})

    def fingerprint(self) -> str:
        """SHA-256 over everything that an example says, so equal data in another file is equal."""
        digest = hashlib.sha256()
        encoder = json.JSONEncoder(sort_keys=True)
        for example in self.examples:
            digest.update(encoder.encode(_said(example)).encode())
            digest.update(b"\n")
        return digest.hexdigest()


def _said(example: Example) -> dict[str, Any]:
    """All fields but the row: blank lines in a file change nothing."""
    return {
        "id": example.id,
        "group": example.group,
        "label": example.label,
        "question": example.question,
        "messages": [{"role": m.role, "content": m.content} for m in example.messages],
        "answer": example.answer,
        "category": example.category,
    }


def load_dataset(data: str | Path | Sequence[Mapping[str, Any]]) -> Dataset:
    """Read a data file, or records that are already in memory.

    Args:
        data: path of a .json, .jsonl or .csv file in UTF-8, or a list of records.

    Raises:
        DataError: the file or one of its rows is not as the module's docstring says.
    """
    if not isinstance(data, (str, Path)):
        return parse_records(_numbered(data), source=IN_MEMORY)
    path = Path(data)
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise DataError(f"expected --data to end in .json, .jsonl or .csv, got {path.name!r}")
    text = _read_text(path)
    with unlimited_csv_fields():
        return parse_records(readers[path.suffix.lower()](text, path), source=str(path))


def parse_records(rows: Iterable[tuple[int, str, Any]], source: str) -> Dataset:
    """Turn records into examples; all of one form, of at least two classes.

    Args:
        rows: number of each record, where it stands in words, and the record.
        source: where they come from, for messages.

    Raises:
        DataError: names `source` and the row.
    """
    examples: list[Example] = []
    form: str | None = None
    first_row = 0
    for index, (row, place, record) in enumerate(rows):
        where = f"{source}, {place}"
        this_form = _form_of(record, where)
        if form is None:
            form, first_row = this_form, row
        elif this_form != form:
            raise DataError(
                f"{where}: expected a {form} record like row {first_row}, got a {this_form} one; "
                "put the two forms into two files"
            )
        parse = _parse_pair if this_form == "pair" else _parse_labelled
        examples.extend(parse(record, index, row, where))
    if not examples:
        raise DataError(f"{source}: expected at least one record, got none")
    dataset = Dataset(source, tuple(_with_class_names(examples)), paired=form == "pair")
    _check_classes(dataset)
    _check_ids(dataset)
    return dataset


def _numbered(records: Iterable[Any]) -> Iterator[tuple[int, str, Any]]:
    return ((row, f"row {row}", record) for row, record in enumerate(records, start=1))


# ---------------------------------------------------------------- files to records


def _read_text(path: Path) -> str:
    try:
        content = read_text_bytes(path)
        if path.suffix.lower() != ".csv":
            require_sane_density(content)
    except OSError as error:
        raise DataError(
            f"expected a readable data file at {path}, got: {error.strerror}"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: expected text in UTF-8, got {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + len(content) - len(error.object)  # a BOM is cut off before decoding
        line = content.count(b"\n", 0, start) + 1
        raise DataError(
            f"{path}, line {line}: expected UTF-8, got the byte 0x{content[start]:02x} "
            f"at offset {start}; save the file as UTF-8"
        ) from error


def _read_json(text: str, path: Path) -> Iterable[tuple[int, str, Any]]:
    if not text.lstrip(" \t\r\n").startswith("["):
        with _valid_json(str(path)):
            record = parse_json(text)
        raise DataError(
            f"{path}: expected a JSON array of records, got {_kind(record)}; "
            "for one record per line name the file .jsonl"
        )
    return _numbered(_array_items(text, path))


def _array_items(text: str, path: Path) -> Iterator[Any]:
    items, row = json_items(text), 1
    while True:
        with _valid_json(f"{path}, row {row}"):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
        row += 1


def _read_jsonl(text: str, path: Path) -> Iterable[tuple[int, str, Any]]:
    # Not splitlines(): it would also cut at U+2028 and others that JSON strings may hold. And not
    # split(): of a file of nothing but line ends it would make eight times its size.
    row, start = 1, 0
    while match := _NOT_BLANK.search(text, start):
        row += text.count("\n", start, match.start())
        start = max(start, text.rfind("\n", start, match.start()) + 1)
        stop = text.find("\n", match.start())
        stop = len(text) if stop < 0 else stop
        with _valid_json(f"{path}, row {row}"):
            record = parse_json(text[start:stop])
        yield row, f"row {row}", record
        row, start = row + 1, stop + 1


@contextmanager
def _valid_json(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataError(f"{where}: expected valid JSON, got: {error}") from error


@contextmanager
def unlimited_csv_fields() -> Iterator[None]:
    """Lift csv's limit of 131,072 characters a field, which holds for the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_csv(text: str, path: Path) -> Iterable[tuple[int, str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    row = 0
    try:
        columns = list(reader.fieldnames or [])
        if len(set(columns)) < len(columns):
            raise DataError(f"{path}: expected different columns, got {', '.join(columns)[:200]}")
        for row, record in enumerate(reader, start=1):
            place = f"row {row} (line {reader.line_num})"  # empty lines are no rows
            if None in record or None in record.values():
                raise DataError(
                    f"{path}, {place}: expected {len(columns)} columns as in the "
                    "header, got another number; quote fields that hold commas"
                )
            # An empty cell is an absent field: columns are shared by all rows.
            yield row, place, {key: value for key, value in record.items() if value != ""}
    except csv.Error as error:
        place = f"row {row + 1} (line {reader.reader.line_num})"
        raise DataError(f"{path}, {place}: expected valid CSV, got: {error}") from error


# ---------------------------------------------------------------- records to examples


def _form_of(record: Any, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with named fields, got {_kind(record)}")
    pairs = [names for names in _PAIR_ANSWERS if record.keys() >= set(names)]
    if len(pairs) > 1:
        raise DataError(
            f"{where}: expected either positive and negative or test and deploy, got all four"
        )
    if pairs and "question" in record:
        if labels := [name for name in _LABEL_FIELDS if record.get(name) is not None]:
            raise DataError(
                f"{where}: expected a pair, whose answers are its two classes, without a label, "
                f"got {labels[0]}; remove it, or make each answer a labelled record"
            )
        return "pair"
    if not (record.keys().isdisjoint(_TEXT_FIELDS) or record.keys().isdisjoint(_LABEL_FIELDS)):
        return "labelled"
    fields = ", ".join(sorted(map(str, record))) or "none"
    raise DataError(f"{where}: expected {_FORMS}; got the fields {fields[:200]}")


def _parse_pair(record: dict[str, Any], index: int, row: int, where: str) -> Iterable[Example]:
    names = next(names for names in _PAIR_ANSWERS if record.keys() >= set(names))
    question = _text(record, "question", where)
    identifier = _optional(record, "id", where) or str(index)
    group = _optional(record, "group", where) or identifier
    messages = (Message("user", question),)
    for label, name in zip((TESTING, DEPLOYMENT), names, strict=True):
        yield Example(
            row=row,
            id=identifier,
            group=group,
            label=label,
            question=question,
            messages=messages,
            answer=_text(record, name, where),
            category=_optional(record, "category", where),
        )


def _parse_labelled(record: dict[str, Any], index: int, row: int, where: str) -> Iterable[Example]:
    text_field = _only_one(record, _TEXT_FIELDS, where)
    label_field = _only_one(record, _LABEL_FIELDS, where)
    if text_field == "messages":
        messages = _messages(record["messages"], where)
    else:
        messages = (Message("user", _text(record, text_field, where)),)
    identifier = _optional(record, "id", where) or str(index)
    users = [message.content for message in messages if message.role == "user"]
    yield Example(
        row=row,
        id=identifier,
        group=_optional(record, "group", where) or identifier,
        label=_label(record[label_field], label_field, where),
        question=users[-1] if users else messages[-1].content,
        messages=messages,
        category=_optional(record, "category", where),
    )


def _only_one(record: dict[str, Any], names: Sequence[str], where: str) -> str:
    present = [name for name in names if name in record]
    if len(present) > 1:
        raise DataError(
            f"{where}: expected one of the fields {', '.join(names)}, "
            f"got {' and '.join(present)}; rename or remove the others"
        )
    return present[0]


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        got = "an empty one" if value == [] else _kind(value)
        raise DataError(f"{where}: expected messages to be a list of turns, got {got}")
    turns = []
    for number, turn in enumerate(value, start=1):
        inside = f"{where}, message {number}"
        if not isinstance(turn, dict):
            raise DataError(
                f"{inside}: expected an object with role and content, got {_kind(turn)}"
            )
        turns.append(Message(_text(turn, "role", inside), _text(turn, "content", inside)))
    return tuple(turns)


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise DataError(f"{where}: expected {name} to be text, got {_kind(value)}")
    if not value.strip():
        what = "an empty prompt" if name in _TEXT_FIELDS else "nothing but white space"
        raise DataError(f"{where}: expected {name} to hold text, got {what}")
    return _encodable(value, name, where)


def _label(value: Any, name: str, where: str) -> str:
    label = _text({name: _digits(value)}, name, where)
    if label != label.strip():
        raise DataError(
            f"{where}: expected {name} without white space around it, got {label!r}; remove it"
        )
    return label


def _optional(record: Mapping[str, Any], name: str, where: str) -> str | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(_digits(value), str):
        raise DataError(
            f"{where}: expected {name} to be text or a whole number, got {_kind(value)}"
        )
    return _encodable(str(_digits(value)), name, where)


def _digits(value: Any) -> Any:
    """A whole number as text; anything else as it is, and a number beyond all sense too."""
    if isinstance(value, int) and abs(value) < 10**100:
        return str(value)
    return value


def _encodable(value: str, name: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: expected {name} to be valid Unicode, got the lone surrogate "
            f"\\u{ord(value[error.start]):04x} at character {error.start}; re-export the text"
        ) from error
    return value


def _kind(value: Any) -> str:
    words = {dict: "an object", list: "a list", str: "text", type(None): "nothing"}
    return words.get(type(value), f"a {type(value).__name__}")


# ---------------------------------------------------------------- classes


def _with_class_names(examples: list[Example]) -> Iterable[Example]:
    """Read `test` as testing and `deploy` as deployment, where the data holds no other class."""
    if not {example.label for example in examples} <= _CLASS_OF_WORD.keys():
        return examples
    named = ((example, _CLASS_OF_WORD[example.label]) for example in examples)
    return (e if e.label == name else replace(e, label=name) for e, name in named)


def _check_classes(dataset: Dataset) -> None:
    if len(dataset.labels) < 2:
        raise DataError(
            f"{dataset.source}: expected examples of at least two classes, got only "
            f"{dataset.labels[0]!r} ({len(dataset)} examples), so the other class has no examples; "
            "add some"
        )
    spelt: dict[str, Example] = {}
    for example in dataset.examples:
        other = spelt.setdefault(example.label.casefold(), example)
        if other.label != example.label:
            raise DataError(
                f"{dataset.source}: expected labels that differ in more than their case, got "
                f"{other.label!r} in row {other.row} and {example.label!r} in row {example.row}; "
                "spell a class in one way"
            )


def _check_ids(dataset: Dataset) -> None:
    """Scores are told by class and id, so these must tell any two examples apart."""
    seen: dict[tuple[str, str], Example] = {}
    for example in dataset.examples:
        other = seen.setdefault((example.label, example.id), example)
        if other is not example:
            raise DataError(
                f"{dataset.source}: expected every id once in a class, got {example.id!r} in row "
                f"{other.row} and in row {example.row}; rows without an id are numbered from 0; "
                "use group for examples that belong together"
            )
