"""The report of a run: one self-contained HTML page, pictures first, its data one click away.

The page needs no network, no script and no font of its own, follows the reader's light or dark
setting, and refuses by its own Content-Security-Policy to load anything from elsewhere. Whatever
comes from the run (task names above all) is escaped by jinja2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

from manylora.evaluate.table import LOWER_IS_BETTER, METRIC_TITLES, verdict
from manylora.report.benchmarks import benchmark_view
from manylora.report.files import LoggedStep, Routing, Scores, Summary, ValidationStep, read_run
from manylora.report.plots import (
    Axis,
    DotPlot,
    LinePlot,
    Point,
    Strip,
    csv_link,
    dot_plot,
    heat_strips,
    line_plot,
    number,
    points_a_bin,
    thin,
)
from manylora.report.render import render

PAGE_FILE = "report.html"


def write_report(run: Path) -> Path:
    """Write run/report.html from the run folder's files and return its path."""
    files = read_run(run)
    page = render(
        "report.html.j2",
        score=number,
        summary=files.summary,
        facts=facts(files.summary, len(files.scores.tasks)),
        scores=files.scores,
        metrics=metric_views(files.scores),
        training=training_view(files.steps, files.validation),
        benchmarks=benchmark_view(files.benchmarks) if files.benchmarks else None,
        routing=routing_view(files.routing) if files.routing else None,
        exports=files.exports,
        recipe=files.recipe,
    )
    path = run / PAGE_FILE
    path.write_text(page, encoding="utf-8")
    return path


@dataclass(frozen=True, slots=True)
class MetricView:
    """One metric over the tasks that have it."""

    name: str
    title: str
    direction: str
    verdicts: dict[str, str]
    counts: Counter[str]
    plot: DotPlot


def metric_views(scores: Scores) -> list[MetricView]:
    """Every metric that some task has, the known ones first and in their fixed order."""
    found = {m for task in scores.tasks.values() for m in (*task.before, *task.after)}
    known = [metric for metric in METRIC_TITLES if metric in found]
    views = []
    for metric in known + sorted(found - set(known)):
        rows = [
            (name, task.before.get(metric), task.after.get(metric))
            for name, task in scores.tasks.items()
            if metric in task.before or metric in task.after
        ]
        verdicts = {name: verdict(metric, before, after) for name, before, after in rows}
        direction = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
        views.append(
            MetricView(
                metric,
                METRIC_TITLES.get(metric, metric),
                direction,
                verdicts,
                Counter(verdicts.values()),
                dot_plot(rows),
            )
        )
    return views


@dataclass(frozen=True, slots=True)
class TrainingView:
    """Loss, learning rate and throughput over steps."""

    loss: LinePlot
    learning_rate: LinePlot
    throughput: LinePlot
    csv: str
    bin: int
    validated: bool
    tasks: list[LinePlot]
    task_csv: str
    task_bin: int


def training_view(
    steps: Sequence[LoggedStep], validation: Sequence[ValidationStep] = ()
) -> TrainingView | None:
    """The training plots, or None when no step was logged."""
    if not steps:
        return None
    last = steps[-1].step
    size = points_a_bin(len(steps))
    total = thin([(s.step, s.loss) for s in steps], size)
    rates = thin([(s.step, s.learning_rate) for s in steps], size)
    pace = thin([(s.step, s.tokens_per_second) for s in steps], size)
    apart = [(float(v.step), v.mean) for v in validation]
    loss_y = Axis.over(value for _, value in [*total, *apart])
    rate_y, pace_y = (Axis.over((v for _, v in line), zero=True) for line in (rates, pace))
    panels, task_csv, task_bin = _task_panels(steps, validation)
    return TrainingView(
        loss=line_plot("total loss", [("line", total), ("dashed", apart)], loss_y, last),
        learning_rate=line_plot("learning rate", [("line", rates)], rate_y, last, height=140),
        throughput=line_plot("tokens per second", [("line", pace)], pace_y, last, height=140),
        csv=csv_link(
            ["step", "loss", "learning_rate", "tokens_per_second"], _columns(total, rates, pace)
        ),
        bin=size,
        validated=bool(validation),
        tasks=panels,
        task_csv=task_csv,
        task_bin=task_bin,
    )


