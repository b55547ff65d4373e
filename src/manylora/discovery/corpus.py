"""Discovery over a corpus as it is split: learned from the training rows alone.

The rows kept apart and held out are put into the clusters that the training rows have; what is
written has the cluster of every row, the training rows first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from manylora.corpus import Corpus, Rows
from manylora.discovery.discover import Documents, Say, discover
from manylora.discovery.documents import texts_of
from manylora.discovery.folder import write_discovery
from manylora.discovery.options import DiscoveryOptions
from manylora.discovery.space import Embedding


def documents_of(parts: Sequence[tuple[str, Rows]]) -> Documents:
    """The documents of some tasks' rows, one task after the other."""
    texts: list[str] = []
    tasks: list[str] = []
    sources: list[str] = []
    for task, rows in parts:
        texts += texts_of(rows)
        tasks += [task] * len(rows)
        sources += rows.sources
    return Documents(texts, tasks, sources)


def discover_corpus(
    corpus: Corpus,
    options: DiscoveryOptions,
    seed: int,
    folder: Path,
    embedding: Callable[[], Embedding] | None = None,
    say: Say = lambda text: None,
) -> None:
    """Find the clusters of a corpus and write them, with the cluster of every row, to a folder."""
    parts = [
        part
        for rows in (corpus.train, corpus.validation, corpus.test)
        for part in sorted(rows.items())
    ]
    every = documents_of(parts)
    count = sum(map(len, corpus.train.values()))
    trained = Documents(every.texts[:count], every.tasks[:count], every.sources[:count])
    found = discover(trained, options, seed, embedding, say)
    labels, similarity = found.clusters.assign(every.texts[count:], say)
    whole = replace(
        found,
        labels=np.concatenate([found.labels, labels]),
        similarity=np.concatenate([found.similarity, similarity]),
    )
    say("writing what was found")
    write_discovery(whole, every, np.concatenate([rows.keys for _, rows in parts]), folder)
