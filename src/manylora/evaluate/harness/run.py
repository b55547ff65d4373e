"""Benchmarks of a run: lm-eval's tasks on its adapter, with intervals, kept in the run folder.

    benchmarks.json      {"tasks": {NAME_SHOTSshot: {"metrics": {METRIC: [mean, low, high]}, ...}},
                          "groups": ...}
    benchmarks.parquet   one row for each example and metric: its value, the answer, the target

A later evaluation replaces what it does again and leaves the rest.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from manylora.evaluate.answers import Model
from manylora.evaluate.code import check_sandbox
from manylora.evaluate.harness import require_lm_eval
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
    collect,
    group_intervals,
    task_intervals,
)
from manylora.precision import resolve_precision
from manylora.run import load, recipe_of
from manylora.training.checkpoints import partial_of, write_atomically
from manylora.training.validation import eval_mode

BENCHMARKS_FILE, EXAMPLES_FILE = "benchmarks.json", "benchmarks.parquet"
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
        results = _on_model(subject, benchmarks, limit, batch_size, task, console)
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
) -> dict[str, Any]:
    from manylora.evaluate.harness.model import AdapterLM

    wanted = recipe_of(subject).train.precision if isinstance(subject, Path) else "fp32"
    model, tokenizer = load(subject) if isinstance(subject, Path) else subject
    eval_mode(model)
    precision = resolve_precision(wanted, model.device)
    lm = AdapterLM(model, tokenizer, batch_size, console, task, precision)
    results = score(lm, benchmarks, limit, console)
    if lm.truncated:
        console.print(
            f"{lm.truncated:,} requests are longer than the {lm.max_length:,} tokens of the model"
            "; the beginning of their prompts was cut off",
            style="yellow",
        )
    return {**results, "truncated": lm.truncated}


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


def score(lm: Any, benchmarks: Benchmarks, limit: int | None, console: Console) -> dict[str, Any]:
    """Run built tasks on any lm-eval model; see `evaluate_benchmarks` for what comes back."""
    from lm_eval.evaluator import evaluate

    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        found: Any = evaluate(
            lm=lm,
            task_dict={"tasks": benchmarks.tasks},
            limit=limit,
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,
        )
    tasks: dict[str, dict[str, Any]] = {}
    values, examples = {}, []
    for name, task in benchmarks.tasks.items():
        values[name], rows = collect(name, found["samples"][name])
        tasks[name] = _noted(_task_entry(name, task, values[name]), console)
        examples += [{**row, "shots": tasks[name]["shots"]} for row in rows]
    groups = [
        _noted(_group_entry(name, members, tasks, values), console)
        for name, members in benchmarks.groups.items()
    ]
    return {
        "versions": {"lm_eval": version("lm_eval")},
        "tasks": {_key(entry): entry for entry in tasks.values()},
        "groups": {_key(entry): entry for entry in groups},
        "examples": examples,
    }


def _task_entry(name: str, task: Any, values: Values) -> dict[str, Any]:
    changed = departures(name)
    return {
        "name": name,
        "n": len(next(iter(values.values()))),
        "documents": len(task.eval_docs),
        "shots": task.get_config("num_fewshot"),
        "lm_eval_version": task.VERSION,
        "metrics": task_intervals(values, task.aggregation()),
        **({"departs": changed} if changed else {}),
    }


def _group_entry(
    name: str, members: list[str], tasks: dict[str, dict[str, Any]], values: dict[str, Values]
) -> dict[str, Any]:
    shots = sorted({tasks[member]["shots"] for member in members})
    return {
        "name": name,
        "n": sum(tasks[member]["n"] for member in members),
        "documents": sum(tasks[member]["documents"] for member in members),
        "shots": shots[0] if len(shots) == 1 else shots,
        "tasks": members,
        **group_intervals([values[member] for member in members]),
    }


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


def write_benchmarks(run: Path, results: dict[str, Any]) -> None:
    """Put results beside those of earlier evaluations, in the place of those done again."""
    path = run / BENCHMARKS_FILE
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    merged = {
        part: {**kept.get(part, {}), **results[part]} for part in ("versions", "tasks", "groups")
    }
    _write_examples(run / EXAMPLES_FILE, results["examples"])
    write_atomically(path, json.dumps(merged, indent=2))


def _write_examples(path: Path, examples: list[Example]) -> None:
    done = {(example["task"], example["shots"]) for example in examples}
    if path.is_file():
        kept = pq.read_table(path).to_pylist()
        examples = [row for row in kept if (row["task"], row["shots"]) not in done] + examples
    pq.write_table(pa.Table.from_pylist(examples), partial_of(path))
    os.replace(partial_of(path), path)


def print_benchmarks(results: dict[str, Any], console: Console) -> None:
    """One line for each metric of each group, and of each task that is in none."""
    grouped = {name for entry in results["groups"].values() for name in entry["tasks"]}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("benchmark", "documents", "shots", "metric", "score", "95 % interval"):
        words = heading in ("benchmark", "metric")
        justify: Any = "left" if words else "right"
        table.add_column(heading, justify=justify, no_wrap=not words, overflow="fold")
    entries = [*results["groups"].values(), *results["tasks"].values()]
    for entry in entries:
        if entry["name"] in grouped and len(grouped) > 10:
            continue
        metrics = dict(entry["metrics"])
        for name, found in entry.get("mean_of_tasks", {}).items():
            metrics[f"{name}, mean of {len(entry['tasks'])} tasks"] = found
        for name, (mean, low, high) in metrics.items():
            head = (entry["name"], f"{entry['n']:,}", str(entry["shots"]))
            first = name == next(iter(metrics))
            table.add_row(
                *(head if first else ("", "", "")),
                name,
                f"{mean:.3f}",
                f"{low:.3f} to {high:.3f}",
            )
    console.print(table)
