"""The header of a GGUF file, checked against the file's size before anything else reads it.

A GGUF file (little-endian) is: "GGUF", version u32, tensor count u64, key count u64; then the keys
(name, type u32, value), then for each tensor its name, dimensions, type u32 and offset u64, then
the data. The gguf package trusts the lengths it finds: in a damaged file it can run out of memory.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from manylora.base.converted import BaseModelError

MAGIC = b"GGUF"
_SCALARS = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?"])) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself. Arrays are left out of `keys`, but for their length."""

    architecture: str
    tensors: int
    parameters: int
    keys: dict[str, Any]


class _DamagedError(Exception):
    """The file ends early, or a length in it cannot be."""


def is_gguf(path: Path) -> bool:
    """Whether the file says that it is GGUF, by its name or its first bytes."""
    with path.open("rb") as stream:
        return path.suffix.lower() == ".gguf" or stream.read(4) == MAGIC


def read_header(path: Path) -> Header:
    """Read and check a GGUF file's header; BaseModelError says what is wrong with the file."""
    with path.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise BaseModelError(
                f"{path} is not a GGUF file: it does not start with 'GGUF'. It may be an error "
                "page or a pointer file of a download that went wrong; fetch it again."
            )
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _Reader(data).header()
            except (_DamagedError, UnicodeDecodeError) as error:
                raise BaseModelError(
                    f"{path} is truncated or damaged ({error}); it has {len(data):,} bytes. "
                    "Compare its size and SHA-256 with the source, and fetch it again."
                ) from None
    return header


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, len(MAGIC)

    def header(self) -> Header:
        version = self.number("I")
        if version not in (2, 3):
            raise _DamagedError(
                f"GGUF version {version}; versions 2 and 3, little-endian, can be read"
            )
        tensors, count = self.number("Q"), self.number("Q")
        keys: dict[str, Any] = {}
        for _ in range(self.fits(count, 13, "keys")):
            name = self.string()
            keys[name] = self.value(self.number("I"))
        parameters = self.tensors(tensors, int(keys.get("general.alignment", 32)))
        return Header(str(keys.get("general.architecture", "")), tensors, parameters, keys)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _DamagedError(f"a key of unknown type {kind}")
        inner, length = self.number("I"), self.number("Q")
        if inner == _STRING:
            for _ in range(self.fits(length, 8, "strings")):
                self.skip(self.number("Q"))
        elif inner in _SCALARS:
            self.skip(length * struct.calcsize(_SCALARS[inner]))
        else:
            raise _DamagedError(f"an array of unknown type {inner}")
        return length

    def tensors(self, count: int, alignment: int) -> int:
        parameters, end = 0, 0
        for _ in range(self.fits(count, 24, "tensors")):
            name = self.string()
            rank = self.number("I")
            if rank > _MOST_DIMENSIONS:
                raise _DamagedError(f"tensor {name!r} with {rank} dimensions")
            elements = math.prod(self.number("Q") for _ in range(rank))
            kind, offset = self.number("I"), self.number("Q")
            if kind not in GGMLQuantizationType._value2member_map_:
                raise _DamagedError(f"tensor {name!r} of unknown type {kind}")
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            parameters += elements
            end = max(end, offset + elements * size // block)
        start = -(-self.at // max(1, alignment)) * max(1, alignment)
        if start + end > len(self.data):
            raise _DamagedError(f"its tensors end at byte {start + end:,}")
        return parameters

    def number(self, kind: str) -> int:
        at = self.at
        self.skip(struct.calcsize("<" + kind))
        return struct.unpack_from("<" + kind, self.data, at)[0]

    def string(self) -> str:
        length = self.number("Q")
        at = self.at
        self.skip(length)
        return self.data[at : self.at].decode("utf-8")

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise _DamagedError("its header ends early")

    def fits(self, count: int, size: int, what: str) -> int:
        if count * size > len(self.data) - self.at:
            raise _DamagedError(f"{count:,} {what} do not fit into it")
        return count
