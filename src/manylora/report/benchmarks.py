"""The part of a run's page about its benchmarks: a table, and a dot plot for each metric."""

from __future__ import annotations

from dataclasses import dataclass

from manylora.evaluate.harness.table import Line, benchmark_lines
from manylora.report.files import Benchmarks, Interval
from manylora.report.plots import DotPlot, dot_plot


@dataclass(frozen=True, slots=True)
class BenchmarkPlot:
    """One metric over the benchmarks that have it; verdicts: against the base model."""

    name: str
    title: str
    direction: str
    verdicts: dict[str, str]
    plot: DotPlot


@dataclass(frozen=True, slots=True)
class BenchmarkView:
    """compared: the base model was measured for some of it. harness: lm-eval's version."""

    lines: list[Line]
    plots: list[BenchmarkPlot]
    compared: bool
    harness: str


def benchmark_view(found: Benchmarks) -> BenchmarkView:
    """What the page shows of benchmarks.json: groups, and tasks that are in no large one."""
    lines = benchmark_lines(found.model_dump(exclude_none=True))
    return BenchmarkView(
        lines,
        [_plot(metric, lines) for metric in dict.fromkeys(line.metric for line in lines)],
        any(line.base is not None for line in lines),
        found.versions.get("lm_eval", ""),
    )


def _plot(metric: str, lines: list[Line]) -> BenchmarkPlot:
    shown = {
        f"{line.benchmark}, {line.shots}-shot": line
        for line in lines
        if line.metric == metric and line.tasks is None
    }
    rows: list[tuple[str, Interval | None, Interval | None]] = [
        (name, _interval(line.base), _interval(line.score)) for name, line in shown.items()
    ]
    verdicts = {name: line.verdict for name, line in shown.items()}
    lower = any(line.lower_is_better for line in shown.values())
    direction = "lower is better" if lower else "higher is better"
    return BenchmarkPlot(f"benchmarks_{metric}", metric, direction, verdicts, dot_plot(rows))


def _interval(found: list[float] | None) -> Interval | None:
    return None if found is None else (found[0], found[1], found[2])
