"""The groups of a recipe that say how to train and how to score."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from manylora.training.optimizer import Part
from manylora.training.reporting import Reporter


class Strict(BaseModel):
    """A group of keys; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        hint = cls.model_fields[str(info.field_name)].annotation
        kinds = {hint, *get_args(hint)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"{str(value).lower()} is no number; give one")
        return value


class TrainRecipe(Strict):
    """How long and how fast: learning_rate is AdamW's peak; warmup is a share of all steps.

    rates multiply learning_rate for a part of the adapter (0 freezes it), weight_decays replace
    weight_decay. compile: the model's blocks, with torch.compile; the first step then waits for the
    compiler. early_stopping: evaluations (every evaluate_every steps) without a better one after
    which training ends. report_to: where the losses go besides the run folder. workers: processes
    that encode rows beside the training; 0 encodes them in between. energy: measure the training's
    electricity with CodeCarbon.
    """

    epochs: float = Field(3.0, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    rates: dict[Part, float] = Field(default_factory=dict)
    weight_decays: dict[Part, float] = Field(default_factory=dict)
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: int = Field(10, ge=1)
    checkpoint_every: int | None = Field(None, ge=1)
    evaluate_every: int | None = Field(None, ge=1)
    early_stopping: int | None = Field(None, ge=1)
    report_to: list[Reporter] = Field(default_factory=list)
    workers: int = Field(1, ge=0)
    energy: bool = False

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("rates", "weight_decays")
    @classmethod
    def _not_negative(cls, value: dict[Part, float]) -> dict[Part, float]:
        for part, number in value.items():
            if not 0 <= number < math.inf:
                raise ValueError(f"{part} is {number}; it must be 0 or more")
        return value

    @model_validator(mode="after")
    def _keeps_what_it_compiles(self) -> TrainRecipe:
        if self.compile and self.gradient_checkpointing:
            raise ValueError(
                "compile=true and gradient_checkpointing=true do not go together: the compiler "
                "chooses what is kept and what is computed again; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _stops_on_evaluations(self) -> TrainRecipe:
        if self.early_stopping is not None and self.evaluate_every is None:
            raise ValueError(
                f"early_stopping={self.early_stopping} counts evaluations, but none is made; set "
                "evaluate_every=STEPS as well"
            )
        return self


class EvaluateRecipe(Strict):
    """Held-out rows scored for each task, before and after training; 0 scores nothing."""

    rows_per_task: int = Field(100, ge=0)
    batch_size: int = Field(16, ge=1)
    generate: bool = True
