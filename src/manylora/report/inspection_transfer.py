"""What each task gives the others: what changes for them when it is left out of the training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd

from manylora.inspect.frames import Inspection
from manylora.report.heat import Cell, HeatTable, heat_table
from manylora.report.tables import frame_csv, wide


@dataclass(frozen=True, slots=True)
class TransferView:
    """The section: one table a run."""

    tables: list[HeatTable]
    csv: str


def transfer_view(found: Inspection) -> TransferView | None:
    """The section, or None where no task was left out."""
    transfer = found.frame("transfer")
    if transfer is None:
        return None
    groups = transfer.groupby("run", sort=False)
    tables = [_table(rows, str(run), len(found.runs) > 1) for run, rows in groups]
    return TransferView(tables, frame_csv(transfer))


def _table(rows: pd.DataFrame, run: str, several: bool) -> HeatTable:
    change, low, high = (
        wide(rows, "left_out", "task", column).rename_axis(index="left out")
        for column in ("nll", "low", "high")
    )
    note = "change of nll, nats a token, with its 95 % interval; above 0: the left-out task helped"
    title = f"{run}: without a task" if several else "Without a task"
    table = heat_table(title, note, change, digits=3)
    named = [
        (name, [_with_interval(*cell) for cell in zip(cells, lows, highs, strict=True)])
        for (name, cells), lows, highs in zip(
            table.rows, low.to_numpy().tolist(), high.to_numpy().tolist(), strict=True
        )
    ]
    return replace(table, rows=named)


def _with_interval(cell: Cell, low: float, high: float) -> Cell:
    return cell if cell.style == "plain" else replace(cell, below=f"{low:.3f} to {high:.3f}")
