"""The input of a layer, computed again in the backward pass instead of kept for it.

A frozen linear layer keeps nothing, an adapted one its input x, which is 29 % more memory over all
layers of a Llama. But the two kinds of x that nobody else keeps are products of tensors that
autograd has kept for its own gradients, and those are found from x itself:

    x = a * b                  what a gated feed-forward layer gives to its last product
    x = w * (a * b).to(dtype)  what an RMSNorm gives, w its frozen weight

Computed again with the same operations, so x has the same bits. Where x is anything else, or saved
tensors are in somebody's care (a checkpoint, offloading), it is kept. This is for eager mode;
compiled, see autograd.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manylora.adapter.mixing import has_triton


def factors_of(x: Tensor) -> tuple[Tensor, ...] | None:
    """(a, b) or (a, b, w) that autograd keeps and that give x; None where there are none."""
    node: Any = x.grad_fn
    if node is None or node.name() != "MulBackward0" or watched():
        return None
    a, b = node._saved_self, node._saved_other  # None: its partner has no gradient
    if a is not None and b is not None:
        return a, b
    w = b if a is None else a
    if w is None or w.dtype != x.dtype:
        return None
    inner = node.next_functions[0 if a is None else 1][0]
    if inner is not None and inner.name() == "ToCopyBackward0":
        if inner._input_metadata[0].dtype != x.dtype:
            return None
        inner = inner.next_functions[0][0]
    if inner is None or inner.name() != "MulBackward0":
        return None
    a, b = inner._saved_self, inner._saved_other
    return None if a is None or b is None else (a, b, w)


def computed_again(factors: tuple[Tensor, ...]) -> Tensor:
    """x of its factors."""
    a, b, *w = factors
    if not w:
        return a * b
    if a.is_cuda and has_triton():
        from manylora.adapter import recompute_kernels as kernels

        if kernels.norm_fits(a, b, w[0]):
            return kernels.norm_product(a, b, w[0])
    return w[0] * (a * b).to(w[0].dtype)


def watched() -> bool:
    """Whether reading a saved tensor would call somebody's hook."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
