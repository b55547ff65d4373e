"""A training step's walks over the model, made short.

In each step transformers' Trainer switches every module to training, which all of them are in, and
asks every module for its parameters, twice: to clip the gradients and to drop them. A model of 30
blocks with an adapter has thousands of modules, and on a small one a GPU waits for such walks. Only
what the optimizer steps has gradients, and it has them in a list.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class ShortWalksMixin:
    """Left of a transformers trainer class.

    A module that was put into eval mode alone, while the model is in training mode, stays there.
    Under FSDP and DeepSpeed gradients are clipped over all parameters, as accelerate wants it.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with _short(self):
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def _clip_grad_norm(self, model: Any) -> Any:
        trainer: Any = self
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        return super()._clip_grad_norm(_Stepped(trainer.optimizer))  # type: ignore[misc]


class _Stepped:
    """In the place of a model whose parameters are asked for: those that an optimizer steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])


@contextmanager
def _short(trainer: Any) -> Iterator[None]:
    """The model's own train() and zero_grad() made short inside."""
    model: nn.Module = trainer.model

    def train(mode: bool = True) -> nn.Module:
        return model if mode and model.training else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        if trainer.optimizer is None or not set_to_none:
            type(model).zero_grad(model, set_to_none)
            return
        for parameter in _Stepped(trainer.optimizer).parameters():
            parameter.grad = None

    vars(model).update(train=train, zero_grad=zero_grad)
    try:
        yield
    finally:
        for name in ("train", "zero_grad"):
            vars(model).pop(name, None)
