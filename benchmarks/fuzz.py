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
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from in_children import finish, fuzz

from fuzz_check import ViolationError, check
from fuzzing import READERS, make_case
from fuzzing_recipes import check_recipe, make_recipe_case

KINDS = (*READERS, "recipe")
OUTCOMES = ("right", "partly", "refused")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="how many for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, action="append", help="these readers alone")
    parser.add_argument("--no-keep", action="store_true", help="write no results file")
    options = parser.parse_args()
    results = {}
    for kind in options.only or KINDS:
        results[kind] = fuzz(work, kind, options.inputs, options.seed, OUTCOMES)
        print(json.dumps({kind: results[kind]}), flush=True)
    finish(results, options.seed, "readers", None if options.no_keep else "fuzz.json")


if __name__ == "__main__":
    main()
