"""Fuzzing in child processes, so that a crash or a hang of a library is one outcome of many."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from here import about_here

RESULTS = Path(__file__).resolve().parent / "results"
SILENCE = 60.0

Work = Callable[[str, int, int, int, Connection], None]
"""work(kind, start, stop, seed, results) sends (number, outcome, message, seconds) for each."""


def fuzz(work: Work, kind: str, inputs: int, seed: int, outcomes: Sequence[str]) -> dict[str, Any]:
    """Counts of outcomes; a crash or a hang of the child is one, and the next input goes on."""
    counts: Counter[str] = Counter(inputs=inputs)
    counts.update(dict.fromkeys((*outcomes, "violations", "crashes", "hangs"), 0))
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


def command(
    doc: str,
    kinds: Sequence[str],
    what: str,
    file: str,
    fuzz_kind: Callable[[str, int, int], dict[str, Any]],
) -> None:
    """The command line of a benchmark that shares its inputs out over kinds.

    fuzz_kind(kind, inputs, seed) gives the counts that `fuzz` gives.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--inputs", type=int, default=10_000, help="how many of all together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=kinds, action="append", help="these alone")
    parser.add_argument("--no-keep", action="store_true", help="write no results file")
    options = parser.parse_args()
    chosen, results = options.only or kinds, {}
    for place, kind in enumerate(chosen):
        share = len(range(place, options.inputs, len(chosen)))
        results[kind] = fuzz_kind(kind, share, options.seed)
        print(json.dumps({kind: results[kind]}), flush=True)
    finish(results, options.seed, what, None if options.no_keep else file)


def finish(results: dict[str, dict[str, Any]], seed: int, what: str, file: str | None) -> None:
    """Keep the counts in results/FILE, if one is given; exit with 1 where a promise was broken."""
    if file is not None:
        kept = {**about_here(), "seed": seed, what: results}
        path = RESULTS / file
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(path)
    bad = sum(r["violations"] + r["crashes"] + r["hangs"] for r in results.values())
    sys.exit(f"{bad} inputs were not handled as promised" if bad else 0)
