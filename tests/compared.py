"""Comparisons for tests: rows whose methods, seeds and examples differ by known amounts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from manylora.comparison.intervals import differences, summarise
from manylora.comparison.result import Comparison, MethodInfo, RatePoint
from manylora.comparison.rows import SCHEMA, Scores
from manylora.comparison.verdict import verdict

BUDGET = 4_884_480
METHODS = {
    "lora": 0.0,
    "lora_split": 0.002,
    "multilora": -0.012,
    "hydralora": -0.03,
    "lora_moe": -0.011,
    "adalora": 0.02,
    "ia3": 0.14,
    "branch_per_cluster": -0.005,
    "lora_split_one_hot": 0.015,
    "branch_per_cluster_shared": -0.02,
    "rslora": 0.001,
    "dora": -0.004,
}
TASKS = ["cuad", "gsm8k", "banking77", "medquad"]


def rows(
    effects: Mapping[str, float],
    tasks: Sequence[str] = TASKS,
    seeds: int = 3,
    examples: int = 40,
    seed_sd: float = 0.004,
    example_sd: float = 0.05,
    rest_sd: float = 0.05,
    rng: int = 0,
) -> pa.Table:
    """The test rows of methods whose nll a token is the task's plus their effect, plus noise."""
    random = np.random.default_rng(rng)
    parts = []
    names = [f"rows.jsonl:{i}" for i in range(examples)]
    for task, name in enumerate(tasks):
        tokens = random.integers(1, 40, examples)
        hard = 0.5 + 0.05 * task + random.exponential(0.3, examples)
        for method, effect in effects.items():
            own = example_sd * (random.exponential(1.0, examples) - 1)
            for seed in range(seeds):
                noise = random.normal(0, seed_sd) + random.normal(0, rest_sd, examples)
                nll = tokens * (hard + effect + own + noise)
                parts.append(table(method, seed, name, names, tokens, nll, nll < 0.9 * tokens))
    return pa.concat_tables(parts)


def table(
    method: str,
    seed: int,
    task: str,
    examples: Sequence[str],
    tokens: Any,
    nll: Any,
    correct: Any,
    stage: str = "test",
) -> pa.Table:
    """One run's rows of a task."""
    count = len(examples)
    columns = {
        "run": [f"{method}-{seed}-{stage}"] * count,
        "method": [method] * count,
        "params": [1000] * count,
        "lr": [1e-3] * count,
        "seed": [seed] * count,
        "stage": [stage] * count,
        "task": [task] * count,
        "example": list(examples),
        "tokens": tokens,
        "nll": nll,
        "correct": correct,
    }
    return pa.table(columns, schema=SCHEMA)


def info(name: str, **changes: Any) -> MethodInfo:
    """A method at the budget with five rates, the middle one best."""
    centre = 8e-3 if name == "ia3" else 2e-3 if name == "multilora" else 1e-3
    rates = [
        RatePoint(lr=centre * step, nll=0.95 + loss + 0.1 * METHODS.get(name, 0.0), correct=0.3)
        for step, loss in ((0.25, 0.11), (0.5, 0.04), (1.0, 0.0), (2.0, 0.03), (4.0, 0.9))
    ]
    fields: dict[str, Any] = {
        "name": name,
        "label": f"{name} r=16",
        "params": BUDGET - 31 * len(name) ** 2,
        "budget_share": 1 - 31 * len(name) ** 2 / BUDGET,
        "note": f"r=16 is the largest that fits {BUDGET:,}",
        "rates": rates,
        "best_lr": centre,
        "at_edge": False,
        "seconds": 312.4,
        "energy_kwh": {"cpu": 0.0123, "gpu": 0.0314, "ram": 0.0021},
        "peak_memory_bytes": 5 * 2**30,
    }
    if name == "ia3":
        fields |= {"params": 193_536, "budget_share": 193_536 / BUDGET, "label": "IA3"}
        fields |= {"note": "0.04 of the budget: IA3 has no size"}
    return MethodInfo(**{**fields, **changes})


def compared(
    methods: int = 8,
    tasks: int = 4,
    seeds: int = 3,
    effects: Mapping[str, float] | None = None,
    infos: Mapping[str, dict[str, Any]] | None = None,
    examples: int = 40,
    **changes: Any,
) -> Comparison:
    """A comparison of the first methods of METHODS; infos: other fields of a method."""
    effects = dict(list(METHODS.items())[:methods]) if effects is None else effects
    names = (TASKS + [f"{TASKS[i % 4]}_part_{i:02}" for i in range(4, tasks)])[:tasks]
    scores = Scores.of(rows(effects, names, seeds, examples))
    reference = next(iter(effects))
    found = [info(name, **(infos or {}).get(name, {})) for name in effects]
    summary = summarise(scores, 1000)
    apart = [d for m in ("nll", "correct") for d in differences(scores, reference, m, 1000)]
    fields: dict[str, Any] = {
        "command": f"manylora compare recipe.yaml --methods {','.join(effects)} --seeds {seeds}",
        "budget": "lora:r=16",
        "budget_params": BUDGET,
        "reference": reference,
        "seeds": seeds,
        "methods": found,
        "scores": summary,
        "differences": apart,
        "verdict": verdict(reference, found, summary, apart),
        "settings": {"model": "smollm2-135m-instruct", "steps": 400, "max_length": 512},
        "device": "NVIDIA H100 80GB HBM3",
    }
    return Comparison(**{**fields, **changes})
