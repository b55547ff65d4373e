"""Everything a run trains with, loaded and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed

from manylora.adapter.selector import BranchSelector
from manylora.base import load_model, load_tokenizer, name_and_revision
from manylora.corpus import (
    Corpus,
    CorpusError,
    Encoder,
    Example,
    MixtureRow,
    Rows,
    TooLongError,
    mixture_table,
    print_mixture,
)
from manylora.corpus.store import Count
from manylora.recipe import Recipe
from manylora.training.clusters import settle
from manylora.training.packing import check_packing
from manylora.training.start import (
    Start,
    forgetting,
    read_start,
    selector_for,
    start_from,
    task_order,
)

ADAPTER = "default"
_PROMPTS_TO_FIT = 4000


@dataclass
class Prepared:
    """Everything a run trains with, loaded and checked.

    tasks: names in the order of their ids; those that only `start_from` knows have no rows.
    train, validation: rows that fit max_length, by task. discovery: the folder of the one behind
    its clusters or its number of branches.
    """

    recipe: Recipe
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    model: PeftModel
    tasks: list[str]
    train: dict[str, Rows]
    validation: dict[str, Rows]
    mixture: list[MixtureRow]
    discovery: Path | None = None


def prepare(recipe: Recipe, console: Console, kept: Path | None = None) -> Prepared:
    """Read the corpus, load the base model and attach the adapter.

    kept: the discovery of a run that has begun, which goes on with its clusters.

    Raises CorpusError, BaseModelError or ValueError before anything is written.
    """
    settled = settle(recipe, read_corpus(recipe, console), console, kept)
    recipe, corpus = settled.recipe, settled.corpus
    if corpus.validation and recipe.train.evaluate_every is None:
        _say_unread(recipe, corpus, console)
    tokenizer = load_tokenizer(recipe.model)
    encoder = Encoder(tokenizer, recipe.max_length)
    train = {task: fitting(task, rows, encoder, console) for task, rows in corpus.train.items()}
    validation = {
        task: fitting(task, rows, encoder, console) for task, rows in corpus.validation.items()
    }
    mixture = mixture_table(train, recipe.mixture, encoder)
    print_mixture(mixture, console)
    start = read_start(Path(recipe.start_from)) if recipe.start_from else None
    tasks = task_order(start, corpus.tasks) if start else corpus.tasks
    set_seed(recipe.seed)
    base = load_model(recipe.model, recipe.dtype, recipe.quantize)
    if recipe.quantize is not None:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    if recipe.packing:
        check_packing(base)
    config = recipe.config(len(tasks))
    branches = config.branches_of()
    if branches.gate == "one_hot" and branches.count != len(tasks):
        raise ValueError(
            f"adapter.gate='one_hot' trains one branch for each of the {len(tasks)} tasks, "
            f"but the adapter has {branches.count} branches; leave num_branches out"
        )
    if branches.needs_ids:
        config.branch_selector = fit_selector(train, tasks, encoder, start)
    revision = name_and_revision(recipe.model)[1]
    model = get_peft_model(base, config, adapter_name=ADAPTER, revision=revision)
    if start is not None:
        start_from(start, recipe, model, ADAPTER)
        absent = [task for task in tasks if task not in train]
        if (warning := forgetting(config, recipe.train, absent)) is not None:
            console.print(warning, style="yellow", markup=False)
    if torch.cuda.is_available() and recipe.quantize is None:
        model.to("cuda")
    return Prepared(
        recipe,
        corpus,
        tokenizer,
        encoder,
        model,
        tasks,
        train,
        validation,
        mixture,
        settled.folder,
    )


def _say_unread(recipe: Recipe, corpus: Corpus, console: Console) -> None:
    rows = sum(map(len, corpus.validation.values()))
    console.print(
        f"validation={recipe.validation} keeps {rows:,} rows out of training, and nothing is "
        "measured on them; set train.evaluate_every=STEPS, or validation=0 to train on them too",
        style="yellow",
        markup=False,
        soft_wrap=True,
    )


def read_corpus(recipe: Recipe, console: Console) -> Corpus:
    """Read the recipe's rows, telling how far it is and what was left out."""
    return reading(recipe.load_corpus, console)


def reading(read: Callable[[Count], Corpus], console: Console) -> Corpus:
    """Read rows, telling how far it is and what was left out."""
    with console.status("reading the data") as status:
        corpus = read(lambda rows: status.update(f"{rows:,} rows read"))
    if corpus.skipped:
        said = f"{corpus.skipped:,} rows cannot be used and are left out (on_bad_row=skip):"
        console.print(
            "\n  ".join([said, *corpus.skipped_shown]),
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    return corpus


def fitting(task: str, rows: Rows, encoder: Encoder, console: Console) -> Rows:
    """The rows that are not longer than max_length; says how many are left out.

    Only rows that could be too long, by their bytes, are encoded to know.
    """
    suspects = np.flatnonzero(encoder.most_tokens(rows.sizes, rows.turns) > encoder.max_length)
    fits = np.ones(len(rows), dtype=bool)
    for start in range(0, len(suspects), 1000):
        places = suspects[start : start + 1000]
        found = encoder.encode_many(rows.at(places))
        fits[places] = [not isinstance(item, TooLongError) for item in found]
    if not fits.all():
        console.print(
            f"{task}: {len(rows) - int(fits.sum()):,} of {len(rows):,} rows have more than "
            f"max_length={encoder.max_length} tokens and are left out",
            style="yellow",
            markup=False,
        )
    if not fits.any():
        raise CorpusError(
            f"task {task!r}: none of its {len(rows):,} rows is as short as "
            f"max_length={encoder.max_length} tokens; raise max_length"
        )
    return rows.at(fits)


def fit_selector(
    train: dict[str, Rows], tasks: list[str], encoder: Encoder, start: Start | None
) -> BranchSelector:
    """Learn which task a prompt belongs to, from training prompts spread over each task."""
    spread = {
        tasks.index(task): rows.spread(prompts_of_each(len(train))) for task, rows in train.items()
    }
    prompts, owners = prompts_of(spread, encoder)
    if start is not None:
        return selector_for(start, prompts, owners, tasks)
    return BranchSelector.fit(prompts, owners, tasks)


def prompts_of_each(branches: int) -> int:
    """From how many prompts a selector learns each branch."""
    return max(50, _PROMPTS_TO_FIT // branches)


def prompts_of(
    examples: Mapping[int, Iterable[Example]], encoder: Encoder
) -> tuple[list[list[int]], list[int]]:
    """(token ids of each prompt, its branch), of the examples of each branch that fit."""
    prompts: list[list[int]] = []
    owners: list[int] = []
    for branch, own in examples.items():
        for item in encoder.split_too_long(own)[0]:
            prompts.append(item.input_ids[: item.prompt_length])
            owners.append(branch)
    return prompts, owners
