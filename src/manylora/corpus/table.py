"""The mixture as a table: what each task brings and how much of it a step draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from rich.console import Console
from rich.table import Table

from manylora.corpus.encode import Encoder
from manylora.corpus.mixture import Mixture, shares
from manylora.corpus.store import Rows

# More rows than this are not all encoded to be counted; training encodes them as it goes.
COUNTED_ROWS = 2000


class MixtureRow(TypedDict):
    """share: expected part of the rows that a step draws. counted: rows that tokens come from."""

    task: str
    rows: int
    tokens: int
    answer_tokens: int
    share: float
    counted: int


def mixture_table(train: dict[str, Rows], mixture: Mixture, encoder: Encoder) -> list[MixtureRow]:
    """One row a task, in the order given; of a large task a sample of rows is counted."""
    share = shares({task: len(rows) for task, rows in train.items()}, mixture)
    table = []
    for task, rows in train.items():
        encoded, _ = encoder.split_too_long(rows.spread(COUNTED_ROWS))
        scale = len(rows) / len(encoded)
        table.append(
            MixtureRow(
                task=task,
                rows=len(rows),
                tokens=round(scale * sum(len(item.input_ids) for item in encoded)),
                answer_tokens=round(scale * sum(item.answer_tokens for item in encoded)),
                share=share[task],
                counted=len(encoded),
            )
        )
    return table


def print_mixture(table: Sequence[MixtureRow], console: Console | None = None) -> None:
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
                task=f"{len(table)} task{'s' * (len(table) != 1)}",
                rows=sum(row["rows"] for row in table),
                tokens=sum(row["tokens"] for row in table),
                answer_tokens=sum(row["answer_tokens"] for row in table),
                share=sum(row["share"] for row in table),
                counted=sum(row["counted"] for row in table),
            )
        )
    )
    out = console or Console()
    out.print(view)
    if any(row["counted"] < row["rows"] for row in table):
        out.print(f"~: reckoned from {COUNTED_ROWS:,} rows of the task")


def _cells(row: MixtureRow) -> tuple[str, str, str, str, str]:
    about = "~" if row["counted"] < row["rows"] else ""
    return (
        row["task"],
        f"{row['rows']:,}",
        f"{about}{row['tokens']:,}",
        f"{about}{row['answer_tokens']:,}",
        f"{row['share']:.1%}",
    )
