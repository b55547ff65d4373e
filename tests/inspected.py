"""Inspections for tests: tables of the shape that the measures give, with known contents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from manylora.findings import Finding
from manylora.inspect.frames import Inspection
from manylora.inspect.initialisation import summary

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def layers(blocks: int) -> pd.DataFrame:
    """layer, module, depth of a Llama with so many blocks."""
    return pd.DataFrame(
        [
            (f"model.layers.{d}.{'mlp' if k[0] in 'gud' else 'self_attn'}.{k}", k, d)
            for d in range(blocks)
            for k in KINDS
        ],
        columns=["layer", "module", "depth"],
    )


def inspection(
    runs: Sequence[str] = ("hydra",),
    blocks: int = 4,
    branches: int = 3,
    tasks: Sequence[str] = ("code", "law", "bank"),
    rank: int = 4,
    **changes: Any,
) -> Inspection:
    """Every measure of runs of this size; the second run's values fall more slowly."""
    at = layers(blocks)
    parts = [
        "mean routing",
        *(f"branch {i}" for i in range(branches)),
        *(f"task {t}" for t in tasks),
    ]
    frames = {
        **_spectra(runs, at, parts, rank),
        "subspaces": _subspaces(runs, at, branches, rank),
        "projection": _projection(runs, at, branches),
        "initialisation": _initialisation(runs, at),
        "likeness": summary(_initialisation(runs, at)),
        **_routing(runs, at, tasks, branches),
        "confusion": _each(runs, tasks, range(branches), ["task", "branch"], rows=8),
        "distances": _distances(runs, tasks, branches),
        "interference": _interference(runs, at, tasks, branches),
        "transfer": _transfer(runs, tasks),
        "training": training(runs, tasks, branches),
    }
    findings = {runs[0]: [Finding("routing", "problem", "branch 2 is dead", "train longer")]}
    missing = {"transfer": "`manylora inspect RUN --leave-out TASK` gives it"}
    return Inspection(
        **{"runs": list(runs), "frames": frames, "findings": findings, "missing": missing} | changes
    )


def _each(runs: Any, first: Any, second: Any, names: list[str], **values: Any) -> pd.DataFrame:
    rows = [(run, a, b) for run in runs for a in first for b in second]
    return pd.DataFrame(rows, columns=["run", *names]).assign(**values)


