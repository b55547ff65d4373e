"""Benchmarks of a run: lm-eval's tasks on its adapter, with intervals."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from manylora.evaluate.answers import Model
from manylora.evaluate.code import check_sandbox
from manylora.evaluate.harness import require_lm_eval
from manylora.evaluate.harness.kept import write_benchmarks
from manylora.evaluate.harness.offline import (
    OFFICIAL,
    Benchmarks,
    check_shots,
    departures,
    load_tasks,
)
from manylora.evaluate.harness.scoring import (
    Example,
    Values,
    beside,
    collect,
    differences,
    group_intervals,
    task_differences,
    task_intervals,
)
from manylora.precision import resolve_precision
from manylora.run import load, recipe_of
from manylora.training.validation import eval_mode

SEED = 1234
"""lm-eval's own: of the examples that are shown where a task draws them, and of sampling."""


def evaluate_benchmarks(
    subject: Path | tuple[Model, PreTrainedTokenizerBase],
    tasks: Sequence[str],
    console: Console,
    *,
    data_dir: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    allow_code: bool = False,
    samples: int = 1,
    task: str | None = None,
    base: bool = False,
) -> dict[str, Any]:
    """Evaluate a run folder, or a model with its tokenizer, on lm-eval tasks.

    Args:
        tasks: lm-eval's names, and those of `offline`.
        data_dir: a folder of benchmark files; without it, rows come from the hub.
        shots: examples shown before each question; default: what each task has.
        limit: the first so many documents of each task.
        allow_code: run programs that the model writes (humaneval).
        samples: programs for each problem of humaneval.
        task: the branch of all prompts, for adapters that choose it by task.
        base: also the model without its adapter, and the paired difference; twice the time.

    Returns what benchmarks.json has of this evaluation, and "examples": the rows of
    benchmarks.parquet. A run folder gets both files.

    Raises CorpusError for a benchmark file that is missing or in another form, ValueError for
    names and numbers that cannot be, RuntimeError where lm-eval is not installed.
    """
    require_lm_eval()
    _check(tasks, limit, batch_size, allow_code)
    with _quiet_lm_eval():
        benchmarks = load_tasks(tasks, data_dir, samples, allow_code=allow_code)
        set_shots(benchmarks, shots, console)
        results = _on_model(subject, benchmarks, limit, batch_size, task, console, base)
    for entry in results["tasks"].values():
        entry.update(data_dir=None if data_dir is None else str(data_dir), branch=task)
        if entry["name"] == "humaneval":
            entry["samples"] = samples
    if isinstance(subject, Path):
        write_benchmarks(subject, results)
    return results


def _on_model(
    subject: Path | tuple[Model, PreTrainedTokenizerBase],
    benchmarks: Benchmarks,
    limit: int | None,
    batch_size: int,
    task: str | None,
    console: Console,
    base: bool,
) -> dict[str, Any]:
    from manylora.evaluate.harness.model import AdapterLM

    wanted = recipe_of(subject).train.precision if isinstance(subject, Path) else "fp32"
    model, tokenizer = load(subject) if isinstance(subject, Path) else subject
    eval_mode(model)
    precision = resolve_precision(wanted, model.device)
    lm = AdapterLM(model, tokenizer, batch_size, console, task, precision)
    off = _without_adapter(model) if base else None
    results = score(lm, benchmarks, limit, console, off)
    truncated = lm.truncated // (1 if off is None else 2)
    if truncated:
        console.print(
            f"{truncated:,} requests are longer than the {lm.max_length:,} tokens of the model"
            "; the beginning of their prompts was cut off",
            style="yellow",
        )
    return {**results, "truncated": truncated}


def _without_adapter(model: Model) -> AbstractContextManager[Any]:
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"a {type(model).__name__} has no adapter to do without; leave out --base (base=True)"
        )
    without: AbstractContextManager[Any] = model.disable_adapter()
    return without


def _check(tasks: Sequence[str], limit: int | None, batch_size: int, allow_code: bool) -> None:
    if not tasks:
        raise ValueError("no benchmark was named")
    if (limit is not None and limit < 1) or batch_size < 1:
        raise ValueError(f"limit={limit}, batch_size={batch_size}: give 1 or more")
    if "humaneval" in tasks and not allow_code:
        raise ValueError(
            "humaneval runs programs that the model writes. They run in a sandbox, but they run on "
            "this machine: pass --allow-code (in Python allow_code=True) if that is what you want"
        )
    if "humaneval" in tasks and (missing := check_sandbox()):
        raise RuntimeError(
            f"humaneval cannot run here, as this machine cannot hold programs: {'; '.join(missing)}"
        )


