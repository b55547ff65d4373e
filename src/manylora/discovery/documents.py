"""What a row is to discovery: the text of everything that is asked in it.

The answer is left out, because a new prompt has none; the roles of the turns too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from manylora.corpus.layouts import Message
from manylora.corpus.store import Rows

_READABLE = re.compile(r"\w")
_AT_ONCE = 100_000


def text_of(messages: Sequence[Message]) -> str:
    """The turns one under the other, without the answer at the end."""
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return "\n".join(message["content"] for message in asked)


def texts_of(rows: Rows) -> list[str]:
    """The text of each row, read in one go rather than row by row."""
    column = rows.store.table.column("messages")
    found: list[str] = []
    for start in range(0, len(rows), _AT_ONCE):
        part = column.take(rows.numbers[start : start + _AT_ONCE])
        found += [text_of(json.loads(messages)) for messages in part.to_pylist()]
    return found


def readable(texts: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which texts have a letter or a digit of any script; without one there is nothing to read."""
    return np.array([_READABLE.search(text) is not None for text in texts], dtype=bool)
