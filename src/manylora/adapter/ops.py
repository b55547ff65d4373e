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

from manylora.adapter.layout import Layout, by_layer
from manylora.adapter.masks import down_backward, down_product, input_gradient
from manylora.adapter.mixing import mix, mix_backward, owners, padded_with_zeros
from manylora.methods import Branches


def _registered(name: str, function: Any, shapes: Any) -> Any:
    """The function as an operation of torch. shapes: the same on tensors that have nothing else.

    torch.library.custom_op does as much and more, which takes longer than a small product.
    """
    full = f"manylora::{name}"
    torch.library.define(full, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(full, "CompositeExplicitAutograd", function)
    torch.library.register_fake(full, shapes)
    return getattr(torch.ops.manylora, name).default


def fold_scale(B: Tensor, branches: Branches, scale: Tensor | None) -> Tensor:
    """B with column block i multiplied by c_i (N, out) along the output channels."""
    if scale is None:
        return B
    if branches.equal_ranks:
        blocks = torch.unflatten(B, 1, (len(scale), branches.ranks[0]))  # perhaps not all branches
        return (blocks * scale.T.unsqueeze(-1)).flatten(1)
    return B * (scale.T @ owners(branches.ranks, scale))


def computable(tensor: Tensor) -> Tensor:
    """Half precision is multiplied in float32: slow on some CPUs otherwise, and less exact."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


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
        weights: given mixing weights (T, n or 1, N), or `mixing.by_column` of them.
        router: on A x, (n, N, rows of A).
        seed: of dropout's masks, (n, 1) or (n, N + 1) integers on the CPU. dropout: probability.
        layout: `layout.Layout`, the same for all layers. scaling: s. shared_scaling: s0.
    """
    numbers = (layout, scaling, shared_scaling, dropout)
    z, u, factor = hidden(x, down, len(ups), weights, router, seed, *numbers)
    return [*outputs(x, bases, biases, dense, ups, u, factor), z]


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
) -> tuple[Tensor, Tensor, float]:
    """z, u (T, n, m), and the factor that is missing in u."""
    lay = Layout.decode(layout)
    with _as_is(x):
        z = down_product(x, down, lay, dropout, seed)
        if lay.only_scales:
            return z, by_layer(z, lay, n), scaling
        return z, mix(z, n, lay, scaling, shared_scaling, weights, router), 1.0


def outputs(
    x: Tensor,
    bases: list[Tensor],
    biases: list[Tensor],
    dense: bool,
    ups: list[Tensor],
    u: Tensor,
    factor: float,
) -> list[Tensor]:
    """y_1, ..., y_n; factor: of u."""
    with _as_is(x):
        starts = biases if dense else bases
        ys = [
            times(u[:, j], up.t(), factor, starts[j] if starts else None)
            for j, up in enumerate(ups)
        ]
        if not dense:
            return ys
        return [y.addmm_(x, base.t()) for y, base in zip(ys, bases, strict=True)]


def times(
    a: Tensor, b: Tensor, factor: float, start: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """factor a b + start, rounded once."""
    if start is None and factor == 1:
        return torch.mm(a, b, out=out)
    if start is None:
        return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=factor, out=out)
    return torch.addmm(start, a, b, alpha=factor, out=out)


def _forward_shapes(
    x: Tensor, bases: list[Tensor], biases: Any, dense: bool, down: Tensor, *rest: Any
) -> Any:
    widths = [base.shape[0] if dense else base.shape[1] for base in bases]
    return [x.new_empty(x.shape[0], width) for width in [*widths, down.shape[0]]]


linear = _registered("linear", forward, _forward_shapes)


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
    factor, dweights, drouter = (scaling if lay.only_scales else 1.0), None, None
    with _as_is(z):
        if lay.only_scales:  # what is du then is dz too
            own = padded_with_zeros(z, n * lay.block)
            du = by_layer(own, lay, n)
        else:
            du = z.new_empty(z.shape[0], n, ups[0].shape[1])
        for j, (dy, up) in enumerate(zip(dys, ups, strict=True)):
            times(dy, up, factor, out=du[:, j])
        if lay.only_scales:
            u = by_layer(z, lay, n)
        else:
            u, own, dweights, drouter = mix_backward(
                du, z, n, lay, scaling, shared_scaling, weights, router
            )
        dups = [times(dy.t(), u[:, j], factor) for j, dy in enumerate(dys)]
        dz = own if dz is None else own + dz
        dx = z.new_empty(0)
        if wants_x:
            dx = input_gradient(dz, down, lay, dropout, seed)
            for dy, base in zip(dys, bases, strict=False):
                dx.addmm_(dy, base)
        rest = [z.new_empty(0) if one is None else one for one in (dweights, drouter)]
    return [dx, dz, *dups, *rest]


def _backward_shapes(
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
    *rest: Any,
) -> Any:
    empty = z.new_empty(0)
    trained = None if Layout.decode(layout).gate == "columns" else weights
    return [
        z.new_empty(z.shape[0], down.shape[1]) if rest[-1] else empty,
        torch.empty_like(z),
        *[torch.empty_like(up) for up in ups],
        empty if trained is None else torch.empty_like(trained),
        empty if router is None else torch.empty_like(router),
    ]


linear_gradients = _registered("linear_gradients", backward, _backward_shapes)


def backward_down(
    dz: Tensor, x: Tensor, seed: Tensor | None, layout: list[int], dropout: float
) -> Tensor:
    """dP."""
    with _as_is(x):
        return down_backward(dz, x, Layout.decode(layout), dropout, seed)


def _backward_down_shapes(dz: Tensor, x: Tensor, *rest: Any) -> Any:
    return x.new_empty(dz.shape[1], x.shape[1])


down_gradient = _registered("down_gradient", backward_down, _backward_down_shapes)


def _as_is(x: Tensor) -> Any:
    """No autocast inside: the caller has decided the dtypes."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