def _spectra(
    runs: Sequence[str], at: pd.DataFrame, parts: Sequence[str], rank: int
) -> dict[str, pd.DataFrame]:
    values, spectra = [], []
    for r, run in enumerate(runs):
        for p, part in enumerate(parts):
            for row in at.itertuples(index=False):
                fall = 0.3 / (1 + r) * (1 + 0.1 * p + 0.02 * row.depth)
                found = np.exp(-fall * np.arange(rank))
                head = (run, *row, part)
                values += [(*head, i + 1, v) for i, v in enumerate(found)]
                share = found / found.sum()
                entropy = float(-(share * np.log(share)).sum())
                spectra.append(
                    (
                        *head,
                        rank,
                        float(np.hypot.reduce(found)),
                        float(share[0]),
                        float(share[: max(1, rank // 4)].sum()),
                        entropy,
                        float(np.exp(entropy)),
                        0.1 * p % 1,
                    )
                )
    head = ["run", "layer", "module", "depth", "part"]
    more = ["rank", "frobenius", "top1", "top_quarter", "entropy", "effective_rank", "gini"]
    return {
        "singular_values": pd.DataFrame(values, columns=[*head, "index", "value"]),
        "spectra": pd.DataFrame(spectra, columns=[*head, *more]),
    }


def _subspaces(runs: Sequence[str], at: pd.DataFrame, branches: int, rank: int) -> pd.DataFrame:
    updates = [f"{run}: branch {i}" for run in runs for i in range(branches)]
    pairs = [(a, b) for i, a in enumerate(updates) for b in updates[i + 1 :]]
    found = pd.DataFrame(pairs, columns=["left", "right"])
    for name, values in (
        ("side", ["input", "output"]),
        ("i", list(range(1, rank + 1))),
        ("j", list(range(1, rank + 1))),
    ):
        found = found.merge(pd.DataFrame({name: values}), how="cross")
    found = at.merge(found, how="cross")
    return found.assign(
        phi=np.minimum(found["i"], found["j"]) / rank * (1 - 0.1 * (found["depth"] % 5))
    )


def _projection(runs: Sequence[str], at: pd.DataFrame, branches: int) -> pd.DataFrame:
    parts = [("A", "shared"), *(("B", f"branch {i}") for i in range(branches))]
    found = pd.DataFrame({"run": list(runs)}).merge(at, how="cross")
    found = found.merge(pd.DataFrame(parts, columns=["matrix", "part"]), how="cross")
    noise = np.random.default_rng(0).normal(size=(len(found), 2))
    kind = found["module"].map(KINDS.index)
    return found.assign(
        x=3 * np.cos(kind) + 0.4 * noise[:, 0], y=3 * np.sin(kind) + 0.4 * noise[:, 1]
    )


def _initialisation(runs: Sequence[str], at: pd.DataFrame) -> pd.DataFrame:
    """A: 0.95 alike, 0.9 of it by the start; B: 0.2 alike, all learned."""
    found = at.merge(pd.DataFrame({"matrix": ["A", "B"]}), how="cross")
    is_a = found["matrix"] == "A"
    found = found.assign(left=f"{runs[0]}: all branches", right=f"{runs[-1]}: all branches")
    found["pair"] = "same seed, other data"
    names = {
        "similarity": (0.95, 0.2),
        "at_start": (0.99, np.nan),
        "of_change": (0.1, 0.2),
        "explained": (0.9, 0.0),
        "from_start": (0.855, 0.0),
        "from_change": (0.05, 0.2),
        "subspace": (0.9, 0.3),
        "subspace_at_start": (0.99, np.nan),
        "subspace_of_change": (0.1, 0.3),
    }
    return found.assign(**{name: np.where(is_a, a, b) for name, (a, b) in names.items()})


def _routing(
    runs: Sequence[str], at: pd.DataFrame, tasks: Sequence[str], branches: int
) -> dict[str, pd.DataFrame]:
    base = pd.DataFrame({"run": list(runs)}).merge(at, how="cross")
    by_task = base.merge(pd.DataFrame({"task": list(tasks)}), how="cross")
    usage = by_task.merge(pd.DataFrame({"branch": range(branches)}), how="cross")
    favourite = usage["task"].map({t: i % branches for i, t in enumerate(tasks)})
    weight = np.where(favourite == usage["branch"], 0.6, 0.4 / max(branches - 1, 1))
    words = ["The", "quick", "brown", "<b>fox</b>", "jumps", "over", "the", "lazy", "&", "dog"]
    tokens = [
        (
            run,
            layer,
            task,
            e,
            p,
            word + " ",
            b,
            0.7 if b == p % branches else 0.3 / max(branches - 1, 1),
        )
        for run in runs
        for layer in ("", at["layer"].iloc[0])
        for task in tasks
        for e in range(2)
        for p, word in enumerate(words)
        for b in range(branches)
    ]
    columns = ["run", "layer", "task", "example", "position", "text", "branch", "weight"]
    return {
        "usage": usage.assign(weight=weight),
        "entropy": by_task.assign(of_mean=0.98, mean_of_tokens=0.7 + 0.01 * by_task["depth"]),
        "information": base.assign(nats=0.02 * base["depth"], share=0.01 * base["depth"]),
        "tokens": pd.DataFrame(tokens, columns=columns),
    }


def _distances(runs: Sequence[str], tasks: Sequence[str], branches: int) -> pd.DataFrame:
    found = _each(runs, tasks, range(20), ["task", "branch"], threshold=0.9)
    distance = 0.2 + 0.04 * found["branch"]
    return found.assign(
        branch=found["branch"] % branches, distance=distance, accepted=distance < 0.9
    )


def _interference(
    runs: Sequence[str], at: pd.DataFrame, tasks: Sequence[str], branches: int
) -> pd.DataFrame:
    parts = ["all", "A", *(f"branch {i}" for i in range(branches))]
    found = pd.DataFrame({"run": list(runs)}).merge(at, how="cross")
    for name, values in (("part", parts), ("task", list(tasks)), ("other", list(tasks))):
        found = found.merge(pd.DataFrame({name: values}), how="cross")
    found = found[found["task"] != found["other"]]
    a, b = (found[c].map({t: i for i, t in enumerate(tasks)}) for c in ("task", "other"))
    cosine = 0.3 * np.cos(2.0 * (a + b)) + 0.02 * found["depth"]
    return found.assign(cosine=cosine, norm=1.0, other_norm=1.0)


def _transfer(runs: Sequence[str], tasks: Sequence[str]) -> pd.DataFrame:
    """Without the first task it is 0.5 nats worse itself, and the others 0.02 better."""
    found = _each(runs, tasks[:1], tasks, ["left_out", "task"])
    nll = np.where(found["task"] == tasks[0], 0.5, -0.02)
    return found.assign(nll=nll, low=nll - 0.01, high=nll + 0.01)


def training(
    runs: Sequence[str], tasks: Sequence[str], branches: int, steps: int = 30
) -> pd.DataFrame:
    """Loss, rate, gradient norms, pace, memory and energy over the steps."""
    rows = []
    for r, run in enumerate(runs):
        for step in range(10, 10 * steps + 1, 10):
            loss = 1 + 20 / (step + 10 + 5 * r)
            rows += [
                (run, step, "loss", "", loss),
                (run, step, "learning_rate", "", 1e-3 * (1 - step / (10 * steps + 10))),
                (run, step, "grad_norm", "", 0.5 + 1 / step),
                (run, step, "tokens_per_second", "", 400.0 + step % 7),
                (run, step, "memory_gib", "", 2.5),
                (run, step, "energy_kwh", "", 1e-4 * step),
            ]
            rows += [(run, step, "task_loss", t, loss + 0.1 * i) for i, t in enumerate(tasks)]
            rows += [
                (run, step, "branch_grad_norm", str(i), 0.1 * (i + 1)) for i in range(branches)
            ]
    return pd.DataFrame(rows, columns=["run", "step", "what", "of", "value"])
