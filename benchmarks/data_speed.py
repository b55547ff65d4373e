"""A million short rows: how fast they are read and encoded, and what memory that takes.

    python benchmarks/data_speed.py [--rows 1000000]

Writes benchmarks/results/data_speed.json. The rows are drawn from the bundled tasks, numbered so
that no two are equal. Reading is from the file to rows on disk that can be drawn in any order;
encoding is what a loader's worker does while the model trains.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import psutil
from here import about_here

RESULT = Path(__file__).parent / "results" / "data_speed.json"
BATCH, BATCHES = 32, 500


def write_rows(path: Path, rows: int) -> None:
    from manylora.corpus import samples_path

    lines = [
        json.loads(line)
        for file in sorted((samples_path() / "train").glob("*.jsonl"))
        for line in file.open(encoding="utf-8")
    ]
    short = [line for line in lines if len(json.dumps(line)) < 400]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = dict(short[number % len(short)])
            row["input"] = f"{number} {row.get('input', '')}"
            file.write(json.dumps(row) + "\n")


def resident() -> int:
    """Bytes of this process that are not mapped files."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def measure(rows: int, folder: Path, model: str) -> dict[str, float]:
    os.environ["MANYLORA_CACHE"] = str(folder / "cache")
    from manylora.base import load_tokenizer
    from manylora.corpus import DrawOrder, Encoder, Mixture, dataset_of, load_corpus

    file = folder / "rows.jsonl"
    write_rows(file, rows)
    before, started = resident(), time.perf_counter()
    corpus = load_corpus(file)
    read = time.perf_counter() - started
    started = time.perf_counter()
    load_corpus(file)
    again = time.perf_counter() - started
    train = {task: corpus.train[task] for task in corpus.tasks}
    data = dataset_of(train, corpus.tasks, Encoder(load_tokenizer(model), 1024))
    order = DrawOrder({task: len(own) for task, own in train.items()}, Mixture(), 0).epoch(0)
    started = time.perf_counter()
    for _ in range(BATCHES):
        data.__getitems__(list(itertools.islice(order, BATCH)))
    encoding = time.perf_counter() - started
    size = file.stat().st_size
    return {
        "rows": rows,
        "bytes": size,
        "read_seconds": round(read, 2),
        "read_rows_per_second": round(rows / read),
        "read_megabytes_per_second": round(size / read / 1e6, 1),
        "read_again_seconds": round(again, 3),
        "encode_rows_per_second": round(BATCH * BATCHES / encoding),
        "memory_grew_megabytes": round((resident() - before) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    default = Path.home() / ".cache/manylora/smollm2-135m-instruct"
    parser.add_argument("--model", default=str(default), help="a folder with a tokenizer")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(given.rows, Path(folder), given.model)
    result = {**about_here(), "result": measured}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
