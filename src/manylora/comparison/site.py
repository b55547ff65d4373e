"""The base model without its numbers: what a configuration trains on it, counted by PEFT itself."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from manylora.adapter.config import ManyLoraConfig


@dataclass(frozen=True)
class Site:
    """model: on the meta device. targets: the layers that are adapted. tasks: of the rows.

    selector: how many numbers the selector stores that chooses the branch of a prompt, where one
    does; they count for the methods that need it.
    """

    model: PreTrainedModel
    targets: tuple[str, ...]
    tasks: int
    selector: int = 0

    @classmethod
    def of(
        cls, base: PreTrainedModel, tasks: int, selection: dict[str, Any], selector: int = 0
    ) -> Site:
        """selection: target_modules and the like, as LoraConfig has them."""
        with torch.device("meta"):
            model = type(base)(deepcopy(base.config))
        adapted: Any = _attach(model, LoraConfig(r=1, **selection))
        return cls(model, tuple(adapted.base_model.targeted_module_names), tasks, selector)

    @property
    def blocks(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def trained(self, config: PeftConfig) -> int:
        """How many parameters the configuration trains, everything counted."""
        trained, _ = _attach(self.model, config).get_nb_trainable_parameters()
        return trained + (self.selector if needs_ids(config) else 0)


def needs_ids(config: PeftConfig | None) -> bool:
    """Whether a method has to know the task or branch of every row."""
    return isinstance(config, ManyLoraConfig) and config.branches_of().needs_ids


def _attach(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """To copies of both, because PEFT changes the model and writes into the configuration."""
    with torch.device("meta"):
        adapted: PeftModel = get_peft_model(deepcopy(model), deepcopy(config))
    return adapted
