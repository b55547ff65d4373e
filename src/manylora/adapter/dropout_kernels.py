"""Triton kernels: products with a dropped-out x whose mask is drawn anew each time, never stored.

For x (T, in), A (K, in) with few rows, and mask[i, j] = 1 where element (i, j) is kept:

    z   = (mask * x / (1 - p)) A^T      (T, K)
    dx  = mask * (dz A) / (1 - p)       (T, in)
    dA  = dz^T (mask * x / (1 - p))     (K, in)

Rows of A may be plain (a router's): they read x itself, in the same pass, without mask or factor.

The mask is a function of i, j and the seed alone: 16 of the bits of Philox4x32 with the seed as its
key and (j // 8, i) as its counter, compared with p. One call draws 8 elements, since one call each
would take several times as long as reading x; p is therefore rounded to a multiple of 2^-16.
A dropped infinity or NaN gives NaN, as a product with the mask does. Sums are in float32 and in a
fixed order, nothing is atomic: equal inputs, equal bits. Importing this file needs Triton.

Sources: dropout recomputed from its seed, the Triton tutorial of that name; Philox, Salmon et al.
2011 (7 rounds pass BigCrush; 10 is the usual margin).
"""
# A kernel is compiled by Triton and its parameters are pointers, numbers and constants:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDS = tl.constexpr(7)
# No seed is specialised: Triton would compile each kernel again for one that 16 divides.


