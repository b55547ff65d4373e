"""The table of static exports: a row a task, a column a kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from manylora.export.plans import ALL
from manylora.export.record import Export

COLUMNS = ("mean, all tasks", "fit, all tasks", "mean, own", "fit, own")


def print_gaps(exports: Sequence[Export], out: Console) -> None:
    """Print how much of what training gave each static LoRA loses, with 95 % intervals."""
    cells = gap_cells(exports)
    table = Table(title="lost of what training gave: (static - live) / (base - live) of NLL, in %")
    table.add_column("task")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for task, row in cells.items():
        table.add_row(task, *(row.get(column, "") for column in COLUMNS))
    out.print(table)
    if not cells:
        out.print("on no task is the run better than its base, so there is nothing to lose")


def gap_cells(exports: Sequence[Export]) -> dict[str, dict[str, str]]:
    """By task and column: the gap in percent, with its interval."""
    cells: dict[str, dict[str, str]] = {}
    for export in exports:
        kind, _, rest = Path(export.path).name.partition("_")
        column = f"{kind}, {'all tasks' if rest == ALL else 'own'}"
        for task, gap in export.gap.items():
            cells.setdefault(task, {})[column] = _percent(gap)
    return cells


def _percent(gap: Sequence[float]) -> str:
    value, low, high = (100 * part for part in gap)
    return f"{value:.2f} ({low:.2f} to {high:.2f})"
