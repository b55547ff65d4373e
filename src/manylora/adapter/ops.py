"""The one computation, collapsed: two products however many branches there are.

    h  = A drop(x)                      (..., rows of A)
    u  = s g (x) h                      (..., columns of B)
    dy = B' u,  B' = B diag(c)          (..., out)

A shared: u = s [g_1 h, ..., g_N h]. Own A: block i of h times s g_i. B shared: those blocks' sum.
The scale c_i of each branch (MultiLoRA 2311.11501) multiplies output channels, so it is folded into
B, which costs a weight-sized product and no activations. Nothing loops over branches; the loop
written from the papers is the reference in the tests. Faster kernels replace `branch_update` alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from manylora.methods import Branches


def branch_update(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    branches: Branches,
    scaling: float,
    weights: Tensor | None = None,
    scale: Tensor | None = None,
    dropout_per_branch: float = 0.0,
) -> Tensor:
    """s B' [g (x) A x] of shape (..., out).

    Args:
        x: (..., in), in the dtype of A.
        A: (rows of A, in). B: (out, columns of B).
        scaling: s.
        weights: g, broadcastable to (..., N); None means all ones.
        scale: c, (N, out), or None.
        dropout_per_branch: probability of a mask of its own for each branch, as in the HydraLoRA
            authors' code; 0 where x has been masked already, or need not be.
    """
    if dropout_per_branch:
        h = _down_with_own_masks(x, A, branches, dropout_per_branch)
    else:
        h = F.linear(x, A)
        if branches.equal_ranks:
            h = torch.unflatten(h, -1, (-1, branches.ranks[0]))
    u = scaling * _mix(h, branches, weights)
    return F.linear(u, fold_scale(B, branches, scale).to(u.dtype))


def fold_scale(B: Tensor, branches: Branches, scale: Tensor | None) -> Tensor:
    """B with column block i multiplied by c_i along the output channels; (out, columns of B)."""
    if scale is None:
        return B
    if branches.equal_ranks:
        blocks = torch.unflatten(B, 1, (branches.count, branches.ranks[0]))
        return (blocks * scale.T.unsqueeze(-1)).flatten(1)
    return B * (scale.T @ owners(branches, scale))


def owners(branches: Branches, like: Tensor) -> Tensor:
    """(N, sum of ranks): 1 where a column belongs to a branch. Only uneven ranks need it."""
    return _owners(branches.ranks, like.device, like.dtype)


@cache
def _owners(ranks: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    # Kept, because making it waits for the GPU; and outside of inference mode, since what is made
    # in it takes no part in a backward pass.
    with torch.inference_mode(False):
        column = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
        return F.one_hot(column, len(ranks)).T.to(device, dtype)


def _mix(h: Tensor, branches: Branches, weights: Tensor | None) -> Tensor:
    """g (x) h: (..., columns of B), from h (..., N or 1, r), or (..., sum of ranks) if uneven."""
    if not branches.equal_ranks:
        return h if weights is None else h * (weights @ owners(branches, weights)).to(h.dtype)
    if weights is not None:
        h = weights.to(h.dtype).unsqueeze(-1) * h
    elif branches.share_A:
        h = h.expand(*h.shape[:-2], branches.count, h.shape[-1])
    return h.sum(-2) if branches.share_B else h.flatten(-2)


def _down_with_own_masks(x: Tensor, A: Tensor, branches: Branches, dropout: float) -> Tensor:
    masked = F.dropout(x.expand(branches.count, *x.shape), dropout)
    h = F.linear(masked, A)  # (N, ..., rows of A)
    if branches.share_A:
        return h.movedim(0, -2)
    mine = owners(branches, h).bool().reshape(branches.count, *[1] * (h.dim() - 2), -1)
    h = torch.where(mine, h, 0).sum(0)
    return torch.unflatten(h, -1, (-1, branches.ranks[0])) if branches.equal_ranks else h
