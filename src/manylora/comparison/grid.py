"""The cells of a comparison, in the order in which they can be run.

    three rates a factor of 4 apart, seed 0, scored on validation rows
    the two rates a factor of 2 beside the best of the three
    the best of the five with every seed, scored on held-out rows

Every method gets the same five trials. Cells that are finished are not run again; the others run
side by side where the memory allows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from manylora.comparison.cell import Cell, run_cell
from manylora.comparison.contenders import Contender
from manylora.comparison.ground import Ground
from manylora.comparison.result import RatePoint
from manylora.comparison.side_by_side import at_once, gpus, run_side_by_side
from manylora.comparison.store import CellStore, key_of

FIRST, BESIDE = (0.25, 1.0, 4.0), (0.5, 2.0)


@dataclass
class Grid:
    """Runs cells and keeps them.

    parallel: runs side by side on a GPU; 0 finds out from the memory that the first one took.
    energy: whether that of each is measured. keys: of the cells that were asked for, in the grid's
    order.
    """

    ground: Ground
    store: CellStore
    console: Console
    parallel: int = 0
    energy: bool = False
    keys: dict[Cell, str] = field(default_factory=dict)

    def run(
        self, contenders: Sequence[Contender], seeds: int, rate: float | None
    ) -> dict[str, float]:
        """Every cell of the comparison; returns each method's rate."""
        trials = 0 if rate is not None else len(FIRST) + len(BESIDE)
        with _progress(self.console) as bar:
            bar.add_task("runs", total=len(contenders) * (trials + seeds), what="")
            rates = {contender.name: rate for contender in contenders if rate is not None}
            if rate is None:
                self._tried(contenders, {c.name: c.centre_lr for c in contenders}, FIRST, bar)
                self._tried(contenders, self.best(contenders), BESIDE, bar)
                rates = self.best(contenders)
            self._run(
                [Cell(c, rates[c.name], seed, "test") for c in contenders for seed in range(seeds)],
                bar,
            )
        return rates

    def rates(self, contender: Contender) -> list[RatePoint]:
        """The trials of a method, lowest rate first."""
        cells = [c for c in self.keys if c.contender is contender and c.stage == "rate"]
        return sorted(
            (rate_point(self.store.rows([self.keys[cell]]), cell.lr) for cell in cells),
            key=lambda point: point.lr,
        )

    def best(self, contenders: Sequence[Contender]) -> dict[str, float]:
        """The rate of each method with the lowest loss on the validation rows."""
        found = {}
        for contender in contenders:
            whole = [point for point in self.rates(contender) if math.isfinite(point.nll)]
            if not whole:
                raise ValueError(
                    f"{contender.label} diverged at every rate that was tried; give a lower one "
                    "with --lr, or leave the method out"
                )
            found[contender.name] = min(whole, key=lambda point: point.nll).lr
        return found

    def _tried(
        self,
        contenders: Sequence[Contender],
        around: dict[str, float],
        factors: Sequence[float],
        bar: Progress,
    ) -> None:
        cells = [Cell(c, around[c.name] * f, 0, "rate") for c in contenders for f in factors]
        self._run(cells, bar)

    def _run(self, cells: Sequence[Cell], bar: Progress) -> None:
        """Run the cells that have not been run."""
        self.keys |= {cell: key_of(self.ground, cell) for cell in cells}
        task = bar.task_ids[0]
        waiting = [cell for cell in cells if self.store.summary(self.keys[cell]) is None]
        bar.advance(task, len(cells) - len(waiting))
        for cell in self._finished(waiting):
            bar.update(task, advance=1, what=f"{cell.contender.name} {cell.lr:.2g}")

    def _finished(self, waiting: list[Cell]) -> Iterator[Cell]:
        if waiting and not self.parallel:
            first = waiting.pop(0)
            self.parallel = at_once(self._run_here(first))
            yield first
        if self.parallel * len(gpus()) == 1 or len(waiting) < 2:
            for cell in waiting:
                self._run_here(cell)
                yield cell
            return
        yield from run_side_by_side(self.ground, self.store, waiting, self.parallel, self.energy)

    def _run_here(self, cell: Cell) -> dict[str, Any]:
        key = self.keys[cell]
        summary, rows = run_cell(self.ground, cell, key, 1, self.energy, self.store.beside(key))
        self.store.write(key, summary, rows)
        return summary


def rate_point(rows: pa.Table, lr: float) -> RatePoint:
    """A trial in two numbers: means over tasks of nats a token, and of the share of right rows."""
    sums = rows.group_by("task").aggregate([("nll", "sum"), ("tokens", "sum"), ("correct", "mean")])
    nll = pc.mean(pc.divide(sums["nll_sum"], pc.cast(sums["tokens_sum"], pa.float64())))
    return RatePoint(lr=lr, nll=nll.as_py(), correct=pc.mean(sums["correct_mean"]).as_py())


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
        console=console,
    )
