"""Benchmark results in a run folder.

    benchmarks.json      {"tasks": {NAME_SHOTSshot: {"metrics": {METRIC: [mean, low, high]}, ...}},
                          "groups": ...}; with base=True also "base", {"metrics": ...} of the model
                          without its adapter, and "difference", paired
    benchmarks.parquet   one row for each example and metric: its value, the answer, the target,
                         and perhaps the value and answer of the base model

A later evaluation replaces what it does again and leaves the rest.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manylora.evaluate.harness.scoring import Example
from manylora.training.checkpoints import partial_of, write_atomically

BENCHMARKS_FILE, EXAMPLES_FILE = "benchmarks.json", "benchmarks.parquet"
EXAMPLES = pa.schema(
    [
        ("task", pa.string()),
        ("shots", pa.int64()),
        ("row", pa.int64()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("target", pa.string()),
        ("answer", pa.string()),
        ("base_value", pa.float64()),
        ("base_answer", pa.string()),
    ]
)


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
    pq.write_table(pa.Table.from_pylist(examples, schema=EXAMPLES), partial_of(path))
    os.replace(partial_of(path), path)
