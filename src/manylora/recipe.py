"""What a run is: one typed recipe, from YAML and `key=value`, checked before anything is loaded.

    model: smollm2-135m-instruct     # hub name, folder, or the small default
    data: my/tasks                   # one file a task: JSONL, JSON, CSV or Parquet
    adapter: {method: hydralora, r: 8}
    train: {epochs: 3, learning_rate: 1e-3}
    output: runs/mine

`adapter` takes the fields of `ManyLoraConfig`. The resolved recipe is saved in the run folder and
gives the same run again.
"""

from __future__ import annotations

import difflib
import typing
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from peft import PeftConfig
from pydantic import Field, ValidationError, create_model, field_validator, model_validator

from manylora.adapter.config import ManyLoraConfig
from manylora.base import DEFAULT_MODEL, Dtype, Quantize, pinned
from manylora.corpus import Corpus, Data, DataOptions, Fields, Mixture, absolute, load_corpus
from manylora.corpus.origins import refuse_empty
from manylora.corpus.store import Count
from manylora.discovery.options import DiscoveryOptions
from manylora.plain_yaml import NotYamlError, plain_yaml
from manylora.recipe_checks import check_adapter
from manylora.train_recipe import EvaluateRecipe, Strict, TrainRecipe
from manylora.training.optimizer import check_parts

RECIPE_FILE = "recipe.yaml"
AUTO = "auto"
TASK_WORDS = ("named", "discovered")
Choice = Literal["told", "selector"]

# What a run decides itself, or what only a caller in Python can use.
_NOT_IN_A_RECIPE = {
    "init_weights",
    "selector",
    "format_version",
    "num_tasks",
    "bias",
    "trainable_token_indices",
}


class RecipeError(ValueError):
    """A recipe that cannot be run, with where it is wrong and what would be right."""


def _adapter_fields() -> dict[str, Any]:
    hints = typing.get_type_hints(ManyLoraConfig)
    inherited = typing.get_type_hints(PeftConfig)
    hints["num_branches"] |= Literal["auto"]
    start = ManyLoraConfig()
    return {
        name: (hint, Field(default_factory=partial(deepcopy, getattr(start, name))))
        for name, hint in hints.items()
        if name not in inherited and name not in _NOT_IN_A_RECIPE
    }


AdapterRecipe: Any = create_model("AdapterRecipe", __base__=Strict, **_adapter_fields())


