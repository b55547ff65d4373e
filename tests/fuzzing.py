"""Random and damaged inputs for the readers, the same for the same seed.

A case is a file's content, made in two steps: rows, some of them spoilt, written in the format;
then, in most cases, damage to the bytes. Where nothing is damaged, what must come out is known.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

READERS = ("jsonl", "json", "csv", "parquet", "gz")
ALPHABET = "abc XYZ 019 .,;:!?'\"\\/{}[]<>|\n\t\r\u00e9\u00df\u4e2d\U0001f600\u2028\u00a0\u0000"
PAIRS = (
    ("instruction", "output"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("Input", "target"),
    ("query", "response"),
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A file to read."""

    name: str
    content: bytes
    unpacked: int
    """Bytes of the text that it holds."""
    good: list[list[tuple[str, str]]] | None
    """(role, content) of each turn of each good row, where nothing was damaged."""
    bad: int = 0


def make_case(reader: str, number: int, seed: int = 0) -> Case:
    """The case of that number; every third one is not damaged."""
    rng = random.Random(f"{reader}:{seed}:{number}")
    if reader == "gz":
        return _packed(rng, number)
    rows, good = _rows(rng, flat=reader == "csv")
    name, content = _written(rng, reader, rows)
    if number % 3 == 0:
        return Case(name, content, len(content), good, len(rows) - len(good))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        content = rng.choice(DAMAGE)(rng, content)
    return Case(name, content, len(content), None)


def _packed(rng: random.Random, number: int) -> Case:
    if number % 97 == 1:  # a bomb: few bytes that unpack to many, in one line
        size = rng.choice((2**20, 2**25, 2**27))
        content = gzip.compress(b'{"prompt": "' + rng.choice((b"a", b"[", b" ")) * size, 1)
        return Case("bomb.jsonl.gz", content, len(content), None)
    inner = make_case(rng.choice(("jsonl", "json", "csv")), rng.randrange(10**9), number)
    content = gzip.compress(inner.content, 1, mtime=0)
    if number % 3 == 0:
        return Case(inner.name + ".gz", content, inner.unpacked, inner.good, inner.bad)
    content = rng.choice(DAMAGE)(rng, content)
    return Case(inner.name + ".gz", content, inner.unpacked + len(content), None)


def _rows(rng: random.Random, flat: bool) -> tuple[list[Row], list[list[tuple[str, str]]]]:
    """Rows of one layout, and the conversations that the good ones are."""
    make = _exchange if flat or rng.random() < 0.6 else _chat
    pair, system = rng.choice(PAIRS), rng.random() < 0.3
    rows, good = [], []
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        row, turns = make(rng, pair, system)
        # The first stays whole: what comes after is judged by its layout.
        if rows and rng.random() < 0.25:
            column = rng.choice([key for key in row if key not in ("system", "note")])
            row[column] = "" if flat else rng.choice(WRONG)
            if flat and rng.random() < 0.3:
                row[column] = " \t "
        else:
            good.append(turns)
        rows.append(row)
    return rows, good


def _exchange(rng: random.Random, pair: tuple[str, str], system: bool) -> tuple[Row, list[Any]]:
    question, answer = _text(rng), _text(rng)
    row: Row = {pair[0]: question, pair[1]: answer, "note": _text(rng)}
    turns = [("user", question), ("assistant", answer)]
    if system:
        row["system"] = _text(rng)
        turns.insert(0, ("system", row["system"]))
    return row, turns


def _chat(rng: random.Random, pair: tuple[str, str], system: bool) -> tuple[Row, list[Any]]:
    turns = [("system", _text(rng))] if system else []
    for _ in range(rng.randint(1, 3)):
        turns += [("user", _text(rng)), ("assistant", _text(rng))]
    if pair[0] in ("instruction", "query"):
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        return {"conversations": [{"from": names[r], "value": t} for r, t in turns]}, turns
    return {"messages": [{"role": role, "content": text} for role, text in turns]}, turns


def _text(rng: random.Random) -> str:
    long = 3000 if rng.random() < 0.02 else 20
    return "x" + "".join(rng.choices(ALPHABET, k=rng.randint(0, long)))


WRONG: tuple[Any, ...] = (
    "",
    " \n",
    None,
    3,
    -1.5,
    True,
    [],
    ["a"],
    {},
    {"a": "b"},
    "\ud800",
    10**30,
)


