"""Rows of JSON Lines and JSON files, in constant memory.

    .jsonl, .ndjson   one object a line; blank lines are no rows
    .json             a list of objects; or an object one value of which is such a list, as
                      {"version": 1, "data": [...]}; or one object a line, as in .jsonl

A bad line of JSON Lines is a bad row. A .json file is one text, and where it is broken nobody
knows where the next row begins: it is read no further.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from manylora.corpus.layouts import MESSAGES, CorpusError, RowError
from manylora.corpus.streams import BOM, LONGEST, lines, opened, too_long
from manylora.corpus.values import shown

Place = int | str
Rows = Iterator[tuple[Place, dict[str, object]] | CorpusError]

_SPACE = re.compile(r"[ \t\n\r]*")
_LIST_START = re.compile(r"\[[ \t\n\r]*([^ \t\n\r]?)")
_CHUNK = 2**18


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: json alone keeps the last of two and says nothing."""
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise RowError(f"the key {shown(key)} is there twice. Rename one.")
            seen.add(key)
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def read_json_lines(path: Path) -> Rows:
    """(line number, row) for each line that is not blank; a CorpusError where it is no row."""
    with opened(path) as file:
        for number, raw in enumerate(lines(path, file), start=1):
            try:
                line = raw.decode().strip()
                if not line:
                    continue
                row, end = _DECODER.raw_decode(line)
            except (ValueError, RecursionError) as error:
                yield CorpusError(f"{path}:{number}: {_reason(error, raw)}")
                continue
            if end != len(line):
                yield CorpusError(
                    f"{path}:{number}: text after the end of the row: "
                    f"{line[end : end + 60].strip()!a}. Write one whole JSON object on each line."
                )
            elif type(row) is not dict:
                yield _no_object(f"{path}:{number}", row)
            else:
                yield number, row


def read_json(path: Path, unread: set[str]) -> Rows:
    """("LINE (row N)", row) for each object of the list; a CorpusError for what is no object.

    Keys beside the list are added to `unread`.
    """
    with opened(path) as file:
        as_lines = _one_object_a_line(file)
    if as_lines:
        yield from read_json_lines(path)
        return
    with opened(path) as file:
        text = _Text(path, file)
        first = text.next()
        if first == "[":
            yield from _list(text)
        elif first == "{":
            yield from _list_in_object(text, unread)
        elif first:
            raise text.error(
                f"a JSON file begins with [ or {{, not with {text.shown()}. Write a list of "
                "objects."
            )
        if text.next():
            raise text.error(
                f"text after the end of the JSON: {text.shown()}. Write one list, or one object "
                "a line."
            )


