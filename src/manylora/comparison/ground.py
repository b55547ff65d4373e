"""What all cells of a comparison share: its rows, how they are encoded, who says which branch.

A method with a branch for each task is told the task of every row, or has it chosen from the row's
prompt by a selector that was fitted to the training prompts: in training, on the rows that choose
the rate, and when scored. The rows may then be trained on by cluster (`tasks: discovered`), while
they are scored by the tasks that the data name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from manylora.adapter.selector import BranchSelector
from manylora.base import load_tokenizer
from manylora.corpus import Collator, Corpus, CorpusError, DataOptions, Encoder, Rows
from manylora.corpus.split import read_rows
from manylora.recipe import Choice, Recipe
from manylora.training.choosing import ChoosingCollator
from manylora.training.clusters import settle
from manylora.training.prepare import fit_selector, fitting, read_corpus


@dataclass(frozen=True)
class Ground:
    """train, validation, test, unseen: rows that fit max_length, by task; of the scored ones at
    most evaluate.rows_per_task. tasks: of the training rows, a branch each. selector: chooses the
    branches, where they are not told. unseen_data: where the tasks come from that are scored
    without being trained on; their rows are of stage "unseen".
    """

    recipe: Recipe
    content: str
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    tasks: list[str]
    train: dict[str, Rows]
    validation: dict[str, Rows]
    test: dict[str, Rows]
    unseen: dict[str, Rows] = field(default_factory=dict)
    selector: BranchSelector | None = None
    unseen_data: Path | None = None

    @property
    def choice(self) -> Choice:
        return "told" if self.selector is None else "selector"

    def collator(self, packing: bool = False) -> ChoosingCollator:
        pad: Any = self.tokenizer.pad_token_id
        return ChoosingCollator(Collator(int(pad), packing), self.selector)

    def task_id(self, task: str) -> int:
        """The place of its branch; -1, the shared branch alone, for one that is not trained on."""
        return self.tasks.index(task) if task in self.tasks else -1


def prepare_ground(
    recipe: Recipe, console: Console, choice: Choice = "told", unseen_data: Path | None = None
) -> Ground:
    """Read the rows; ValueError when the recipe keeps no validation rows to tune the rates on, or
    asks for what a comparison does not do.

    unseen_data: a file or a folder, as a recipe's `data`.
    """
    _check(recipe, choice)
    read = read_corpus(recipe, console)
    settled = settle(recipe, read, console)
    named = settled.corpus if recipe.tasks == "named" else read
    scored = settled.corpus if choice == "told" else named
    encoder = Encoder(load_tokenizer(recipe.model), recipe.max_length)
    most = recipe.evaluate.rows_per_task

    def fit(split: dict[str, Rows], most: int | None = None) -> dict[str, Rows]:
        rows = {task: fitting(task, own, encoder, console) for task, own in split.items()}
        return rows if most is None else {task: own.spread(most) for task, own in rows.items()}

    train, tasks = fit(settled.corpus.train), settled.corpus.tasks
    unseen = None if unseen_data is None else _unseen(unseen_data, recipe, named)
    return Ground(
        settled.recipe,
        " ".join([settled.corpus.content, *([unseen.content] if unseen else [])]),
        encoder.tokenizer,
        encoder,
        tasks,
        train,
        fit(scored.validation, most),
        fit(scored.test, most),
        fit(unseen.train, most) if unseen else {},
        fit_selector(train, tasks, encoder, None) if choice == "selector" else None,
        unseen_data,
    )


def _check(recipe: Recipe, choice: Choice) -> None:
    most = recipe.evaluate.rows_per_task
    if most < 2:
        raise ValueError(
            f"evaluate.rows_per_task={most}: a comparison scores held-out rows; give 2 or more"
        )
    if not recipe.validation:
        raise ValueError(
            "a comparison tunes each method's learning rate on validation rows; set "
            "validation=0.1, the share of the training rows that is kept apart for it"
        )
    if recipe.leave_out and recipe.tasks != "named" and choice == "selector":
        raise ValueError(
            f"leave_out={recipe.leave_out} names clusters, but rows are scored by the tasks that "
            "the data name; leave their files out of data instead"
        )
    train = recipe.train
    for name, value in (
        ("start_from", recipe.start_from),
        ("train.rates", train.rates),
        ("train.weight_decays", train.weight_decays),
        ("train.early_stopping", train.early_stopping),
    ):
        if value:
            raise ValueError(
                f"{name}={value}: a comparison trains every method from its start, for as long as "
                "the others, at one rate of its own; leave it out"
            )


def _unseen(data: Path, recipe: Recipe, named: Corpus) -> Corpus:
    """All rows of the tasks that are scored without being trained on."""
    found = read_rows(data, DataOptions(fields=recipe.fields))
    if both := sorted(set(found.train) & set(named.train)):
        raise CorpusError(
            f"{data}: {', '.join(both)} is trained on too; a task is unseen only when it "
            "is not among the data"
        )
    return found
