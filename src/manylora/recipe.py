"""What a run is: one typed recipe, from YAML and `key=value`, checked before anything is loaded.

    model: smollm2-135m-instruct     # hub name, folder, or the small default
    data: my/tasks                   # one JSONL file a task
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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from manylora.adapter.config import ManyLoraConfig
from manylora.base import DEFAULT_MODEL, Dtype, Quantize
from manylora.corpus import Strategy, samples_path

RECIPE_FILE = "recipe.yaml"
BUNDLED = "samples"

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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def _adapter_fields() -> dict[str, Any]:
    hints = typing.get_type_hints(ManyLoraConfig)
    inherited = typing.get_type_hints(PeftConfig)
    start = ManyLoraConfig()
    return {
        name: (hint, Field(default_factory=partial(deepcopy, getattr(start, name))))
        for name, hint in hints.items()
        if name not in inherited and name not in _NOT_IN_A_RECIPE
    }


AdapterRecipe: Any = create_model("AdapterRecipe", __base__=_Strict, **_adapter_fields())


class TrainRecipe(_Strict):
    """How long and how fast: learning_rate is AdamW's peak; warmup is a share of all steps."""

    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    log_every: int = Field(10, ge=1)
    checkpoint_every: int | None = Field(None, ge=1)


class EvaluateRecipe(_Strict):
    """Held-out rows scored for each task, before and after training; 0 scores nothing."""

    rows_per_task: int = Field(100, ge=0)
    batch_size: int = Field(16, ge=1)
    generate: bool = True


class Recipe(_Strict):
    """A whole run. Paths are relative to the working directory."""

    model: str = DEFAULT_MODEL
    dtype: Dtype = "float32"
    quantize: Quantize | None = None
    data: str
    holdout: float = Field(0.1, gt=0, lt=1)
    mixture: Strategy = "proportional"
    max_length: int = Field(1024, ge=8)
    adapter: AdapterRecipe = Field(default_factory=AdapterRecipe)
    train: TrainRecipe = Field(default_factory=TrainRecipe)
    evaluate: EvaluateRecipe = Field(default_factory=EvaluateRecipe)
    seed: int = Field(0, ge=0)
    output: str = "runs/latest"

    @model_validator(mode="after")
    def _adapter_fits(self) -> Recipe:
        self.config()
        return self

    @property
    def data_path(self) -> Path:
        return samples_path() if self.data == BUNDLED else Path(self.data)

    @property
    def run(self) -> Path:
        return Path(self.output)

    def config(self, tasks: int = 1) -> ManyLoraConfig:
        """The adapter's configuration for a corpus of that many tasks.

        A learned gate gets a row for each task; a one-hot gate a branch for each, unless the
        recipe says how many.
        """
        values = {**self.adapter.model_dump(), "task_type": "CAUSAL_LM"}
        if values["gate"] == "task":
            values["num_tasks"] = tasks
        config = ManyLoraConfig(**values)
        free = values["num_branches"] is None and values["branch_ranks"] is None
        if free and config.branches_of().gate == "one_hot":
            config = ManyLoraConfig(**{**values, "num_branches": tasks})
        return config

    def resolved(self) -> Recipe:
        """The same recipe with its local folders absolute, so that it means the same anywhere."""
        data = self.data if self.data == BUNDLED else str(Path(self.data).resolve())
        model = str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model
        return self.model_copy(update={"data": data, "model": model})

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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}; write one like examples/recipe.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} is not a readable YAML file: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold `key: value` lines, found {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"{override!r} is not key=value, as in train.learning_rate=1e-3")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{override!r}: {parent!r} holds a value, not a group of keys")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is not YAML: {error}") from None


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        group = problem["loc"][:-1]
        known = list((GROUPS[group[0]] if group else Recipe).model_fields)
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    if problem["type"] == "missing":
        return f"{where!r} is missing" + (
            ": the folder of your task files, or `samples` for the bundled ones"
            if where == "data"
            else ""
        )
    message = problem["msg"].removeprefix("Value error, ")
    given = f" (got {problem['input']!r})" if where else ""
    return f"{where + ': ' if where else ''}{message}{given}"


GROUPS: dict[Any, Any] = {
    "adapter": AdapterRecipe,
    "train": TrainRecipe,
    "evaluate": EvaluateRecipe,
}
