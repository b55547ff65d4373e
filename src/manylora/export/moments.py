"""What a least-squares fit of a routed layer needs to know about its tokens: second moments.

    C = sum_t x_t x_t^T            (in, in), once for the layers that read the same x
    Z = sum_t z_t x_t^T            (K, in),  z = g(x) (x) A x, in the adapter's own small space
    g = sum_t g(x_t)               (N,)

With Q the (out, K) up-projections, the routed update of a token is dW(x) x = Q z, so Q Z is its
cross moment with x, and no (out, in) matrix is ever summed. All is float64, because a fit divides
by what is smallest in C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manylora.adapter.layer import ManyLoraLayer
from manylora.adapter.ops import fold_scale
from manylora.adapter.router import router_weights


@dataclass
class Moments:
    """Sums by layer name; `second` by the name of the first layer that read the same input."""

    second: dict[str, Tensor] = field(default_factory=dict)
    cross: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    tokens: float = 0.0

    def add(self, other: Moments, scale: float = 1.0) -> None:
        """Add `scale` times the other's sums."""
        self.owner |= other.owner
        self.tokens += scale * other.tokens
        for mine, theirs in (
            (self.second, other.second),
            (self.cross, other.cross),
            (self.weights, other.weights),
        ):
            for name, tensor in theirs.items():
                if name in mine:
                    mine[name].add_(tensor, alpha=scale)
                else:
                    mine[name] = scale * tensor

    def mean_weights(self, layer: str) -> Tensor:
        return self.weights[layer] / self.weights[layer].sum().clamp(min=1e-30)


class MomentMeter:
    """Sums the moments of some routed layers while `watching` forward passes."""

    def __init__(self, layers: Sequence[ManyLoraLayer], adapter: str) -> None:
        self.layers, self.adapter = layers, adapter

    @contextmanager
    def watching(self, mask: Tensor, moments: Moments) -> Iterator[None]:
        """mask: (batch, tokens), true for tokens to count. Adds to `moments`."""
        keep = mask.bool().flatten()
        last: list[Any] = [None, ""]

        def watch(layer: ManyLoraLayer, args: tuple[Any, ...]) -> None:
            x = args[0].flatten(0, -2)[keep].double()
            first = args[0] is not last[0]
            if first:
                last[:] = args[0], layer.name
            found = _of(layer, self.adapter, x, last[1], first)
            moments.add(found)

        handles = [layer.register_forward_pre_hook(watch) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        moments.tokens += float(keep.sum())


def _of(layer: ManyLoraLayer, adapter: str, x: Tensor, owner: str, first: bool) -> Moments:
    z, weights = _mixed(layer, adapter, x)
    return Moments(
        {owner: x.T @ x} if first else {},
        {layer.name: z.T @ x},
        {layer.name: weights.sum(0)},
        {layer.name: owner},
    )


def _mixed(layer: ManyLoraLayer, adapter: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """z (tokens, K) and g (tokens, N) of tokens x (tokens, in)."""
    branches, t = layer.branches[adapter], layer.tensors(adapter)
    h = F.linear(x, t["A"].double())
    g = router_weights(h if branches.router_input == "Ax" else x, t["router"].double())
    if branches.share_A:
        return (g[:, :, None] * h[:, None, :]).flatten(1), g
    if branches.share_B:
        return (h.unflatten(1, (branches.count, -1)) * g[:, :, None]).sum(1), g
    return h * g.repeat_interleave(torch.tensor(branches.ranks, device=g.device), 1), g


def up_projections(layer: ManyLoraLayer, adapter: str) -> Tensor:
    """Q (out, K), scaling baked in; without the shared branch, which is constant."""
    t = layer.tensors(adapter)
    B = fold_scale(t["B"].detach(), layer.branches[adapter], t.get("scale"))
    return layer.scaling[adapter] * B.detach().double()


def mean_rows(layer: ManyLoraLayer, adapter: str, weights: Tensor) -> Tensor:
    """P (K, in) with Q P the update at fixed mixing weights (N,)."""
    branches, A = layer.branches[adapter], layer.tensors(adapter)["A"].detach().double()
    weights = weights.to(A)
    if branches.share_A:
        return (weights[:, None, None] * A).flatten(0, 1)
    if branches.share_B:
        return (weights[:, None, None] * A.unflatten(0, (branches.count, -1))).sum(0)
    return A * weights.repeat_interleave(torch.tensor(branches.ranks, device=A.device))[:, None]
