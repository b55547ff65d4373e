"""A corpus on disk: every row once through the readers, into one Arrow file mapped into memory.

Reading, checking and counting happen once for a set of files; whoever reads them again, another
rank or a later run, finds the Arrow file in the cache. Any row can then be had in any order without
holding the others: memory does not grow with the corpus, but for the four bytes a row that number
the rows of each task. Files are known by path, size and time of change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from manylora.corpus.layouts import CorpusError, Example

FORMAT = 2
SHOWN = 10
_DAYS_KEPT = 30
_FLUSH_ROWS, _FLUSH_BYTES = 16384, 16_000_000
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_SCHEMA = pa.schema(
    [
        ("task", pa.int32()),
        ("messages", pa.large_string()),  # JSON
        ("source", pa.string()),
        ("turns", pa.int32()),
        ("key", pa.uint64()),  # of the prompt's text; equal for the same question
        ("tests", pa.large_string()),  # of code; no part of `content`, as nothing learns from them
    ]
)

Found = Iterable[Example | CorpusError]
Count = Callable[[int], None]


class Store:
    """The rows of some files, in the order of the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.tasks: list[str] = meta["tasks"]
        self.content: str = meta["content"]
        self.bad: int = meta["bad"]
        self.bad_shown: list[str] = meta["bad_shown"]
        self.unread: dict[str, list[str]] = meta["unread"]
        with pa.memory_map(str(folder / "rows.arrow")) as file:
            self.table: pa.Table = pa.ipc.open_file(file).read_all()

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return Store, (self.folder,)

    def column(self, name: str, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A number for each of the given rows."""
        return np.asarray(self.table.column(name).to_numpy()[rows])

    def rows_of(self, task: str) -> npt.NDArray[np.uint32]:
        number = self.tasks.index(task)
        return np.flatnonzero(self.table.column("task").to_numpy() == number).astype(np.uint32)

    def example(self, row: int) -> Example:
        table = self.table
        return Example(
            self.tasks[table.column("task")[row].as_py()],
            json.loads(table.column("messages")[row].as_py()),
            table.column("source")[row].as_py(),
            table.column("tests")[row].as_py(),
        )


class Rows(Sequence[Example]):
    """Some rows of one task; each is read when it is asked for.

    task: what they are filed under, where that is not the task that the store names.
    """

    def __init__(
        self, store: Store, numbers: npt.NDArray[np.uint32], task: str | None = None
    ) -> None:
        self.store, self.numbers, self.task = store, numbers, task

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Rows: ...
    def __getitem__(self, place: int | slice) -> Example | Rows:
        if isinstance(place, slice):
            return Rows(self.store, self.numbers[place], self.task)
        example = self.store.example(int(self.numbers[place]))
        return example if self.task is None else replace(example, task=self.task)

    def at(self, places: npt.NDArray[Any]) -> Rows:
        """The rows at these places."""
        return Rows(self.store, self.numbers[places], self.task)

    def spread(self, count: int) -> Rows:
        """At most so many rows, evenly over all of them."""
        places = np.linspace(0, len(self) - 1, min(len(self), count)).astype(int)
        return self.at(np.unique(places))

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each row's text, a few for its punctuation included."""
        sizes = pc.binary_length(self.store.table.column("messages")).to_numpy()
        return np.asarray(sizes[self.numbers], dtype=np.int64)

    @property
    def turns(self) -> npt.NDArray[np.int64]:
        """Messages of each row."""
        return self.store.column("turns", self.numbers).astype(np.int64)

    @property
    def sources(self) -> list[str]:
        """Where each row stands, as "file.jsonl:17"."""
        found: list[str] = self.store.table.column("source").take(self.numbers).to_pylist()
        return found

    @property
    def keys(self) -> npt.NDArray[np.uint64]:
        """A hash of each row's question, without case and spacing."""
        return self.store.column("key", self.numbers)


def open_store(
    identity: object,
    found: Callable[[], Found],
    cache: Path,
    count: Count,
    unread: dict[str, list[str]] | None = None,
) -> Store:
    """The store of the given identity, read from `found` unless the cache has it.

    identity: plain values that are equal only where the rows would be. count: told how many rows
    have been read, from time to time. unread: columns by file, which `found` fills as it reads.
    """
    name = hashlib.sha256(json.dumps([FORMAT, identity]).encode()).hexdigest()[:32]
    folder = cache / "corpora" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "meta.json").is_file():
                forget_old(folder.parent)
                _build(folder, found(), count, {} if unread is None else unread)
            os.utime(folder)
    except OSError as error:
        raise CorpusError(
            f"the rows cannot be kept in {folder.parent}: {error}. About the size of the data is "
            "needed there; set MANYLORA_CACHE to a folder with room that can be written."
        ) from error
    return Store(folder)


def _build(folder: Path, found: Found, count: Count, unread: dict[str, list[str]]) -> None:
    """Into a sibling folder, renamed at the end: a killed process leaves no half store."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        intake = _Intake()
        with pa.ipc.new_file(partial / "rows.arrow", _SCHEMA) as file:
            for columns in intake.batches(found, count):
                file.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        meta = {
            "tasks": list(intake.tasks),
            "content": intake.content.hexdigest(),
            "bad": intake.bad,
            "bad_shown": intake.shown,
            "unread": unread,
        }
        (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Intake:
    """Sorts what the readers give: examples into columns, bad rows into a count."""

    def __init__(self) -> None:
        self.tasks: dict[str, int] = {}
        self.content = hashlib.blake2b(digest_size=16)
        self.bad = 0
        self.shown: list[str] = []

    def batches(self, found: Found, count: Count) -> Iterator[list[list[Any]]]:
        rows: list[tuple[Any, ...]] = []
        read = size = 0
        for read, item in enumerate(found, start=1):
            if isinstance(item, CorpusError):
                self.bad += 1
                if self.bad <= SHOWN:
                    self.shown.append(str(item))
                continue
            rows.append(self._values(item))
            self.content.update(f"{item.task}\0{rows[-1][1]}\0".encode())
            size += len(rows[-1][1]) + len(item.tests)
            if len(rows) == _FLUSH_ROWS or size > _FLUSH_BYTES:
                yield [list(column) for column in zip(*rows, strict=True)]
                rows, size = [], 0
                count(read)
        if rows:
            yield [list(column) for column in zip(*rows, strict=True)]
        count(read)

    def _values(self, example: Example) -> tuple[int, str, str, int, int, str]:
        messages = example.messages
        question = " ".join([message["content"] for message in messages[:-1]])
        plain = " ".join(question.split()).casefold().encode()
        return (
            self.tasks.setdefault(example.task, len(self.tasks)),
            _to_json(messages),
            example.source,
            len(messages),
            int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "big"),
            example.tests,
        )


def forget_old(folder: Path) -> None:
    """Remove the folders in it that nobody has opened for a month."""
    limit = time.time() - _DAYS_KEPT * 86400
    for old in folder.iterdir():
        if old.is_dir() and old.stat().st_mtime < limit:
            shutil.rmtree(old, ignore_errors=True)
