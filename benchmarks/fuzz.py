"""Random and damaged inputs into each reader and into the recipe; the counts are kept.

python benchmarks/fuzz.py --inputs 10000            # all readers, into results/fuzz.json
python benchmarks/fuzz.py --inputs 500 --only parquet --seed 7 --no-keep

Each input is read in a child process, so that a crash of a library is seen and counted, and not
only an exception. The inputs are made in tests/fuzzing.py, and judged in tests/fuzz_check.py:
at most five seconds each, memory bounded by the file's size, every row accounted for.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from here import about_here  # noqa: E402

from fuzz_check import ViolationError, check  # noqa: E402
from fuzzing import READERS, make_case  # noqa: E402
from fuzzing_recipes import check_recipe, make_recipe_case  # noqa: E402

KINDS = (*READERS, "recipe")
SILENCE = 60.0


def run_case(kind: str, number: int, seed: int, folder: Path) -> str:
    if kind == "recipe":
        return check_recipe(make_recipe_case(number, seed), folder)
    return check(make_case(kind, number, seed), folder)


def work(kind: str, start: int, stop: int, seed: int, results: Connection) -> None:
    """Sends (number, outcome, message, seconds) for each case."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(start, stop):
            began, message = time.perf_counter(), ""
            try:
                outcome = run_case(kind, number, seed, Path(folder))
            except ViolationError as error:
                outcome, message = "violations", str(error)
            results.send((number, outcome, message, time.perf_counter() - began))


def fuzz(kind: str, inputs: int, seed: int) -> dict[str, Any]:
    """Counts of outcomes; a crash or a hang of the child is one, and the next case goes on."""
    counts: Counter[str] = Counter(inputs=inputs, right=0, partly=0, refused=0, violations=0)
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
    parser.add_argument("--inputs", type=int, default=10_000, help="how many for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, action="append", help="these readers alone")
    parser.add_argument("--no-keep", action="store_true", help="write no results file")
    options = parser.parse_args()
    results = {}
    for kind in options.only or KINDS:
        results[kind] = fuzz(kind, options.inputs, options.seed)
        print(json.dumps({kind: results[kind]}), flush=True)
    kept = {**about_here(), "seed": options.seed, "readers": results}
    if not options.no_keep:
        path = HERE / "results" / "fuzz.json"
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(path)
    bad = sum(r["violations"] + r["crashes"] + r["hangs"] for r in results.values())
    sys.exit(f"{bad} inputs were not handled as promised" if bad else 0)


if __name__ == "__main__":
    main()
