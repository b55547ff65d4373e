"""Mutated adapter folders and checkpoints into loading and import; the counts are kept.

python benchmarks/fuzz_adapters.py --inputs 10000   # of all kinds together, into results/
python benchmarks/fuzz_adapters.py --inputs 500 --only hydralora --seed 7 --no-keep

Each folder is loaded in a child process, so that a crash of a library is seen and counted, and not
only an exception. The folders are made in tests/folder_fuzzing.py, and judged in
tests/folder_check.py: loaded as the file says, or one error that names a file, within ten seconds
and 64 MiB, nothing executed, nothing written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before PEFT is imported: a folder is never looked up

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from here import about_here  # noqa: E402

from folder_check import CHECKPOINT, KINDS, base_model, check, make_adapter  # noqa: E402
from folder_fuzzing import mutate  # noqa: E402
from fuzz_check import ViolationError  # noqa: E402

SILENCE = 60.0


def work(kind: str, start: int, stop: int, seed: int, results: Connection) -> None:
    """Sends (number, outcome, message, seconds) for each folder."""
    with tempfile.TemporaryDirectory() as parent:
        source, base = make_adapter(kind, Path(parent) / "source"), base_model()
        for number in range(start, stop):
            folder = Path(parent) / f"{kind}-{number}"
            change = mutate(source, folder, number, seed)
            began, message = time.perf_counter(), ""
            try:
                outcome = check(folder, base, kind == CHECKPOINT)
                if change == "nothing" and outcome != "loaded":
                    raise ViolationError("a folder without damage was refused")
            except ViolationError as error:
                outcome, message = "violations", f"{change}: {error}"
            results.send((number, outcome, message, time.perf_counter() - began))
            shutil.rmtree(folder)


def fuzz(kind: str, inputs: int, seed: int) -> dict[str, Any]:
    """Counts of outcomes; a crash or a hang of the child is one, and the next folder goes on."""
    counts: Counter[str] = Counter(inputs=inputs, loaded=0, refused=0, violations=0)
    counts.update(crashes=0, hangs=0)
    found: list[str] = []
    slowest, number = 0.0, 0
    began = time.perf_counter()
    while number < inputs:
        receive, send = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.Process(target=work, args=(kind, number, inputs, seed, send))
        child.start()
        send.close()
        try:
            while receive.poll(SILENCE):
                at, outcome, message, seconds = receive.recv()
                counts[outcome] += 1
                slowest, number = max(slowest, seconds), at + 1
                if message:
                    found.append(f"{kind} {at}: {message}")
            counts["hangs"] += 1
            found.append(f"{kind} {number}: silent for {SILENCE} s")
            child.kill()
            number += 1
        except EOFError:
            if number < inputs:
                child.join()
                counts["crashes"] += 1
                found.append(f"{kind} {number}: the process ended with code {child.exitcode}")
                number += 1
        child.join()
    for line in found[:20]:
        print(line, file=sys.stderr)
    return {
        **counts,
        "slowest_seconds": round(slowest, 2),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="how many of all together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, action="append", help="these alone")
    parser.add_argument("--no-keep", action="store_true", help="write no results file")
    options = parser.parse_args()
    kinds, results = options.only or KINDS, {}
    for place, kind in enumerate(kinds):
        share = len(range(place, options.inputs, len(kinds)))
        results[kind] = fuzz(kind, share, options.seed)
        print(json.dumps({kind: results[kind]}), flush=True)
    kept = {**about_here(), "seed": options.seed, "folders": results}
    if not options.no_keep:
        path = HERE / "results" / "fuzz_adapters.json"
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(path)
    bad = sum(r["violations"] + r["crashes"] + r["hangs"] for r in results.values())
    sys.exit(f"{bad} folders were not handled as promised" if bad else 0)


if __name__ == "__main__":
    main()
