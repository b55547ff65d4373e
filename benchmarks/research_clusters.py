"""What stage 3 of docs/research.md trains with: its clusters, and where prompts are sent.

    python benchmarks/research_clusters.py run MULTITASK [--folder runs/research]
    python benchmarks/research_clusters.py show

`run` writes benchmarks/results/research_clusters.json: for each reading the training rows of each
task in each cluster, and the branches that the saved selector chose for held-out prompts of each
task, those of the left-out tasks among them; nothing is trained. `show` computes the page's table.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from here import about_here
from readings import READINGS
from research import PARTS, recipe_of, write_data
from rich.console import Console

from manylora.comparison.ground import Ground, prepare_ground
from manylora.corpus import Rows, dataset_of

RESULT = Path(__file__).parent / "results" / "research_clusters.json"
SHARED = "the shared branch alone"
Counts = dict[str, dict[str, int]]


def run(multitask: Path, folder: Path, model: str | None) -> dict[str, Any]:
    found: dict[str, Any] = about_here()
    for reading in READINGS:
        name = f"3-clusters-{reading}"
        part, data = PARTS[name], folder / "data" / name
        write_data(multitask, data, part)
        recipe = recipe_of(part, data, model).resolved()
        ground = prepare_ground(recipe, Console(stderr=True), part.choice, data / "unseen")
        found[reading] = {
            "clusters": {
                name: dict(Counter(map(task_of, rows.sources)))
                for name, rows in ground.train.items()
            },
            "selector_numbers": ground.selector.size if ground.selector else 0,
            "test": chosen(ground, ground.test),
            "unseen": chosen(ground, ground.unseen),
        }
    return found


def task_of(source: str) -> str:
    """The task of a row by where it comes from: "nli_mnli.jsonl:17"."""
    return Path(source.rpartition(":")[0]).stem


@torch.no_grad()
def chosen(ground: Ground, rows: Mapping[str, Rows]) -> Counts:
    """How many of each task's prompts went to each branch."""
    collate, counts = ground.collator(), {}
    for task, own in rows.items():
        data = dataset_of({task: own}, [task], ground.encoder)
        ids = collate([data[i] for i in range(len(data))])["task_ids"].tolist()
        counts[task] = dict(Counter(SHARED if i < 0 else ground.tasks[i] for i in ids))
    return counts


def shares(reading: dict[str, Any]) -> dict[str, float]:
    """clusters: how many. pure: the share of training rows that are of their cluster's main task.
    own: the share of held-out prompts sent to a cluster whose main task is theirs, by task, then
    averaged. refused: of held-out prompts; unseen: of left-out tasks' prompts, sent to the shared
    branch alone, averaged likewise.
    """
    clusters: Counts = reading["clusters"]
    main = {name: max(tasks, key=lambda task: tasks[task]) for name, tasks in clusters.items()}
    rows = sum(sum(tasks.values()) for tasks in clusters.values())

    def mean(counts: Counts, of: Any) -> float:
        return sum(
            sum(n for branch, n in own.items() if of(task, branch)) / sum(own.values())
            for task, own in counts.items()
        ) / len(counts)

    return {
        "clusters": len(clusters),
        "pure": sum(clusters[name][task] for name, task in main.items()) / rows,
        "own": mean(reading["test"], lambda task, branch: main.get(branch) == task),
        "refused": mean(reading["test"], lambda task, branch: branch == SHARED),
        "unseen": mean(reading["unseen"], lambda task, branch: branch == SHARED),
    }


def shown(found: dict[str, Any]) -> str:
    lines = [
        "| reading | clusters | rows of their cluster's main task | held-out prompts sent to it "
        "| to the shared branch alone | left-out prompts to the shared branch alone |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for reading in READINGS:
        one = shares(found[reading])
        cells = [reading, str(one["clusters"])]
        cells += [f"{100 * one[key]:.1f} %" for key in ("pure", "own", "refused", "unseen")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("run", "show"))
    parser.add_argument("multitask", nargs="?", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/research"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--model", help="another base model")
    given = parser.parse_args()
    if given.verb == "run":
        if given.multitask is None:
            parser.error("run needs MULTITASK")
        found = run(given.multitask, given.folder, given.model)
        given.result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(shown(json.loads(given.result.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
