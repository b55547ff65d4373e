"""A million short documents through `manylora discover`: how long each step takes, what memory.

    python benchmarks/discovery_scale.py [--rows 1000000] [--data FOLDER]

Writes benchmarks/results/discovery_scale.json. A document is the first sentence of a real row's
instruction and 40 to 110 characters from somewhere in its input, one word of them exchanged with
another row's of the task. The tasks are those of FOLDER (one JSONL file each), default the bundled
ones; their files are made one without a task column. Memory is what the command and the processes
that it starts have resident together, at its highest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from here import about_here

RESULT = Path(__file__).parent / "results" / "discovery_scale.json"


def write_rows(path: Path, rows: int, data: Path) -> float:
    """Write so many made-up rows; returns the mean characters of their prompts."""
    draw = random.Random(0)
    tasks = [
        [json.loads(line) for line in file.open(encoding="utf-8")]
        for file in sorted(data.glob("*.jsonl"))
    ]
    characters = 0
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = varied(draw, tasks[number % len(tasks)])
            characters += len(row["instruction"]) + 1 + len(row["input"])
            file.write(json.dumps(row) + "\n")
    return characters / rows


def varied(draw: random.Random, rows: list[dict[str, Any]]) -> dict[str, str]:
    one, other = draw.choice(rows), draw.choice(rows)
    sentence = re.split(r"(?<=[.?!])\s", one["instruction"], maxsplit=1)[0][:60]
    words = str(one["input"] or one["instruction"]).split()
    start = draw.randrange(max(1, len(words) - 15))
    some = words[start : start + 25] or ["none"]
    some[draw.randrange(len(some))] = draw.choice(str(other["input"]).split() or ["none"])
    text = " ".join(some)[: draw.randint(40, 110)]
    return {"instruction": sentence, "input": text, "output": str(one["output"])[:80] or "none"}


def resident(process: psutil.Process) -> int:
    """Bytes of a process and of all that it has started."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def measure(rows: int, data: Path, folder: Path, model: str) -> dict[str, Any]:
    file, output = folder / "rows.jsonl", folder / "found"
    length = write_rows(file, rows, data)
    command = [sys.executable, "-m", "manylora", "discover", str(file)]
    command += ["--output", str(output), "--model", model]
    environment = os.environ | {"MANYLORA_CACHE": str(folder / "cache")}
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process))
        time.sleep(0.1)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    found = json.loads((output / "discovery.json").read_text(encoding="utf-8"))
    steps = {step: round(taken, 1) for step, taken in found["seconds"].items()}
    return {
        "documents": found["documents"],
        "characters_a_document": round(length),
        "seconds": round(seconds, 1),
        "seconds_by_step": steps
        | {"reading, selector and writing": round(seconds - sum(steps.values()), 1)},
        "peak_memory_megabytes": round(peak / 1e6),
        "tasks": len(list(data.glob("*.jsonl"))),
        "clusters": found["k"],
        "chosen_by": found["chosen_by"],
    }


def main() -> None:
    from manylora.corpus import samples_path

    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--data", type=Path, default=samples_path() / "train")
    default = Path.home() / ".cache/manylora/smollm2-135m-instruct"
    parser.add_argument("--model", default=str(default), help="a folder with a tokenizer")
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(given.rows, given.data, Path(folder), given.model)
    result = {**about_here(), "result": measured}
    given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
