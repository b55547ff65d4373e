"""A part of docs/research.md: its data, its runs, its raw rows, its differences.

    python benchmarks/research.py run 2-oracle-4 MULTITASK [--folder runs/research]
    python benchmarks/research.py keep 2-oracle-4 [--folder runs/research] [--commit REV]
    python benchmarks/research.py show

`run` goes on where it was stopped (the cells of a comparison are kept one by one). `keep` puts the
rows of a part into benchmarks/results/research.parquet, and into research.json the device, the
versions and the rates; `show` computes every difference of the page from those rows alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from here import commit
from readings import READINGS, Row, as_read, load
from rich.console import Console

from manylora.comparison.command import compare
from manylora.comparison.ground import Choice
from manylora.comparison.intervals import differences
from manylora.comparison.result import Difference, Interval
from manylora.comparison.rows import TEST_STAGE, Scores
from manylora.recipe import Recipe, parse_recipe

RESULTS = Path(__file__).parent / "results"
ROWS, SAID = "research.parquet", "research.json"
MOST_TRAINED, LEAST_HELD_OUT = 400, 100
STAGES = {"test": "trained on", "unseen": "left out"}
# random.Random(0).sample of the 23 tasks with 100 held-out examples, sorted by name
LEFT_OUT = ("math_gsm8k", "med_medquad", "code_bash", "instr_dolly", "qa_arc", "nli_mnli")
FOUR = ("code_bash", "legal_cuad", "math_gsm8k", "ner_wnut17")


@dataclass(frozen=True)
class Part:
    """tasks: None is all. methods: names as `manylora compare` takes them, the reference first.

    clusters: those that discovery finds take the place of the tasks in training. left_out: tasks
    that are scored without being trained on.
    """

    methods: tuple[str, ...]
    budget: str
    epochs: float
    tasks: tuple[str, ...] | None = None
    reading: str = "as_is"
    seeds: int = 3
    clusters: bool = False
    choice: Choice = "told"
    left_out: tuple[str, ...] = ()


ORACLE = ("lora", "branch_per_cluster_shared", "branch_per_cluster")
PARTS = {
    "2-oracle-4": Part(ORACLE, "lora:r=16", epochs=3, tasks=FOUR),
    "2-oracle-26": Part(ORACLE, "lora:r=52", epochs=1),
}
PARTS |= {
    f"3-clusters-{reading}": Part(
        ORACLE[:2],
        "lora:r=52",
        epochs=1,
        reading=reading,
        clusters=True,
        choice="selector",
        left_out=LEFT_OUT,
    )
    for reading in READINGS
}


def run(name: str, multitask: Path, folder: Path, parallel: int, model: str | None) -> None:
    part, console = PARTS[name], Console(stderr=True)
    data = folder / "data" / name
    write_data(multitask, data, part)
    compare(
        recipe_of(part, data, model),
        part.methods,
        part.budget,
        part.seeds,
        None,
        folder / name,
        parallel,
        console,
        choice=part.choice,
        unseen=data / "unseen" if part.left_out else None,
    )


def write_data(multitask: Path, folder: Path, part: Part) -> None:
    """folder/train, test and unseen, a file a task: what the part trains on, and is scored on."""
    for split in ("train", "test"):
        for task, rows in load(multitask, split).items():
            if part.tasks is not None and task not in part.tasks:
                continue
            chosen = drawn(rows, MOST_TRAINED) if split == "train" else rows
            if task not in part.left_out:
                _write(folder / split / f"{task}.jsonl", chosen, part.reading)
            elif split == "test":
                _write(folder / "unseen" / f"{task}.jsonl", chosen, part.reading)


def _write(path: Path, rows: list[Row], reading: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asked(row, reading), ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def drawn(rows: list[Row], most: int) -> list[Row]:
    """At most so many rows, by a hash of what they are, in the order of the file."""

    def key(place: int) -> str:
        row = rows[place]
        return hashlib.sha256(
            f"{row['instruction']}\n{row['input']}\n{row['output']}".encode()
        ).hexdigest()

    return [rows[place] for place in sorted(sorted(range(len(rows)), key=key)[:most])]


def asked(row: Row, reading: str) -> Row:
    """A row as the model sees it; one without an input keeps its instruction."""
    instruction, text = as_read(row, reading)
    if not instruction:
        instruction, text = text or row["instruction"], ""
    return {"instruction": instruction, "input": text, "output": row["output"]}


def recipe_of(part: Part, data: Path, model: str | None = None) -> Recipe:
    values: dict[str, Any] = {
        "data": str(data),
        "dtype": "bfloat16",
        "max_length": 1024,
        "packing": True,
        "validation": 0.1,
        "train": {"epochs": part.epochs, "batch_size": 16},
        "evaluate": {"rows_per_task": 200, "batch_size": 64, "generate": False},
    }
    if part.clusters:
        values["tasks"] = "discovered"
    return parse_recipe(values if model is None else {**values, "model": model, "dtype": "float32"})


def keep(name: str, folder: Path, results: Path, tree: str) -> None:
    """The rows of a part in the place of what was kept of it before. tree: the commit it ran at."""
    part = PARTS[name]
    rows = pq.read_table(folder / name / "rows.parquet")
    for column, value in (("part", name), ("reading", part.reading), ("epochs", part.epochs)):
        rows = rows.append_column(column, pa.array([value] * rows.num_rows))
    others = [table for table in _kept(results) if table["part"][0].as_py() != name]
    pq.write_table(pa.concat_tables([*others, rows]), results / ROWS, compression="zstd")
    said = json.loads((folder / name / "comparison.json").read_text(encoding="utf-8"))
    path = results / SAID
    whole = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    command = f"python benchmarks/research.py run {name} MULTITASK"
    whole[name] = {**said, "commit": tree, "command": command}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


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
    """The differences of every part from its reference, overall and by task, as Markdown tables."""
    whole = [
        "| part | tasks | method | NLL, nats | separates | accuracy, points | separates |",
        "|---|---|---|---:|---|---:|---|",
    ]
    by_task: list[str] = []
    for rows in _kept(results):
        for stage in ("test", "unseen"):
            if stage in pc.unique(rows["stage"]).to_pylist():
                part, which = rows["part"][0].as_py(), STAGES[stage]
                scores = counted(rows, stage)
                found = [differences(scores, scores.methods[0], m) for m in ("nll", "correct")]
                whole += _overall(f"| {part} | {which}", *found)
                by_task += ["", *_tasks(f"NLL by task: {part}, {which}", found[0])]
    return "\n".join([*whole, *by_task])


def _overall(start: str, nll: list[Difference], right: list[Difference]) -> list[str]:
    lines = []
    for one, other in zip(nll, right, strict=True):
        cells = [start, one.method, _interval(one.value), _said(one)]
        lines.append(" | ".join([*cells, _interval(other.value, 100, "+.1f"), _said(other)]) + " |")
    return lines


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("run", "keep", "show"))
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("multitask", nargs="?", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/research"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--parallel", type=int, default=0, help="runs on a GPU; default found out")
    parser.add_argument("--model", help="another base model, in float32")
    parser.add_argument("--commit", default=commit(), help="that a part ran at; default: this one")
    given = parser.parse_args()
    if given.verb == "show":
        print(shown(given.results))
    elif given.part is None or (given.verb == "run" and given.multitask is None):
        parser.error(f"{given.verb} needs a part" + " and MULTITASK" * (given.verb == "run"))
    elif given.verb == "run":
        run(given.part, given.multitask, given.folder, given.parallel, given.model)
    else:
        keep(given.part, given.folder, given.results, given.commit)


if __name__ == "__main__":
    main()
