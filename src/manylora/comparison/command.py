"""`manylora compare`: the grid run, and what it says."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from peft import PrefixTuningConfig
from rich.console import Console
from transformers import PreTrainedModel

from manylora.base import load_model
from manylora.comparison.contenders import Contender, contenders
from manylora.comparison.grid import Grid
from manylora.comparison.ground import Ground, prepare_ground
from manylora.comparison.intervals import differences, summarise
from manylora.comparison.result import (
    COMPARISON_FILE,
    ROWS_FILE,
    Comparison,
    MethodInfo,
)
from manylora.comparison.rows import Scores
from manylora.comparison.store import CellStore
from manylora.comparison.tables import markdown
from manylora.comparison.verdict import verdict
from manylora.corpus import Data
from manylora.energy import require_codecarbon
from manylora.recipe import Choice, Recipe
from manylora.report.comparison import write_comparison_page
from manylora.training.checkpoints import write_atomically
from manylora.training.compiled import CompileError, check_compile
from manylora.training.packing import PackingError, check_packing

PAGE_FILE, TABLES_FILE = "comparison.html", "comparison.md"


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    budget: str,
    seeds: int,
    rate: float | None,
    output: Path,
    parallel: int,
    console: Console,
    energy: bool = False,
    choice: Choice = "told",
    unseen: Path | None = None,
    wider_rates: bool = False,
) -> Comparison:
    """Run what of the comparison has not been run, and write what it says to `output`.

    Args:
        recipe: the data, the base model and how to train; its adapter gives what all methods
            share (target modules).
        methods: names as in contenders.py; the first is the reference.
        budget: "lora:r=16" or a number of parameters, which no method exceeds.
        seeds: runs of each method at its rate.
        rate: one learning rate for all; None tunes it for each.
        parallel: runs side by side; 0 finds out.
        energy: measure each run's with CodeCarbon.
        choice: whether methods with a branch for each task are told it, or choose it from the
            prompt by a selector, whose numbers count.
        unseen: data of tasks that are scored without being trained on; their rows are in the table,
            of stage "unseen", and in no figure.
        wider_rates: whether a method whose best trial is its lowest or highest rate has two more
            beyond it.

    Raises ValueError for methods or a budget that cannot be, CorpusError for the data.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: at least one run of each method is needed")
    if energy:
        require_codecarbon()
    check_compile(recipe.train.compile)
    ground = prepare_ground(recipe.resolved(), console, choice, unseen)
    base = load_model(recipe.model, recipe.dtype, recipe.quantize)
    adapter = recipe.adapter.model_dump(exclude_unset=True)
    numbers = 0 if ground.selector is None else ground.selector.size
    params, found = contenders(methods, budget, base, len(ground.tasks), adapter, numbers)
    if recipe.packing:
        _check_packing(base, found)
    if recipe.train.compile:
        _check_compiling(found)
    del base
    for contender in found:
        console.print(
            f"{contender.label}: {contender.params:,} parameters. {contender.note}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    output.mkdir(parents=True, exist_ok=True)
    grid = Grid(ground, CellStore(output), console, parallel, energy, wider_rates)
    rates = grid.run(found, seeds, rate)
    comparison = _said(ground, grid, found, rates, budget, params, seeds)
    write(comparison, grid.store.rows(list(grid.keys.values())), output)
    return comparison


def _check_packing(base: PreTrainedModel, found: Sequence[Contender]) -> None:
    """PackingError where packed examples would see each other, in the base model or by a method."""
    check_packing(base)
    for contender in found:
        if contender.config is not None and contender.config.is_prompt_learning:
            raise PackingError(
                f"packing=true: {contender.label} puts tokens of its own before a row, which all "
                "examples packed into it would share; leave packing out, or the method"
            )


def _check_compiling(found: Sequence[Contender]) -> None:
    """CompileError for a method whose blocks cannot share a graph, before any is trained."""
    for contender in found:
        if isinstance(contender.config, PrefixTuningConfig):
            raise CompileError(
                f"train.compile=true: {contender.label} puts states of its own into each block's "
                "cache, so that each needs a graph of its own; leave compile out, or the method"
            )


def rate_of(text: str) -> float | None:
    """One rate for all methods; None for "auto"."""
    if text == "auto":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise ValueError(f"lr={text!r}: give a learning rate above 0, as 1e-3, or auto")
    return rate


def write(comparison: Comparison, rows: pa.Table, output: Path) -> None:
    """comparison.json, its rows, the page and the tables."""
    pq.write_table(rows, output / ROWS_FILE, compression="zstd")
    write_atomically(output / COMPARISON_FILE, comparison.model_dump_json(indent=1))
    write_comparison_page(comparison, output / PAGE_FILE)
    write_atomically(output / TABLES_FILE, markdown(comparison))


def _said(
    ground: Ground,
    grid: Grid,
    found: Sequence[Contender],
    rates: dict[str, float],
    budget: str,
    params: int,
    seeds: int,
) -> Comparison:
    tests = {cell: key for cell, key in grid.keys.items() if cell.stage == "test"}
    scores = Scores.of(grid.store.rows(list(tests.values())))
    reference = found[0].name
    infos = [_info(grid, contender, rates[contender.name], params) for contender in found]
    apart = [
        difference
        for metric in ("nll", "correct")
        for difference in differences(scores, reference, metric)
    ]
    summaries = summarise(scores)
    return Comparison(
        command=shlex.join(["manylora", *sys.argv[1:]]),
        budget=budget,
        budget_params=params,
        reference=reference,
        seeds=seeds,
        methods=infos,
        scores=summaries,
        differences=apart,
        verdict=verdict(reference, infos, summaries, apart),
        settings=_settings(ground, grid),
        device=" and ".join(_seen(grid, "device")),
    )


def _info(grid: Grid, contender: Contender, rate: float, budget: int) -> MethodInfo:
    points = grid.rates(contender)
    tried = [point.lr for point in points]
    own = [
        grid.store.summary(key) or {}
        for cell, key in grid.keys.items()
        if cell.contender is contender and cell.stage == "test"
    ]
    return MethodInfo(
        name=contender.name,
        label=contender.label,
        params=contender.params,
        budget_share=contender.params / budget,
        note=contender.note,
        rates=points,
        best_lr=rate,
        at_edge=bool(tried) and rate in (min(tried), max(tried)),
        seconds=sum(summary["train_seconds"] for summary in own) / len(own),
        energy_kwh=_mean_energy(own),
        peak_memory_bytes=max(summary["peak_memory_bytes"] for summary in own),
    )


def _mean_energy(summaries: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Of the runs whose energy was measured, kWh by part.

    Of what a counter gives for all that ran on a device, a run gets an even share.
    """
    measured = [summary["energy"] for summary in summaries if summary["energy"]]
    if not measured:
        return None
    return {
        part: sum(
            one["kwh"][part] / (one["parallel"] if one["covers"][part] == "machine" else 1)
            for one in measured
        )
        / len(measured)
        for part in measured[0]["kwh"]
    }


def _how_energy(grid: Grid) -> str:
    """What is measured and what estimated, as the first run says it."""
    found = [grid.store.summary(key) for key in grid.keys.values()]
    energies = [one["energy"] for one in found if one and one["energy"]]
    if not energies:
        return "not measured"
    energy = energies[0]
    parts = [
        f"{part} {'measured' if energy['measured'][part] else 'estimated'} ({how}; {covers})"
        for part, how, covers in zip(
            energy["how"], energy["how"].values(), energy["covers"].values(), strict=True
        )
    ]
    beside = max(energy["parallel"] for energy in energies)
    if beside > 1:
        parts.append(f"up to {beside} runs side by side, each with an even share of 'machine'")
    return ", ".join(parts)


def _how_rates(grid: Grid) -> str:
    if not any(cell.stage == "rate" for cell in grid.keys):
        return "one for all, as given"
    wider = ", two beyond where that is the lowest or highest" if grid.wider else ""
    return f"five a method: three a factor of 4 apart, two beside the best{wider}; validation loss"


def _settings(ground: Ground, grid: Grid) -> dict[str, Any]:
    recipe = ground.recipe
    return {
        "model": recipe.model,
        "data": _named(recipe.data),
        "training rows": sum(map(len, ground.train.values())),
        "validation rows": sum(map(len, ground.validation.values())),
        "held-out rows": sum(map(len, ground.test.values())),
        "epochs": recipe.train.epochs,
        "max_steps": recipe.train.max_steps,
        "batch": recipe.train.batch_size * recipe.train.gradient_accumulation,
        "rates": _how_rates(grid),
        "energy": _how_energy(grid),
        "tasks": "methods that choose a branch by task are told it"
        if ground.selector is None
        else f"methods with a branch for each task choose it from the prompt, by a selector of "
        f"{ground.selector.size:,} numbers, which count",
        "versions": "; ".join(
            ", ".join(f"{name} {number}" for name, number in seen.items())
            for seen in _seen(grid, "versions")
        ),
    }


def _named(data: Data) -> str:
    """Names without the folders that they are in on this machine."""
    if isinstance(data, dict):
        return ", ".join(f"{task}: {Path(file).name}" for task, file in data.items())
    return ", ".join(Path(file).name for file in ([data] if isinstance(data, str) else data))


def _seen(grid: Grid, what: str) -> list[Any]:
    """The values that the runs' summaries give, each once."""
    found: list[Any] = []
    for key in grid.keys.values():
        value = (grid.store.summary(key) or {})[what]
        if value not in found:
            found.append(value)
    return found
