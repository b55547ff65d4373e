"""The gradient's norm for each part of an adapter, at the steps that are logged.

    norm(part) = sqrt( sum over layers of |dL/d(part's tensors)|^2 )

A part is what one branch owns (its rows of A, its columns of B, its row of scales: "branch i"), or
what all share ("A" or "B" where the branches share it, "router", "gate", "shared", the always-on
branch), or "other", what is trained outside the branches. The parts' squares sum to the square of
the whole norm, `grad_norm`.

Measured once a step, after the last micro-batch and DDP's averaging and before clipping; other
steps are left alone. Under FSDP and DeepSpeed a process has only pieces of the gradients (or, with
ZeRO, none in `.grad`): no norms are given then, rather than those of a piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from manylora.adapter.layer import ManyLoraLayer, layers_of
from manylora.adapter.training import block_of
from manylora.methods import Branches

OTHER = "other"
Blocks = dict[str, list[tuple[str, int | None]]]


def blocks_of(branches: Branches) -> Blocks:
    """Part -> its tensors on a layer: names without prefix, each with the branch that owns a block
    of it, or None for all of it."""
    found: Blocks = {}
    for tensor in branches.shapes(1, 1):
        whole = {"A": branches.share_A, "B": branches.share_B}.get(tensor)
        if tensor.startswith("shared_"):
            found.setdefault("shared", []).append((tensor, None))
        elif whole or tensor in ("router", "gate"):
            found.setdefault(tensor, []).append((tensor, None))
        else:
            for i in range(branches.count):
                found.setdefault(f"branch {i}", []).append((tensor, i))
    return found


def gradients_of(layer: ManyLoraLayer, adapter: str) -> dict[str, list[Tensor]]:
    """The gradients of each part of a layer as they stand in `.grad`; frozen tensors have none."""
    found: dict[str, list[Tensor]] = {}
    for part, blocks in blocks_of(layer.branches[adapter]).items():
        for tensor, branch in blocks:
            gradient = getattr(layer, f"manylora_{tensor}")[adapter].weight.grad
            if gradient is not None:
                own = block_of(layer, adapter, tensor, gradient, branch)
                found.setdefault(part, []).append(own)
    return found


def gradient_norms(model: nn.Module, adapter: str) -> dict[str, float]:
    """The norm of each part's gradient over all layers; call after a backward pass.

    The device is waited for once.
    """
    parts: dict[str, list[Tensor]] = {}
    seen: set[int] = set()
    for layer in layers_of(model):
        if adapter not in layer.branches:
            continue
        tensors = layer.branches[adapter].shapes(1, 1)
        seen.update(id(getattr(layer, f"manylora_{name}")[adapter].weight) for name in tensors)
        for part, gradients in gradients_of(layer, adapter).items():
            parts.setdefault(part, []).extend(gradients)
    rest = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in seen]
    if rest:
        parts[OTHER] = rest
    if not parts:
        return {}
    norms = [get_total_norm([g.float() for g in gradients]) for gradients in parts.values()]
    return dict(zip(parts, torch.stack(norms).tolist(), strict=True))


class GradientNormsMixin:
    """Left of a transformers trainer class: `gradient_norms` of the last step that was logged.

    Empty before the first, and where gradients are sharded.
    """

    args: Any
    state: Any
    model: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.gradient_norms: dict[str, float] = {}
        super().__init__(*args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self._is_logged(self.state.global_step + 1) and not self._is_sharded():
            scaler = self.accelerator.scaler  # fp16's: what it multiplied the loss by
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            norms = gradient_norms(self.model, self.model.active_adapter)
            self.gradient_norms = {part: norm / scale for part, norm in norms.items()}
        return super()._clip_grad_norm(model)  # type: ignore[misc]

    def _is_logged(self, step: int) -> bool:
        """As transformers' DefaultFlowCallback decides it, but before the step is done."""
        first = step == 1 and self.args.logging_first_step
        return bool(first or step % self.state.logging_steps == 0)

    def _is_sharded(self) -> bool:
        trainer: Any = self
        return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