def _written(rng: random.Random, reader: str, rows: list[Row]) -> tuple[str, bytes]:
    ascii_only = any("\\ud" in json.dumps(row) for row in rows) or rng.random() < 0.5
    if reader == "jsonl":
        end = rng.choice(("\n", "\r\n", "\n\n"))
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows)
        return "rows.jsonl", _utf8(text)
    if reader == "json":
        indent = rng.choice((None, None, 1))
        whole: Any = rows if rng.random() < 0.6 else {"version": 1, "data": rows, "n": [1]}
        return "rows.json", _utf8(json.dumps(whole, ensure_ascii=ascii_only, indent=indent))
    return ("rows.csv", _csv(rng, rows)) if reader == "csv" else ("rows.parquet", _table(rng, rows))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _csv(rng: random.Random, rows: list[Row]) -> bytes:
    text = io.StringIO(newline="")
    delimiter = rng.choice(",;\t")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return _utf8(rng.choice(("", "\ufeff")) + text.getvalue())


def _table(rng: random.Random, rows: list[Row]) -> bytes:
    """A column has one type, so that a wrong value is a null here."""
    columns: dict[str, Any] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        right = type(values[0])
        values = [
            v if type(v) is right and v and v != "\ud800" and not _odd(v) else None for v in values
        ]
        columns[key] = values
    file = io.BytesIO()
    pq.write_table(
        pa.table(columns),
        file,
        compression=rng.choice(("none", "snappy", "gzip", "zstd")),
        use_dictionary=rng.random() < 0.5,
        row_group_size=rng.choice((1, 3, 1000)),
        data_page_version=rng.choice(("1.0", "2.0")),
    )
    return file.getvalue()


def _odd(value: Any) -> bool:
    return isinstance(value, list) and not all(isinstance(item, dict) for item in value)


def _flip_bits(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 3, 30)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_end(rng: random.Random, content: bytes) -> bytes:
    """The end is where Parquet has its metadata, and gzip its checksum."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 5)) if changed else 0):
        changed[-1 - rng.randrange(min(len(changed), 800))] = rng.randrange(256)
    return bytes(changed)


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randint(0, len(content))]


def _cut_out(rng: random.Random, content: bytes) -> bytes:
    start = rng.randint(0, len(content))
    return content[:start] + content[start + rng.randint(1, 50) :]


def _repeat(rng: random.Random, content: bytes) -> bytes:
    start = rng.randint(0, len(content))
    part = content[start : start + rng.randint(1, 200)]
    return content[:start] + part * rng.randint(2, 20) + content[start:]


def _insert(rng: random.Random, content: bytes) -> bytes:
    what = rng.choice(INSERTED)
    at = rng.randint(0, len(content))
    return content[:at] + what + content[at:]


def _recode(rng: random.Random, content: bytes) -> bytes:
    coding = rng.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-8-sig"))
    return content.decode("utf-8", "replace").encode(coding, "replace")


def _random_bytes(rng: random.Random, content: bytes) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 7, 100, 5000)))


def _random_tokens(rng: random.Random, content: bytes) -> bytes:
    return b"".join(rng.choices(INSERTED[:-4], k=rng.randint(1, 60)))


def _other_format(rng: random.Random, content: bytes) -> bytes:
    rows, _ = _rows(rng, flat=True)
    other = _written(rng, rng.choice(("jsonl", "json", "csv", "parquet")), rows)[1]
    return rng.choice((other, content + other, other + content))


def _deep(rng: random.Random, content: bytes) -> bytes:
    depth = rng.choice((50, 900, 1100, 100_000))
    nested = rng.choice((b"[", b'{"a":')) * depth
    at = rng.randint(0, len(content))
    return rng.choice((nested, content + b"\n" + nested, content[:at] + nested + content[at:]))


def _long(rng: random.Random, content: bytes) -> bytes:
    """A line of 20 MB once in a while, and of 200 kB mostly."""
    size = 20_000_000 if rng.random() < 0.02 else 200_000
    filler = rng.choice((b"a", b" ", b"[],", b'"', b"\\", b"1", b"\xff", b",")) * size
    at = rng.randint(0, len(content))
    return content[:at] + filler[:size] + content[at:]


INSERTED: tuple[bytes, ...] = (
    *(b"\0", b"\0\0\0\0", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b";", b":", b"\n", b"\r"),
    *(b"\t", b" ", b"null", b"NaN", b"-Infinity", b"1e999", b"true", b"\\ud800", b"\\u0000"),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b'"prompt"', b'"prompt": "a", ', b'"a"'),
    *(b'"messages"', b'"role"', b"PAR1", b"\x1f\x8b", b"{}", b'{"prompt": "a", "output": "b"}'),
    *(b"9" * 5000, b"-" + b"9" * 400, b'{"a":1,"a":2}', b"\x80" * 9),
)
DAMAGE: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(_flip_bits, _flip_bits, _flip_end, _cut, _cut_out, _repeat, _insert, _insert, _recode),
    *(_random_bytes, _random_tokens, _other_format, _deep, _long),
)
