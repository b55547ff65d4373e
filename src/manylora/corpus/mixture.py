"""How the tasks are mixed: the table of their sizes, and the order in which rows are drawn.

    proportional   each row once an epoch; a task's share is rows / all rows
    balanced       each task equally often, 1 / tasks; an epoch is about as long as a proportional
                   one, and its rows are drawn anew: a large task gives a part of its rows, a small
                   one all of them several times

Orders depend on the sizes, the strategy, the seed and the epoch alone.
"""

from __future__ import annotations

import random
from typing import Literal, TypedDict, get_args

from rich.console import Console
from rich.table import Table

from manylora.corpus.encode import Encoded
from manylora.corpus.formats import CorpusError

Strategy = Literal["proportional", "balanced"]


class MixtureRow(TypedDict):
    task: str
    rows: int
    tokens: int
    answer_tokens: int
    share: float
    """Expected part of the rows that a step draws."""


def mixture_table(
    train: dict[str, list[Encoded]], strategy: Strategy = "proportional"
) -> list[MixtureRow]:
    """One row a task, in the order of their names."""
    sizes = {task: len(encoded) for task, encoded in train.items()}
    _check(sizes, strategy)
    every_row = sum(sizes.values())
    return [
        MixtureRow(
            task=task,
            rows=sizes[task],
            tokens=sum(len(item.input_ids) for item in train[task]),
            answer_tokens=sum(item.answer_tokens for item in train[task]),
            share=sizes[task] / every_row if strategy == "proportional" else 1 / len(sizes),
        )
        for task in sorted(train)
    ]


def sample_order(
    rows_per_task: dict[str, int], strategy: Strategy, seed: int, epoch: int
) -> list[tuple[str, int]]:
    """The (task, row number) pairs of one epoch, in the order in which they are to be used."""
    _check(rows_per_task, strategy)
    # A string seed is hashed with SHA-512: the same on every machine, and epochs are unrelated.
    generator = random.Random(f"{strategy}:{seed}:{epoch}")
    if strategy == "proportional":
        order = [
            (task, row) for task in sorted(rows_per_task) for row in range(rows_per_task[task])
        ]
        generator.shuffle(order)
        return order
    return _balanced(rows_per_task, generator)


def print_mixture(table: list[MixtureRow], console: Console | None = None) -> None:
    """Write the table to the terminal, with a line of sums."""
    view = Table()
    view.add_column("task")
    for heading in ("rows", "tokens", "answer tokens", "share"):
        view.add_column(heading, justify="right")
    for row in table:
        view.add_row(*_cells(row))
    view.add_section()
    view.add_row(
        *_cells(
            MixtureRow(
                task=f"{len(table)} tasks",
                rows=sum(row["rows"] for row in table),
                tokens=sum(row["tokens"] for row in table),
                answer_tokens=sum(row["answer_tokens"] for row in table),
                share=sum(row["share"] for row in table),
            )
        )
    )
    (console or Console()).print(view)


def _cells(row: MixtureRow) -> tuple[str, str, str, str, str]:
    return (
        row["task"],
        f"{row['rows']:,}",
        f"{row['tokens']:,}",
        f"{row['answer_tokens']:,}",
        f"{row['share']:.1%}",
    )


def _balanced(rows_per_task: dict[str, int], generator: random.Random) -> list[tuple[str, int]]:
    """Rounds in which each task comes once, in a shuffled order within the round."""
    tasks = sorted(rows_per_task)
    rounds = max(1, round(sum(rows_per_task.values()) / len(tasks)))
    drawn = {task: _draw(rows_per_task[task], rounds, generator) for task in tasks}
    order = []
    for number in range(rounds):
        generator.shuffle(tasks)
        order += [(task, drawn[task][number]) for task in tasks]
    return order


def _draw(rows: int, count: int, generator: random.Random) -> list[int]:
    """`count` row numbers; none comes again before all have come."""
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += generator.sample(range(rows), rows)
    return drawn[:count]


def _check(rows_per_task: dict[str, int], strategy: str) -> None:
    if strategy not in get_args(Strategy):
        known = ", ".join(get_args(Strategy))
        raise CorpusError(f"mixture strategy {strategy!r} is not known. Choose one of: {known}.")
    if not rows_per_task:
        raise CorpusError("there is no task to draw rows from. Give at least one task file.")
    for task, rows in rows_per_task.items():
        if rows < 1:
            raise CorpusError(
                f"task {task!r} has no training row left. Add rows, raise max_length if its rows "
                "were too long, or leave the task out."
            )
