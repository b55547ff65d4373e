"""What is kept of docs/research.md's runs, and what follows from it.

research.parquet has a row for each scored example of each run, research.json what each run took
and, for a part whose runs are all there, what the comparison says of it. Runs are kept one by one:
a part that was stopped goes on from those that are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from research_parts import PARTS, Part

from manylora.comparison.grid import rate_point
from manylora.comparison.intervals import differences, summarise
from manylora.comparison.result import COMPARISON_FILE, Difference, Interval, RatePoint
from manylora.comparison.rows import SCHEMA, TEST_STAGE, Scores
from manylora.comparison.store import CellStore

ROWS, SAID = "research.parquet", "research.json"
LEAST_HELD_OUT = 100
STAGES = {"test": "trained on", "unseen": "left out"}


def keep(name: str, folder: Path, results: Path, tree: str) -> int:
    """The finished runs of a part in the place of what was kept of it before; returns how many.

    tree: the commit it ran at.
    """
    part, store = PARTS[name], CellStore(folder / name)
    runs = {path.stem: store.summary(path.stem) or {} for path in store.folder.glob("*.json")}
    runs = dict(sorted(runs.items(), key=lambda run: _place(run[1], part)))
    rows = store.rows(list(runs))
    for column, value in (("part", name), ("reading", part.reading), ("epochs", part.epochs)):
        rows = rows.append_column(column, pa.array([value] * rows.num_rows))
    others = [table for table in _kept(results) if table["part"][0].as_py() != name]
    pq.write_table(pa.concat_tables([*others, rows]), results / ROWS, compression="zstd")
    path = results / SAID
    whole = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    said = folder / name / COMPARISON_FILE
    whole[name] = {
        **(json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {}),
        "commit": tree,
        "command": f"python benchmarks/research.py run {name} MULTITASK",
        "runs": runs,
    }
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return len(runs)


def _place(summary: dict[str, Any], part: Part) -> tuple[Any, ...]:
    """Of a run among those of its part: as the part orders its methods; trials first."""
    method = summary["method"]
    known = [name == method or name.startswith(_before_ranks(method)) for name in part.methods]
    return known.index(True), method, summary["stage"], summary["lr"], summary["seed"]


def _before_ranks(method: str) -> str:
    start, separator, _ = method.partition("branch_ranks=")
    return start + separator if separator else f"{method} "


def restore(name: str, folder: Path, results: Path) -> None:
    """Put the kept runs of a part back where its comparison looks for finished ones."""
    path = results / SAID
    whole = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    summaries = whole.get(name, {}).get("runs", {})
    store = CellStore(folder / name)
    missing = [key for key in summaries if store.summary(key) is None]
    if not missing:
        return
    rows = pq.read_table(results / ROWS, filters=[("part", "==", name)]).select(SCHEMA.names)
    for key in missing:
        store.write(key, summaries[key], rows.filter(pc.equal(rows["run"], key)))


def _kept(results: Path) -> Iterator[pa.Table]:
    """The kept rows, a table for each part."""
    if not (results / ROWS).is_file():
        return
    rows = pq.read_table(results / ROWS)
    for name in pc.unique(rows["part"]).to_pylist():
        yield rows.filter(pc.equal(rows["part"], name))


def counted(rows: pa.Table, stage: str = "test") -> Scores:
    """The scores that the page's metric is made of: nats a token of each example, all examples
    alike, of the tasks with enough of them. stage: test, or unseen."""
    rows = rows.filter(pc.equal(rows["stage"], stage)).drop_columns("stage")
    scores = Scores.of(rows.append_column("stage", pa.array([TEST_STAGE] * rows.num_rows)))
    tasks = [
        replace(task, nll=task.nll / task.tokens, tokens=task.tokens * 0 + 1)
        for task in scores.tasks
        if len(task.examples) >= LEAST_HELD_OUT
    ]
    if not tasks:
        raise ValueError(f"no task has {LEAST_HELD_OUT} held-out examples; none counts")
    return replace(scores, tasks=tasks)


def shown(results: Path) -> str:
    """The differences of every finished method from its part's reference, overall and by task, and
    what each method is at itself."""
    both = "method | NLL, nats | separates | accuracy, points | separates"
    whole = [f"| part | tasks | {both} |", "|---|---|---|---:|---|---:|---|"]
    without = [
        "| part | tasks | method | task that differs most | NLL without it, nats |",
        "|---|---|---|---|---:|",
    ]
    loras = [f"| part | tasks | from | {both} |", f"|---{whole[1]}"]
    levels = ["| part | tasks | method | NLL, nats | accuracy, % |", "|---|---|---|---:|---:|"]
    by_task: list[str] = []
    parts = {table["part"][0].as_py(): at_best_rates(table) for table in _kept(results)}
    for name in (one for one in PARTS if one in parts):
        own = _finished(parts[name], PARTS[name])
        reference = PARTS[PARTS[name].against or name].methods[0]
        rows = _with_reference(own, PARTS[name], reference, parts)
        methods = pc.unique(rows["method"]).to_pylist()
        if reference not in methods or len(methods) == 1:
            continue
        others = _other_loras(name, parts)
        for stage in (one for one in STAGES if one in pc.unique(rows["stage"]).to_pylist()):
            scores, start = counted(rows, stage), f"| {name} | {STAGES[stage]}"
            found = _found(scores, reference)
            whole += _overall(start, *found)
            without += _without(start, scores, found[0])
            levels += _levels(start, scores)
            by_task += ["", *_tasks(f"NLL by task: {name}, {STAGES[stage]}", found[0])]
            for other in others:
                beside = _with_reference(own, PARTS[name], other, parts)
                loras += _overall(f"{start} | {other}", *_found(counted(beside, stage), other))
    return "\n".join([*whole, "", *without, "", *loras, "", *levels, *by_task])


def _found(scores: Scores, reference: str) -> tuple[list[Difference], list[Difference]]:
    """In NLL and in accuracy."""
    return differences(scores, reference, "nll"), differences(scores, reference, "correct")


def at_best_rates(rows: pa.Table) -> pa.Table:
    """Without the scored runs of a rate that a later trial was better than."""
    later = [
        pc.and_(pc.equal(rows["method"], name), pc.not_equal(rows["lr"], point.lr))
        for name, (point, _) in best_trials(rows).items()
    ]
    superseded = reduce(pc.or_, later, pc.equal(rows["stage"], ""))
    return rows.filter(pc.or_(pc.equal(rows["stage"], "rate"), pc.invert(superseded)))


def best_trials(rows: pa.Table) -> dict[str, tuple[RatePoint, str]]:
    """Each method's best rate trial, and its run. A method whose trials all diverged has none."""
    trials = rows.filter(pc.equal(rows["stage"], "rate"))
    best: dict[str, tuple[RatePoint, str]] = {}
    for run in pc.unique(trials["run"]).to_pylist():
        own = trials.filter(pc.equal(trials["run"], run))
        name, point = own["method"][0].as_py(), rate_point(own, own["lr"][0].as_py())
        if math.isfinite(point.nll):
            best[name] = min(best.get(name, (point, run)), (point, run), key=lambda b: b[0].nll)
    return best


