"""The products with P, and dropout in them: its masks are drawn again from their seeds.

A router reads x as it is. Each layer has masks of its own: one for all branches and the shared one,
or, with N + 1 seeds, one for each branch, as in the HydraLoRA authors' code, and the last for the
shared one. On a GPU,
in half precision and with one mask, no mask is ever written (dropout_kernels.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from manylora.adapter.layout import Layout
from manylora.adapter.mixing import has_triton


def down_product(
    x: Tensor, down: Tensor, layout: Layout, dropout: float, seed: Tensor | None
) -> Tensor:
    """z = drop(x) P' (T, rows of P). seed: (n, 1 or N + 1), a row for each layer that reads x."""
    if not dropout:
        return x @ down.t()
    assert seed is not None
    z = x.new_empty(x.shape[0], down.shape[0])
    if (kernels := _kernels(x, seed)) is not None:
        for rows, one in _layers(down, layout, seed):
            kernels.dropout_linear(x, down[rows], dropout, one, _plain(layout), z[:, rows])
        return z
    for rows, mask in _masked_rows(x, layout, dropout, seed):
        torch.mm(x if mask is None else x * mask, down[rows].t(), out=z[:, rows])
    return z


def down_backward(
    dz: Tensor, x: Tensor, layout: Layout, dropout: float, seed: Tensor | None
) -> Tensor:
    """dP = dz' drop(x)."""
    if not dropout:
        return dz.t() @ x
    assert seed is not None
    if (kernels := _kernels(x, seed)) is not None:
        parts = [
            kernels.dropout_linear_backward_A(dz[:, rows], x, dropout, one, _plain(layout))
            for rows, one in _layers(dz.t(), layout, seed)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    ddown = x.new_empty(dz.shape[1], x.shape[1])
    for rows, mask in _masked_rows(x, layout, dropout, seed):
        torch.mm(dz[:, rows].t(), x if mask is None else x * mask, out=ddown[rows])
    return ddown


def input_gradient(
    dz: Tensor, down: Tensor, layout: Layout, dropout: float, seed: Tensor | None
) -> Tensor:
    """drop'(dz P), the adapters' share of dx."""
    if not dropout:
        return dz @ down
    assert seed is not None
    if (kernels := _kernels(dz, seed)) is not None:
        d: Tensor | None = None
        for rows, one in _layers(down, layout, seed):
            d = kernels.dropout_linear_backward_x(
                dz[:, rows], down[rows], dropout, one, _plain(layout), d
            )
        assert d is not None
        return d
    dx = dz.new_zeros(len(dz), down.shape[1])
    for rows, mask in _masked_rows(dx, layout, dropout, seed):
        d = dz[:, rows]
        dx.addmm_(d, down[rows]) if mask is None else dx.addcmul_(d @ down[rows], mask)
    return dx


def _layers(down: Tensor, layout: Layout, seed: Tensor) -> Iterator[tuple[slice, int]]:
    """Each layer's rows of P and the seed of its one mask; the last has what pads P too."""
    last = len(seed) - 1
    for j, (one,) in enumerate(seed.tolist()):
        start = j * layout.block
        yield slice(start, len(down) if j == last else start + layout.block), one


def _masked_rows(
    x: Tensor, layout: Layout, dropout: float, seed: Tensor
) -> Iterator[tuple[slice, Tensor | None]]:
    """Rows of P, and the mask of what they read, scaled by 1 / (1 - p)."""
    start = 0
    for own in seed.tolist():
        ends = [layout.rows_A] if len(own) == 1 else list(accumulate(layout.ranks))
        first = start
        for place, end in enumerate(ends):
            mask = _mask(x, dropout, own[place])
            yield slice(start, first + end), mask
            start = first + end
        if layout.logits:
            yield slice(start, start + layout.logits), None
            start += layout.logits
        if layout.shared_rank:
            shared = mask if len(own) == 1 else _mask(x, dropout, own[-1])
            yield slice(start, start + layout.shared_rank), shared
            start += layout.shared_rank


def _plain(layout: Layout) -> tuple[int, int]:
    """Rows of P that read x as it is: a router's."""
    return layout.rows_A, layout.rows_A + layout.logits


def _kernels(x: Tensor, seed: Tensor) -> Any:
    half = x.dtype in (torch.float16, torch.bfloat16)
    if not x.is_cuda or not half or seed.shape[1] > 1 or not has_triton():
        return None
    from manylora.adapter import dropout_kernels

    return dropout_kernels


def _mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    drawn = torch.Generator(x.device).manual_seed(seed)
    mask = x.new_empty(x.shape)  # in one order, whatever the strides of x or its gradient
    return mask.bernoulli_(1 - dropout, generator=drawn).div_(1 - dropout)
