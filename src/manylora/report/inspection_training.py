"""Training over steps, of one run or of several: loss, rate, gradients, pace, memory, energy."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from manylora.inspect.frames import Inspection
from manylora.report.curves import Curve, CurvePlot, curve_plot
from manylora.report.plots import points_a_bin, thin
from manylora.report.tables import frame_csv, in_order


@dataclass(frozen=True, slots=True)
class Quantity:
    """One `what` of the table of training: its title and its unit."""

    what: str
    title: str
    unit: str
    log: bool = False


QUANTITIES = (
    Quantity("loss", "Loss", "nats a token of the answers"),
    Quantity("validation_loss", "Validation loss", "nats a token, mean over tasks"),
    Quantity("learning_rate", "Learning rate", "at that step"),
    Quantity("grad_norm", "Gradient norm", "before clipping, logarithmic", log=True),
    Quantity("branch_grad_norm", "Gradient norm by part", "before clipping, logarithmic", log=True),
    Quantity("tokens_per_second", "Throughput", "tokens a second"),
    Quantity("memory_gib", "Memory", "GiB, peak so far"),
    Quantity("energy_kwh", "Energy", "kWh so far"),
)


@dataclass(frozen=True, slots=True)
class TrainingView:
    """The section: plots over the steps; tasks: one plot a task; bin: logged steps a point."""

    plots: list[CurvePlot]
    tasks: list[CurvePlot]
    bin: int
    csv: str


def inspected_training(
    found: Inspection, shown: frozenset[str] = frozenset()
) -> TrainingView | None:
    """The section, or None without logged steps; shown: what the page has elsewhere."""
    training = found.frame("training")
    if training is None:
        return None
    size = points_a_bin(int(training.groupby(["run", "what", "of"]).size().max()))
    plots = []
    for quantity in QUANTITIES:
        rows = training[(training["what"] == quantity.what)]
        if quantity.what not in shown and not rows.empty:
            plots += _plots(rows, quantity, found.runs, size)
    tasks = [] if "task_loss" in shown else _task_plots(training, found.runs, size)
    return TrainingView(plots, tasks, size, frame_csv(training))


def _plots(rows: pd.DataFrame, quantity: Quantity, runs: list[str], size: int) -> list[CurvePlot]:
    """All runs in one plot; of what has parts (branches), one plot a run."""
    parts = in_order(rows["of"].astype(str))
    if len(parts) == 1:
        curves = [
            Curve(run, place, _line(rows[rows["run"] == run], size))
            for place, run in enumerate(runs)
            if run in set(rows["run"])
        ]
        return [_plot(quantity.title, quantity, curves)]
    found = []
    for run in in_order(rows["run"]):
        of_run = rows[rows["run"] == run]
        curves = [
            Curve(part, place, _line(of_run[of_run["of"].astype(str) == part], size))
            for place, part in enumerate(in_order(of_run["of"].astype(str)))
        ]
        title = quantity.title if len(runs) == 1 else f"{quantity.title}: {run}"
        found.append(_plot(title, quantity, curves))
    return found


def _plot(title: str, quantity: Quantity, curves: list[Curve]) -> CurvePlot:
    return curve_plot(
        title, quantity.unit, curves, "step", quantity.log, height=160, zero=not quantity.log
    )


def _task_plots(training: pd.DataFrame, runs: list[str], size: int) -> list[CurvePlot]:
    rows = training[training["what"] == "task_loss"]
    plots = []
    for task in in_order(rows["of"].astype(str)):
        of_task = rows[rows["of"].astype(str) == task]
        curves = [
            Curve(run, place, _line(of_task[of_task["run"] == run], size))
            for place, run in enumerate(runs)
            if run in set(of_task["run"])
        ]
        plots.append(curve_plot(task, "loss, nats a token", curves, "step", height=120))
    return plots


def _line(rows: pd.DataFrame, size: int) -> list[tuple[float, float]]:
    points = [(float(s), float(v)) for s, v in zip(rows["step"], rows["value"], strict=True)]
    return thin(points, size)
