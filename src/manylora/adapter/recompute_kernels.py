"""Triton kernel for the input of a layer that an RMSNorm gave (recompute.py): one pass, not three.

Importing this file needs Triton, so import it only where tensors are on a GPU.
"""
# A kernel is compiled by Triton and its parameters are pointers, numbers and constants:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # 8 elements a thread: loads and stores of 16 bytes


@triton.jit
def _product(a, b, w, x, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    normed = tl.load(a + row * width + column, mask=here) * tl.load(b + row)
    rounded = normed.to(x.dtype.element_ty).to(tl.float32)
    weighed = rounded * tl.load(w + column, mask=here).to(tl.float32)
    tl.store(x + row * width + column, weighed.to(x.dtype.element_ty), mask=here)


def norm_fits(a: Tensor, b: Tensor, w: Tensor) -> bool:
    """Whether `norm_product` takes them: what an RMSNorm in at least float32 leaves."""
    return (
        a.dtype == b.dtype == torch.float32
        and w.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and b.shape == (*a.shape[:-1], 1)
        and w.shape == a.shape[-1:]
        and all(tensor.is_contiguous() for tensor in (a, b, w))
    )


def norm_product(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """w * (a * b).to(w.dtype), (..., width) in w's dtype, with torch's own bits.

    Args:
        a: (..., width), b: (..., 1), float32; w: (width). All contiguous.

    Raises: ValueError where not `norm_fits(a, b, w)`.
    """
    if not norm_fits(a, b, w):
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (a, b, w))
        raise ValueError(
            f"a (..., width) and b (..., 1) must be float32, w (width), all dense; got {shapes}"
        )
    x = torch.empty(a.shape, dtype=w.dtype, device=a.device)
    width = len(w)
    if x.numel():
        with torch.cuda.device_of(a):
            grid = (a.numel() // width, triton.cdiv(width, BLOCK))
            _product[grid](a, b, w, x, width, BLOCK=BLOCK)
    return x
