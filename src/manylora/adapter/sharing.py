"""Layers that read the same input (q, k and v; gate and up) are computed in one operation.

Siblings are layers of one module with the names in `SIBLINGS`. The first that is called computes
for all, and lays the others' outputs aside; another takes its output only if it is called with the
very same tensor, else it computes for itself, and what was laid aside for it is dropped. So a wrong
guess costs time and nothing else; cross-attention, whose keys read another input, is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from manylora.adapter.layer import ManyLoraLayer

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
_CROSS = ("cross", "encoder_attn", "EncDec")


def find_siblings(layers: Iterable[ManyLoraLayer]) -> None:
    """Tell each layer of a model which others read what it reads."""
    by_name = {layer.name: layer for layer in layers}
    for name, layer in by_name.items():
        parent, _, own = name.rpartition(".")
        names = next((names for names in SIBLINGS if own in names), ())
        if any(word in parent for word in _CROSS):
            names = ()
        paths = [f"{parent}.{one}" if parent else one for one in names if one != own]
        layer.siblings = [by_name[path] for path in paths if path in by_name]


@dataclass
class SharedReads:
    """What the layers of one model computed for each other: outputs by own name, for the input x.

    version: of x, which changes when x is written to.
    """

    x: Tensor | None = None
    version: int = 0
    aside: dict[str, Tensor] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {"x": None, "version": 0, "aside": {}}  # nothing of a forward pass is copied

    def taken(self, layer: ManyLoraLayer, x: Tensor) -> Tensor | None:
        """What was computed for this layer and input, once."""
        if self.x is not x or self.version != _version(x) or layer.own_name not in self.aside:
            return None
        y = self.aside.pop(layer.own_name)
        if not self.aside:
            self.x = None
        return y

    def readers(self, layer: ManyLoraLayer, adapter: str, x: Tensor) -> list[ManyLoraLayer]:
        """The layers to compute with x: this one first, then siblings that can be."""
        self.x, self.aside = None, {}
        return [layer, *(one for one in layer.siblings if layer.reads_as(one, adapter, x))]

    def lay_aside(self, x: Tensor, readers: list[ManyLoraLayer], ys: list[Tensor]) -> None:
        """Keep the outputs of all readers but the first."""
        if len(readers) > 1:
            self.x, self.version = x, _version(x)
            self.aside = {one.own_name: y for one, y in zip(readers[1:], ys[1:], strict=True)}


def _version(x: Tensor) -> int:
    untracked = torch.compiler.is_compiling() or x.is_inference()
    return 0 if untracked else x._version


def is_plain(base: nn.Module, x: Tensor) -> bool:
    """Whether a layer is W x + b and nothing else, so that W can be used instead of calling it."""
    if type(base) is not nn.Linear or "forward" in vars(base):
        return False
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
        return False
    if base._backward_pre_hooks:
        return False
    for own in (base.weight, base.bias):
        if own is not None and (
            type(own) not in (Tensor, nn.Parameter) or own.requires_grad or own.device != x.device
        ):
            return False
    return bool(torch.is_autocast_enabled(x.device.type) or base.weight.dtype == x.dtype)


def in_backward() -> bool:
    """A checkpointed block runs again inside the backward pass; its loss was already counted."""
    return torch._C._current_graph_task_id() != -1
