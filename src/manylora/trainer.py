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

from manylora.adapter.training import ManyLoraTrainerMixin
from manylora.corpus import Strategy, sample_order
from manylora.corpus.encode import IGNORED
from manylora.progress import GradientCheck


class MixtureSampler(Sampler[int]):
    """Row numbers in the order of the mixture, drawn anew for each epoch."""

    def __init__(self, sizes: dict[str, int], strategy: Strategy, seed: int) -> None:
        self.sizes, self.strategy, self.seed, self.epoch = sizes, strategy, seed, 0
        starts = [0, *torch.tensor(list(sizes.values())).cumsum(0).tolist()]
        self.starts = dict(zip(sizes, starts, strict=False))
        self.rows = len(sample_order(sizes, strategy, seed, epoch=0))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for task, row in sample_order(self.sizes, self.strategy, self.seed, self.epoch):
            yield self.starts[task] + row

    def __len__(self) -> int:
        return self.rows


class AnswerTrainer(SFTTrainer):
    """SFTTrainer that keeps the log-probability of each answer token in `log_probs`.

    Without a GPU, TRL projects every position to the vocabulary, a large part of a step on a small
    model; here only the answers are, which the collator has aligned at the end.
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
        learned = (labels != IGNORED).any(0)
        keep = labels.shape[1] - int(learned.int().argmax())
        logits = model(**inputs, logits_to_keep=keep + 1, use_cache=False).logits[:, :-1]
        wanted = labels[:, -keep:]
        log_probs = -cross_entropy(
            logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(wanted)
        self.log_probs = log_probs.detach()
        inputs["labels"] = labels
        return -log_probs.sum() / ((wanted != IGNORED).sum() if items is None else items)


class RunTrainer(ManyLoraTrainerMixin, AnswerTrainer):
    """Knows the task of each example: its branch id, its loss, its place in the mixture."""

    def __init__(
        self, sampler: MixtureSampler, tasks: list[str], use_ids: bool, **kwargs: Any
    ) -> None:
        self.sampler, self.tasks, self.use_ids = sampler, tasks, use_ids
        self.step_ids: set[int] = set()
        self.unread: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.tokens = 0
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> MixtureSampler:
        return self.sampler

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tasks: Tensor = inputs.pop("task_ids")
        if self.use_ids:
            inputs["branch_ids"] = tasks
        if self.state.global_step < GradientCheck.STEPS:
            self.step_ids.update(tasks.tolist())
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        answers = (inputs["labels"] != IGNORED).sum(1)
        tokens = inputs["attention_mask"].sum()
        self.unread.append((tasks, -self.log_probs.sum(1), answers, tokens))
        return loss

    def read_task_losses(self) -> dict[str, tuple[float, int]]:
        """Summed loss (nats) and answer tokens of each task since the last call; counts tokens."""
        losses = torch.zeros(2, len(self.tasks), dtype=torch.float64)
        for tasks, loss, answers, tokens in self.unread:
            losses[0].index_add_(0, tasks.cpu(), loss.to("cpu", torch.float64))
            losses[1].index_add_(0, tasks.cpu(), answers.to("cpu", torch.float64))
            self.tokens += int(tokens)
        self.unread.clear()
        return {
            task: (loss, int(count))
            for task, loss, count in zip(self.tasks, *losses.tolist(), strict=True)
            if count
        }