class Recipe(Strict):
    """A whole run. Paths are relative to the working directory.

    tasks: those that the data name; "discovered", clusters of the training rows' prompts instead;
    or the clusters of a folder that `manylora discover` wrote. leave_out: those of them that the
    run is to do without. branches: who says which branch a row goes to, in training and in scores,
    where the adapter goes by that: "told", its task; "selector", what the adapter's selector makes
    of its prompt, as in generation. Default: told, but the selector for clusters.
    """

    model: str = DEFAULT_MODEL
    dtype: Dtype = "float32"
    quantize: Quantize | None = None
    start_from: str | None = None
    data: Data
    fields: Fields = Fields()
    tasks: str = "named"
    leave_out: list[str] = Field(default_factory=list)
    branches: Choice | None = None
    discovery: DiscoveryOptions = DiscoveryOptions()
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    holdout: float = Field(0.1, gt=0, lt=1)
    validation: float = Field(0.0, ge=0, lt=1)
    mixture: Mixture = Mixture()
    max_length: int = Field(1024, ge=8)
    packing: bool = False
    adapter: AdapterRecipe = Field(default_factory=AdapterRecipe)
    train: TrainRecipe = Field(default_factory=TrainRecipe)
    evaluate: EvaluateRecipe = Field(default_factory=EvaluateRecipe)
    seed: int = Field(0, ge=0, lt=2**32)
    output: str = "runs/latest"

    @field_validator("data", mode="before")
    @classmethod
    def _names_data(cls, value: Any) -> Any:
        refuse_empty("" if value is None else value)  # `data=` is null in YAML
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        self._settle_auto()
        check_adapter(self.adapter.model_dump())
        check_parts(self.train, self.config())
        if self.train.compile and self.quantize is not None:
            raise ValueError(
                f"train.compile=true and quantize={self.quantize}: quantised layers are no part of "
                "a compiled graph; leave one of them out"
            )
        if self.train.evaluate_every is not None and not self.validation:
            raise ValueError(
                f"train.evaluate_every={self.train.evaluate_every} has no rows to evaluate; set "
                "validation=0.05, the share of the training rows that is kept apart for it"
            )
        return self

    def _settle_auto(self) -> None:
        """With a one-hot gate `auto` means a branch for each task, as leaving it out does."""
        values = self.adapter.model_dump()
        if values["num_branches"] != AUTO:
            return
        if values["method"] == "lora" or values["branch_ranks"] is not None:
            fixed = "method='lora'" if values["method"] == "lora" else "branch_ranks"
            raise ValueError(
                f"adapter.num_branches=auto, but {fixed} fixes their number; leave num_branches out"
            )
        if self.config().branches_of().gate == "one_hot":
            self.adapter = self.adapter.model_copy(update={"num_branches": None})

    @property
    def choice(self) -> Choice:
        """`branches`, or what it is by default."""
        return self.branches or ("told" if self.tasks == "named" else "selector")

    def load_corpus(self, count: Count = lambda rows: None) -> Corpus:
        """Read and split the rows; count is told how many have been read, from time to time."""
        options = DataOptions(
            fields=self.fields,
            skip_bad_rows=self.on_bad_row == "skip",
            holdout=self.holdout,
            validation=self.validation,
            seed=self.seed,
        )
        return load_corpus(self.data, options, count)

    @property
    def run(self) -> Path:
        return Path(self.output)

    @property
    def num_branches(self) -> int | Literal["auto"] | None:
        found: int | Literal["auto"] | None = self.adapter.model_dump()["num_branches"]
        return found

    def config(self, tasks: int = 1) -> ManyLoraConfig:
        """The adapter's configuration for a corpus of that many tasks.

        A learned gate gets a row for each task; a one-hot gate a branch for each, unless the
        recipe says how many. `auto` counts as left out until the corpus has been looked at
        (training/clusters.py).
        """
        values = {**self.adapter.model_dump(), "task_type": "CAUSAL_LM"}
        if values["num_branches"] == AUTO:
            values["num_branches"] = None
        if values["gate"] == "task":
            values["num_tasks"] = tasks
        config = ManyLoraConfig(**values)
        free = values["num_branches"] is None and values["branch_ranks"] is None
        if free and config.branches_of().gate == "one_hot":
            config = ManyLoraConfig(**{**values, "num_branches": tasks})
        return config

    def resolved(self) -> Recipe:
        """The same recipe with its local paths absolute, so that it means the same anywhere."""
        start = str(Path(self.start_from).resolve()) if self.start_from else None
        update = {"data": absolute(self.data), "model": pinned(self.model), "start_from": start}
        if self.tasks not in TASK_WORDS:
            update["tasks"] = str(Path(self.tasks).resolve())
        return self.model_copy(update=update)

    def save(self, folder: Path) -> None:
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        (folder / RECIPE_FILE).write_text(text, encoding="utf-8")


def load_recipe(path: Path | None = None, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, or a run folder's, apply `key.sub=value`, and check everything.

    Raises RecipeError listing every problem, with the nearest known key for an unknown one.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read(path / RECIPE_FILE if path.is_dir() else path)
    keys = {override.partition("=")[0] for override in overrides or []}
    train = values.get("train")
    if "train.epochs" in keys and "train.max_steps" not in keys and isinstance(train, dict):
        train.pop("max_steps", None)  # else the file's would still hold, and the change do nothing
    for override in overrides or []:
        _apply(values, override)
    return parse_recipe(values, str(path) if path else "the command line")


def parse_recipe(values: dict[str, Any], where: str = "the recipe") -> Recipe:
    """A recipe from plain values; RecipeError when they do not fit."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise RecipeError(f"{where} cannot be run:\n  " + "\n  ".join(problems)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = plain_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}; write one with `manylora init DATA`") from None
    except (NotYamlError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} is not a readable YAML file: {_short(error)}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold `key: value` lines, found {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"{_short(override)!r} is not key=value, as in train.learning_rate=1e-3")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(
                f"{_short(override)!r}: {_short(parent)!r} holds a value, not a group of keys"
            )
    try:
        values[last] = plain_yaml(text)
    except NotYamlError as error:
        raise RecipeError(f"{_short(override)!r}: the value is not YAML: {_short(error)}") from None


def _short(value: object, most: int = 200) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        group = problem["loc"][:-1]
        known = list((GROUPS[group[0]] if group else Recipe).model_fields)
        near = difflib.get_close_matches(_short(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {_short(where)!r}; {hint}"
    if problem["type"] == "missing":
        return f"{where!r} is missing" + (
            ": the folder of your task files, or `samples` for the bundled ones"
            if where == "data"
            else ""
        )
    message = _short(problem["msg"].removeprefix("Value error, "), 2000)
    given = f" (got {_short(repr(problem['input']), 80)})" if where else ""
    return f"{_short(where) + ': ' if where else ''}{message}{given}"


GROUPS: dict[Any, Any] = {
    "adapter": AdapterRecipe,
    "train": TrainRecipe,
    "evaluate": EvaluateRecipe,
    "mixture": Mixture,
    "fields": Fields,
    "discovery": DiscoveryOptions,
}
