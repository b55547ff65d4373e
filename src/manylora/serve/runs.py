"""Several runs on one base model, loaded once, and what each name that a request gives means.

NAME          the run in the folder of that name; its selector picks the branch of a prompt
NAME:TASK     the same run with the branch of that task
BASE          the base model, without an adapter
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from jinja2 import TemplateError
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from manylora.adapter.selector import BranchSelector
from manylora.base import load_model, load_tokenizer, name_and_revision
from manylora.corpus import Encoder, Message
from manylora.predict import end_tokens
from manylora.recipe import Recipe
from manylora.run import config_of, recipe_of
from manylora.serve.batch import BASE, Row, check_batching


class PromptError(ValueError):
    """A prompt that this model cannot be given."""


@dataclass(frozen=True)
class Choice:
    """What a name in a request stands for; task: a place in the selector's names."""

    adapter: str
    selector: BranchSelector | None = None
    task: int | None = None

    def row(self, prompt: list[int]) -> Row:
        """The adapter and branch for a prompt's token ids."""
        if self.task is not None:
            return Row(self.adapter, self.task)
        if self.selector is None:
            return Row(self.adapter, -1)
        ids = torch.tensor([prompt])
        return Row(self.adapter, int(self.selector.select(ids, torch.ones_like(ids))[0]))

    def branch_name(self, row: Row) -> str | None:
        """The task of the branch that was taken, where the run has branches by task."""
        return self.selector.names[row.branch] if self.selector and row.branch >= 0 else None


class ServedRuns:
    """The model with an adapter for each run, its tokenizer, and the names of `models`.

    decoder: the tokenizer again, for reading answers. ends: tokens that end one. context: tokens of
    prompt and answer together.
    """

    def __init__(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, models: dict[str, Choice]
    ) -> None:
        self.model, self.tokenizer, self.models = model, tokenizer, models
        self.ends = frozenset(end_tokens(model, tokenizer))
        self.pad = int(tokenizer.pad_token_id)
        config: Any = cast(Any, model.get_base_model()).config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", 0) or 2**20)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        # Encoding may change a tokenizer's settings, which must not be in use in another thread.
        self.decoder = copy.deepcopy(tokenizer)
        self._encoder = Encoder(tokenizer, max_length=2**31)
        self._one_at_a_time = Lock()

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt that training and `manylora predict` would see for these messages."""
        try:
            with self._one_at_a_time:
                return self._encoder.prompt_ids(messages)
        except TemplateError as error:
            raise PromptError(f"the model's chat template refuses them: {error}") from None

    def text_ids(self, text: str) -> list[int]:
        """Plain text, with the special tokens that the tokenizer puts around it."""
        with self._one_at_a_time:
            return [int(i) for i in self.tokenizer(text)["input_ids"]]

    def check(self, prompt: Sequence[int]) -> None:
        """PromptError where token ids are none of this model's, or there are none."""
        if not prompt:
            raise PromptError("the prompt is empty; give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < self.vocabulary:
            raise PromptError(
                f"token ids are from 0 to {self.vocabulary - 1} for this model, and the prompt has "
                f"{min(prompt)}..{max(prompt)}"
            )


def load_runs(folders: Sequence[Path]) -> ServedRuns:
    """Load the base once and every run's adapter on it, in eval mode, on the GPU if there is one.

    Raises FileNotFoundError for a folder that is no finished run; ValueError where the runs' bases
    differ, two names are the same, or the adapters cannot share a batch.
    """
    recipes = [recipe_of(folder) for folder in folders]
    _same_base(folders, recipes)
    recipe = recipes[0]
    base: Any = load_model(recipe.model, recipe.dtype, recipe.quantize)
    # The folders' names may hold what a module's name must not.
    adapters = [f"run{i}" for i in range(len(folders))]
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=adapters[0])
    for folder, adapter in zip(folders[1:], adapters[1:], strict=True):
        model.load_adapter(str(folder), adapter)
    if torch.cuda.is_available() and recipe.quantize is None:
        model.to("cuda")
    tokenizer = load_tokenizer(recipe.model)
    models = _names(model, folders, adapters, base_name(recipe.model))
    check_batching(model.eval(), [*adapters, BASE], int(tokenizer.pad_token_id))
    return ServedRuns(model, tokenizer, models)


def base_name(model: str) -> str:
    """What the bare base is called: a hub name, or the last part of a path."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else name_and_revision(model)[0]


def _same_base(folders: Sequence[Path], recipes: Sequence[Recipe]) -> None:
    bases = [(*name_and_revision(r.model), r.dtype, r.quantize) for r in recipes]
    if len(set(bases)) > 1:
        lines = [
            f"  {folder}: {recipe.model}, dtype {recipe.dtype}, quantize {recipe.quantize}"
            for folder, recipe in zip(folders, recipes, strict=True)
        ]
        raise ValueError(
            "serve: runs are served together on one base model, loaded once, and these have "
            "different ones:\n" + "\n".join(lines) + "\nStart a server for each base."
        )


def _names(
    model: PeftModel, folders: Sequence[Path], adapters: Sequence[str], base: str
) -> dict[str, Choice]:
    models: dict[str, Choice] = {}
    for folder, adapter in zip(folders, adapters, strict=True):
        config = config_of(model, adapter)
        selector = config.branch_selector
        if selector is None and config.branches_of().needs_ids:
            raise ValueError(
                f"{folder} picks a branch for each prompt and has no selector to do it; train it "
                "again with `manylora train`, which saves one"
            )
        name = folder.resolve().name
        tasks = [] if selector is None else selector.names
        choices = {name: Choice(adapter, selector)} | {
            f"{name}:{task}": Choice(adapter, selector, i) for i, task in enumerate(tasks)
        }
        if taken := sorted(choices.keys() & (models.keys() | {base})):
            raise ValueError(
                f"serve: {folder} would be called {taken[0]!r}, as another run or the base is; "
                "rename the run's folder"
            )
        models |= choices
    return models | {base: Choice(BASE)}
