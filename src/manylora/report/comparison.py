"""The page of a comparison: the verdict, the methods, differences, tasks, rates and sizes.

Made as the report of a run is: self-contained, without scripts, all text from the data escaped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from manylora.comparison.result import Comparison, Interval
from manylora.comparison.tables import (
    difference_rows,
    energy,
    headline,
    how,
    memory,
    rate,
    score_of,
    setting_rows,
    spent,
)
from manylora.comparison.verdict import better, share_of_budget
from manylora.report.comparison_plots import MethodPlot, method_plot, rate_plots, size_plot
from manylora.report.plots import csv_link
from manylora.report.render import render


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is named and printed: times `scale`, with `digits` decimals."""

    name: str
    title: str
    direction: str
    scale: float
    digits: int

    def scaled(self, value: Interval) -> Interval:
        mean, low, high = (self.scale * part for part in value)
        return mean, low, high

    def cell(self, value: Interval) -> tuple[str, str]:
        """The mean, and the bounds that stand below it."""
        mean, low, high = (f"{part:.{self.digits}f}" for part in self.scaled(value))
        return mean, f"{low}–{high}"


METRICS = [
    Metric("nll", "nll", "nats a token; lower is better", 1, 3),
    Metric("correct", "correct", "percent of answers; higher is better", 100, 1),
]


def write_comparison_page(found: Comparison, path: Path) -> Path:
    """Write the page to `path` and return it."""
    page = render(
        "comparison.html.j2",
        found=found,
        title=headline(found),
        facts=facts(found),
        methods=method_views(found),
        energy_parts=energy_parts(found),
        methods_csv=methods_csv(found),
        overall=[overall_plot(found, metric) for metric in METRICS] if found.scores else [],
        apart=[plot for m in METRICS if (plot := difference_plot(found, m)) is not None],
        difference_rows=difference_rows(found),
        differences_csv=differences_csv(found),
        tasks=[(metric, task_plots(found, metric)) for metric in METRICS],
        task_rows=task_rows(found),
        tasks_csv=tasks_csv(found),
        rates=rate_plots(found.methods),
        size=size_view(found),
        settings=setting_rows(found),
        how=how(found),
    )
    path.write_text(page, encoding="utf-8")
    return path


def facts(found: Comparison) -> list[tuple[str, str]]:
    """The comparison in a few numbers: (what, value)."""
    tasks = found.scores[0].tasks if found.scores else []
    said = [
        ("budget", f"{found.budget_params:,} parameters"),
        ("reference", found.reference),
        ("tasks", f"{len(tasks):,}"),
        ("held-out examples", f"{sum(task.n for task in tasks):,}"),
        ("seeds", f"{found.seeds:,}"),
    ]
    trials = {len(method.rates) for method in found.methods}
    if trials != {0}:
        least, most = min(trials), max(trials)
        each = f"{most}" if least == most else f"{least} to {most}"
        said.append(("rates tried a method", each))
    return [*said, ("device", found.device)]


@dataclass(frozen=True, slots=True)
class MethodView:
    """A method as its table row shows it."""

    name: str
    label: str
    note: str
    params: str
    share: str
    rate: str
    scores: list[tuple[str, str]]
    seconds: str
    energy: str
    parts: list[str]
    memory: str


def method_views(found: Comparison) -> list[MethodView]:
    """The methods in the order that they were given."""
    views = []
    for info in found.methods:
        score = score_of(found, info.name)
        parts = info.energy_kwh or {}
        views.append(
            MethodView(
                info.name,
                info.label,
                info.note,
                f"{info.params:,}",
                share_of_budget(info.budget_share),
                rate(info),
                [m.cell(getattr(score, m.name)) if score else ("–", "") for m in METRICS],
                spent(info.seconds),
                energy(info),
                [f"{parts[p]:.3g}" if p in parts else "–" for p in energy_parts(found)],
                memory(info.peak_memory_bytes),
            )
        )
    return views


def energy_parts(found: Comparison) -> list[str]:
    """What energy was taken of, in the order of the first method that has it."""
    return list(dict.fromkeys(part for m in found.methods for part in m.energy_kwh or {}))


