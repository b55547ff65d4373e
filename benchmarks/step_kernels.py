"""Which GPU kernels a training step is made of, and for how long the GPU waits between them.

    python benchmarks/step_kernels.py --mode eager compiled --method frozen hydralora
    python benchmarks/step_kernels.py --show

Rows of benchmarks/speed.py at LLaMA-2-7B's shapes, one profiled step of each after three others.
Appends {commit, device, torch, row, busy_ms, span_ms, kernels: [[name, launches, ms], ...]} to
benchmarks/results/step_kernels.jsonl; --show compares each kept row with the frozen one of its
commit, kernel by kernel. COMMIT in the environment says the commit where the tree has no history.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from here import commit, device
from torch.profiler import ProfilerActivity, profile

from manylora.speed.contender import Contender
from manylora.speed.grid import METHODS, Row
from manylora.speed.model import Shape, random_base

RESULTS = Path(__file__).parent / "results" / "step_kernels.jsonl"
NAME = 120  # characters of a kernel's name that are kept
LEAST = 0.8  # ms of a difference that is shown


def kernels_of(contender: Contender) -> dict[str, Any]:
    for _ in range(3):
        contender.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        contender.step()
        torch.cuda.synchronize()
    launches: dict[str, int] = defaultdict(int)
    ms: dict[str, float] = defaultdict(float)
    times = []
    for event in profiled.events():
        if event.device_type.name == "CUDA":
            launches[event.name[:NAME]] += 1
            ms[event.name[:NAME]] += event.device_time_total / 1000
            times += [event.time_range.start, event.time_range.end]
    longest = sorted(ms, key=lambda name: -ms[name])
    return {
        "busy_ms": round(sum(ms.values()), 3),
        "span_ms": round((max(times) - min(times)) / 1000, 3),
        "kernels": [[name, launches[name], round(ms[name], 3)] for name in longest],
    }


def show() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        words = row["row"].split()
        print(f"\n{row['commit']} {row['row']}: busy {row['busy_ms']:.1f} ms")
        frozen = [
            other
            for other in rows
            if other["commit"] == row["commit"]
            and other["row"].split()[:2] == [words[0], "frozen"]
            and ("checkpointed" in other["row"]) == ("checkpointed" in row["row"])
            and "merged" not in other["row"]
        ]
        if not frozen or words[1] == "frozen":
            continue
        own, base = ({name: ms for name, _, ms in r["kernels"]} for r in (row, frozen[0]))
        more = {name: own.get(name, 0) - base.get(name, 0) for name in {*own, *base}}
        for name, ms in sorted(more.items(), key=lambda item: -abs(item[1])):
            if abs(ms) >= LEAST:
                print(f"  {ms:+8.2f} ms  {name[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", nargs="+", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["frozen", "hydralora"])
    parser.add_argument("--n", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--show", action="store_true", help="measure nothing; show what is kept")
    given = parser.parse_args()
    if given.show:
        show()
        return
    base = random_base(Shape(), torch.device("cuda"), 2048)
    facts = {"commit": commit(), "device": device(), "torch": torch.__version__}
    for mode in given.mode:
        for method in given.method:
            row = Row(mode, method, n=given.n, checkpointing=given.checkpointing)
            found = facts | {"row": str(row)} | kernels_of(Contender(base, row))
            torch.cuda.empty_cache()
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(f"{row}: busy {found['busy_ms']:.1f} of {found['span_ms']:.1f} ms")


if __name__ == "__main__":
    main()
