"""Files and texts of strangers: opened, parsed and shown so that they do no harm.

Guarantees: only regular files are opened, so nothing hangs on a pipe or reads a device without end;
a text file is read no further than its first hole, so one that claims a terabyte costs nothing;
parsing JSON takes at most a few dozen times the memory of the file; a text in a cell of CSV is no
formula. Text for terminals is made harmless in `errors.printable`. Does not say what a file should
hold: that is its reader's.

Links are followed when reading: what the hub downloads is made of them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "csv_cell",
    "csv_text",
    "json_items",
    "open_regular",
    "parse_json",
    "read_json",
    "read_text_bytes",
    "require_sane_density",
]

_CHUNK = 1 << 22
_HOLE = bytes(4096)
# About what Python makes of an object, a list, and a value in one.
_OBJECT, _LIST, _VALUE = 240, 72, 64
# Records of the shortest texts come to 20 times their size, a bomb of brackets to 45 and more.
_MOST_TIMES, _SMALL = 32, 1 << 20
# Possessive: a quote that nothing closes must not be looked for again from every place behind it.
_TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)'
_STRING = re.compile(_TEXT, re.DOTALL)
_PIECE = re.compile(rb'(?:[^"]++|%b){1,20000}+' % _TEXT, re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*")
# What a spreadsheet takes for a formula, also behind white space and in full width; OWASP's list.
_FORMULA = re.compile(r"'*(?:[\t\r\n]|[\s\ufeff]*[=+\-@＝＋－＠])")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", re.ASCII)


# ---------------------------------------------------------------- files


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, provided that it is a regular one or a link to one.

    Raises:
        OSError: as `open`, or with a `strerror` that says what is there instead of a file.
    """
    _require_regular(path.stat().st_mode)  # before opening: that alone can wind back a tape
    # A pipe that has taken the file's place meanwhile must not be waited for.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        _require_regular(os.fstat(handle).st_mode)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _require_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file but a pipe, a socket or a device")


def read_text_bytes(path: Path, most: int | None = None) -> bytes | bytearray:
    """The content of a file that holds text in UTF-8, undecoded.

    Args:
        path: the file.
        most: bytes that such a file may have; None: no limit but the file's own size.

    Raises:
        OSError: as `open_regular`, or larger than `most`.
        ValueError: a page of zeros, as the holes of a sparse file are; names its place.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise OSError(errno.EFBIG, f"{size} bytes, more than the {most} such a file may have")
        content = bytearray()
        while piece := file.read(min(_CHUNK, size - len(content))):
            if (place := piece.find(_HOLE)) >= 0:
                raise ValueError(f"nothing but zeros from byte {len(content) + place} on, no text")
            content += piece
    return content


# ---------------------------------------------------------------- JSON


def read_json(path: Path, most: int) -> Any:
    """What a file of JSON in UTF-8 says.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        OSError, ValueError: as `read_text_bytes`, `require_sane_density` and `parse_json`.
    """
    content = read_text_bytes(path, most)
    require_sane_density(content)
    return parse_json(content.decode())


def parse_json(text: str) -> Any:
    """What a JSON text says; `require_sane_density` is left to the caller.

    Raises:
        ValueError: not JSON, a field twice in one object, NaN, an integer of thousands of digits,
            or nested too deep.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("brackets nested too deep") from None


def json_items(text: str) -> Iterator[Any]:
    """The items of a JSON array one after the other, so that they never all stand in memory.

    `require_sane_density` is left to the caller.

    Raises:
        ValueError: as `parse_json`; the items before the fault have been given by then.
    """
    place, mark = _next_mark(text, 0)
    if mark != "[":
        raise json.JSONDecodeError("Expecting an array", text, place)
    after, mark = _next_mark(text, place + 1)
    while mark != "]":
        try:
            item, place = _DECODER.raw_decode(text, after)
        except RecursionError:
            raise ValueError("brackets nested too deep") from None
        yield item
        place, mark = _next_mark(text, place)
        if mark not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        after = place if mark == "]" else _next_mark(text, place + 1)[0]
    if _next_mark(text, after + 1)[1]:
        raise json.JSONDecodeError("Extra data", text, after + 1)


def _next_mark(text: str, place: int) -> tuple[int, str]:
    """Where the next character that is no white space stands, and which; empty at the end."""
    match = _SPACE.match(text, place)
    place = match.end() if match else place
    return place, text[place : place + 1]


def require_sane_density(content: bytes | bytearray) -> None:
    """Raise ValueError if parsing this JSON would take far more memory than its size explains."""
    if len(content) <= _SMALL or _cost(content) <= _MOST_TIMES * len(content):
        return
    # Brackets and commas inside texts cost nothing; they are told apart only where it matters.
    pieces = _PIECE.finditer(content)  # not all at once: that would take what it is to prevent
    if sum(_cost(_STRING.sub(b"", piece[0])) for piece in pieces) > _MOST_TIMES * len(content):
        raise ValueError("too many values for so few bytes")


def _cost(content: bytes | bytearray) -> int:
    values = content.count(b",") + content.count(b":")
    return _OBJECT * content.count(b"{") + _LIST * content.count(b"[") + _VALUE * values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _no_doubles(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(fields)
    if len(record) < len(fields):
        raise ValueError(f"a field twice among {', '.join(name for name, _ in fields)[:200]}")
    return record


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_doubles)


# ---------------------------------------------------------------- spreadsheets


def csv_cell(text: str) -> str:
    """A text as a spreadsheet takes it for one: with an apostrophe where it looks like a formula.

    `csv_text` takes it away again, from whatever text this is given.
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def csv_text(cell: str) -> str:
    """The text that `csv_cell` made a cell of."""
    return cell[1:] if cell.startswith("'") and csv_cell(cell[1:]) == cell else cell
