"""What a comparison says, in the terms of `comparison.json`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

COMPARISON_FILE = "comparison.json"
ROWS_FILE = "rows.parquet"
FORMAT = 1

Interval = tuple[float, float, float]  # mean, low, high (95 %)


class Part(BaseModel):
    """A part of what was found; values are final."""

    # A run that diverged has no loss: "NaN" in the file, which plain JSON has no number for.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class RatePoint(Part):
    """A trial at one learning rate: mean over tasks, on the validation rows."""

    lr: float
    nll: float
    correct: float


class MethodInfo(Part):
    """One method as it was trained.

    label: with its size, as "HydraLoRA r=6, 3 branches". params: all that are trained, router and
    scales included. note: how the budget was met, or why not. at_edge: the best rate is the lowest
    or highest tried. seconds, energy_kwh, peak_memory_bytes: mean of its runs.
    """

    name: str
    label: str
    params: int
    budget_share: float
    note: str
    rates: list[RatePoint]
    best_lr: float | None
    at_edge: bool
    seconds: float | None
    energy_kwh: dict[str, float] | None
    peak_memory_bytes: int | None


class TaskScore(Part):
    """nll: nats a token; correct: share of rows; over seeds and rows."""

    task: str
    n: int
    nll: Interval
    correct: Interval


class MethodScore(Part):
    """overall: each task counts the same."""

    method: str
    seeds: int
    nll: Interval
    correct: Interval
    tasks: list[TaskScore]


class TaskDifference(Part):
    task: str
    value: Interval


class Difference(Part):
    """A method less the reference, paired by seed and row. metric: nll or correct."""

    method: str
    reference: str
    metric: str
    value: Interval
    separates: bool
    tasks: list[TaskDifference]


class Comparison(Part):
    """Everything that `manylora compare` says; verdict: plain sentences, one a line."""

    format: int = FORMAT
    command: str
    budget: str
    budget_params: int
    reference: str
    seeds: int
    methods: list[MethodInfo]
    scores: list[MethodScore]
    differences: list[Difference]
    verdict: str
    settings: dict[str, Any]
    device: str
