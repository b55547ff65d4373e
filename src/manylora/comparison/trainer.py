"""Training one cell of a comparison: any PEFT method, or the whole model, on the same batches.

transformers' Trainer with a run's rows, order, schedule and precision; methods differ in what is
trained and how fast, and in nothing else.
"""

from __future__ import annotations

from typing import Any

from peft import AdaLoraConfig, PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback

from manylora.adapter.ids import token_mask
from manylora.adapter.layer import layers_of
from manylora.adapter.training import ManyLoraTrainerMixin
from manylora.comparison.reading import read
from manylora.corpus import DrawOrder
from manylora.training.packed_attention import told_boundaries
from manylora.training.trainer import MixtureSampler
from manylora.training.walks import ShortWalksMixin


class _AnswerTrainer(Trainer):
    """The loss of the answers' tokens."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        mine: Any = self.model
        return read(mine, inputs, num_items_in_batch).loss


class CellTrainer(ShortWalksMixin, ManyLoraTrainerMixin, _AnswerTrainer):
    """Gives each example's task to a method that chooses its branch by it (use_ids)."""

    def __init__(self, order: DrawOrder, use_ids: bool, **kwargs: Any) -> None:
        self.order, self.use_ids = order, use_ids
        super().__init__(**kwargs)
        model: Any = self.model
        self.has_branches = bool(layers_of(model))
        self.before_text = isinstance(model, PeftModel) and has_own_tokens(model)
        if isinstance(model, PeftModel) and isinstance(_config(model), AdaLoraConfig):
            self.add_callback(_Allocate())

    def _get_train_sampler(self, train_dataset: Any = None) -> MixtureSampler:
        return MixtureSampler(self.order)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mine: Any = self.model
        inputs |= told_boundaries(mine, inputs)
        inputs, mask = prepared(inputs, self.use_ids, self.before_text)
        if not self.has_branches:  # nothing listens to ids or masks, nor has a loss of its own
            return _AnswerTrainer.compute_loss(self, model, inputs, *args, **kwargs)
        with token_mask(mine, mask):
            return super().compute_loss(model, inputs, *args, **kwargs)


class _Allocate(TrainerCallback):
    """AdaLoRA gives its rank to where it counts after every step (arXiv 2303.10512)."""

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step)


def prepared(
    inputs: dict[str, Any], use_ids: bool, before_text: bool
) -> tuple[dict[str, Any], Tensor]:
    """(what the model is given, which tokens are no padding) of a collated batch."""
    aside = ("task_ids", "branch_ids", "token_mask", "sources")
    left = {k: v for k, v in inputs.items() if k not in aside}
    mask: Tensor = inputs["token_mask"]
    if use_ids:
        left["branch_ids"] = inputs.get("branch_ids", inputs["task_ids"])
    if before_text:
        left.pop("position_ids")  # PEFT counts the method's own tokens too
    return left, mask


def has_own_tokens(model: PeftModel) -> bool:
    """Whether the method reads tokens or states of its own before the text."""
    return bool(_config(model).is_prompt_learning)


def _config(model: PeftModel) -> Any:
    return model.peft_config[model.active_adapter]
