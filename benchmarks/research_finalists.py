"""Which methods are the finalists of docs/research.md, by its rule.

    python benchmarks/research_finalists.py

From the rate trials of stages 3 and 4 alone (seed 0, rows kept apart; no held-out row is looked
at): the method whose best trial is lowest on the data as they are, and the one whose best trials
are lowest on average over the readings, of those run in all three. They may be the same one.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
from readings import READINGS
from research_kept import ROWS, best_trials
from research_parts import FALLBACK, SHARED, VARIANTS

KEPT = Path(__file__).parent / "results" / ROWS
IN_ALL_READINGS = (SHARED, *FALLBACK)
# Ranks by need are left out: by loss or gain, they take a training before the training.
AS_IS = (*IN_ALL_READINGS, *(name for name in VARIANTS if "branch_ranks" not in name))
PARTS = [
    "4-variants",
    *(f"{stage}-{r}" for stage in ("3-clusters", "4-fallback") for r in READINGS),
]


def finalists(kept: Path) -> tuple[str, ...]:
    """Raises KeyError for a method that has no trial yet."""
    best = _best_trials(kept)
    first = min(AS_IS, key=lambda name: best["as_is", name])
    second = min(IN_ALL_READINGS, key=lambda name: sum(best[r, name] for r in READINGS))
    return (first,) if first == second else (first, second)


def _best_trials(kept: Path) -> dict[tuple[str, str], float]:
    """Nats a token, tasks alike, of each method's best trial, by reading and method."""
    rows = pq.read_table(kept, filters=[("stage", "==", "rate"), ("part", "in", PARTS)])
    return {
        (reading, name): point.nll
        for reading in pc.unique(rows["reading"]).to_pylist()
        for name, (point, _) in best_trials(rows.filter(pc.equal(rows["reading"], reading))).items()
    }


def shown(kept: Path) -> str:
    """Best trials of LoRA and each method, nats a token; the finalists with a star."""
    best, chosen = _best_trials(kept), finalists(kept)
    lines = [f"| method | {' | '.join(READINGS)} | all three |", f"|---|{'---:|' * 4}"]
    for name in ("lora", *AS_IS):
        nats = [best.get((reading, name)) for reading in READINGS]
        every = sum(nats) / len(nats) if None not in nats else None
        cells = ["" if one is None else f"{one:.4f}" for one in (*nats, every)]
        lines.append(f"| {name}{' *' * (name in chosen)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(shown(KEPT))
