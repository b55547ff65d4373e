"""Scores as a table in the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from manylora.evaluate.scores import SCORES_FILE

METRIC_TITLES = {
    "nll": "answer loss (nats per token)",
    "exact_match": "exact match",
    "choice_accuracy": "choice accuracy",
    "token_f1": "token F1",
}
LOWER_IS_BETTER = {"nll"}


def verdict(metric: str, before: Sequence[float] | None, after: Sequence[float] | None) -> str:
    """ "better" or "worse" when the whole after-interval lies beyond the before mean, else ""."""
    if before is None or after is None:
        return ""
    mean, (_, low, high) = before[0], after
    above, below = low > mean, high < mean
    if metric in LOWER_IS_BETTER:
        above, below = below, above
    return "better" if above else "worse" if below else ""


def print_scores(run: Path, console: Console) -> None:
    """One line a task: each metric before -> after, with the 95 % interval; * where it is better.

    Better means that the whole interval lies on the better side of the score before.
    """
    scores = json.loads((run / SCORES_FILE).read_text(encoding="utf-8"))["tasks"]
    if not scores:
        console.print("no task was scored")
        return
    used = [m for m in METRIC_TITLES if any(m in task["after"] for task in scores.values())]
    table = Table(
        caption="before -> after [95 % interval]; * the interval lies wholly beyond "
        "the score before"
    )
    table.add_column("task")
    table.add_column("n", justify="right")
    for metric in used:
        table.add_column(METRIC_TITLES[metric])
    for name, task in scores.items():
        table.add_row(name, str(task["n"]), *(_cell(task, metric) for metric in used))
    console.print(table)


def _cell(task: dict[str, Any], metric: str) -> str:
    if metric not in task["after"]:
        return ""
    before, after = task["before"][metric], task["after"][metric]
    mark = {"better": " *", "worse": " !", "": ""}[verdict(metric, before, after)]
    return f"{before[0]:.2f} -> {after[0]:.2f} \\[{after[1]:.2f}, {after[2]:.2f}]{mark}"
