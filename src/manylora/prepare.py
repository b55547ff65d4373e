"""Everything a run trains with, loaded and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed

from manylora.adapter.selector import BranchSelector
from manylora.base import load_model, load_tokenizer
from manylora.corpus import (
    Corpus,
    Encoded,
    MixtureRow,
    encode_all,
    load_corpus,
    mixture_table,
    print_mixture,
)
from manylora.recipe import Recipe

ADAPTER = "default"


@dataclass
class Prepared:
    """Everything a run trains with, loaded and checked."""

    recipe: Recipe
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    model: PeftModel
    train: dict[str, list[Encoded]]
    mixture: list[MixtureRow]


def prepare(recipe: Recipe, console: Console) -> Prepared:
    """Read the corpus, load the base model and attach the adapter.

    Raises CorpusError, BaseModelError or ValueError before anything is written.
    """
    corpus = load_corpus(recipe.data_path, recipe.holdout, recipe.seed)
    tokenizer = load_tokenizer(recipe.model)
    train = {}
    for task, examples in corpus.train.items():
        train[task], too_long = encode_all(examples, tokenizer, recipe.max_length)
        if too_long:
            console.print(
                f"{task}: {len(too_long)} of {len(examples)} training rows have "
                f"more than max_length={recipe.max_length} tokens and are left out",
                style="yellow",
                markup=False,
            )
    mixture = mixture_table(train, recipe.mixture)
    print_mixture(mixture, console)
    set_seed(recipe.seed)
    base = load_model(recipe.model, recipe.dtype, recipe.quantize)
    if recipe.quantize is not None:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    config = recipe.config(len(corpus.tasks))
    branches = config.branches_of()
    if branches.gate == "one_hot" and branches.count != len(corpus.tasks):
        raise ValueError(
            f"adapter.gate='one_hot' trains one branch for each of the {len(corpus.tasks)} tasks, "
            f"but the adapter has {branches.count} branches; leave num_branches out"
        )
    if branches.needs_ids:
        config.branch_selector = fit_selector(train, corpus.tasks)
    model = get_peft_model(base, config, adapter_name=ADAPTER)
    if torch.cuda.is_available() and recipe.quantize is None:
        model.to("cuda")
    return Prepared(recipe, corpus, tokenizer, model, train, mixture)


def fit_selector(train: dict[str, list[Encoded]], tasks: list[str]) -> BranchSelector:
    """Learn from the training prompts which task a prompt belongs to."""
    prompts = [item.input_ids[: item.prompt_length] for task in tasks for item in train[task]]
    owners = [i for i, task in enumerate(tasks) for _ in train[task]]
    return BranchSelector.fit(prompts, owners, tasks)
