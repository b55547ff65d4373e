"""What each task gives the others: the run trained again without it, and scored on the others.

    nll(left_out, task) = nll of `task` without `left_out`  -  nll of `task` in the run

in nats per answer token, on the held-out rows: above 0 the left-out task helped, below 0 it hurt.

A run without a task is the run's own recipe with `leave_out`, and as long as draws each of the
other tasks as often as the run did: epochs, or max_steps, are scaled by what is left of the
mixture. (With the same number of steps the others would be trained longer, and that would count as
harm of the left-out task.) The schedule spans the shorter run; the split, the seed and the rows are
the same. It is kept in RUN/transfer/without_TASK, goes on where it was stopped, and is never
trained twice.

Intervals are 95 % over held-out rows, the same rows in both runs (comparison/intervals.py). They do
not hold what another seed of the training would change: repeat it with another seed before a small
difference is believed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console

from manylora.comparison.cell import score_rows
from manylora.comparison.ground import Ground
from manylora.comparison.intervals import differences
from manylora.comparison.rows import SCHEMA, TEST_STAGE, Scores
from manylora.corpus import Corpus, Encoder
from manylora.inspect.frames import COLUMNS
from manylora.precision import autocast
from manylora.recipe import RECIPE_FILE, Recipe, load_recipe, parse_recipe
from manylora.run import SUMMARY_FILE, config_of, is_finished, load, recipe_of
from manylora.train import train
from manylora.training.checkpoints import partial_of
from manylora.training.clusters import KEPT, settle
from manylora.training.prepare import fitting
from manylora.training.run_folder import FREE

FOLDER = "transfer"
WHOLE, WITHOUT = "run", "without"


@dataclass(frozen=True)
class _Origin:
    """The run, its recipe and all its rows."""

    run: Path
    recipe: Recipe
    corpus: Corpus
    rows: int
    console: Console


def transfer(
    run: str | Path,
    tasks: Sequence[str] | None = None,
    rows: int | None = None,
    console: Console | None = None,
) -> pd.DataFrame:
    """Train again without each of `tasks` (default: all), and compare on held-out rows.

    rows: of each task, from the top; default: the recipe's evaluate.rows_per_task.

    Returns columns run, left_out, task, nll (the difference above), low, high. The left-out task is
    a row too, where the method can answer it without a branch of its own: what its own rows give.

    Raises FileNotFoundError for a folder that is no finished run, ValueError for a task that it has
    not, for a run of one task, and where a run is kept that another recipe made.
    """
    folder = Path(run)
    console = console or Console(stderr=True)
    recipe = recipe_of(folder)
    corpus = settle(recipe, recipe.load_corpus(), console, folder / KEPT).corpus
    wanted = corpus.tasks if tasks is None else list(tasks)
    if unknown := [task for task in wanted if task not in corpus.train]:
        raise ValueError(
            f"{folder} was not trained on {', '.join(unknown)}; its tasks are "
            f"{', '.join(corpus.tasks)}"
        )
    if len(corpus.train) < 2:
        raise ValueError(f"{folder} was trained on one task, so none can be left out")
    count = recipe.evaluate.rows_per_task if rows is None else rows
    if count < 2:
        raise ValueError(f"rows={count}: an interval needs two held-out rows or more of each task")
    origin = _Origin(folder, recipe, corpus, count, console)
    whole = _scored(origin, folder, WHOLE)
    found: list[tuple[Any, ...]] = []
    for task, name in zip(wanted, _names(corpus.tasks, wanted), strict=True):
        without = _scored(origin, _trained(origin, task, name), name)
        found += [(folder.resolve().name, task, *row) for row in _differences(whole, without)]
    return pd.DataFrame(found, columns=list(COLUMNS["transfer"]))


def recipe_without(run: Path, recipe: Recipe, task: str, output: Path) -> Recipe:
    """The run's recipe less one task, for as many draws of each of the others."""
    summary = json.loads((run / SUMMARY_FILE).read_text(encoding="utf-8"))
    mixture = {row["task"]: row for row in summary["mixture"]}
    rows, left = sum(row["rows"] for row in mixture.values()), 1 - mixture[task]["share"]
    values: dict[str, Any] = recipe.model_dump(mode="json")
    train = values["train"]
    # An epoch draws as many rows as there are.
    train["epochs"] *= rows * left / (rows - mixture[task]["rows"])
    if train["max_steps"] is not None:
        train["max_steps"] = max(1, round(train["max_steps"] * left))
    train["report_to"] = []
    if values["mixture"]["weights"] is not None:
        del values["mixture"]["weights"][task]
    if recipe.tasks != "named":
        values["tasks"] = str((run / KEPT).resolve())  # the same clusters
    if recipe.config(len(mixture)).branches_of().gate == "one_hot":
        values["adapter"]["num_branches"] = None  # one for each task that is left
    values["leave_out"] = [*recipe.leave_out, task]
    values["evaluate"]["rows_per_task"] = 0  # scored here, row by row
    values["output"] = str(output.resolve())
    return parse_recipe(values, f"{run} without {task}")


