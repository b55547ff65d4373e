"""The report of a run: one self-contained HTML page, pictures first, its data one click away.

The page needs no network, no script and no font of its own, follows the reader's light or dark
setting, and refuses by its own Content-Security-Policy to load anything from elsewhere. Whatever
comes from the run (task names above all) is escaped by jinja2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora.evaluate.table import LOWER_IS_BETTER, METRIC_TITLES, verdict
from manylora.inspect.gather import from_files
from manylora.report.benchmarks import benchmark_view
from manylora.report.files import LoggedStep, RunFiles, Scores, Summary, ValidationStep, read_run
from manylora.report.inspection import InspectionView, inspection_view
from manylora.report.plots import (
    Axis,
    DotPlot,
    LinePlot,
    Point,
    csv_link,
    dot_plot,
    line_plot,
    number,
    points_a_bin,
    thin,
)
from manylora.report.render import render

PAGE_FILE = "report.html"
# What the page draws from metrics.jsonl itself.
SHOWN = frozenset({"loss", "task_loss", "learning_rate", "tokens_per_second", "validation_loss"})


def write_report(run: Path) -> Path:
    """Write run/report.html from the run folder's files and return its path."""
    files = read_run(run)
    inside = inspection_view(from_files(run), SHOWN)
    page = render(
        "report.html.j2",
        toc=contents(files, inside),
        inside=inside,
        score=number,
        summary=files.summary,
        facts=facts(files.summary, len(files.scores.tasks)),
        scores=files.scores,
        metrics=metric_views(files.scores),
        training=training_view(files.steps, files.validation),
        benchmarks=benchmark_view(files.benchmarks) if files.benchmarks else None,
        exports=files.exports,
        recipe=files.recipe,
    )
    path = run / PAGE_FILE
    path.write_text(page, encoding="utf-8")
    return path


def contents(files: RunFiles, inside: InspectionView) -> list[tuple[str, str]]:
    """(id, title) of the page's sections."""
    found = [("findings", "What stands out")] if inside.findings else []
    found.append(("scores", "Scores"))
    if files.benchmarks:
        found.append(("benchmarks", "Benchmarks"))
    found.append(("training", "Training"))
    if files.summary.mixture:
        found.append(("mixture", "Data mixture"))
    found += inside.entries()
    if files.exports:
        found.append(("exports", "Exports"))
    found.append(("recipe", "How to repeat it"))
    return [*found, *([("missing", "Not shown")] if inside.missing else [])]


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
