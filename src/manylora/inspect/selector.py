"""Where a saved selector sends the held-out prompts of each task, and how near they are.

    distance = 1 - cosine(f - mean, centroid)       of the nearest branch, 0 to 2
    accepted = distance <= 1 - threshold            else the prompt gets -1: no branch of its own

f, mean, centroids and thresholds are those of `manylora.adapter.selector`. It needs token ids alone
and no base model: evaluation writes it to the run's selector.json, and `measure` writes it for runs
that do not have it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import pandas as pd
from rich.console import Console

from manylora.adapter.centroids import cosines, count_prompts, weigh
from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.selector import SELECTOR_FILE, BranchSelector
from manylora.base import load_tokenizer
from manylora.corpus import Encoded, Encoder
from manylora.run import recipe_of
from manylora.training.checkpoints import write_atomically
from manylora.training.clusters import KEPT, settle

CHOICES_FILE = "selector.json"
REFUSED = "(refused)"
"""Stands for a branch where a prompt is too far from all of them."""
_ROWS = 100  # of each task, for a run that is not scored


class TaskChoices(TypedDict):
    """For each held-out prompt of a task the place of its nearest branch, and its cosine to it."""

    nearest: list[int]
    cosines: list[float]


class Choices(TypedDict):
    """Names of the branches; the cosine under which each is refused; the prompts of each task."""

    branches: list[str]
    thresholds: list[float]
    tasks: dict[str, TaskChoices]


def choices_of(selector: BranchSelector, rows: Mapping[str, Sequence[Encoded]]) -> Choices:
    """What the selector makes of the prompts of each task; a task without rows is left out."""
    tasks = {}
    for task, encoded in rows.items():
        if not encoded:
            continue
        prompts = [item.input_ids[: item.prompt_length] for item in encoded]
        features = weigh(count_prompts(prompts, selector.idf.numel()), selector.idf.numpy())
        found = cosines(features, selector.mean.numpy(), selector.centroids.numpy())
        nearest = found.argmax(1)
        tasks[task] = TaskChoices(nearest=nearest.tolist(), cosines=found.max(1).tolist())
    return Choices(branches=selector.names, thresholds=selector.thresholds.tolist(), tasks=tasks)


def write_choices(run: Path, choices: Choices) -> None:
    """RUN/selector.json."""
    write_atomically(run / CHOICES_FILE, json.dumps(choices, separators=(",", ":")))


def measure(run: str | Path, console: Console | None = None) -> None:
    """Write selector.json for a run that has a selector, from its held-out rows.

    Reads the run's data and tokenizer; no base model. Raises ValueError for a run without a
    selector, CorpusError where its data are not there any more.
    """
    folder, console = Path(run), console or Console(stderr=True)
    selector = ManyLoraConfig.from_pretrained(str(folder)).branch_selector
    if selector is None:
        raise ValueError(f"{folder}: its method chooses no branch by prompt, so it has no selector")
    recipe = recipe_of(folder)
    corpus = settle(recipe, recipe.load_corpus(), console, folder / KEPT).corpus
    encoder = Encoder(load_tokenizer(recipe.model), recipe.max_length)
    most = recipe.evaluate.rows_per_task or _ROWS
    rows = {
        task: encoder.split_too_long(held_out[:most])[0] for task, held_out in corpus.test.items()
    }
    write_choices(folder, choices_of(selector, rows))


def distances(run: str | Path) -> pd.DataFrame:
    """One row a held-out prompt: run, task, branch (its nearest), distance, threshold, accepted.

    Empty for a run without a selector; FileNotFoundError where nothing was measured.
    """
    folder = Path(run)
    columns = ["run", "task", "branch", "distance", "threshold", "accepted"]
    choices = read_choices(folder)
    if choices is None:
        return pd.DataFrame(columns=columns)
    branches, thresholds = choices["branches"], choices["thresholds"]
    rows = [
        (
            task,
            branches[nearest],
            1 - cosine,
            1 - thresholds[nearest],
            cosine >= thresholds[nearest],
        )
        for task, prompts in choices["tasks"].items()
        for nearest, cosine in zip(prompts["nearest"], prompts["cosines"], strict=True)
    ]
    name = folder.resolve().name
    return pd.DataFrame([(name, *row) for row in rows], columns=columns)


def confusion(run: str | Path) -> pd.DataFrame:
    """How many held-out prompts of a task get a branch: run, task, branch, rows.

    Every task is paired with every branch and with `REFUSED`. Empty and raising as `distances`.
    """
    folder, columns = Path(run), ["run", "task", "branch", "rows"]
    choices = read_choices(folder)
    if choices is None:
        return pd.DataFrame(columns=columns)
    prompts = distances(folder)
    chosen = prompts["branch"].where(prompts["accepted"], REFUSED)
    counts = Counter(zip(prompts["task"], chosen, strict=True))
    name = folder.resolve().name
    rows = [
        (name, task, branch, counts[task, branch])
        for task in choices["tasks"]
        for branch in [*choices["branches"], REFUSED]
    ]
    return pd.DataFrame(rows, columns=columns)


def read_choices(run: Path) -> Choices | None:
    """selector.json; None for a run without a selector.

    Raises FileNotFoundError for one with a selector whose choices were not measured.
    """
    if (run / CHOICES_FILE).is_file():
        choices: Choices = json.loads((run / CHOICES_FILE).read_text(encoding="utf-8"))
        return choices
    if (run / SELECTOR_FILE).is_file():
        raise FileNotFoundError(
            f"{run} has no {CHOICES_FILE}, where the selector sends held-out prompts: it was not "
            f"measured; do so with `manylora eval {run}`, or without the base model with "
            f'manylora.inspect.selector.measure("{run}")'
        )
    return None
