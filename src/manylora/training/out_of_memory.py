"""When a GPU's memory is too small for the batch: smaller batches, the same step.

batch_size x gradient_accumulation stays what the recipe says, so the steps, the rows of each
and the learning rate at each stay the same; training goes on from the last checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn

from manylora.training.keeping import RunError


@dataclass(frozen=True, slots=True)
class Batch:
    """How the rows of a step are divided."""

    size: int
    accumulation: int

    def smaller(self) -> Batch | None:
        """The next smaller batch that divides this one: half of it where that is whole."""
        if self.size == 1:
            return None
        size = next(size for size in range(self.size // 2, 0, -1) if self.size % size == 0)
        return Batch(size, self.accumulation * self.size // size)


class StartingPoint:
    """The trained tensors as they were before the first step, kept in main memory."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {
            name: tensor.detach().cpu().clone()
            for name, tensor in model.named_parameters()
            if tensor.requires_grad
        }

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put them back, and drop the gradients."""
        for name, tensor in model.named_parameters():
            if name in self.tensors:
                tensor.copy_(self.tensors[name])
        model.zero_grad()


def smaller_batch(batch: Batch, console: Console) -> Batch:
    """The batch to go on with, said to the user; RunError when one row is too much already."""
    found = batch.smaller()
    if found is None:
        raise RunError(
            "the GPU's memory is too small for one row at a time. Start again with one or more of "
            "train.gradient_checkpointing=true, quantize=4bit, a smaller max_length, a smaller "
            "model; `manylora doctor RECIPE` estimates what each needs"
        )
    console.print(
        f"the GPU's memory is too small for train.batch_size={batch.size}; going on with "
        f"{found.size}, and gradient_accumulation={found.accumulation} so that a step keeps the "
        "same rows",
        style="yellow",
        highlight=False,
    )
    return found
