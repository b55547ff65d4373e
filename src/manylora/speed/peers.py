"""What others do, written from their descriptions: the rows that manylora is compared with.

`AutogradLora`: LoRA by a hand-written autograd function, cuBLAS products alone, as Unsloth does it
(unslothai/unsloth, kernels/fast_lora.py, described in its documentation): y = W x + s B A x is
accumulated in place, X is saved and nothing of rank size, h = A x is computed again in backward.

    dh = s dy B      dB = s dy' h      dA = dh' x      dx = dy W + dh A

Compiled, y is no longer written to in place: torch 2.11's compiler loses the gradient then.

`LoopHydraLora`: HydraLoRA (2404.19245) as published, branch by branch:

    y = W x;   for i in 1..N:   y = y + softmax(R x)_i * B_i A drop(x) * s

with A and a dropout mask of its own computed in every turn of the loop, and the router reading x
before dropout in float32 softmax. Own code from the paper's equations.

`merge_reads`: the frozen model itself, with the input gradients of layers that read the same input
accumulated in place, dx = dq Wq + dk Wk + dv Wv, instead of summed by autograd: a method whose
layers are computed together gains that much without any adapter, so it is measured by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoraProduct(torch.autograd.Function):
    """y = W x + b + s B A x for x (tokens, in); W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float
    ) -> Tensor:
        y = F.linear(x, W, bias)
        A_, B_ = A.to(x.dtype), B.to(x.dtype)
        if torch.compiler.is_compiling():
            y = torch.addmm(y, x @ A_.t(), B_.t(), alpha=s)
        else:
            y.addmm_(x @ A_.t(), B_.t(), alpha=s)
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        return y

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = outer
        x, W, A, B = ctx.saved_tensors
        A_, B_ = A.to(x.dtype), B.to(x.dtype)
        dh = (dy @ B_).mul_(ctx.s)
        dB = (dy.t() @ (x @ A_.t())).mul_(ctx.s)
        dA = dh.t() @ x
        dx = dy @ W
        dx.addmm_(dh, A_)
        return dx, None, None, dA.to(A.dtype), dB.to(B.dtype), None


class AutogradLora(nn.Module):
    """A frozen linear layer with LoRA. A (r, in), B (out, r)."""

    def __init__(self, base: nn.Linear, r: int, scaling: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = base
        self.scaling = scaling
        self.A = _factor(r, base.in_features, base, dtype)
        self.B = _factor(base.out_features, r, base, dtype)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        flat = x.reshape(-1, base.in_features)
        y = LoraProduct.apply(flat, base.weight, base.bias, self.A, self.B, self.scaling)
        return cast(Tensor, y).unflatten(0, x.shape[:-1])


class LoopHydraLora(nn.Module):
    """A frozen linear layer with N branches in a loop. A (r, in), each B (out, r), R (N, in)."""

    def __init__(
        self,
        base: nn.Linear,
        r: int,
        n: int,
        scaling: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.base_layer = base
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self.A = _factor(r, base.in_features, base, dtype)
        self.B = nn.ParameterList([_factor(base.out_features, r, base, dtype) for _ in range(n)])
        self.router = _factor(n, base.in_features, base, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        dtype, x = y.dtype, x.to(self.A.dtype)
        logits = F.linear(x, self.router)
        route = torch.softmax(
            logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32)
        ).to(x.dtype)
        for i, B in enumerate(self.B):
            branch = F.linear(F.linear(self.dropout(x), self.A), B)
            y = y + torch.unsqueeze(route[..., i], -1) * branch * self.scaling
        return y.to(dtype)


def _factor(rows: int, columns: int, base: nn.Linear, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=base.weight.device))


class SameInput(torch.autograd.Function):
    """y_i = W_i x of several frozen layers; x (tokens, in), each W (out_i, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights)
        return tuple(F.linear(x, W) for W in weights)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        first, *others = ctx.saved_tensors
        dx = dys[0] @ first
        for dy, W in zip(dys[1:], others, strict=True):
            dx.addmm_(dy, W)
        return dx, *[None for _ in dys]


class Reader(nn.Module):
    """A frozen layer of a group that reads one input: the first computes for all of them."""

    def __init__(self, group: Sequence[nn.Linear], place: int, aside: list[Tensor]) -> None:
        super().__init__()
        self.place = place
        self.aside = aside
        self.layers = nn.ModuleList(group if place == 0 else [])

    def forward(self, x: Tensor) -> Tensor:
        if self.place == 0:
            flat = x.reshape(-1, x.shape[-1])
            weights = [cast(nn.Linear, layer).weight for layer in self.layers]
            ys = SameInput.apply(flat, *weights)
            self.aside[:] = [y.unflatten(0, x.shape[:-1]) for y in ys]
        return self.aside.pop(0)


SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def merge_reads(model: nn.Module) -> None:
    """Compute q, k, v and gate, up together wherever a module has all of them, in place."""
    for module in list(model.modules()):
        for names in SAME_INPUT:
            inside = dict(module.named_children())
            group = [one for n in names if isinstance(one := inside.get(n), nn.Linear)]
            if len(group) != len(names) or any(one.bias is not None for one in group):
                continue
            aside: list[Tensor] = []
            for place, name in enumerate(names):
                setattr(module, name, Reader(group, place, aside))