def set_shots(benchmarks: Benchmarks, shots: int | None, console: Console) -> None:
    """Say how many examples each task shows, as lm-eval does: 0 in a task's YAML stays 0."""
    for name, task in benchmarks.tasks.items():
        own = task.get_config("num_fewshot")
        if shots is not None and own == 0 and shots:
            console.print(f"{name} shows no examples, whatever the shots", style="yellow")
        number = shots if shots is not None and own != 0 else own or 0
        check_shots(name, task, number)
        task.set_config(key="num_fewshot", value=number)
        task.set_fewshot_seed(seed=SEED)


@dataclass(frozen=True)
class Measured:
    """What one model did: its values by task and metric, and each example."""

    values: dict[str, Values]
    examples: list[Example]


def score(
    lm: Any,
    benchmarks: Benchmarks,
    limit: int | None,
    console: Console,
    off: AbstractContextManager[Any] | None = None,
) -> dict[str, Any]:
    """Run built tasks on any lm-eval model; see `evaluate_benchmarks` for what comes back.

    off: in it the model is the base model, which is measured as well.
    """
    measured, base = _measure(lm, benchmarks, limit), None
    if off is not None:
        console.print("the same questions without the adapter")
        with off:
            base = _measure(lm, benchmarks, limit)
    tasks = {
        name: _noted(_task_entry(name, task, measured, base), console)
        for name, task in benchmarks.tasks.items()
    }
    groups = [
        _noted(_group_entry(name, members, tasks, measured, base), console)
        for name, members in benchmarks.groups.items()
    ]
    return {
        "versions": {"lm_eval": version("lm_eval")},
        "tasks": {_key(entry): entry for entry in tasks.values()},
        "groups": {_key(entry): entry for entry in groups},
        "examples": beside(measured.examples, base.examples if base else None),
    }


def _measure(lm: Any, benchmarks: Benchmarks, limit: int | None) -> Measured:
    from lm_eval.evaluator import evaluate

    for task in benchmarks.tasks.values():
        task.set_fewshot_seed(seed=SEED)  # else a second measurement shows other examples
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        found: Any = evaluate(
            lm=lm,
            task_dict={"tasks": benchmarks.tasks},
            limit=limit,
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,
        )
    values, examples = {}, []
    for name, task in benchmarks.tasks.items():
        values[name], rows = collect(name, found["samples"][name])
        examples += [{**row, "shots": task.get_config("num_fewshot")} for row in rows]
    return Measured(values, examples)


def _task_entry(name: str, task: Any, measured: Measured, base: Measured | None) -> dict[str, Any]:
    changed, values, aggregations = departures(name), measured.values[name], task.aggregation()
    entry = {
        "name": name,
        "n": len(next(iter(values.values()))),
        "documents": len(task.eval_docs),
        "shots": task.get_config("num_fewshot"),
        "lm_eval_version": task.VERSION,
        "metrics": task_intervals(values, aggregations),
        "lower_is_better": [name for name in values if _lower_is_better(task, name)],
        **({"departs": changed} if changed else {}),
    }
    if base is not None:
        entry["base"] = {"metrics": task_intervals(base.values[name], aggregations)}
        found = task_differences(values, base.values[name], aggregations)
        entry["difference"] = {"metrics": found}
    return entry


def _lower_is_better(task: Any, metric: str) -> bool:
    return task.higher_is_better().get(metric.partition(",")[0]) is False


def _group_entry(
    name: str,
    members: list[str],
    tasks: dict[str, dict[str, Any]],
    measured: Measured,
    base: Measured | None,
) -> dict[str, Any]:
    shots = sorted({tasks[member]["shots"] for member in members})
    values = [measured.values[member] for member in members]
    entry = {
        "name": name,
        "n": sum(tasks[member]["n"] for member in members),
        "documents": sum(tasks[member]["documents"] for member in members),
        "shots": shots[0] if len(shots) == 1 else shots,
        "tasks": members,
        "lower_is_better": tasks[members[0]]["lower_is_better"],
        **group_intervals(values),
    }
    if base is not None:
        others = [base.values[member] for member in members]
        pairs = zip(values, others, strict=True)
        entry["base"] = group_intervals(others)
        entry["difference"] = group_intervals([differences(*pair) for pair in pairs])
    return entry


def _key(entry: dict[str, Any]) -> str:
    shots = entry["shots"] if isinstance(entry["shots"], list) else [entry["shots"]]
    return f"{entry['name']}_{'-'.join(map(str, shots))}shot"


def _noted(entry: dict[str, Any], console: Console) -> dict[str, Any]:
    """An entry, and a word to the user where it is not over the whole benchmark."""
    official = OFFICIAL.get(entry["name"])
    if official is not None:
        entry["official_documents"] = official
        if entry["n"] != official:
            console.print(
                f"{entry['name']}: {entry['n']:,} documents; the benchmark has {official:,}",
                style="yellow",
            )
    return entry


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """lm-eval logs a line for each task, of which users of manylora need none."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
