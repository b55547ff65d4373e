"""Instructions told from what they are about: the lines and sentences that many documents share.

Rows of an instruction corpus say the same sentence again and again ("Answer yes or no."), often in
several wordings for one task. Read as any other text, each wording becomes a cluster of its own.
So the sentences that repeat are taken out of the text; what is left is the document's content. And
documents that share a sentence are known to belong together: `Space` moves each towards the mean
content of those it shares its sentences with. Two wordings of one task are then alike, because
they stand before the same kind of content, and two tasks with alike content stay apart.

Not in the HydraLoRA paper, whose section 3.2.1 clusters plain TF-IDF; see docs/discovery.md for
what each is worth.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

# A sentence ends at a mark that a space follows; `label: ` is a sentence of its own.
_ENDS = re.compile(r"\n+|(?<=[.!?:])\s+|(?<=[。！？：])")
_HEAD, _TAIL = 1000, 500


class Segments:
    """The lines and sentences that repeat among some documents.

    least: in how many of them a sentence has to be.
    """

    def __init__(self, texts: Sequence[str], least: int = 4) -> None:
        counts = Counter(part for text in texts for part in set(split(text)))
        repeated = sorted(part for part, count in counts.items() if count >= least)
        self.places = {part: place for place, part in enumerate(repeated)}

    def content(self, text: str) -> str:
        """The text without them, or all of it when nothing else is in it; the middle of a long one
        is left out."""
        parts = split(text)
        own = "\n".join(part for part in parts if part not in self.places) or "\n".join(parts)
        return own if len(own) <= _HEAD + _TAIL else f"{own[:_HEAD]}\n{own[-_TAIL:]}"

    def shared(self, texts: Sequence[str]) -> csr_matrix:
        """(texts, repeated segments): 1 / number of them in the text where one is in it."""
        found = [[self.places[p] for p in set(split(t)) if p in self.places] for t in texts]
        counts = np.array([len(places) for places in found])
        ends = np.concatenate([[0], np.cumsum(counts)])
        columns = np.array([place for places in found for place in sorted(places)], dtype=int)
        values = np.repeat(1.0 / np.maximum(counts, 1), counts)
        return csr_matrix((values, columns, ends), shape=(len(texts), len(self.places)))


def split(text: str) -> list[str]:
    """The lines and sentences of a text."""
    return [part.strip() for part in _ENDS.split(text) if part.strip()]
