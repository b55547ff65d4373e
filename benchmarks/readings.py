"""The collection of real tasks in the three readings of its prompts.

MULTITASK holds train/TASK.jsonl and test/TASK.jsonl (task, instruction, input, output) and
paraphrases.json: for each task seven wordings of its instruction to train with and three to test
with, one of which a hash of the row chooses. Readings: as_is (instruction and input), paraphrased,
input_only.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

Row = dict[str, str]
Split = Literal["train", "test"]
READINGS = ("as_is", "paraphrased", "input_only")


def load(folder: Path, split: Split = "train") -> dict[str, list[Row]]:
    """Rows of a split by task, each with its paraphrased instruction."""
    wordings = json.loads((folder / "paraphrases.json").read_text(encoding="utf-8"))
    data: dict[str, list[Row]] = {}
    for file in sorted((folder / split).glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            row["paraphrase"] = paraphrase(row, wordings[file.stem], split)
        data[file.stem] = rows
    return data


def paraphrase(row: Row, wording: dict[str, Any], split: Split = "train") -> str:
    templates = wording[split]
    if not templates:
        return row["instruction"]
    digest = hashlib.sha256((row["task"] + row["input"]).encode()).hexdigest()
    template = str(templates[int(digest, 16) % len(templates)])
    if wording["extract"] is None:
        return template
    match = re.match(wording["extract"], row["instruction"])
    if match is None:
        raise ValueError(f"{row['task']}: no slot in {row['instruction']!r}")
    return template.replace("{slot}", match["slot"])


def as_read(row: Row, reading: str) -> tuple[str, str]:
    """The instruction and the input of a row in a reading."""
    if reading == "paraphrased":
        return row["paraphrase"], row["input"]
    if reading == "input_only":
        return "", row["input"]
    return row["instruction"], row["input"]