def _finished(rows: pa.Table, part: Part) -> pa.Table:
    """Of the methods that have all their seeds."""
    scored = rows.filter(pc.equal(rows["stage"], TEST_STAGE))
    runs = scored.group_by("method").aggregate([("run", "count_distinct")]).to_pylist()
    methods = [one["method"] for one in runs if one["run_count_distinct"] == part.seeds]
    return rows.filter(pc.is_in(rows["method"], pa.array(methods, pa.string())))


def _with_reference(
    rows: pa.Table, part: Part, reference: str, parts: dict[str, pa.Table]
) -> pa.Table:
    """The scored rows, in front those of the reference, which another part may have run."""
    if part.against is None:
        return rows
    other = parts[part.against]
    return pa.concat_tables([other.filter(pc.equal(other["method"], reference)), rows])


def _other_loras(name: str, parts: dict[str, pa.Table]) -> list[str]:
    """LoRA of other sizes and scalings that a part with branches of its own is held to as well."""
    if PARTS[name].clusters is None:
        return []
    held_to = PARTS[name].against or name
    done = pc.unique(_finished(parts[held_to], PARTS[held_to])["method"]).to_pylist()
    return [name for name in done if name.startswith("lora:")]


def _overall(start: str, nll: list[Difference], right: list[Difference]) -> list[str]:
    lines = []
    for one, other in zip(nll, right, strict=True):
        cells = [start, one.method, _interval(one.value), _said(one)]
        lines.append(" | ".join([*cells, _interval(other.value, 100, "+.1f"), _said(other)]) + " |")
    return lines


def _without(start: str, scores: Scores, found: list[Difference]) -> list[str]:
    """Each difference again, without the task that differs most: how much of it is one task's."""
    lines = []
    for one in found if len(scores.tasks) > 1 else ():
        most = max(one.tasks, key=lambda task: abs(task.value[0])).task
        others = replace(scores, tasks=[task for task in scores.tasks if task.task != most])
        left = {d.method: d for d in differences(others, one.reference, "nll")}[one.method]
        lines.append(" | ".join([start, one.method, most, _interval(left.value)]) + " |")
    return lines


def _levels(start: str, scores: Scores) -> list[str]:
    return [
        f"{start} | {one.method} | {_interval(one.nll, form='.3f')}"
        f" | {_interval(one.correct, 100, '.1f')} |"
        for one in summarise(scores)
    ]


def _tasks(title: str, found: list[Difference]) -> list[str]:
    methods = [one.method for one in found]
    lines = [f"| {' | '.join([title, *methods])} |", f"|---|{'---:|' * len(methods)}"]
    for tasks in zip(*(one.tasks for one in found), strict=True):
        lines.append(f"| {' | '.join([tasks[0].task, *(_interval(t.value) for t in tasks)])} |")
    return lines


def _interval(value: Interval, times: float = 1, form: str = "+.3f") -> str:
    mean, low, high = (format(times * number, form) for number in value)
    return f"{mean} ({low} to {high})"


def _said(difference: Difference) -> str:
    return "yes" if difference.separates else "no"
