"""The one computation, as one operation of torch: the layers that read x, and their adapters.

For layers j = 1..n that read the same x, with the trained tensors of each stacked (T tokens):

    z   = drop(x) P'                (T, n K)   P: [A; router; shared A] of each layer, (n K, in)
    u_j = mix(z_j)                  (T, m)     mixing.py
    y_j = W_j x + b_j + Q_j u_j     (T, out)   Q_j: [B diag(c) | shared B], (out, m)

and backwards, by hand:

    du_j = dy_j Q_j      dQ_j = dy_j' u_j      dz = mix'(du)      dP = dz' drop(x)
    dx   = sum_j dy_j W_j + drop'(dz P)

Two skinny products forwards and four backwards, whatever the number of branches; x is read once for
all n layers, and their share of dx is added in place. Only x, z and the mixing weights that were
given are kept for the backward pass, and x not where it can be computed again (recompute.py). u is
computed again, and dropout's mask comes again from its seed. `linear` is registered with torch, so
that torch.compile keeps it whole; where the base layer is no plain linear one (quantised, sharded,
hooked), its own output y_j takes the place of W_j.

The loop written from the papers is the reference in the tests (2106.09685, 2311.11501, 2404.19245).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manylora.adapter.masks import down_backward, down_product, input_backward
from manylora.adapter.mixing import Layout, mix, mix_backward, owners
from manylora.methods import Branches


def fold_scale(B: Tensor, branches: Branches, scale: Tensor | None) -> Tensor:
    """B with column block i multiplied by c_i (N, out) along the output channels."""
    if scale is None:
        return B
    if branches.equal_ranks:
        blocks = torch.unflatten(B, 1, (branches.count, branches.ranks[0]))
        return (blocks * scale.T.unsqueeze(-1)).flatten(1)
    return B * (scale.T @ owners(branches.ranks, scale))


def forward(
    x: Tensor,
    bases: list[Tensor],
    biases: list[Tensor],
    dense: bool,
    down: Tensor,
    ups: list[Tensor],
    weights: Tensor | None,
    router: Tensor | None,
    seed: Tensor | None,
    layout: list[int],
    scaling: float,
    shared_scaling: float,
    dropout: float,
) -> list[Tensor]:
    """[y_1, ..., y_n, z] of layers that read x; see above.

    Args:
        x: (T, in). All tensors but weights and seed have its dtype.
        bases: W_j (out_j, in) if dense, else the base layers' outputs (T, out_j).
        biases: b_j (out_j) of dense layers; empty where they have none.
        down: P. ups: Q_j.
        weights: given mixing weights (T, n or 1, N). router: on A x, (n, N, rows of A).
        seed: of dropout's masks, (1) or (N + 1) integers on the CPU. dropout: probability.
        layout: `mixing.Layout`, the same for all layers. scaling: s. shared_scaling: s0.
    """
    lay = Layout.decode(layout)
    with _as_is(x):
        z = down_product(x, down, lay, dropout, seed)
        u = mix(z, len(ups), lay, scaling, shared_scaling, weights, router)
        ys = []
        for j, up in enumerate(ups):
            mine = u[:, j]
            if dense:
                y = F.linear(x, bases[j], biases[j] if biases else None)
                ys.append(y.addmm_(mine, up.t()))
            else:
                ys.append(torch.addmm(bases[j], mine, up.t()))
    return [*ys, z]


linear = torch.library.custom_op("manylora::linear", forward, mutates_args=())


@linear.register_fake
def _(x: Tensor, bases: list[Tensor], biases: Any, dense: bool, down: Tensor, *rest: Any) -> Any:
    widths = [base.shape[0] if dense else base.shape[1] for base in bases]
    return [x.new_empty(x.shape[0], width) for width in [*widths, down.shape[0]]]


def backward(
    dys: list[Tensor],
    dz: Tensor | None,
    z: Tensor,
    bases: list[Tensor],
    down: Tensor,
    ups: list[Tensor],
    weights: Tensor | None,
    router: Tensor | None,
    seed: Tensor | None,
    layout: list[int],
    scaling: float,
    shared_scaling: float,
    dropout: float,
    wants_x: bool,
) -> list[Tensor]:
    """[dx, dz, dQ_1, ..., dQ_n, dweights, drouter]; what is not there or not wanted is empty.

    dz: of what else reads z (a balance loss). bases: W_j of dense layers, else empty.
    """
    lay, n = Layout.decode(layout), len(ups)
    with _as_is(z):
        du = z.new_empty(len(z), n, ups[0].shape[1])
        for j, (dy, up) in enumerate(zip(dys, ups, strict=True)):
            torch.mm(dy, up, out=du[:, j])
        u, own, dweights, drouter = mix_backward(
            du, z, n, lay, scaling, shared_scaling, weights, router
        )
        dups = [dy.t() @ u[:, j] for j, dy in enumerate(dys)]
        dz = own if dz is None else own + dz
        dx = _through_bases(dys, bases, dz, down) if wants_x else None
        if dx is not None:
            input_backward(dx, dz, down, lay, dropout, seed)
    left_out = [z.new_empty(0) for _ in range(3)]
    return [
        left_out[0] if dx is None else dx,
        dz,
        *dups,
        left_out[1] if dweights is None else dweights,
        left_out[2] if drouter is None else drouter,
    ]


linear_gradients = torch.library.custom_op("manylora::linear_gradients", backward, mutates_args=())


@linear_gradients.register_fake
def _(
    dys: list[Tensor],
    dz: Tensor | None,
    z: Tensor,
    bases: list[Tensor],
    down: Tensor,
    ups: list[Tensor],
    weights: Tensor | None,
    router: Tensor | None,
    *rest: Any,
) -> Any:
    empty = z.new_empty(0)
    return [
        z.new_empty(len(z), down.shape[1]) if rest[-1] else empty,
        torch.empty_like(z),
        *[torch.empty_like(up) for up in ups],
        empty if weights is None else torch.empty_like(weights),
        empty if router is None else torch.empty_like(router),
    ]


def backward_down(
    dz: Tensor, x: Tensor, seed: Tensor | None, layout: list[int], dropout: float
) -> Tensor:
    """dP."""
    with _as_is(x):
        return down_backward(dz, x, Layout.decode(layout), dropout, seed)


down_gradient = torch.library.custom_op("manylora::down_gradient", backward_down, mutates_args=())


@down_gradient.register_fake
def _(dz: Tensor, x: Tensor, *rest: Any) -> Any:
    return x.new_empty(dz.shape[1], x.shape[1])


def _through_bases(dys: list[Tensor], bases: list[Tensor], dz: Tensor, down: Tensor) -> Tensor:
    """The frozen layers' share of dx."""
    if not bases:
        return dz.new_zeros(len(dz), down.shape[1])
    dx = dys[0] @ bases[0]
    for dy, base in zip(dys[1:], bases[1:], strict=True):
        dx.addmm_(dy, base)
    return dx


def _as_is(x: Tensor) -> Any:
    """No autocast inside: the caller has decided the dtypes."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
