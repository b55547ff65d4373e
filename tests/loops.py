"""Every method as its paper writes it: token by token, branch by branch, nothing collapsed.

These loops are the reference of test_equations.py. They share no code with the adapter: x is one
token (in,), A_i (r_i, in) and B_i (out, r_i) are the branches one by one, k is the id of the
token's task or cluster. Sources: LoRA 2106.09685 eq. 3; MultiLoRA 2311.11501 (a sum of parallel
modules, each scaled); HydraLoRA 2404.19245 eq. 4 and 5; MoLoRA 2309.05444; MOELoRA 2310.18339 (the
gate of a task).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Parts:
    """The tensors of one adapter, cut into its branches; R router, c scales, v rows of a gate."""

    A: list[Tensor]
    B: list[Tensor]
    s: float
    R: Tensor | None = None
    c: Tensor | None = None
    v: Tensor | None = None
    A0: Tensor | None = None
    B0: Tensor | None = None
    s0: float = 0.0

    @property
    def count(self) -> int:
        return max(len(self.A), len(self.B))

    @property
    def nothing(self) -> Tensor:
        return self.B[0].new_zeros(len(self.B[0]))


Loop = Callable[[Tensor, Parts, int], Tensor]


def softmax(z: Tensor) -> Tensor:
    e = torch.exp(z - z.max().detach())
    return e / e.sum()


def lora(x: Tensor, p: Parts, k: int) -> Tensor:
    (A,), (B,) = p.A, p.B
    return p.s * (B @ (A @ x))


def lora_split(x: Tensor, p: Parts, k: int) -> Tensor:
    y = p.nothing
    for A, B in zip(p.A, p.B, strict=True):
        y = y + p.s * (B @ (A @ x))
    return y


def multilora(x: Tensor, p: Parts, k: int) -> Tensor:
    y = p.nothing
    for c, A, B in zip(p.c, p.A, p.B, strict=True):
        y = y + p.s * (c * (B @ (A @ x)))
    return y


def hydralora(x: Tensor, p: Parts, k: int) -> Tensor:
    (A,) = p.A
    omega = softmax(p.R @ x)
    y = p.nothing
    for i, B in enumerate(p.B):
        y = y + p.s * omega[i] * (B @ (A @ x))
    return y


def hydralora_rank_router(x: Tensor, p: Parts, k: int) -> Tensor:
    (A,) = p.A
    omega = softmax(p.R @ (A @ x))
    y = p.nothing
    for i, B in enumerate(p.B):
        y = y + p.s * omega[i] * (B @ (A @ x))
    return y


def hydralora_uniform(x: Tensor, p: Parts, k: int) -> Tensor:
    (A,) = p.A
    y = p.nothing
    for B in p.B:
        y = y + p.s * (B @ (A @ x)) / p.count
    return y


def lora_moe(x: Tensor, p: Parts, k: int) -> Tensor:
    w = softmax(p.R @ x)
    y = p.nothing
    for i, (A, B) in enumerate(zip(p.A, p.B, strict=True)):
        y = y + p.s * w[i] * (B @ (A @ x))
    return y


def lora_moe_rank_router(x: Tensor, p: Parts, k: int) -> Tensor:
    w = softmax(p.R @ torch.cat([A @ x for A in p.A]))
    y = p.nothing
    for i, (A, B) in enumerate(zip(p.A, p.B, strict=True)):
        y = y + p.s * w[i] * (B @ (A @ x))
    return y


def lora_moe_shared_b(x: Tensor, p: Parts, k: int) -> Tensor:
    (B,) = p.B
    w = softmax(p.R @ x)
    y = p.nothing
    for i, A in enumerate(p.A):
        y = y + p.s * w[i] * (B @ (A @ x))
    return y


def lora_split_shared_b(x: Tensor, p: Parts, k: int) -> Tensor:
    (B,) = p.B
    y = p.nothing
    for A in p.A:
        y = y + p.s * (B @ (A @ x))
    return y


def one_branch(x: Tensor, p: Parts, k: int) -> Tensor:
    """Branch k alone, and for k = -1 none."""
    return p.nothing if k == -1 else p.s * (p.B[k] @ (p.A[k] @ x))


def one_branch_shared_a(x: Tensor, p: Parts, k: int) -> Tensor:
    (A,) = p.A
    return p.nothing if k == -1 else p.s * (p.B[k] @ (A @ x))


def task_gate(x: Tensor, p: Parts, k: int) -> Tensor:
    y = p.nothing
    if k == -1:
        return y
    w = softmax(p.v[k])
    for i, (A, B) in enumerate(zip(p.A, p.B, strict=True)):
        y = y + p.s * w[i] * (B @ (A @ x))
    return y


def task_gate_shared_a(x: Tensor, p: Parts, k: int) -> Tensor:
    (A,) = p.A
    y = p.nothing
    if k == -1:
        return y
    w = softmax(p.v[k])
    for i, B in enumerate(p.B):
        y = y + p.s * w[i] * (B @ (A @ x))
    return y


def shared_branch_and(loop: Loop) -> Loop:
    """The method with a branch B0 A0 beside it that is always on."""
    return lambda x, p, k: loop(x, p, k) + p.s0 * (p.B0 @ (p.A0 @ x))


def general(x: Tensor, p: Parts, k: int, gate: str, router_input: str) -> Tensor:
    """The design's one equation over any combination of its parts."""
    h = [A @ x for A in p.A]
    if gate == "router":
        g = softmax(p.R @ (x if router_input == "x" else torch.cat(h)))
    elif gate == "task":
        g = softmax(p.v[k]) if k >= 0 else x.new_zeros(p.count)
    elif gate == "one_hot":
        g = x.new_tensor([float(i == k) for i in range(p.count)])
    else:
        g = x.new_full((p.count,), 1 / p.count if gate == "uniform" else 1.0)
    y = p.nothing
    for i in range(p.count):
        branch = p.B[min(i, len(p.B) - 1)] @ h[min(i, len(p.A) - 1)]
        y = y + p.s * g[i] * (branch if p.c is None else p.c[i] * branch)
    return y if p.A0 is None else y + p.s0 * (p.B0 @ (p.A0 @ x))
