"""Between the two products of `ops.linear`: what each branch gave is weighed and put side by side.

The columns of z and u are those of layout.py, and

    g   = softmax(logits), softmax(R h), the weights that are given, or all ones

A shared: g (x) h = [g_1 h, ..., g_N h]. Own A: block i of h times g_i. B shared: those blocks' sum.
Where branches have their own A and B and g does not depend on the layer, u = w * z, with w made
once for all layers (`by_column`).
Arithmetic in at least float32; u has z's dtype. Per token, and small beside the products; on a GPU
one kernel each way (kernels.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manylora.adapter.layout import Layout, by_layer

_traced: list[bool] = []


def gates(
    z: Tensor, layout: Layout, weights: Tensor | None, router: Tensor | None
) -> Tensor | None:
    """g (T, n or 1, N) of z (T, n, block); None is all ones. router: (n, N, rows of A)."""
    if layout.gate not in ("x", "Ax"):
        return weights
    h, logits, _ = layout.split(z)
    if router is not None:
        logits = torch.einsum("tnk,nik->tni", h, router)
    return torch.softmax(logits, -1, dtype=_accumulator(z))


def by_column(weights: Tensor, layout: Layout, scaling: float, shared_scaling: float) -> Tensor:
    """w (T or 1, n or 1, block): what columns of z are multiplied by, of g (T or 1, n or 1, N)."""
    weights = scaling * weights.to(_accumulator(weights))
    if layout.even:  # without the pieces, of which torch.compile would make as many buffers
        each = weights.unsqueeze(-1).expand(*weights.shape, layout.ranks[0]).flatten(-2)
    else:
        pieces = zip(weights.split(1, -1), layout.ranks, strict=True)
        each = torch.cat([one.expand(*one.shape[:-1], r) for one, r in pieces], -1)
    return F.pad(each, (0, layout.shared_rank), value=shared_scaling)


def mix(
    z: Tensor,
    n: int,
    layout: Layout,
    scaling: float,
    shared_scaling: float,
    weights: Tensor | None,
    router: Tensor | None,
) -> Tensor:
    """u (T, n, m) of z (T, K), which holds n layers and perhaps padding; not if `only_scales`."""
    if layout.gate == "columns" and weights is not None:
        return _times(by_layer(z, layout, n), weights)
    if (kernels := _kernels(z, layout)) is not None:
        given = None if weights is None else weights.expand(z.shape[0], -1, -1)
        shape = _shape(n, layout)
        u: Tensor = kernels.mix_forward(z, *shape, given, *_shared(layout, scaling, shared_scaling))
        return u.unflatten(1, (n, -1))
    own = by_layer(z, layout, n)
    return _mix(own, gates(own, layout, weights, router), layout, scaling, shared_scaling)


def _mix(
    z: Tensor, g: Tensor | None, layout: Layout, scaling: float, shared_scaling: float
) -> Tensor:
    """u of z (T, n, block)."""
    h, _, h0 = layout.split(z)
    mixed = scaling * _weigh(h.to(_accumulator(z)), g, layout)
    if layout.shared_rank:
        mixed = torch.cat([mixed, shared_scaling * h0.to(mixed.dtype)], -1)
    return mixed.to(z.dtype)


def mix_backward(
    du: Tensor,
    z: Tensor,
    n: int,
    layout: Layout,
    scaling: float,
    shared_scaling: float,
    weights: Tensor | None,
    router: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(u, dz like z, dweights like weights, drouter like router) of du (T, n, m)."""
    if layout.gate == "columns" and weights is not None:
        dz = padded_with_zeros(z, n * layout.block)
        _times(du, weights, by_layer(dz, layout, n))
        return _times(by_layer(z, layout, n), weights), dz, None, None
    if (kernels := _kernels(z, layout)) is not None:
        given = None if weights is None else weights.expand(z.shape[0], -1, -1)
        rest = (*_shape(n, layout), given, *_shared(layout, scaling, shared_scaling))
        u = torch.empty_like(du)
        dz, dw = kernels.mix_backward(du.flatten(1), z, *rest, given is not None, u.flatten(1))
        dweights = None if weights is None else dw.sum_to_size(weights.shape)
        return u, dz, dweights, None
    own = by_layer(z, layout, n)
    g = gates(own, layout, weights, router)
    u = _mix(own, g, layout, scaling, shared_scaling)
    dz, dweights, drouter = _mix_backward(
        du, own, g, layout, scaling, shared_scaling, weights, router
    )
    dz = F.pad(dz.flatten(1), (0, z.shape[1] - n * layout.block))
    return u, dz, dweights, drouter


