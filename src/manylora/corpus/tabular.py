"""Rows of CSV and Parquet files, in constant memory.

.csv, .tsv   UTF-8, a first line of column names, fields in "..." where they hold the
             delimiter, a quote (written twice) or a line end; the delimiter is the one among
             , ; and tab that makes column names of the first line
.parquet     read in small batches, and of the columns only those that are needed
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manylora.corpus.json_rows import Rows
from manylora.corpus.layouts import CorpusError, RowError, find_layout, listed
from manylora.corpus.rows import RowReader
from manylora.corpus.streams import LONGEST, lines, opened, too_long

_BATCH = 32


def read_csv(path: Path, reader: RowReader) -> Rows:
    """(line number, row) for each row; a CorpusError where its fields do not fit the header."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    with opened(path) as file:
        text = _Lines(path, lines(path, file))
        header = next((line for line in text if line.strip()), None)
        if header is None:
            return
        first = text.number
        columns, delimiter = _header(path, header, text, reader)
        reader.header(columns)
        records = csv.reader(text, delimiter=delimiter, strict=True)
        while True:
            text.begin()
            try:
                fields = next(records, None)
            except csv.Error as error:
                raise CorpusError(
                    f"{path}:{text.start}: not CSV: {error}. Put a field that holds quotes or "
                    'line ends into "...", and write each quote in it twice.'
                ) from None
            if fields is None:
                return
            if text.problem is not None:
                yield CorpusError(text.problem)
            elif len(fields) == len(columns):
                yield text.start, dict(zip(columns, fields, strict=True))
            elif len(fields) > 1 or "".join(fields).strip():
                yield CorpusError(
                    f"{path}:{text.start}: {len(fields)} fields, where the header in line {first} "
                    f"has {len(columns)}. Put fields that hold {delimiter!a} or line ends into "
                    '"...".'
                )


class _Lines:
    """Lines as text for the csv module, which asks for as many as a row has."""

    def __init__(self, path: Path, raw: Iterator[bytes]) -> None:
        self.path, self.raw = path, raw
        self.number = 0
        self.begin()

    def begin(self) -> None:
        """A new row begins with the next line."""
        self.start = self.number + 1
        self.problem: str | None = None
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = next(self.raw)
        self.number += 1
        self._size += len(raw)
        if self._size > LONGEST:
            raise too_long(f"{self.path}:{self.start}: the row that begins there")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.problem = self.problem or (
                f"{self.path}:{self.number}: not UTF-8 text: byte 0x{raw[error.start]:02x} at "
                f"position {error.start} of the line. Save the file as UTF-8."
            )
            # The row is lost, but not where it ends.
            return raw.decode(errors="replace")


def _header(path: Path, line: str, text: _Lines, reader: RowReader) -> tuple[list[str], str]:
    """The columns and the delimiter, by which of them makes columns that are known."""
    if text.problem is not None:
        raise CorpusError(text.problem)
    if "\0" in line:
        raise CorpusError(f"{path}: looks like UTF-16 text. Save the file as UTF-8.")
    split = {}
    for delimiter in ",;\t":
        try:
            split[delimiter] = next(csv.reader([line], delimiter=delimiter, strict=True))
        except csv.Error as error:
            problem = error
            continue
        try:
            find_layout(split[delimiter], reader.fields, reader.answered)
        except RowError:
            continue
        return _distinct(path, split[delimiter]), delimiter
    if not split:
        raise CorpusError(f"{path}: the header in line {text.number} is not CSV: {problem}.")
    # None is: the one with most columns makes the message that helps most.
    delimiter = max(split, key=lambda item: len(split[item]))
    return _distinct(path, split[delimiter]), delimiter


def _distinct(path: Path, columns: list[str]) -> list[str]:
    seen: set[str] = set()
    for name in columns:
        if name and name in seen:
            raise CorpusError(f"{path}: the header names {listed([name])} twice. Rename one.")
        seen.add(name)
    return columns


def read_parquet(path: Path, reader: RowReader) -> Rows:
    """(row number, row) for each row; a CorpusError where its text is not UTF-8."""
    try:
        # Pages of a column are read one after the other, not a row group as a whole.
        file = pq.ParquetFile(
            path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True
        )
        with file:
            columns = reader.header(file.schema_arrow.names).columns
            number = 0
            for batch in file.iter_batches(_BATCH, columns=columns, use_threads=False):
                missing = [column for column in columns if column not in batch.schema.names]
                if missing:
                    raise CorpusError(f"{path}: the column {missing[0]!r} cannot be read.")
                for row in _rows_of(batch):
                    number += 1
                    if row is None:
                        yield CorpusError(
                            f"{path}:{number}: text that is not UTF-8. Write the column anew."
                        )
                    else:
                        yield number, row
            if number != file.metadata.num_rows:
                raise CorpusError(
                    f"{path}: {number} rows, where the file's own count is "
                    f"{file.metadata.num_rows}. Write or copy it again."
                )
    except CorpusError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CorpusError(
            f"{path}: not a Parquet file that can be read: {reason}. Write or copy it again."
        ) from None


def _rows_of(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows; None for those with text that is not UTF-8."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [row for at in range(len(batch)) for row in _rows_of(batch.slice(at, 1))]
