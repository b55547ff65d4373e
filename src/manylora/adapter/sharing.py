"""Layers that read the same input (q, k and v; gate and up) are computed in one operation.

Siblings are layers of one module with the names in `SIBLINGS`. The first that is called computes
for those after it, and lays their outputs aside; another takes its output only if called with the
very same tensor, by the same adapter in the same mode, and nothing was written to since; else it
computes for itself. So a wrong guess costs time and nothing else (but torch's inference mode does
not tell whether an input was written to in between); cross-attention is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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
Aside = dict[str, tuple[Tensor, int]]
_CROSS = ("cross", "encoder_attn", "EncDec")


class Group:
    """Layers of one module that may read the same input; compared by identity."""


def find_siblings(layers: Iterable[ManyLoraLayer]) -> None:
    """Tell each layer of a model which ones that come after it read what it reads."""
    by_name = {layer.name: layer for layer in layers}
    groups: dict[tuple[str, tuple[str, ...]], Group] = {}
    for name, layer in by_name.items():
        parent, _, own = name.rpartition(".")
        names = next((names for names in SIBLINGS if own in names), ())
        if any(word in parent for word in _CROSS):
            names = ()
        layer.group = groups.setdefault((parent, names), Group()) if names else Group()
        after = names[names.index(own) + 1 :] if names else ()
        paths = [f"{parent}.{one}" if parent else one for one in after]
        layer.siblings = [by_name[path] for path in paths if path in by_name]


class Kept(NamedTuple):
    """What one layer computed for its siblings, and for what: aside has outputs by own name, each
    with the version of its layer's tensors; version is that of x, and changes when x is written to.
    """

    x: Tensor
    version: int
    group: Group
    adapter: str
    mode: tuple[bool, bool]
    aside: Aside


@dataclass
class SharedReads:
    """What the layers of one model keep for each other; one value, so that threads do not mix."""

    kept: Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"kept": None}  # nothing of a forward pass is copied

    def aside(self, layer: ManyLoraLayer, adapter: str, x: Tensor) -> Aside:
        """What is kept of this layer's group for this very call."""
        kept = self.kept
        if kept is None or kept.x is not x or kept.group is not layer.group:
            return {}
        same = kept.version == _version(x) and kept.adapter == adapter and kept.mode == _mode()
        return kept.aside if same else {}

    def taken(self, layer: ManyLoraLayer, adapter: str, aside: Aside) -> Tensor | None:
        """What was computed for this layer, once; None if its tensors have changed since."""
        y, version = aside.pop(layer.own_name, (None, 0))
        if not aside:
            self.kept = None
        return y if y is None or version == _versions(layer, adapter) else None

    def lay_aside(
        self, x: Tensor, adapter: str, readers: list[ManyLoraLayer], ys: list[Tensor], aside: Aside
    ) -> None:
        """Keep the outputs of all readers but the first, beside what is kept of the same x."""
        aside = {**aside}
        for one, y in zip(readers[1:], ys[1:], strict=True):
            aside[one.own_name] = y, _versions(one, adapter)
        fields = x, _version(x), readers[0].group, adapter, _mode(), aside
        self.kept = Kept(*fields) if aside else None


def _mode() -> tuple[bool, bool]:
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.is_grad_enabled(), inference


def _version(x: Tensor) -> int:
    untracked = torch.compiler.is_compiling() or x.is_inference()
    return 0 if untracked else x._version


def _versions(layer: ManyLoraLayer, adapter: str) -> int:
    """Grows whenever one of a layer's tensors is written to."""
    if torch.compiler.is_compiling():
        return 0
    held: Any = layer._modules
    try:
        parts = layer.parts[adapter]
        return sum([held[name]._modules[adapter].weight._version for _, name in parts])
    except RuntimeError:  # made in inference mode, which does not count
        return 0


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
