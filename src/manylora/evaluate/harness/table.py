"""Benchmark results as lines: what the terminal prints and the run's page shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from manylora.evaluate.scores import Interval

MANY = 10
"""Tasks of a group that are shown one by one; of more, the group alone."""


@dataclass(frozen=True, slots=True)
class Line:
    """One metric of a benchmark. base, difference: of the model without its adapter, if measured.

    difference: score less base, paired example by example; 95 % intervals all.
    """

    benchmark: str
    documents: int
    whole: int | None
    """Documents of the whole benchmark, where these are fewer."""
    shots: str
    metric: str
    tasks: int | None
    """The mean of so many tasks' scores; else over all examples."""
    lower_is_better: bool
    score: Interval
    base: Interval | None
    difference: Interval | None

    @property
    def title(self) -> str:
        return self.metric if self.tasks is None else f"{self.metric}, mean of {self.tasks} tasks"

    @property
    def verdict(self) -> str:
        """ "better" or "worse" than the base model where the difference's interval is beyond 0."""
        if self.difference is None:
            return ""
        _, low, high = self.difference
        above, below = ("worse", "better") if self.lower_is_better else ("better", "worse")
        return above if low > 0 else below if high < 0 else ""


def benchmark_lines(results: Mapping[str, Any]) -> list[Line]:
    """One line for each metric of each group, and of each task that is not in a large one."""
    hidden = {
        name
        for entry in results["groups"].values()
        for name in entry["tasks"]
        if len(entry["tasks"]) > MANY
    }
    groups = list(results["groups"].values())
    tasks = [entry for entry in results["tasks"].values() if entry["name"] not in hidden]
    return [line for entry in [*groups, *tasks] for line in _lines(entry)]


def _lines(entry: Mapping[str, Any]) -> Iterator[Line]:
    official = entry.get("official_documents")
    shots = entry["shots"]
    for part in ("metrics", "mean_of_tasks"):
        for name, found in entry.get(part, {}).items():
            yield Line(
                benchmark=entry["name"],
                documents=entry["n"],
                whole=official,
                shots="–".join(map(str, shots)) if isinstance(shots, list) else str(shots),
                metric=name,
                tasks=len(entry["tasks"]) if part == "mean_of_tasks" else None,
                lower_is_better=name in entry.get("lower_is_better", []),
                score=found,
                base=entry.get("base", {}).get(part, {}).get(name),
                difference=entry.get("difference", {}).get(part, {}).get(name),
            )


PLAIN = ("benchmark", "documents", "shots", "metric", "score", "95 % interval")
COMPARED = ("benchmark", "n", "metric", "score", "base", "difference", "95 % interval", "")
LEFT = ("benchmark", "metric", "")


def print_benchmarks(results: Mapping[str, Any], console: Console) -> None:
    """The lines as a table; with the base model, the interval is that of the difference."""
    lines = benchmark_lines(results)
    compared = any(line.base for line in lines)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in COMPARED if compared else PLAIN:
        words = heading in ("benchmark", "metric")
        justify: Any = "left" if heading in LEFT else "right"
        table.add_column(heading, justify=justify, no_wrap=not words, overflow="fold")
    before = None
    for line in lines:
        head, cells = (_compared if compared else _plain)(line)
        table.add_row(*(head if head != before else [""] * len(head)), *cells)
        before = head
    console.print(table)


def _plain(line: Line) -> tuple[list[str], list[str]]:
    cells = [line.title, f"{line.score[0]:.3f}", _bounds(line.score)]
    return [line.benchmark, f"{line.documents:,}", line.shots], cells


def _compared(line: Line) -> tuple[list[str], list[str]]:
    head, cells = [f"{line.benchmark} {line.shots}-shot", f"{line.documents:,}"], [line.title]
    cells.append(f"{line.score[0]:.3f}")
    if line.base and line.difference:
        cells += [f"{line.base[0]:.3f}", f"{line.difference[0]:+.3f}"]
        cells += [_bounds(line.difference, "+"), line.verdict]
    return head, cells


def _bounds(interval: Interval, sign: str = "") -> str:
    return f"{interval[1]:{sign}.3f} to {interval[2]:{sign}.3f}"
