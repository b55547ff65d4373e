"""The rows of a new task: a few examples to learn from, and others to score on.

Rows are split as in training, by what they ask: an example's question is never among the held-out
rows, the order of the file does not matter, and the same seed gives the same examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.console import Console

from manylora.corpus import (
    Corpus,
    CorpusError,
    Data,
    DataOptions,
    Encoded,
    Encoder,
    Fields,
    Rows,
    read_rows,
)
from manylora.corpus.split import split
from manylora.evaluate.scores import HeldOut, held_out
from manylora.training.prepare import fitting, reading

SCORED = 100  # held-out rows at most, spread over all of them


@dataclass(frozen=True)
class FewShot:
    """The examples of one task as tokens; held_out: its other rows, empty where too few."""

    task: str
    shots: list[Encoded]
    held_out: list[HeldOut]

    @property
    def scored(self) -> int:
        return sum(len(task.examples) for task in self.held_out)


def few_shot(
    data: Data, fields: Fields, examples: int, seed: int, encoder: Encoder, console: Console
) -> FewShot:
    """Read the rows of one task and draw examples: as many as asked for, at most half the rows.

    Where the data have a test/ of their own, the examples are of the other rows and the test rows
    are scored. Raises CorpusError for data that cannot be used, or that hold several tasks.
    """
    corpus = reading(lambda count: read_rows(data, DataOptions(fields=fields), count), console)
    if len(corpus.tasks) != 1:
        raise CorpusError(
            f"{data} holds {len(corpus.tasks)} tasks ({', '.join(corpus.tasks[:5])}, ...), and "
            "adapters are composed for one: give the file of that task."
        )
    (task,) = corpus.tasks
    rows = fitting(task, corpus.train[task], encoder, console)
    shots, rest = _drawn(task, rows, corpus.test.get(task), examples, seed)
    if len(shots) < examples:
        console.print(
            f"{task}: {len(shots)} of its {len(rows):,} rows are examples, not {examples}",
            style="yellow",
            markup=False,
        )
    scored, notes = held_out(
        Corpus(train={task: shots}, test={task: rest.spread(SCORED)}), encoder, SCORED
    )
    for note in notes:
        console.print(note, style="yellow", markup=False)
    return FewShot(task, [encoder.encode(example) for example in shots], scored)


def _drawn(task: str, rows: Rows, test: Rows | None, examples: int, seed: int) -> tuple[Rows, Rows]:
    """(the examples, the rows to score)."""
    salt = f"{seed}:examples"
    if test is None:
        rest, shots = split(task, rows, min(examples, len(rows) // 2) / len(rows), salt)
        return shots, rest
    shots = rows if len(rows) <= examples else split(task, rows, examples / len(rows), salt)[1]
    return shots, test.at(~np.isin(test.keys, shots.keys))
