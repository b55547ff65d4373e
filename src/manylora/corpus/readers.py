"""Files of rows as examples: JSON Lines, JSON, CSV and Parquet, known by their suffix.

A row that cannot be used is yielded as a CorpusError, so that the caller decides whether the file
is refused or the row skipped; a file that cannot be read any further raises one. No row is lost
without a word: each comes out as an Example or an error. Memory does not grow with the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from manylora.corpus.folders import SUFFIXES, files_not_read, suffix_of, task_files
from manylora.corpus.json_rows import Rows, read_json, read_json_lines
from manylora.corpus.layouts import CorpusError, Example, Fields
from manylora.corpus.rows import RowReader
from manylora.corpus.tabular import read_csv, read_parquet

__all__ = ["columns_not_read", "examples_of", "files_not_read", "read_examples", "task_files"]


def read_examples(
    path: Path,
    fields: Fields | None = None,
    task: str | None = None,
    answered: bool = True,
    unread: set[str] | None = None,
) -> Iterator[Example | CorpusError]:
    """Each row of a file, in order, as an example or as the reason why it is none.

    Args:
        fields: which columns hold what, where their names do not say it.
        task: the task of all rows, unless `fields.task` names a column; else the file's name.
        answered: rows have an answer. Without, they are to be answered, and an answer that a row
            has is left out.
        unread: gets the names of the columns that are not read.

    Raises CorpusError for a file that cannot be read, or not any further, and for one without rows.
    """
    path = Path(path)
    suffix = suffix_of(path)
    if not path.is_file():
        raise CorpusError(f"{path}: no such file. Give a file of rows ({', '.join(SUFFIXES)}).")
    if not suffix:
        raise CorpusError(
            f"{path}: the suffix {path.suffix!r} is not known. Rows are read from "
            f"{', '.join(SUFFIXES)}, the text formats also with .gz."
        )
    name = task if task is not None else next(iter(task_files(path)))
    reader = RowReader(
        path, fields or Fields(), name, answered, suffix in (".csv", ".tsv", ".parquet")
    )
    reader.unread = unread if unread is not None else reader.unread
    yield from examples_of(_rows(path, suffix, reader), reader)


def examples_of(rows: Rows, reader: RowReader) -> Iterator[Example | CorpusError]:
    """Rows of any origin through a reader."""
    found = False
    for item in rows:
        found = True
        if isinstance(item, CorpusError):
            yield item
            continue
        result: Example | CorpusError
        try:
            result = reader.example(item[1], item[0])
        except CorpusError as error:
            # Kept by the caller perhaps, and with it all that its traceback holds.
            error.__context__ = None
            result = error.with_traceback(None)
        yield result
    if not found:
        raise CorpusError(f"{reader.file}: holds no row. Write rows into it, or remove it.")
    reader.finish()


def columns_not_read(path: Path, fields: Fields | None = None) -> list[str]:
    """The columns of a file that no example has anything of; all rows are looked at."""
    unread: set[str] = set()
    for _ in read_examples(path, fields, unread=unread):
        pass
    return sorted(unread)


def _rows(path: Path, suffix: str, reader: RowReader) -> Rows:
    if suffix in (".jsonl", ".ndjson"):
        return read_json_lines(path)
    if suffix == ".json":
        return read_json(path, reader.unread)
    return read_parquet(path, reader) if suffix == ".parquet" else read_csv(path, reader)
