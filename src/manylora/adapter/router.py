"""Mixing weights g(x) of the branches, and the losses that balance a router.

    gate      g                                             shape
    ones      1 (nothing is computed)                       none
    uniform   1 / N                                         (N,)
    router    softmax(R x), or softmax(R A x)               (..., N), per token
    task      softmax(v_t), t the example's task            (batch, 1, N)
    one_hot   e_k, k the example's branch; 0 for id -1      (batch, 1, N)

The softmax is taken in at least float32; float64 stays float64. Sources: HydraLoRA 2404.19245
eq. 5, whose W_g is r x N (the literal reading is R A x) while the authors' code has R x; task gate:
MOELoRA 2310.18339, MTL-LoRA 2410.09437. The router never sees dropout, as in the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manylora.adapter.state import spread
from manylora.methods import Branches


def softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def constant_weights(branches: Branches, like: Tensor) -> Tensor | None:
    """Mixing weights (N,) that depend on nothing; None means all ones."""
    if branches.gate == "uniform":
        n, dtype = branches.count, torch.promote_types(like.dtype, torch.float32)
        return torch.full((n,), 1 / n, dtype=dtype, device=like.device)
    return None


def router_weights(x: Tensor, router: Tensor) -> Tensor:
    """softmax(R x) over (..., N) for x (..., features) and R (N, features)."""
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(router.dtype)
    return softmax(F.linear(x, router))


def id_weights(
    branches: Branches, ids: Tensor | None, gate: Tensor | None, x: Tensor, layer: str
) -> Tensor:
    """Weights chosen by the id of an example or token; x gives device, dtype and shape.

    Raises ValueError when there are no ids: neither the caller nor a selector said which.
    """
    if ids is None:
        raise ValueError(
            f"{layer}: this adapter chooses its branch by task or cluster "
            f"(gate={branches.gate!r}), and nothing says which: wrap the call in "
            "`with manylora.branch_ids(model, ids):`, or load it with PeftModel.from_pretrained "
            "from a folder that has a branch selector"
        )
    ids = spread(ids.to(x.device), x.shape[:-1]).unsqueeze(-1)
    if gate is None:
        return (ids == torch.arange(branches.count, device=x.device)).to(x.dtype)
    rows = softmax(gate)
    # A product with the one-hot task keeps the backward pass deterministic, unlike indexing.
    chosen = (ids == torch.arange(branches.num_tasks, device=x.device)).to(rows.dtype)
    return chosen @ rows


def in_range(adapter: str, branches: Branches, low: int, high: int) -> None:
    """ValueError where ids from low to high are not all the adapter's."""
    if branches.needs_ids and not -1 <= low <= high < branches.choices:
        raise ValueError(
            f"branch_ids: ids must be in -1..{branches.choices - 1} (-1: the shared branch alone), "
            f"got {low}..{high} for adapter {adapter!r}"
        )


def itself(tensor: Tensor) -> Tensor:
    return tensor


def balance_loss(weights: Tensor, kind: str, mask: Tensor | None) -> Tensor:
    """How unevenly a router uses its branches; weights (..., N), mask (batch, tokens) of real ones.

    cv_squared: var(z) / (mean(z)^2 + 1e-10), z_i the weight of branch i summed over tokens
        (LoRAMoE 2312.09979 eq. 6, without its task-type factor). 0 when even.
    switch: N sum_i f_i P_i, f_i the share of tokens whose largest weight is i, P_i the mean weight
        (Switch Transformer 2101.03961 eq. 4). 1 when even.
    """
    flat = weights.reshape(-1, weights.shape[-1])
    keep = torch.ones(len(flat), dtype=flat.dtype, device=flat.device)
    if mask is not None and mask.numel() == len(flat):
        keep = mask.reshape(-1).to(flat)
    if kind == "cv_squared":
        load = keep @ flat
        return load.var(unbiased=False) / (load.mean() ** 2 + 1e-10)
    total = keep.sum().clamp(min=1)
    chosen = F.one_hot(flat.argmax(-1), flat.shape[-1]).to(flat)
    return flat.shape[-1] * ((keep @ chosen / total) * (keep @ flat / total)).sum()


class RoutingLosses(dict[str, Tensor]):
    """Balance losses of the last forward pass by adapter; a copy or a pickle of them is empty.

    They belong to that pass: the tensors of its graph can neither be copied nor pickled.
    """

    def __reduce__(self) -> tuple[type[RoutingLosses], tuple[()]]:
        return RoutingLosses, ()


def not_mergeable(adapter: str, branches: Branches) -> str:
    """Why an adapter has no single weight update, and what to do instead."""
    if branches.gate == "router":
        return (
            f"adapter {adapter!r} mixes its branches anew for every token, so no single weight "
            "equals it and it cannot be merged exactly; keep it unmerged, call unload() to drop "
            "it, or approximate it by its mean routing: manylora export RUN --static"
        )
    what = "task" if branches.gate == "task" else "branch"
    return (
        f"adapter {adapter!r} has one weight update for each {what}: say which to merge, "
        f"`with manylora.branch_ids(model, K): model.merge_adapter()`, or export all of them, one "
        "plain LoRA each: manylora export RUN"
    )