def _trained(origin: _Origin, task: str, name: str) -> Path:
    """The run without the task: kept, gone on with, or trained."""
    folder = origin.run / FOLDER / name
    recipe = recipe_without(origin.run, origin.recipe, task, folder).resolved()
    if is_finished(folder):
        if load_recipe(folder).model_dump(exclude=FREE) != recipe.model_dump(exclude=FREE):
            raise ValueError(
                f"{folder} was made by another recipe than that of {origin.run} without {task!r}; "
                "remove it to have it trained again"
            )
        return folder
    origin.console.print(f"training without {task}: {folder}", markup=False, soft_wrap=True)
    return train(recipe, origin.console, resume=(folder / RECIPE_FILE).is_file())


def _scored(origin: _Origin, folder: Path, name: str) -> pa.Table:
    """The held-out rows of every task that the run in `folder` can answer, scored once."""
    file = origin.run / FOLDER / f"{name}.{origin.rows}.parquet"
    if file.is_file():
        return pq.read_table(file, schema=SCHEMA)
    recipe = load_recipe(folder)
    model, tokenizer = load(folder)
    encoder = Encoder(tokenizer, recipe.max_length)
    config = config_of(model)
    use_ids, selector = config.branches_of().needs_ids, config.branch_selector
    known = origin.corpus.tasks if selector is None else selector.names
    test = {
        task: fitting(task, held[: origin.rows], encoder, origin.console)
        for task, held in origin.corpus.test.items()
        if task in known and len(held) > 1
    }
    chosen = selector if recipe.choice == "selector" else None
    ground = Ground(
        recipe=origin.recipe,
        content=origin.corpus.content,
        tokenizer=tokenizer,
        encoder=encoder,
        tasks=known,
        train={},
        validation={},
        test=test,
        selector=chosen,
    )
    with autocast(recipe.train.precision, model.device):
        scored = score_rows(ground, model, test, use_ids)
    of_run = {
        "run": name,
        "method": WHOLE if name == WHOLE else WITHOUT,
        "params": 0,
        "lr": recipe.train.learning_rate,
        "seed": recipe.seed,
        "stage": TEST_STAGE,
    }
    table = pa.Table.from_pylist([of_run | row for row in scored], schema=SCHEMA)
    file.parent.mkdir(exist_ok=True)
    partial = partial_of(file)
    pq.write_table(table, partial)
    os.replace(partial, file)
    return table


def _differences(whole: pa.Table, without: pa.Table) -> Iterator[tuple[str, float, float, float]]:
    """(task, difference, low, high) of the tasks that both runs answered."""
    both = pa.concat_tables(
        [whole.filter(pc.is_in(whole["task"], pc.unique(without["task"]))), without]
    )
    (found,) = differences(Scores.of(both), WHOLE, "nll")
    for part in found.tasks:
        yield part.task, *part.value


def _names(tasks: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """A folder name for each task: a task may be called anything, and names must differ."""
    found: dict[str, str] = {}
    for task in tasks:
        name = "without_" + re.sub(r"[/\\\x00]", "_", task)
        while name in found.values():
            name += "_"
        found[task] = name
    return [found[task] for task in wanted]
