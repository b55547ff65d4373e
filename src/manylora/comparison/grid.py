"""The cells of a comparison, in the order in which they can be run.

    three rates a factor of 4 apart, seed 0, scored on validation rows
    the two rates a factor of 2 beside the best of the three
    if asked for: two more beyond the lowest or the highest, where that is the best of the five
    the best of these with every seed, scored on held-out rows

Every method gets its trials by the same rule. Cells that are finished are not run again; the others
run side by side where the memory allows it.
"""

from __future__ import annotations

import math
from collections import Counter, deque
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
from manylora.comparison.side_by_side import SideBySide, at_once, gpus
from manylora.comparison.store import CellStore, key_of

FIRST, BESIDE = (0.25, 1.0, 4.0), (0.5, 2.0)
BELOW, ABOVE = (0.5, 0.25), (2.0, 4.0)


@dataclass
class Grid:
    """Runs cells and keeps them.

    parallel: runs side by side on a GPU; 0 finds out from the memory that the first one took.
    energy: whether that of each is measured. wider: whether a method whose best rate is the lowest
    or the highest of its trials gets two more beyond. keys: of the cells that were asked for, in
    the grid's order.
    """

    ground: Ground
    store: CellStore
    console: Console
    parallel: int = 0
    energy: bool = False
    wider: bool = False
    keys: dict[Cell, str] = field(default_factory=dict)

    def run(
        self, contenders: Sequence[Contender], seeds: int, rate: float | None
    ) -> dict[str, float]:
        """Every cell of the comparison; returns each method's rate.

        A method's next cells wait for its own alone, so that no process waits for a slower method.
        """
        trials = 0 if rate is not None else len(FIRST) + len(BESIDE)
        with _progress(self.console) as bar:
            task = bar.add_task("runs", total=len(contenders) * (trials + seeds), what="")
            steps = {c.name: self._steps(c, seeds, rate, bar) for c in contenders}
            waiting = deque(cell for own in steps.values() for cell in self._next(own, bar))
            left = Counter(cell.contender.name for cell in waiting)
            for cell in self._finished(waiting):
                name = cell.contender.name
                bar.update(task, advance=1, what=f"{name} {cell.lr:.2g}")
                left[name] -= 1
                if not left[name]:
                    waiting.extend(following := self._next(steps[name], bar))
                    left[name] = len(following)
        self.keys = {cell: self.keys[cell] for c in contenders for cell in self._of(c)}
        return {c.name: self.best(c) if rate is None else rate for c in contenders}

    def rates(self, contender: Contender) -> list[RatePoint]:
        """The trials of a method, lowest rate first."""
        cells = [cell for cell in self._of(contender) if cell.stage == "rate"]
        return sorted(
            (rate_point(self.store.rows([self.keys[cell]]), cell.lr) for cell in cells),
            key=lambda point: point.lr,
        )

    def best(self, contender: Contender) -> float:
        """The rate of a method with the lowest loss on the validation rows."""
        whole = [point for point in self.rates(contender) if math.isfinite(point.nll)]
        if not whole:
            raise ValueError(
                f"{contender.label} diverged at every rate that was tried; give a lower one "
                "with --lr, or leave the method out"
            )
        return min(whole, key=lambda point: point.nll).lr

    def _of(self, contender: Contender) -> list[Cell]:
        return [cell for cell in self.keys if cell.contender is contender]

    def _steps(
        self, contender: Contender, seeds: int, rate: float | None, bar: Progress
    ) -> Iterator[list[Cell]]:
        """A method's cells; those of a list are known when the ones before are finished."""
        if rate is None:
            for factors in (FIRST, BESIDE):
                around = self.best(contender) if factors is BESIDE else contender.centre_lr
                yield [Cell(contender, around * factor, 0, "rate") for factor in factors]
            rate = self.best(contender)
            beyond = self._beyond(contender, rate) if self.wider else ()
            bar.update(bar.task_ids[0], total=(bar.tasks[0].total or 0) + len(beyond))
            yield [Cell(contender, rate * factor, 0, "rate") for factor in beyond]
            rate = self.best(contender)
        yield [Cell(contender, rate, seed, "test") for seed in range(seeds)]

    def _beyond(self, contender: Contender, rate: float) -> tuple[float, ...]:
        first, *_, last = (point.lr for point in self.rates(contender))
        return {first: BELOW, last: ABOVE}.get(rate, ())

    def _next(self, steps: Iterator[list[Cell]], bar: Progress) -> list[Cell]:
        """A method's next cells that have not been run; none when all have been."""
        for cells in steps:
            self.keys |= {cell: key_of(self.ground, cell) for cell in cells}
            missing = [cell for cell in cells if self.store.summary(self.keys[cell]) is None]
            bar.advance(bar.task_ids[0], len(cells) - len(missing))
            if missing:
                return missing
        return []

    def _finished(self, waiting: deque[Cell]) -> Iterator[Cell]:
        """Runs what waits, also what comes to wait while it does; yields each when finished."""
        if waiting and not self.parallel:
            cell = waiting.popleft()
            self.parallel = at_once(self._run_here(cell))
            yield cell
        while waiting and (self.parallel * len(gpus()) == 1 or len(waiting) == 1):
            cell = waiting.popleft()
            self._run_here(cell)
            yield cell
        if not waiting:
            return
        with SideBySide(self.ground, self.store, self.parallel, self.energy) as processes:
            while waiting or processes.running:
                while waiting and processes.free:
                    processes.start(waiting.popleft())
                yield from processes.finished()

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