def _columns(*lines: Sequence[Point]) -> list[tuple[float, ...]]:
    return [(points[0][0], *(value for _, value in points)) for points in zip(*lines, strict=True)]


def _task_panels(
    steps: Sequence[LoggedStep], validation: Sequence[ValidationStep]
) -> tuple[list[LinePlot], str, int]:
    """A small plot per task, the total in grey behind it, all on one scale; their CSV and bin."""
    names = sorted({name for step in steps for name in step.tasks})
    size = points_a_bin(len(steps), len(names))
    total = thin([(s.step, s.loss) for s in steps], size)
    lines = {
        name: thin([(s.step, s.tasks[name].loss) for s in steps if name in s.tasks], size)
        for name in names
    }
    apart = {
        name: [(float(v.step), v.validation[name]) for v in validation if name in v.validation]
        for name in names
    }
    every = [total, *lines.values(), *apart.values()]
    y = Axis.over((v for line in every for _, v in line), bins=3)
    panels = []
    for name, line in lines.items():
        drawn = [("total", total), ("line", line), ("dashed", apart[name])]
        panels.append(line_plot(name, drawn, y, steps[-1].step, 100, x_bins=2))
    rows = [(name, x, value) for name, line in lines.items() for x, value in line]
    return panels, csv_link(["task", "step", "loss"], rows), size


@dataclass(frozen=True, slots=True)
class RoutingRow:
    """Mean weights of one task or layer, and their entropy over log N (1: all branches alike)."""

    name: str
    weights: list[float]
    entropy: float


@dataclass(frozen=True, slots=True)
class RoutingView:
    """Who uses which branch."""

    branches: int
    tasks: list[RoutingRow]
    layers: list[RoutingRow]
    strips: list[Strip]
    largest: float
    largest_of_layers: float
    task_csv: str
    layer_csv: str


def routing_view(routing: Routing) -> RoutingView:
    """The mean over layers for each task, and the mean over tasks for each layer."""
    tasks = [_routing_row(name, layers) for name, layers in routing.tasks.items()]
    by_layer = zip(*routing.tasks.values(), strict=True)
    layers = [
        _routing_row(name, list(rows)) for name, rows in zip(routing.layers, by_layer, strict=True)
    ]
    branch_names = [f"branch_{i}" for i in range(routing.branches)]

    def table(first: str, rows: Sequence[RoutingRow]) -> str:
        cells = [[row.name, *row.weights, row.entropy] for row in rows]
        return csv_link([first, *branch_names, "entropy"], cells)

    return RoutingView(
        branches=routing.branches,
        tasks=tasks,
        layers=layers,
        strips=heat_strips(routing.layers, [row.weights for row in layers]),
        largest=max((w for row in tasks for w in row.weights), default=0.0) or 1.0,
        largest_of_layers=max((w for row in layers for w in row.weights), default=0.0),
        task_csv=table("task", tasks),
        layer_csv=table("layer", layers),
    )


def _routing_row(name: str, rows: Sequence[Sequence[float]]) -> RoutingRow:
    weights = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    nats = sum(w * log(1 / w) for w in weights if w > 0)
    return RoutingRow(name, weights, nats / log(len(weights)) if len(weights) > 1 else 0.0)


def facts(summary: Summary, tasks: int) -> list[tuple[str, str]]:
    """The run in a dozen numbers: (what, value)."""
    share = summary.trainable_parameters / summary.total_parameters
    return [
        ("tasks", str(tasks)),
        ("trainable parameters", f"{summary.trainable_parameters:,} ({share:.2%})"),
        ("all parameters", f"{summary.total_parameters:,}"),
        ("training examples", f"{summary.train_rows:,}"),
        ("training tokens", f"{summary.train_tokens:,}"),
        ("steps", f"{summary.steps:,}"),
        ("training time", duration(summary.train_seconds)),
        ("evaluation time", duration(summary.evaluate_seconds)),
        ("peak memory", f"{summary.peak_memory_bytes / 2**30:.2f} GiB"),
        ("device", summary.device),
    ]


def duration(seconds: float) -> str:
    """Seconds as a reader says them: 48 s, 12 min 5 s, 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