def methods_csv(found: Comparison) -> str:
    """The table of methods as a data: address."""
    parts = energy_parts(found)
    header = ["method", "label", "params", "budget_share", "best_lr", "at_edge", "seconds"]
    rows = [
        [
            *(m.name, m.label, m.params, m.budget_share, m.best_lr, m.at_edge, m.seconds),
            m.peak_memory_bytes,
            *((m.energy_kwh or {}).get(part) for part in parts),
        ]
        for m in found.methods
    ]
    return csv_link([*header, "peak_memory_bytes", *(f"kwh_{part}" for part in parts)], rows)


def overall_plot(found: Comparison, metric: Metric) -> MethodPlot:
    """Each method over all tasks; the dashed line is the reference's mean."""
    rows = {s.method: metric.scaled(getattr(s, metric.name)) for s in found.scores}
    return _scores_plot(found, metric, metric.title, metric.direction, rows)


def task_plots(found: Comparison, metric: Metric) -> list[MethodPlot]:
    """One plot a task, each on its own axis."""
    return [
        _scores_plot(
            found,
            metric,
            task.task,
            f"{task.n:,} examples",
            {s.method: metric.scaled(getattr(s.tasks[t], metric.name)) for s in found.scores},
        )
        for t, task in enumerate(found.scores[0].tasks if found.scores else [])
    ]


def _scores_plot(
    found: Comparison,
    metric: Metric,
    title: str,
    note: str,
    rows: dict[str, Interval],
) -> MethodPlot:
    guide = rows[found.reference][0] if found.reference in rows else None
    styled = [(name, _style(found, name), value) for name, value in rows.items()]
    return method_plot(title, note, styled, guide, metric.digits)


def _style(found: Comparison, method: str) -> str:
    return "before" if method == found.reference else "after"


def difference_plot(found: Comparison, metric: Metric) -> MethodPlot | None:
    """Each method less the reference around a line at zero; None where there is no other."""
    differences = [d for d in found.differences if d.metric == metric.name]
    if not differences:
        return None
    rows = []
    for d in differences:
        style = ("better" if better(d) else "worse") if d.separates else "soft"
        rows.append((d.method, style, metric.scaled(d.value)))
    unit = "nats a token; left is better" if metric.name == "nll" else "points; right is better"
    title = f"{metric.title} less that of {found.reference}"
    return method_plot(title, unit, rows, 0.0, metric.digits)


def differences_csv(found: Comparison) -> str:
    """All differences as a data: address, those over all tasks with an empty task."""
    rows = []
    for d in found.differences:
        rows.append([d.method, d.reference, d.metric, "", *d.value, d.separates])
        rows += [[d.method, d.reference, d.metric, t.task, *t.value, ""] for t in d.tasks]
    header = ["method", "reference", "metric", "task", "mean", "low", "high", "separates"]
    return csv_link(header, rows)


@dataclass(frozen=True, slots=True)
class TaskCell:
    """A method's nll on a task; verdict: against the reference, by its own interval."""

    mean: str
    bounds: str
    verdict: str


def task_rows(found: Comparison) -> list[tuple[str, int, list[TaskCell]]]:
    """(task, examples, a cell for each method) of nll."""
    signs = {
        (d.method, t.task): ("better" if t.value[2] < 0 else "worse" if t.value[1] > 0 else "")
        for d in found.differences
        if d.metric == "nll"
        for t in d.tasks
    }

    def cell(method: str, task: str, value: Interval) -> TaskCell:
        return TaskCell(*METRICS[0].cell(value), signs.get((method, task), ""))

    return [
        (task.task, task.n, [cell(s.method, task.task, s.tasks[t].nll) for s in found.scores])
        for t, task in enumerate(found.scores[0].tasks if found.scores else [])
    ]


def tasks_csv(found: Comparison) -> str:
    """Every method's scores by task as a data: address, those over all tasks with an empty task."""
    rows: list[list[object]] = []
    for s in found.scores:
        rows.append([s.method, "", "", *s.nll, *s.correct])
        rows += [[s.method, t.task, t.n, *t.nll, *t.correct] for t in s.tasks]
    bounds = [f"{m.name}_{part}" for m in METRICS for part in ("mean", "low", "high")]
    return csv_link(["method", "task", "n", *bounds], rows)


def size_view(found: Comparison) -> object:
    """nll over trained parameters; None before the first score."""
    rows = [
        (info.name, _style(found, info.name), info.params, score.nll)
        for info in found.methods
        if (score := score_of(found, info.name)) is not None
    ]
    return size_plot(rows, found.budget_params) if rows else None