class _Text:
    """The text of a file, of which no more is held than the value at hand."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.line = 1
        self.rows = 0
        self._text, self._at, self._ended = "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def next(self) -> str:
        """The next character that is not white space, which stays; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._move(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more()

    def skip(self, wanted: str) -> str:
        """Goes past the next character, which must be one of those wanted."""
        found = self.next()
        if not found or found not in wanted:
            needed = " or ".join(wanted)
            raise self.error(
                f"not JSON: found {self.shown()} where {needed} belongs. Mend it there."
            )
        self._move(self._at + 1)
        return found

    def value(self) -> Any:
        """The JSON value that comes next."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._cut_off(error):
                    self._move(error.pos)
                    raise self.error(f"not JSON: {error.msg}; found {self.shown()}.") from None
            except (ValueError, RecursionError) as error:
                raise self.error(_reason(error, b"")) from None
            else:
                if end < len(self._text) or self._ended:
                    self._move(end)
                    return value
            if len(self._text) - self._at > LONGEST:
                raise too_long(f"{self.path}:{self.line}: the value that begins there")
            self._more()

    def place(self) -> str:
        """Where the value that comes next stands."""
        return f"{self.line} (row {self.rows})"

    def opens_rows(self) -> bool:
        """Whether a list of objects comes next."""
        self.next()
        while True:
            match = _LIST_START.match(self._text, self._at)
            if match is None or match[1] or self._ended:
                return match is not None and match[1] == "{"
            self._more()

    def shown(self) -> str:
        return ascii(self._text[self._at : self._at + 60]) if self.next() else "the end of the file"

    def error(self, reason: str) -> CorpusError:
        return CorpusError(f"{self.path}:{self.line}: {reason}")

    def _move(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether the end of what is read so far, not the file, may be what is wrong."""
        return error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 16

    def _more(self) -> None:
        """At least doubles what is held, so that a long value is decoded in linear time."""
        rest = self._text[self._at :]
        raw = self.file.read(max(_CHUNK, min(len(rest), LONGEST - len(rest))))
        self._ended = not raw
        try:
            self._text, self._at = rest + self._decoder.decode(raw, self._ended), 0
        except UnicodeDecodeError as error:
            line = self.line + rest.count("\n") + error.object[: error.start].count(b"\n")
            raise CorpusError(
                f"{self.path}:{line}: not UTF-8 text: byte 0x{error.object[error.start]:02x}. "
                "Save the file as UTF-8."
            ) from None


def _list(text: _Text) -> Rows:
    """The rows of the list that begins here."""
    text.skip("[")
    if text.next() == "]":
        text.skip("]")
        return
    while True:
        text.next()
        text.rows += 1
        place = text.place()
        row = text.value()
        yield (place, row) if type(row) is dict else _no_object(f"{text.path}:{place}", row)
        if text.skip(",]") == "]":
            return


def _list_in_object(text: _Text, unread: set[str]) -> Rows:
    """The rows of the one value of the object that is a list of objects."""
    text.skip("{")
    found: str | None = None
    keys: list[str] = []
    while text.next() != "}":
        key = text.value()
        if not isinstance(key, str):
            raise text.error("not JSON: an object's key is not a string.")
        text.skip(":")
        keys = [*keys, key][:12]
        if text.opens_rows():
            if found is not None or key.casefold() in MESSAGES:
                raise text.error(_not_the_rows(found, key))
            found = key
            yield from _list(text)
        else:
            text.value()
            unread.update([key] if len(unread) < 1000 else [])
        if text.next() == "}":
            break
        text.skip(",")
        if text.next() == "}":
            raise text.error("not JSON: a comma before }. Take it out.")
    text.skip("}")
    if found is None:
        raise text.error(
            f"an object with {', '.join(shown(key) for key in keys) or 'nothing in it'}, and none "
            "of it a list of objects. Write a list of rows, [{...}, {...}]."
        )


def _one_object_a_line(file: BinaryIO) -> bool:
    """Whether it is JSON Lines by another name: no JSON text goes on after a whole object."""
    first = file.readline(LONGEST).removeprefix(BOM).strip()
    while not first and (line := file.readline(LONGEST)):
        first = line.strip()
    if not (first.startswith(b"{") and first.endswith(b"}")):
        return False
    second = b""
    while not second and (line := file.readline(LONGEST)):
        second = line.strip()
    return second.startswith(b"{")


def _not_the_rows(found: str | None, key: str) -> str:
    if found is not None:
        return (
            f"two lists of objects, {shown(found)} and {shown(key)}: which holds the rows is not "
            "clear. Write each to its own file."
        )
    return (
        f"{shown(key)} is one conversation, so this is one row. Write a list of rows, "
        '[{"messages": [...]}, ...].'
    )


def _no_object(where: str, value: object) -> CorpusError:
    kind = {list: "list", str: "string", bool: "boolean", type(None): "null"}.get(type(value))
    hint = " A file that is one list as a whole is named .json." if kind == "list" else ""
    return CorpusError(
        f"{where}: a JSON {kind or 'number'}, not an object; found {shown(value)}. A row is "
        f'{{"prompt": ..., "completion": ...}} or {{"messages": [...]}}.{hint}'
    )


def _reason(error: Exception, raw: bytes) -> str:
    if isinstance(error, UnicodeDecodeError):
        return (
            f"not UTF-8 text: byte 0x{raw[error.start]:02x} at position {error.start} of the "
            "line. Save the file as UTF-8."
        )
    if isinstance(error, json.JSONDecodeError):
        utf16 = " It looks like UTF-16 text: save the file as UTF-8." if b"\0" in raw[:64] else ""
        return (
            f"not JSON: {error.msg} at character {error.pos + 1}; found "
            f"{error.doc[:60]!a}. Write one whole JSON object on each line.{utf16}"
        )
    if isinstance(error, RecursionError):
        return "objects or lists nested too deep to be read. Take the row out, or flatten it."
    if isinstance(error, RowError):
        return str(error)
    return "a number of more than 4,300 digits. Write it as a string, or take it out."
