"""Scores as a table in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from manylora.evaluate.scores import SCORES_FILE

METRIC_TITLES = {
    "nll": "NLL, nats/token",
    "exact_match": "exact match",
    "choice_accuracy": "choice accuracy",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU, 0 to 1",
    "pass@1": "pass@1",
    "pass@10": "pass@10",
}
LOWER_IS_BETTER = {"nll"}
HEADINGS: dict[str, Literal["left", "right"]] = {
    "task": "left",
    "rows": "right",
    "metric": "left",
    "before": "right",
    "after": "right",
    "95 % interval": "right",
    "": "left",
}


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
    """One line for each task and metric: before, after, and the interval after.

    better, worse: the whole interval lies beyond the score before. Below it, that rows carry tests
    which were not run.
    """
    scores = json.loads((run / SCORES_FILE).read_text(encoding="utf-8"))["tasks"]
    if not scores:
        console.print("no task was scored")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading, justify in HEADINGS.items():
        # A cluster's name may be as wide as a terminal; numbers are not cut for it.
        table.add_column(heading, justify=justify, no_wrap=heading != "task", overflow="fold")
    for name, task in scores.items():
        for metric in [metric for metric in METRIC_TITLES if metric in task["after"]]:
            before, after = task["before"][metric], task["after"][metric]
            first = metric == next(iter(task["after"]))
            table.add_row(
                name if first else "",
                str(task["n"]) if first else "",
                METRIC_TITLES[metric],
                f"{before[0]:.2f}",
                f"{after[0]:.2f}",
                f"{after[1]:.2f} to {after[2]:.2f}",
                verdict(metric, before, after),
            )
    console.print(table)
    tested = {name: task["tests"] for name, task in scores.items() if _unrun(task)}
    if tested:
        console.print(
            f"{', '.join(tested)}: {sum(tested.values())} held-out rows carry tests; `manylora "
            f"eval {run} --allow-code` runs the programs that the model writes against them, "
            "for pass@k",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _unrun(task: Mapping[str, Any]) -> bool:
    """Whether it has tests enough for an interval, and no program was run against them."""
    return task.get("tests", 0) > 1 and "pass@1" not in task["after"]
