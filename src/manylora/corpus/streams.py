"""Files as bytes and lines: plain or gzip'd, in constant memory.

A line is never longer than `LONGEST`, so that a file without line ends, or a small gzip file that
unpacks to terabytes, is refused before it fills the memory.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from manylora.corpus.layouts import CorpusError

LONGEST = 16 * 2**20
BOM = b"\xef\xbb\xbf"
_BLOCK = 2**18

# What a file is that begins with these bytes.
_NOT_TEXT = {
    b"\xff\xfe": "UTF-16 text. Save it as UTF-8",
    b"\xfe\xff": "UTF-16 text. Save it as UTF-8",
    b"PAR1": "a Parquet file. Give it the suffix .parquet",
    b"PK\x03\x04": "a zip or Excel file. Unpack it, or save the sheet as CSV in UTF-8",
    b"\x1f\x8b": "a gzip file. Give it the suffix .gz after its own, as in .jsonl.gz",
    b"ARROW1": "an Arrow file. Save it as Parquet",
    b"BZh": "a bzip2 file. Unpack it",
    b"\x28\xb5\x2f\xfd": "a Zstandard file. Unpack it",
}


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file of text, unpacked where its name ends with .gz."""
    try:
        with open(path, "rb", buffering=_BLOCK) as packed:
            if path.suffix.lower() != ".gz":
                yield _checked(path, packed)
                return
            with gzip.GzipFile(fileobj=packed, mode="rb") as file:
                buffered = io.BufferedReader(cast(io.RawIOBase, file), _BLOCK)
                yield _checked(path, buffered)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(
            f"{path}: not a whole gzip file: {error}. Copy it again, or pack it with gzip."
        ) from None
    except EOFError:
        raise CorpusError(f"{path}: the gzip file is cut off. Copy it again.") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CorpusError(f"{path}: cannot be read ({reason}). Check the file.") from None


def lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The lines, without a byte order mark. Only \\n ends one: a JSON string may hold U+2028."""
    first = file.readline(LONGEST).removeprefix(BOM)
    for number, raw in enumerate(_from(first, file), start=1):
        if len(raw) >= LONGEST:
            raise too_long(f"{path}:{number}: the line")
        yield raw


def too_long(what: str) -> CorpusError:
    return CorpusError(
        f"{what} is longer than {LONGEST // 2**20} MiB, too long for one row. Write one row a "
        "line, and shorten or split rows of this length."
    )


def _from(first: bytes, file: BinaryIO) -> Iterator[bytes]:
    if first:
        yield first
        yield from iter(lambda: file.readline(LONGEST), b"")


def _checked(path: Path, file: BinaryIO) -> BinaryIO:
    start = cast(io.BufferedReader, file).peek(8)[:8]
    for magic, what in _NOT_TEXT.items():
        if start.startswith(magic):
            raise CorpusError(f"{path}: not what its suffix says: it is {what}.")
    return file
