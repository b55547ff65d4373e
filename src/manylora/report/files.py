"""The run folder's files as the report reads them: typed, checked, with errors that name the file.

Fields that the report doesn't show are not declared, and are ignored when present.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, TypeAdapter, ValidationError

Interval = tuple[float, float, float]  # mean, low, high (95 %)


# JSON has no NaN: a loss that was lost is written as null.
Loss = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class TaskLoss(BaseModel):
    """One task's loss since the previous logged line, in nats per answer token."""

    loss: Loss
    tokens: int


class LoggedStep(BaseModel):
    """One line of metrics.jsonl."""

    step: int
    loss: Loss
    learning_rate: float
    tokens_per_second: float
    tasks: dict[str, TaskLoss]


class ValidationStep(BaseModel):
    """A line of metrics.jsonl about the rows kept apart: nats per answer token, by task."""

    step: int
    validation: dict[str, Loss]
    mean: Loss


class TaskScores(BaseModel):
    """One task of scores.json: metric name -> interval, before and after training."""

    n: int
    before: dict[str, Interval]
    after: dict[str, Interval]


class Scores(BaseModel):
    """scores.json."""

    tasks: dict[str, TaskScores]


class Share(BaseModel):
    """One task's part of the training mixture."""

    task: str
    rows: int
    tokens: int
    answer_tokens: int
    share: float


class Summary(BaseModel):
    """summary.json."""

    method: str
    model: str
    trainable_parameters: int
    total_parameters: int
    train_rows: int
    train_tokens: int
    steps: int
    train_seconds: float
    evaluate_seconds: float
    peak_memory_bytes: int
    device: str
    versions: dict[str, str | None]
    mixture: list[Share]


class Routing(BaseModel):
    """routing.json: task -> layer -> mean routing weight of each branch over held-out tokens."""

    branches: int
    layers: list[str]
    tasks: dict[str, list[list[float]]]


class BenchmarkPart(BaseModel):
    """A model's scores on one benchmark, or their difference from another's."""

    metrics: dict[str, Interval]
    mean_of_tasks: dict[str, Interval] = {}


class Benchmark(BenchmarkPart):
    """One task of benchmarks.json, or one group with its `tasks`."""

    name: str
    n: int
    shots: int | list[int]
    official_documents: int | None = None
    tasks: list[str] = []
    lower_is_better: list[str] = []
    base: BenchmarkPart | None = None
    difference: BenchmarkPart | None = None


class Benchmarks(BaseModel):
    """benchmarks.json."""

    versions: dict[str, str]
    tasks: dict[str, Benchmark]
    groups: dict[str, Benchmark]


class Export(BaseModel):
    """One entry of exports.json."""

    path: str
    kind: str
    exact: bool
    max_logit_difference: float
    note: str


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Everything the report shows, read from one run folder."""

    recipe: str
    steps: list[LoggedStep]
    validation: list[ValidationStep]
    scores: Scores
    summary: Summary
    benchmarks: Benchmarks | None
    exports: list[Export]


T = TypeVar("T")
_VALIDATED = '"validation":'


def read_run(run: Path) -> RunFiles:
    """Read a run folder; recipe, metrics, scores and summary must be there."""
    metrics = run / "metrics.jsonl"
    lines = [
        (f"{metrics}:{number}", line)
        for number, line in enumerate(_text(metrics).splitlines(), start=1)
        if line.strip()
    ]
    routing, exports = run / "routing.json", run / "exports.json"
    benchmarks = run / "benchmarks.json"
    if routing.exists():
        _check_routing(routing)
    return RunFiles(
        recipe=_text(run / "recipe.yaml"),
        steps=[_parse(LoggedStep, line, at) for at, line in lines if _VALIDATED not in line],
        validation=[_parse(ValidationStep, line, at) for at, line in lines if _VALIDATED in line],
        scores=_parse(Scores, _text(run / "scores.json"), str(run / "scores.json")),
        summary=_parse(Summary, _text(run / "summary.json"), str(run / "summary.json")),
        benchmarks=_parse(Benchmarks, _text(benchmarks), str(benchmarks), EVAL)
        if benchmarks.exists()
        else None,
        exports=_parse(list[Export], _text(exports), str(exports)) if exports.exists() else [],
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing, and the report needs it. `manylora train` writes it: "
            "give the folder of a finished run, or train again."
        ) from None


TRAIN = "The report reads what `manylora train` writes: restore the file, or train again."
EVAL = "`manylora eval RUN --tasks` writes it: delete the file, and evaluate again."


def _parse(kind: type[T], text: str, where: str, advice: str = TRAIN) -> T:
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ValueError(f"{where}: {field}: {first['msg']}. {advice}") from None


def _check_routing(path: Path) -> None:
    routing = _parse(Routing, _text(path), str(path))
    for task, layers in routing.tasks.items():
        if len(layers) != len(routing.layers) or any(len(w) != routing.branches for w in layers):
            raise ValueError(
                f"{path}: task {task!r} needs {len(routing.layers)} layers of {routing.branches} "
                f"weights, but has {len(layers)} layers of {sorted({len(w) for w in layers})}. "
                "`manylora train` writes this file: delete it, or train again."
            )
