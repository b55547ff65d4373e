"""How alike the A's and B's of runs are, and what part of that their shared start explains.

    python benchmarks/initialisation.py RUN RUN ... [--keep NAME]

Runs of one base model and one rank, best three or more: two with one seed on different data (what
is claimed), and the baseline, the same data with another seed. Prints a line for each matrix, kind
of pair and measure (inspect/initialisation.py says what they are): mean over layers, 95 % interval
over layers. --keep writes them to benchmarks/results/NAME.json, with each run's seed, data and
length.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from here import about_here

from manylora.inspect.adapters import read
from manylora.inspect.initialisation import initialisation, summary
from manylora.inspect.starts import start_of
from manylora.run import SUMMARY_FILE, recipe_of

RESULTS = Path(__file__).parent / "results"


def measure(runs: Sequence[Path]) -> dict[str, Any]:
    """What is kept: the runs, and the table of means."""
    adapters = [read(run, str(place)) for place, run in enumerate(runs)]
    found = summary(initialisation(adapters))
    return {
        **about_here(),
        "runs": [
            about(run, start_of(adapter).unknown)
            for run, adapter in zip(runs, adapters, strict=True)
        ],
        "likeness": [
            {name: None if value != value else value for name, value in row.items()}
            for row in found.to_dict("records")
        ],
    }


def about(run: Path, unknown_start: str | None) -> dict[str, Any]:
    recipe = recipe_of(run)
    summary_of_run = json.loads((run / SUMMARY_FILE).read_text(encoding="utf-8"))
    return {
        "name": run.resolve().name,
        "model": recipe.model,
        "method": recipe.adapter.method,
        "r": recipe.adapter.r,
        "seed": recipe.seed,
        "tasks": sorted(row["task"] for row in summary_of_run["mixture"]),
        "steps": summary_of_run["steps"],
        "learning_rate": recipe.train.learning_rate,
        "unknown_start": unknown_start,
    }


def show(found: dict[str, Any]) -> str:
    lines = [f"{'':2}{'pairs of':28}{'measure':22}{'mean':>8}   95 % over layers"]
    for row in found["likeness"]:
        mean, low, high = (math.nan if row[k] is None else row[k] for k in ("mean", "low", "high"))
        said = f"{mean:8.4f}   {low:.4f} to {high:.4f}" if mean == mean else f"{'-':>8}"
        lines.append(f"{row['matrix']:2}{row['pair']:28}{row['measure']:22}{said}")
    unknown = [run["unknown_start"] for run in found["runs"] if run["unknown_start"]]
    return "\n".join(lines + unknown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--keep", metavar="NAME")
    given = parser.parse_args()
    result = measure(given.runs)
    print(show(result))
    if given.keep:
        file = RESULTS / f"{given.keep}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(file)
