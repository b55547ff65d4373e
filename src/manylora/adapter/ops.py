"""The one computation, as one operation of torch: the layers that read x, and their adapters.

For layers j = 1..n that read the same x, with the trained tensors of each stacked (T tokens):

    z   = drop(x) P'                (T, n K)   P: [A; router; shared A] of each layer, (n K, in)
    u_j = mix(z_j)                  (T, m)     mixing.py
    y_j = Q_j u_j + b_j + W_j x     (T, out)   Q_j: [B diag(c) | shared B], (out, m)

and backwards, by hand:

    du_j = dy_j Q_j      dQ_j = dy_j' u_j      dz = mix'(du)      dP = dz' drop(x)
    dx   = drop'(dz P) + sum_j dy_j W_j

Two skinny products forwards and four backwards, whatever the number of branches; x is read once for
all n layers. The small products that y and dx begin with are only written, and the large ones added
in place: the other way round they would be read and written again. Only x, z and the mixing weights
that were given are kept for the backward pass, and x not where it can be computed again
(autograd.py). u is computed again, and dropout's mask comes again from its seed. `linear` is
registered with torch, so that torch.compile keeps it whole; where the base layer is no plain linear
one (quantised, sharded, hooked), its own output y_j takes the place of W_j. torch keeps compiled
graphs on disk by these names: arguments that change need another name.

The loop written from the papers is the reference in the tests (2106.09685, 2311.11501, 2404.19245).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manylora.adapter.masks import down_backward, down_product, input_gradient
from manylora.adapter.mixing import Layout, mix, mix_backward, owners
from manylora.methods import Branches


def fold_scale(B: Tensor, branches: Branches, scale: Tensor | None) -> Tensor:
    """B with column block i multiplied by c_i (N, out) along the output channels."""
    if scale is None:
        return B
    if branches.equal_ranks:
        blocks = torch.unflatten(B, 1, (len(scale), branches.ranks[0]))  # perhaps not all branches
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
        seed: of dropout's masks, (n, 1) or (n, N + 1) integers on the CPU. dropout: probability.
        layout: `mixing.Layout`, the same for all layers. scaling: s. shared_scaling: s0.
    """
    numbers = (layout, scaling, shared_scaling, dropout)
    z, u = hidden(x, down, len(ups), weights, router, seed, *numbers)
    return [*outputs(x, bases, biases, dense, ups, u), z]


def hidden(
    x: Tensor,
    down: Tensor,
    n: int,
    weights: Tensor | None,
    router: Tensor | None,
    seed: Tensor | None,
    layout: list[int],
    scaling: float,
    shared_scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """z and u (T, n, m)."""
    lay = Layout.decode(layout)
    with _as_is(x):
        z = down_product(x, down, lay, dropout, seed)
        return z, mix(z, n, lay, scaling, shared_scaling, weights, router)


def outputs(
    x: Tensor,
    bases: list[Tensor],
    biases: list[Tensor],
    dense: bool,
    ups: list[Tensor],
    u: Tensor,
) -> list[Tensor]:
    """y_1, ..., y_n."""
    with _as_is(x):
        if not dense:
            return [torch.addmm(y, u[:, j], ups[j].t()) for j, y in enumerate(bases)]
        own: list[Any] = [*biases] or [None] * len(bases)
        ys = [F.linear(u[:, j], ups[j], bias) for j, bias in enumerate(own)]
        return [y.addmm_(x, base.t()) for y, base in zip(ys, bases, strict=True)]


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
        dx = None
        if wants_x:
            dx = input_gradient(dz, down, lay, dropout, seed)
            for dy, base in zip(dys, bases, strict=False):
                dx.addmm_(dy, base)
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


def _as_is(x: Tensor) -> Any:
    """No autocast inside: the caller has decided the dtypes."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