def _mix_backward(
    du: Tensor,
    z: Tensor,
    g: Tensor | None,
    layout: Layout,
    scaling: float,
    shared_scaling: float,
    weights: Tensor | None,
    router: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dz, dweights, drouter) of z (T, n, block)."""
    h, _, _ = layout.split(z)
    own, shared = du.to(_accumulator(z)).split(
        [du.shape[-1] - layout.shared_rank, layout.shared_rank], -1
    )
    dh, dg = _weigh_backward(scaling * own, h.to(own.dtype), g, layout)
    parts, dweights, drouter = [dh], None, None
    if layout.gate == "given" and weights is not None and dg is not None:
        dweights = dg.sum_to_size(weights.shape).to(weights.dtype)
    if layout.gate in ("x", "Ax"):
        assert g is not None and dg is not None
        dlogits = g * (dg - (g * dg).sum(-1, keepdim=True))
        if router is None:
            parts.append(dlogits)
        else:
            drouter = torch.einsum("tni,tnk->nik", dlogits, h.to(dlogits.dtype)).to(router.dtype)
            parts = [dh + torch.einsum("tni,nik->tnk", dlogits, router.to(dlogits.dtype))]
    if layout.shared_rank:
        parts.append(shared_scaling * shared)
    return torch.cat(parts, -1).to(z.dtype), dweights, drouter


def _times(z: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """z w, multiplied in the dtype of w and rounded once to that of z."""
    return torch.mul(z, weights, out=z.new_empty(z.shape) if out is None else out)


def padded_with_zeros(z: Tensor, width: int) -> Tensor:
    """An empty tensor like z, but for the columns from width on."""
    dz = z.new_empty(z.shape)
    if width < z.shape[1]:
        dz[:, width:].zero_()  # assigning 0 is a constant to a compiler, which it may refuse
    return dz


def _kernels(z: Tensor, layout: Layout) -> Any:
    """The Triton kernels, which do the same in one pass, where they can."""
    if not z.is_cuda or z.dtype == torch.float64 or not layout.even or layout.gate == "Ax":
        return None
    if not has_triton() or _traced:
        return None
    from manylora.adapter import kernels

    fits = kernels.mix_fits(layout.branches, layout.ranks[0], layout.shared_rank)
    return kernels if fits else None


@contextmanager
def without_kernels() -> Iterator[None]:
    """No kernel is launched inside, where what is computed is only traced."""
    _traced.append(True)
    try:
        yield
    finally:
        _traced.pop()


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def _shape(n: int, layout: Layout) -> tuple[Any, ...]:
    routed = layout.gate == "x"
    r = layout.ranks[0]
    return n, layout.branches, r, layout.share_A, layout.share_B, routed


def _shared(layout: Layout, scaling: float, shared_scaling: float) -> tuple[Any, ...]:
    return layout.shared_rank, scaling, shared_scaling


def _weigh(h: Tensor, g: Tensor | None, layout: Layout) -> Tensor:
    """g (x) h: (T, n, columns of B)."""
    if not layout.even:
        return h if g is None else h * (g.to(h.dtype) @ owners(layout.ranks, h))
    blocks = h.unflatten(-1, (-1, layout.ranks[0]))
    if g is not None:
        blocks = g.to(h.dtype).unsqueeze(-1) * blocks
    elif layout.share_A:
        blocks = blocks.expand(*blocks.shape[:-2], layout.branches, -1)
    return blocks.sum(-2) if layout.share_B else blocks.flatten(-2)


def _weigh_backward(
    d: Tensor, h: Tensor, g: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor | None]:
    """(dh, dg (T, n, N)) of d, the gradient of g (x) h."""
    if not layout.even:
        owner = owners(layout.ranks, h)
        if g is None:
            return d, None
        return d * (g.to(d.dtype) @ owner), (d * h) @ owner.T
    r = layout.ranks[0]
    blocks = d.unflatten(-1, (-1, r))
    if layout.share_B:
        blocks = blocks.expand(*blocks.shape[:-2], layout.branches, r)
    dh = blocks if g is None else g.to(d.dtype).unsqueeze(-1) * blocks
    dg = None if g is None else (blocks * h.unflatten(-1, (-1, r))).sum(-1)
    return (dh.sum(-2) if layout.share_A else dh.flatten(-2)), dg


def owners(ranks: tuple[int, ...], like: Tensor) -> Tensor:
    """(N, sum of ranks): 1 where a column belongs to a branch. Only uneven ranks need it."""
    # A graph keeps its own, and warns of caches.
    make = _owners.__wrapped__ if torch.compiler.is_compiling() else _owners
    return make(ranks, like.device, like.dtype)


@cache
def _owners(ranks: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    # Kept, because making it waits for the GPU; and outside of inference mode, since what is made
    # in it takes no part in a backward pass.
    with torch.inference_mode(False):
        return torch.block_diag(*[torch.ones(1, r) for r in ranks]).to(device, dtype)


def _accumulator(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)