@triton.jit
def _kept(key, row, first, BT: tl.constexpr, BD: tl.constexpr, threshold):
    """Whether to keep elements (row, first + 0..BD), (BT, BD); first is a multiple of 8."""
    group = tl.broadcast_to((first // 8 + tl.arange(0, BD // 8))[None, :], (BT, BD // 8))
    token = tl.broadcast_to(row.to(tl.int32)[:, None], (BT, BD // 8))
    zero = tl.zeros((BT, BD // 8), tl.int32)
    a, b, c, d = tl.philox(key, group, token, zero, zero, ROUNDS)
    words = tl.interleave(tl.interleave(a, b), tl.interleave(c, d))
    return tl.interleave(words & 0xFFFF, words >> 16) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["seed"])
def _down(
    x, A, z, T, seed: tl.int64, x_t, A_k, z_t, threshold, factor,
    width: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    live, rank = (row < T)[:, None], (k < K)[None, :]
    total = tl.zeros((BT, BK), tl.float32)
    plain = total
    for first in range(0, width, BD):
        j = first + tl.arange(0, BD)
        x_here, A_here = live & (j < width)[None, :], rank & (j < width)[:, None]
        x_part = tl.load(x + row[:, None] * x_t + j[None, :], mask=x_here, other=0.0)
        A_part = tl.load(A + k[None, :] * A_k + j[:, None], mask=A_here, other=0.0)
        if P1 > P0:
            plain = tl.dot(x_part, A_part, plain, input_precision="ieee")
        x_part *= _kept(seed, row, first, BT, BD, threshold).to(x_part.dtype)
        total = tl.dot(x_part, A_part, total, input_precision="ieee")
    z_part = tl.where(((k >= P0) & (k < P1))[None, :], plain, total * factor)
    tl.store(z + row[:, None] * z_t + k[None, :], z_part, mask=live & rank)


@triton.jit(do_not_specialize=["seed"])
def _to_x(
    dx, dz, A, T, seed: tl.int64, dz_t, A_k, threshold, factor,
    width: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * BD
    j = first + tl.arange(0, BD)
    live, inside = (row < T)[:, None], (j < width)[None, :]
    total = tl.zeros((BT, BD), tl.float32)
    plain = total
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        dz_there, A_there = dz + row[:, None] * dz_t + k[None, :], A + k[:, None] * A_k + j[None, :]
        dz_part = tl.load(dz_there, mask=live & (k < K)[None, :], other=0.0)
        A_part = tl.load(A_there, mask=(k < K)[:, None] & inside, other=0.0)
        if P1 > P0:
            unmasked = ((k >= P0) & (k < P1))[None, :]
            own = tl.where(unmasked, dz_part, 0.0).to(dz_part.dtype)
            plain = tl.dot(own, A_part, plain, input_precision="ieee")
            dz_part = tl.where(unmasked, 0.0, dz_part).to(dz_part.dtype)
        total = tl.dot(dz_part, A_part, total, input_precision="ieee")
    kept = _kept(seed, row, first, BT, BD, threshold).to(tl.float32)
    there = dx + row[:, None] * width + j[None, :]
    total = total * factor * kept + plain
    if ADD:
        total += tl.load(there, mask=live & inside, other=0.0)
    tl.store(there, total, mask=live & inside)


@triton.jit(do_not_specialize=["seed"])
def _to_A(
    dz, x, parts, T, seed: tl.int64, dz_t, x_t, threshold, factor,
    width: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    first, part = tl.program_id(0) * BD, tl.program_id(1).to(tl.int64)
    k = tl.program_id(2) * BK + tl.arange(0, BK)
    j = first + tl.arange(0, BD)
    inside = (j < width)[None, :]
    total = tl.zeros((BK, BD), tl.float32)
    plain = total
    for step in range(STEPS):
        row = (part * STEPS + step) * BT + tl.arange(0, BT)
        live = (row < T)[:, None]
        x_there, dz_there = (
            x + row[:, None] * x_t + j[None, :],
            dz + row[:, None] * dz_t + k[None, :],
        )
        x_part = tl.load(x_there, mask=live & inside, other=0.0)
        dz_part = tl.trans(tl.load(dz_there, mask=live & (k < K)[None, :], other=0.0))
        if P1 > P0:
            plain = tl.dot(dz_part, x_part, plain, input_precision="ieee")
        x_part *= _kept(seed, row, first, BT, BD, threshold).to(x_part.dtype)
        total = tl.dot(dz_part, x_part, total, input_precision="ieee")
    there = parts + (part * K + k[:, None]) * width + j[None, :]
    dA = tl.where(((k >= P0) & (k < P1))[:, None], plain, total * factor)
    tl.store(there, dA, mask=(k < K)[:, None] & inside)


@triton.jit(do_not_specialize=["seed"])
def _draw(mask, T, seed: tl.int64, width, threshold, BT: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * BD
    j = first + tl.arange(0, BD)
    kept = _kept(seed, row, first, BT, BD, threshold).to(tl.int8)
    inside = (row < T)[:, None] & (j < width)[None, :]
    tl.store(mask + row[:, None] * width + j[None, :], kept, mask=inside)


def dropout_mask(shape: tuple[int, int], p: float, seed: int, device: torch.device) -> Tensor:
    """The mask itself, (T, in) bool, True where kept; for tests.

    Args:
        shape: (T, in). p: the probability of dropping, in [0, 1). seed: 0 to 2^63 - 1.

    Raises: ValueError for another p or seed.
    """
    mask = torch.empty(shape, dtype=torch.int8, device=device)
    grid = (triton.cdiv(shape[0], 32), triton.cdiv(shape[1], 128))
    _launch(_draw, grid, mask, shape[0], seed, shape[1], _chance(p, seed)[0], BT=32, BD=128)
    return mask.bool()


def dropout_linear(
    x: Tensor,
    A: Tensor,
    p: float,
    seed: int,
    plain: tuple[int, int] = (0, 0),
    out: Tensor | None = None,
) -> Tensor:
    """(mask * x / (1 - p)) A^T, (T, K) in x's dtype.

    Args:
        x: (T, in) in float32, float16 or bfloat16; rows of any stride, dense.
        A: (K, in), in x's dtype, dense rows; x is read once for every 128 of K.
        p, seed: as in `dropout_mask`.
        plain: rows of A from the first up to the second read x itself.
        out: (T, K) to write to; rows of any stride, dense.

    Raises: ValueError where shapes, strides, dtypes, p or the seed do not fit.
    """
    (T, width), K = x.shape, len(A)
    z = x.new_empty(T, K) if out is None else out
    _check(x, x=(x, (T, width)), A=(A, (K, width)), out=(z, (T, K)))
    # As many tokens a program as leave about one program to each of 132 multiprocessors.
    BT = 64 if T > 4096 else 32 if T > 2048 else 16
    BK = _rank_tile(K)
    # Three tiles of x and of A in flight stay below the 100 KiB that the smallest cards have.
    BD = 256 // x.element_size() // max(1, BK // 64)
    _launch(
        _down, (triton.cdiv(T, BT), triton.cdiv(K, BK)), x, A, z, T, seed,
        x.stride(0), A.stride(0), z.stride(0), *_chance(p, seed), width, K, *plain,
        BT=BT, BD=BD, BK=BK,
    )  # fmt: skip
    return z


def dropout_linear_backward_x(
    dz: Tensor,
    A: Tensor,
    p: float,
    seed: int,
    plain: tuple[int, int] = (0, 0),
    onto: Tensor | None = None,
) -> Tensor:
    """mask * (dz A) / (1 - p), (T, in) in dz's dtype, contiguous.

    Args:
        dz: (T, K), A: (K, in), of one dtype; rows of any stride, dense.
        p, seed, plain: those of the forward pass.
        onto: (T, in), contiguous, that it is added to instead.

    Raises: as `dropout_linear`.
    """
    (T, K), width = dz.shape, A.shape[1]
    dx = dz.new_empty(T, width) if onto is None else onto
    _check(dz, dz=(dz, (T, K)), A=(A, (K, width)), onto=(dx, (T, width)))
    BD, BK = 256 // dx.element_size(), min(128 // dx.element_size(), _rank_tile(K))
    _launch(
        _to_x, (triton.cdiv(T, 64), triton.cdiv(width, BD)), dx, dz, A, T, seed,
        dz.stride(0), A.stride(0), *_chance(p, seed), width, K, *plain,
        BT=64, BD=BD, BK=BK, ADD=onto is not None,
    )  # fmt: skip
    return dx


def dropout_linear_backward_A(
    dz: Tensor, x: Tensor, p: float, seed: int, plain: tuple[int, int] = (0, 0)
) -> Tensor:
    """dz^T (mask * x / (1 - p)), (K, in) in x's dtype, contiguous; zeros for no tokens.

    Two passes: parts of the tokens side by side, then the sum of the parts in order. How many parts
    depends on the shapes alone.

    Args:
        dz: (T, K), x: (T, in), of one dtype; rows of any stride, dense.
        p, seed, plain: those of the forward pass.

    Raises: as `dropout_linear`.
    """
    (T, width), K = x.shape, dz.shape[1]
    _check(x, x=(x, (T, width)), dz=(dz, (T, K)))
    BT, BD, BK = 128 // x.element_size(), 256 // x.element_size(), _rank_tile(K)
    columns, blocks = triton.cdiv(width, BD), triton.cdiv(T, BT)
    # One or two programs to each of 132 multiprocessors, as more would write more parts than they
    # win; each sums a power of two of blocks, because the kernel is compiled for their number.
    steps = triton.next_power_of_2(max(1, blocks * columns // 264))
    split = triton.cdiv(blocks, steps)
    parts = torch.empty((split, K, width), dtype=torch.float32, device=x.device)
    _launch(
        _to_A, (columns, split, triton.cdiv(K, BK)), dz, x, parts, T, seed, dz.stride(0),
        x.stride(0), *_chance(p, seed), width, K, *plain, BT=BT, BD=BD, BK=BK, STEPS=steps,
    )  # fmt: skip
    return parts.sum(0).to(x.dtype)


def _rank_tile(K: int) -> int:
    """Tensor cores take 16 columns or more; above 128 the sums no longer fit the registers."""
    return min(128, max(16, triton.next_power_of_2(K)))


def _chance(p: float, seed: int) -> tuple[int, float]:
    """What a draw of 16 bits must reach to be kept, and 1 / (1 - p)."""
    if not 0 <= p < 1:
        raise ValueError(f"p={p} is not a probability of dropping; it must be in [0, 1)")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be in 0 to 2^63 - 1")
    return round(p * 65536), 1 / (1 - p)


def _check(like: Tensor, **tensors: tuple[Tensor, tuple[int, int]]) -> None:
    for name, (tensor, shape) in tensors.items():
        if tensor.shape != shape or tensor.stride(1) != 1 or tensor.dtype != like.dtype:
            raise ValueError(
                f"{name} must be {shape} with dense rows, {like.dtype}; got {tuple(tensor.shape)}, "
                f"strides {tensor.stride()}, {tensor.dtype}"
            )
    if like.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the kernels sum in float32, so {like.dtype} is not for them")


def _launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *rest: Any, **sizes: int) -> None:
    # Products of float32 are not for tensor cores, and spill registers with fewer warps.
    warps = 8 if like.dtype == torch.float32 else 4
    if all(grid):
        with torch.cuda.device_of(like):
            kernel[grid](like, *rest, num_warps=warps, **sizes)
