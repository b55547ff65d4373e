"""How a run was trained, step by step, from the metrics.jsonl that training leaves.

    what                unit                         of
    loss                nats per answer token        "", since the line before
    task_loss           nats per answer token        task, since the line before
    validation_loss     nats per answer token        "", the mean over tasks
    validation          nats per answer token        task
    learning_rate       1                            "", at that step
    grad_norm           before clipping              "", at that step
    branch_grad_norm    before clipping              part: "A", "branch 0", "router", ...
    tokens_per_second   1/s                          "", since the line before
    memory_gib          GiB                          "", the peak so far: GPU, else resident
    energy_kwh          kWh since the start          "cpu", "gpu", "ram"

The parts are those of `training/gradients.py`; there are none for a run that sharded its gradients
or was trained before they were logged. Energy is there where the recipe had it measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from manylora.inspect.frames import COLUMNS

FILE = "metrics.jsonl"
GIB = 2**30
_WHOLE = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second",
    "mean": "validation_loss",
}
_PARTS = {"validation": "validation", "grad_norms": "branch_grad_norm", "kwh": "energy_kwh"}

Observation = tuple[str, str, float]  # what, of, value


def training(run: str | Path) -> pd.DataFrame:
    """Columns run, step, what, of, value; a lost loss (not finite) is NaN.

    Raises FileNotFoundError where the folder has no metrics.jsonl, ValueError for a line that is
    not one that training writes.
    """
    folder = Path(run)
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; `manylora train` writes it: give the folder of a run"
        )
    name = folder.resolve().name
    rows: list[tuple[Any, ...]] = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            step = int(line["step"])
            rows += [(name, step, *found) for found in _observations(line)]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{file}:{number}: not a line that training writes ({error!r}); restore the file, "
                "or train again"
            ) from None
    return pd.DataFrame(rows, columns=list(COLUMNS["training"]))


def _observations(line: dict[str, Any]) -> Iterator[Observation]:
    for key, what in _WHOLE.items():
        if key in line:
            yield what, "", _number(line[key])
    for task, found in line.get("tasks", {}).items():
        yield "task_loss", task, _number(found["loss"])
    for key, what in _PARTS.items():
        for part, value in line.get(key, {}).items():
            yield what, part, _number(value)
    if "peak_memory_bytes" in line:
        yield "memory_gib", "", _number(line["peak_memory_bytes"]) / GIB


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
