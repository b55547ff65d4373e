"""One product for each layer: the whole update of fixed mixing weights as a plain LoRA's A and B.

    dW = [s g_1 B'_1 ... s g_N B'_N | s0 B0] [A_1; ...; A_N; A0]

Everything is baked into B, so alpha = rank. Where the branches share A (or B), they add up to a
single B (or A), and the rank stays r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.adapter.layer import ManyLoraLayer
from manylora.adapter.ops import fold_scale
from manylora.adapter.router import constant_weights

Factors = dict[str, tuple[Tensor, Tensor]]
"""Layer name -> A (rank, in) and B (out, rank)."""


def lora_factors(
    layer: ManyLoraLayer, adapter: str, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with B A the layer's whole update, scaling baked into B.

    weights: mixing weights (N,); None where the method has constant ones. At least float32.
    """
    branches = layer.branches[adapter]
    t = {part: tensor.detach().double().cpu() for part, tensor in layer.tensors(adapter).items()}
    A, B = t["A"], fold_scale(t["B"], branches, t.get("scale"))
    if weights is None:
        weights = constant_weights(branches, t["A"])
    if weights is None:
        weights = torch.ones(branches.count)
    weights = weights.double().cpu()
    if branches.share_A:
        B = (B.unflatten(1, (branches.count, -1)) * weights[:, None]).sum(1)
    elif branches.share_B:
        A = (A.unflatten(0, (branches.count, -1)) * weights[:, None, None]).sum(0)
    else:
        B = B * weights.repeat_interleave(torch.tensor(branches.ranks))
        used = weights.repeat_interleave(torch.tensor(branches.ranks)) != 0
        A, B = (A[used], B[:, used]) if branches.gate == "one_hot" else (A, B)
    return with_shared(layer, adapter, A, layer.scaling[adapter] * B)


def with_shared(layer: ManyLoraLayer, adapter: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the branches and, below and beside them, those of the shared branch."""
    t = layer.tensors(adapter)
    if layer.branches[adapter].shared_rank:
        A = torch.cat([A, t["shared_A"].detach().to(A)])
        B = torch.cat([B, layer.shared_scaling[adapter] * t["shared_B"].detach().to(B)], 1)
    dtype = torch.promote_types(t["A"].dtype, torch.float32)
    return A.to(dtype), B.to(dtype)
