"""A collection of tasks in the files that the research reads: two of them, in a few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_multitask(folder: Path, train: int, test: int) -> Path:
    """So many rows of each task, the first without an input; returns the folder."""
    wordings: dict[str, dict[str, Any]] = {}
    for task in ("sums", "names"):
        wordings[task] = {"train": [f"{task} A", f"{task} B"], "test": [f"{task} C"]}
        wordings[task]["extract"] = None
        for split, count in (("train", train), ("test", test)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            rows = [
                {"task": task, "instruction": f"do {task}", "input": f"{split} {i}", "output": "x"}
                for i in range(count)
            ]
            rows[0]["input"] = ""
            lines = "\n".join(map(json.dumps, rows))
            (folder / split / f"{task}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "paraphrases.json").write_text(json.dumps(wordings), encoding="utf-8")
    return folder
