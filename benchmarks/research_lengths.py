"""How long the rows of docs/research.md are, in tokens, and what padding them would add.

    python benchmarks/research_lengths.py run MULTITASK
    python benchmarks/research_lengths.py show

`run` writes benchmarks/results/research_lengths.json: the tokens of every row, prompt and answer in
the chat template, as it is read, by split and task; `show` prints the page's figures from them.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

from here import about_here
from research import PARTS, write_data

from manylora.base import DEFAULT_MODEL, load_tokenizer
from manylora.corpus import DataOptions, Encoder, Rows
from manylora.corpus.encode import TooLongError
from manylora.corpus.split import read_rows

RESULT = Path(__file__).parent / "results" / "research_lengths.json"
LONGEST, BATCH = 1024, 16


def run(multitask: Path) -> dict[str, Any]:
    encoder = Encoder(load_tokenizer(DEFAULT_MODEL), 8192)
    found: dict[str, Any] = about_here()
    with tempfile.TemporaryDirectory() as folder:
        write_data(multitask, Path(folder), PARTS["2-oracle-26"])
        for split in ("train", "test"):
            tasks = read_rows(Path(folder) / split, DataOptions()).train
            found[split] = {task: lengths(rows, encoder) for task, rows in tasks.items()}
    return found


def lengths(rows: Rows, encoder: Encoder) -> list[int]:
    encoded = encoder.encode_many([rows[i] for i in range(len(rows))])
    return [
        encoder.max_length if isinstance(one, TooLongError) else len(one.input_ids)
        for one in encoded
    ]


def shown(found: dict[str, Any]) -> str:
    train, test = found["train"], found["test"]
    fitting = [n for lengths in train.values() for n in lengths if n <= LONGEST]
    order = random.Random(0).sample(fitting, len(fitting))
    batches = [order[i : i + BATCH] for i in range(0, len(order) // BATCH * BATCH, BATCH)]
    total = sum(map(len, train.values()))
    banking = train["intent_banking77"]
    quoref = test["rc_quoref"]
    return (
        f"intent_banking77: {median(banking):.0f} tokens in the median, "
        f"{sum(n <= 512 for n in banking)} rows of at most 512\n"
        f"rc_quoref: {sum(n <= 512 for n in quoref)} of {len(quoref)} held-out rows at most 512\n"
        f"{total - len(fitting)} of {total:,} training rows longer than {LONGEST}\n"
        f"{mean(fitting):.0f} tokens a row, {mean(map(max, batches)):.0f} padded"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("run", "show"))
    parser.add_argument("multitask", nargs="?", type=Path)
    given = parser.parse_args()
    if given.verb == "run":
        if given.multitask is None:
            parser.error("run needs MULTITASK")
        RESULT.write_text(json.dumps(run(given.multitask)) + "\n", encoding="utf-8")
    print(shown(json.loads(RESULT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
