"""Forward, backward and AdamW on the adapter: manylora beside its peers, all rows in turns.

    python benchmarks/speed.py --part main checkpointed --mode eager --time-limit 500
    python benchmarks/speed.py --show --plots docs/performance
    python benchmarks/speed.py --layers 2 --hidden 64 --intermediate 96 --heads 4 --vocab 128 \
        --rows 2 --length 32 --output /tmp/tiny

LLaMA-2-7B's shapes, random bf16 weights; every row shares the one frozen model. Prints the table
and the targets. Appends raw rows to OUTPUT/speed.jsonl; to OUTPUT/speed_merged.jsonl those of the
frozen model whose q, k, v and gate, up accumulate their input's gradient in place; energy, measured
after the time limit, to OUTPUT/speed_energy.jsonl.
COMMIT in the environment says the commit where the tree has no history.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
from here import commit, device

from manylora.speed import results
from manylora.speed.electricity import measure_energy
from manylora.speed.grid import METHODS, PARTS, Row, grid
from manylora.speed.measure import OUT_OF_MEMORY, Plan, measure
from manylora.speed.model import Shape, random_base
from manylora.speed.plots import draw

RESULTS = Path(__file__).parent / "results"
MERGED = "speed_merged.jsonl"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_argument_group("which rows")
    which.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    which.add_argument("--mode", nargs="+", choices=("eager", "compiled"), default=["eager"])
    which.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    which.add_argument("--targets", nargs="+", choices=("all", "mlp", "qv"))
    which.add_argument("--n", nargs="+", type=int, help="branches (frozen rows always stay)")
    which.add_argument("--rows", type=int, help="packed rows in a step, instead of the grid's")
    which.add_argument("--length", type=int, help="tokens of each, instead of the grid's")
    which.add_argument("--list", action="store_true", help="print the rows and stop")
    how = parser.add_argument_group("how they are measured")
    how.add_argument("--steps", type=int, default=20)
    how.add_argument("--turn", type=int, default=5, help="steps of a row before the next one's")
    how.add_argument("--warm-up", type=int, default=1)
    how.add_argument("--time-limit", type=float, help="seconds; what was measured is kept")
    how.add_argument("--backend", default="inductor", help="of torch.compile")
    how.add_argument("--energy", action="store_true", help="kWh of 1000 steps too (CodeCarbon)")
    how.add_argument("--energy-seconds", type=float, default=20.0)
    shape = parser.add_argument_group("the model; default LLaMA-2-7B")
    for field in fields(Shape):
        shape.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    output = parser.add_argument_group("what is written")
    output.add_argument("--output", type=Path, default=RESULTS)
    output.add_argument("--plots", type=Path, help="a folder for the plots")
    output.add_argument("--show", action="store_true", help="measure nothing; show OUTPUT's rows")
    output.add_argument("--of", metavar="COMMIT", help="show its rows, not the newest ones")
    return parser.parse_args()


def chosen(given: argparse.Namespace) -> list[Row]:
    rows = [
        row
        for row in grid(given.part, given.mode)
        if row.method in given.method
        and (given.targets is None or row.targets in given.targets)
        and (given.n is None or row.method == "frozen" or row.n in given.n)
    ]
    changes = {k: v for k in ("rows", "length") if (v := getattr(given, k)) is not None}
    return list(dict.fromkeys(replace(row, **changes) for row in rows))


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def show(path: Path, plots: Path | None, shape: Shape, of: str | None = None) -> None:
    rows = results.read(path, of)
    print(f"{rows[0]['device']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}\n")
    print(results.table(rows) + "\n")
    for target in results.targets(rows):
        print(target)
    for row in merged_rows(path.parent / MERGED, rows[0]["commit"]):
        ratio = results.times(row, results.frozen_of(rows, row))
        if ratio is not None:
            print(f"{row['mode']}, frozen with merged input gradients / frozen: {ratio:.3f}")
    if plots is not None:
        print("\n" + "\n".join(map(str, draw(rows, plots, shape))))


def merged_rows(path: Path, commit: str) -> list[results.Raw]:
    """Those of a commit; none where it measured none."""
    try:
        return results.read(path, commit)
    except ValueError:
        return []


def main() -> int:
    given = arguments()
    shape = Shape(**{field.name: getattr(given, field.name) for field in fields(Shape)})
    if shape != Shape() and given.output == RESULTS:
        sys.exit(f"{RESULTS} is for LLaMA-2-7B's shapes, and rows do not say theirs: give --output")
    path = given.output / "speed.jsonl"
    if given.show:
        show(path, given.plots, shape, given.of)
        return 0
    rows = chosen(given)
    if given.list or not rows:
        print("\n".join(map(str, rows)) or "no row is left of the grid")
        return 0
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = random_base(shape, where, max(row.length for row in rows))
    plan = Plan(given.steps, given.turn, given.warm_up, given.time_limit, given.backend)
    measured = measure(base, rows, plan, say)
    raw = results.raw_rows([m for m in measured if not m.row.merged], commit(), device())
    merged = results.raw_rows([m for m in measured if m.row.merged], commit(), device())
    results.append(path, raw)
    results.append(given.output / MERGED, merged)
    if given.energy:
        facts = {"commit": commit(), "device": device(), "torch": torch.__version__}
        blocks = measure_energy(measured, say, given.energy_seconds)
        results.append(given.output / "speed_energy.jsonl", [{**facts, **b} for b in blocks])
        print("\n".join(json.dumps(block) for block in blocks))
    if raw:
        show(path, given.plots, shape)
    broken = [m for m in measured if m.error not in (None, OUT_OF_MEMORY)]
    missing = [m for m in measured if m.error is None and len(m.step_ms) < results.LEAST_STEPS]
    for one in missing:
        say(f"{one.row}: {len(one.step_ms)} steps measured, fewer than {results.LEAST_STEPS}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
