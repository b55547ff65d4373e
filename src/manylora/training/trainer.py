"""The trainer of a run: TRL's SFTTrainer, for several tasks.

It draws rows in the order of the mixture, gives each example's task to the adapter as its branch
id, and keeps the loss of each task.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from trl import SFTTrainer  # type: ignore[attr-defined]

from manylora.adapter.ids import token_mask
from manylora.adapter.training import ManyLoraTrainerMixin
from manylora.corpus import IGNORED, DrawOrder
from manylora.train_recipe import TrainRecipe
from manylora.training.gradients import GradientNormsMixin
from manylora.training.metering import EnergyMixin
from manylora.training.optimizer import PartRatesMixin
from manylora.training.packed_attention import told_boundaries
from manylora.training.progress import GradientCheck
from manylora.training.survival import SurvivalMixin
from manylora.training.validation import ValidationMixin
from manylora.training.walks import ShortWalksMixin


class MixtureSampler(Sampler[int]):
    """Row numbers in the order of the mixture, drawn anew for each epoch."""

    def __init__(self, order: DrawOrder) -> None:
        self.order, self.epoch = order, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return self.order.epoch(self.epoch)

    def __len__(self) -> int:
        return self.order.length


class AnswerTrainer(SFTTrainer):
    """SFTTrainer that keeps `log_probs`, of each token that follows another; (batch, tokens - 1).

    Without a GPU, TRL projects every position to the vocabulary, a large part of a step on a small
    model; here only those before a learned token are.
    """

    log_probs: Tensor

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if inputs["input_ids"].device.type == "cpu":
            return self._answer_loss(model, inputs, kwargs.get("num_items_in_batch"))
        outputs: list[Any] = []
        handle = model.register_forward_hook(lambda *hook: outputs.append(hook[2]))
        try:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            handle.remove()
        self.log_probs = outputs[0].log_probs.detach()
        return loss

    def _answer_loss(self, model: Any, inputs: dict[str, Any], items: Any) -> Tensor:
        labels = inputs.pop("labels")
        learned = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
        mine: Any = self.model
        head = mine.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, given: (given[0][learned],))
        try:
            logits = model(**inputs, use_cache=False).logits  # (learned tokens, words)
        finally:
            handle.remove()
        inputs["labels"] = labels
        losses = cross_entropy(logits.float(), labels[:, 1:][learned[:, :-1]], reduction="none")
        log_probs = losses.new_zeros(labels.shape[0], labels.shape[1] - 1)
        self.log_probs = log_probs.masked_scatter_(learned[:, :-1], -losses.detach())
        if items is None:
            return losses.mean()
        # DDP averages over processes what is to be a mean over the tokens of all.
        everywhere = self.args.average_tokens_across_devices
        return losses.sum() / items * (self.accelerator.num_processes if everywhere else 1)


class RunTrainer(
    SurvivalMixin,
    EnergyMixin,
    GradientNormsMixin,
    ValidationMixin,
    PartRatesMixin,
    ShortWalksMixin,
    ManyLoraTrainerMixin,
    AnswerTrainer,
):
    """Knows the task of each example: its branch id, its loss, its place in the mixture."""

    def __init__(
        self,
        order: DrawOrder,
        tasks: list[str],
        use_ids: bool,
        train_recipe: TrainRecipe,
        **kwargs: Any,
    ) -> None:
        self.order, self.tasks, self.use_ids = order, tasks, use_ids
        self.train_recipe = train_recipe
        self.step_ids: set[int] = set()
        self.batch_sources: list[str] = []
        self.unread: list[Tensor] = []
        self.tokens = 0
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> MixtureSampler:
        return MixtureSampler(self.order)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tasks: Tensor = inputs.pop("task_ids")
        mask: Tensor = inputs.pop("token_mask")
        self.batch_sources = inputs.pop("sources")
        if self.use_ids:
            inputs.setdefault("branch_ids", tasks)
        mine: Any = self.model
        inputs |= told_boundaries(mine, inputs)
        with token_mask(mine, mask):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step < GradientCheck.STEPS and self.told_ids is not None:
            self.step_ids.update(self.told_ids.unique().tolist())
        self._count(tasks, mask, inputs["labels"])
        return loss

    def _count(self, tasks: Tensor, mask: Tensor, labels: Tensor) -> None:
        """Add a micro-batch to the sums: loss, answer tokens, tokens of each task."""
        owners = (tasks if tasks.dim() == 2 else tasks[:, None].expand_as(mask)).flatten()
        answers = labels != IGNORED
        losses = torch.nn.functional.pad(-self.log_probs, (1, 0))
        sums = torch.stack([losses.float(), answers.float(), mask.float()]).flatten(1)
        totals = sums.new_zeros(3, len(self.tasks)).index_add_(1, owners, sums)
        self.unread.append(totals)

    def gather_sums(self) -> None:
        """Leave the unread sums of all processes with the first one."""
        if self.accelerator.num_processes > 1 and self.unread:
            total = self.accelerator.reduce(torch.stack(self.unread).sum(0), "sum")
            self.unread = [total] if self.state.is_world_process_zero else []

    def read_task_losses(self) -> dict[str, tuple[float, int]]:
        """Summed loss (nats) and answer tokens of each task since the last call; counts tokens."""
        if not self.unread:
            return {}
        losses, answers, tokens = torch.stack(self.unread).cpu().double().sum(0).tolist()
        self.unread.clear()
        self.tokens += int(sum(tokens))
        return {
            task: (loss, int(count))
            for task, loss, count in zip(self.tasks, losses, answers, strict=True)
            if count
        }
