"""A part of docs/research.md: its data, its runs, its raw rows, its differences.

    python benchmarks/research.py run 2-oracle-4 MULTITASK [--folder runs/research]
    python benchmarks/research.py keep 2-oracle-4 [--folder runs/research] [--commit REV]
    python benchmarks/research.py show

`run` goes on where it was stopped, from the runs in the folder and from those that are kept. `keep`
puts the rows of a part's finished runs into benchmarks/results/research.parquet, and into
research.json the device, the versions and the rates; `show` computes every difference of the page
from those rows alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from here import commit
from readings import Row, as_read, load
from research_kept import ROWS, keep, restore, shown
from research_parts import PARTS, Part
from research_ranks import with_ranks
from rich.console import Console

from manylora.comparison.command import compare
from manylora.recipe import Recipe, parse_recipe

RESULTS = Path(__file__).parent / "results"
MOST_TRAINED = 400


def run(
    name: str,
    multitask: Path,
    folder: Path,
    parallel: int,
    model: str | None,
    results: Path = RESULTS,
) -> None:
    part, console = PARTS[name], Console(stderr=True)
    data = folder / "data" / name
    write_data(multitask, data, part)
    restore(name, folder, results)
    recipe = recipe_of(part, data, model)
    compare(
        recipe,
        list(with_ranks(part, recipe, results / ROWS).values()),
        part.budget,
        part.seeds,
        None,
        folder / name,
        parallel,
        console,
        choice=part.choice,
        unseen=data / "unseen" if part.left_out else None,
        wider_rates=part.wider_rates,
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
        "train": {"epochs": part.epochs, "batch_size": 16, "compile": part.compile},
        "evaluate": {"rows_per_task": 200, "batch_size": 64, "generate": False},
    }
    if part.clusters is not None:
        values["tasks"] = "discovered"
        if part.clusters != "found":
            values["discovery"] = {"clusters": part.clusters}
    return parse_recipe(values if model is None else {**values, "model": model, "dtype": "float32"})


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
        run(
            *(given.part, given.multitask, given.folder, given.parallel, given.model),
            given.results,
        )
    else:
        kept = keep(given.part, given.folder, given.results, given.commit)
        print(f"{kept} runs of {given.part} are kept")


if __name__ == "__main__":
    main()
