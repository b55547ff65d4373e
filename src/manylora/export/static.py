"""A token router's best plain LoRAs: measured on training rows, compared on held-out rows.

Two for each task (or cluster, where those are the run's tasks) and two for all tasks, to which
every task counts the same: mixing weights at their mean, or fitted by least squares
(`static_fit.py`). As plain LoRAs all are exported; where there is room for one (a merged model, a
GGUF) it is the `better` one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from peft import PeftModel
from rich.console import Console

from manylora.base import load_tokenizer
from manylora.corpus import Corpus, Encoder
from manylora.evaluate.answers import left_padded
from manylora.evaluate.scores import HeldOut, held_out
from manylora.export.lora import folders_of, write_checked
from manylora.export.plans import ALL, MEAN_NOTE, Plan, adapted, load_exact, named
from manylora.export.record import Export, ExportError, record, written_whole
from manylora.export.static_fit import Batch, Name, Static, measure
from manylora.export.static_gap import gaps_of
from manylora.recipe import Recipe
from manylora.run import recipe_of
from manylora.training.clusters import KEPT, settle

ROWS = 128
KINDS = ("mean", "fit")


@dataclass(frozen=True)
class Measured:
    """A static update, what it is for, and its gap by task: [gap, low, high]."""

    plan: Plan
    name: Name
    gap: dict[str, list[float]]


def export_static(
    run: Path,
    output: Path,
    rank: int | None = None,
    rows: int | None = None,
    console: Console | None = None,
    adapter: str = "default",
) -> list[Export]:
    """Write mean_all_tasks, fit_all_tasks, mean_TASK and fit_TASK, each with its `gap`.

    rank: of the fitted LoRAs; default: all that the branches have together, which loses nothing.
    rows: of each task, training rows to fit on and held-out rows to compare on; default 128, and
    the recipe's rows_per_task.

    Raises ExportError for a run without a router or without held-out rows, and as `export_lora`.
    """
    with written_whole(output) as partial:
        model = load_exact(run)
        found = compare(run, model, adapter, rank, rows, console)
        plans = [one.plan for one in found]
        differences = write_checked(model, adapter, recipe_of(run).model, plans, partial)
    exports = [
        Export(str(folder), "lora", False, difference, one.plan.note, one.gap)
        for one, folder, difference in zip(
            found, folders_of(plans, output), differences, strict=True
        )
    ]
    return record(run, exports)


def compare(
    run: Path,
    model: PeftModel,
    adapter: str,
    rank: int | None = None,
    rows: int | None = None,
    console: Console | None = None,
    only: Sequence[Name] | None = None,
) -> list[Measured]:
    """The mean and the fit of every name, measured on training rows, compared on held-out rows.

    model: from `load_exact`; it is on the GPU meanwhile, where there is one. rank, rows: as
    `export_static`. only: these names alone. Errors as `export_static`, and for a name that is no
    task.
    """
    console = console or Console(stderr=True)
    layers = adapted(model, adapter)
    if layers[0].branches[adapter].gate != "router":
        raise ExportError(f"{run} has no token router; it exports exactly, without --static")
    recipe = recipe_of(run)
    tokenizer = load_tokenizer(recipe.model)
    batches, held = _rows_of(run, recipe, Encoder(tokenizer, recipe.max_length), rows, console)
    names = [None, *batches] if only is None else list(only)
    if unknown := [name for name in names if name is not None and name not in batches]:
        known = ", ".join(batches)
        raise ExportError(f"no update is called task={unknown[0]!r}; the run has {known}")
    if None not in names:
        batches = {task: own for task, own in batches.items() if task in names}
        held = [task for task in held if task.name in names]
    console.print(f"measuring {len(layers)} routed layers on rows of {len(batches)} tasks")
    with _on_the_gpu(model):
        plans = plans_from(measure(model, layers, adapter, batches, rank, names))
        owners = [name for name in names for _ in KINDS]
        console.print(f"comparing {len(plans)} static LoRAs on the held-out rows")
        pairs = list(zip(plans, owners, strict=True))
        gaps = gaps_of(model, adapter, pairs, held, tokenizer, recipe.evaluate.batch_size)
    return [Measured(*found) for found in zip(plans, owners, gaps, strict=True)]


def better(found: Sequence[Measured]) -> list[Measured]:
    """Of the mean and the fit for each name the one with the smaller gap, as its note says.

    For all tasks that is the mean of their gaps. Where on no task the run is better than its base
    there is none, and the fit is taken, which is nearer to the run itself.
    """
    best = []
    for pair in zip(found[::2], found[1::2], strict=True):
        if all(one.gap for one in pair):
            lost = [fmean(value for value, _, _ in one.gap.values()) for one in pair]
            taken = int(lost[1] <= lost[0])
            said = (
                f"it loses {100 * lost[taken]:.2f} % of what training gave, the "
                f"{KINDS[1 - taken]} would lose {100 * lost[1 - taken]:.2f} %"
            )
        else:
            taken, said = 1, "not compared: on no held-out task is the run better than its base"
        one = pair[taken]
        best.append(replace(one, plan=replace(one.plan, note=f"{one.plan.note}; {said}")))
    plans = named(replace(one.plan, name=_label(one.name)) for one in best)
    return [replace(one, plan=plan) for one, plan in zip(best, plans, strict=True)]


def _rows_of(
    run: Path, recipe: Recipe, encoder: Encoder, rows: int | None, console: Console
) -> tuple[dict[str, list[Batch]], list[HeldOut]]:
    """Training rows of each task to measure on, and held-out rows to compare on."""
    corpus = settle(recipe, recipe.load_corpus(), console, run / KEPT).corpus
    held, notes = held_out(corpus, encoder, rows or recipe.evaluate.rows_per_task)
    for note in notes:
        console.print(note, style="yellow", markup=False)
    if not held:
        raise ExportError(f"{run} holds out no rows to compare on; train with holdout=0.1")
    return _training_batches(corpus, encoder, recipe, rows or ROWS), list(held)


@contextmanager
def _on_the_gpu(model: PeftModel) -> Iterator[None]:
    device = model.device
    if torch.cuda.is_available():
        model.to("cuda")
    try:
        yield
    finally:
        model.to(device)


def _label(name: Name) -> str:
    return ALL if name is None else name


def plans_from(static: Static) -> list[Plan]:
    """mean_NAME and fit_NAME for every name, in its order."""
    plans = []
    for name, weights in static.means.items():
        factors, label = static.fits[name], _label(name)
        rank = max(len(A) for A, _ in factors.values())
        fitted = f"least squares of rank {rank} on {static.tokens[name]:,} tokens: an approximation"
        plans.append(Plan(f"mean_{label}", weights, None, False, MEAN_NOTE))
        plans.append(Plan(f"fit_{label}", {}, None, False, fitted, factors))
    return named(plans)


def _training_batches(
    corpus: Corpus, encoder: Encoder, recipe: Recipe, rows: int
) -> dict[str, list[Batch]]:
    """Training rows of every task, prompts and answers, as padded batches."""
    size, batches = min(recipe.evaluate.batch_size, max(1, rows // 4)), {}
    for task in corpus.tasks:
        encoded, _ = encoder.split_too_long(islice(corpus.train[task], rows))
        ids = [list(item.input_ids) for item in encoded]
        if ids:
            batches[task] = [left_padded(ids[i : i + size], 0) for i in range(0, len(ids), size)]
    return batches
