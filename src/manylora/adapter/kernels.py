"""Triton kernels for what lies between the two products: mixing the branches, and its gradients.

For n layers that read the same x, T tokens, N branches of rank r and a shared branch of rank r0:

    z = x P^T     (T, K)    layer j owns columns j*block to (j+1)*block, in order
                            h (r if A is shared, else N*r) | router logits (N, if any) | h0 (r0);
                            columns after n*block are padding
    g = softmax(logits), or given, or ones
    u             (T, n*m)  layer j: s g (x) h (N*r, or r if B is shared: summed) | s0 h0 (r0)

Arithmetic is in float32, results in the dtype of z. Nothing is atomic: equal inputs, equal bits.
Importing this file needs Triton, so import it only where tensors are on a GPU. The block sizes were
chosen from the numbers of an H100 (132 SMs, 228 KiB of shared memory each) and fit smaller cards.

Sources: HydraLoRA 2404.19245 eq. 4 and 5; MoLoRA 2309.05444; MultiLoRA 2311.11501.
"""
# A kernel is compiled by Triton and its parameters are pointers, numbers and constants:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ELEMENTS = 32768  # of one token's branches, padded: 64 a thread with the most warps used here
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _gates(z_row, w_row, w_stride, live, N: tl.constexpr, NP: tl.constexpr, GATE: tl.constexpr):
    """g as (tokens, NP), float32; 0 past the last branch."""
    i = tl.arange(0, NP)[None, :]
    real = (i < N) & live[:, None]
    if GATE == "router":
        logits = tl.load(z_row[:, None] + i, mask=real, other=0.0).to(tl.float32)
        logits = tl.where(i < N, logits, float("-inf"))
        e = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        g = e / tl.sum(e, axis=1)[:, None]
    elif GATE == "given":
        g = tl.load(w_row[:, None] + i * w_stride, mask=real, other=0.0).to(tl.float32)
    else:
        g = tl.where(real, 1.0, 0.0)
    return g


@triton.jit
def _columns(live, ONE: tl.constexpr, N, r, NP: tl.constexpr, RP: tl.constexpr):
    COUNT: tl.constexpr = 1 if ONE else NP
    i = tl.arange(0, COUNT)[None, :, None]
    k = tl.arange(0, RP)[None, None, :]
    return i * r + k, live[:, None, None] & (i < N) & (k < r)


@triton.jit
def _get(start, live, ONE: tl.constexpr, N, r, NP: tl.constexpr, RP: tl.constexpr):
    """Blocks of r columns as float32 (tokens, NP, RP), or (tokens, 1, RP) if there is ONE."""
    column, here = _columns(live, ONE, N, r, NP, RP)
    return tl.load(start[:, None, None] + column, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _put(start, value, live, ONE: tl.constexpr, N, r, NP: tl.constexpr, RP: tl.constexpr):
    if ONE:
        real = tl.arange(0, NP)[None, :, None] < N  # past it, infinity times 0 would be NaN
        value = tl.sum(tl.where(real, value, 0.0), axis=1, keep_dims=True)
    column, here = _columns(live, ONE, N, r, NP, RP)
    tl.store(start[:, None, None] + column, value, mask=here)


@triton.jit
def _scaled(source, target, factor, live, R0: tl.constexpr, R0P: tl.constexpr):
    k = tl.arange(0, R0P)[None, :]
    here = live[:, None] & (k < R0)
    value = tl.load(source[:, None] + k, mask=here, other=0.0).to(tl.float32)
    tl.store(target[:, None] + k, factor * value, mask=here)


@triton.jit
def _mix(
    z, du, weights, u, dz, dweights, T, K, z_t, du_t, w_t, w_j, w_i, u_t, s, s0,
    N: tl.constexpr, R: tl.constexpr, R0: tl.constexpr, A_ONE: tl.constexpr, B_ONE: tl.constexpr,
    GATE: tl.constexpr, BACKWARD: tl.constexpr, WRITE_U: tl.constexpr, DW: tl.constexpr,
    BT: tl.constexpr, NP: tl.constexpr, RP: tl.constexpr, R0P: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    LOGITS: tl.constexpr = R if A_ONE else N * R
    SHARED: tl.constexpr = LOGITS + (N if GATE == "router" else 0)
    MIXED: tl.constexpr = R if B_ONE else N * R
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = row < T
    j, n = tl.program_id(1), tl.num_programs(1)
    z_row, u_row = z + row * z_t + j * (SHARED + R0), u + row * u_t + j * (MIXED + R0)
    g = _gates(z_row + LOGITS, weights + row * w_t + j * w_j, w_i, live, N, NP, GATE)
    h = _get(z_row, live, A_ONE, N, R, NP, RP)
    if WRITE_U:
        _put(u_row, s * (g[:, :, None] * h), live, B_ONE, N, R, NP, RP)
        if R0 > 0:
            _scaled(z_row + SHARED, u_row + MIXED, s0, live, R0, R0P)
    if BACKWARD:
        du_row, dz_row = du + row * du_t + j * (MIXED + R0), dz + row * K + j * (SHARED + R0)
        d = s * _get(du_row, live, B_ONE, N, R, NP, RP)
        _put(dz_row, g[:, :, None] * d, live, A_ONE, N, R, NP, RP)
        i = tl.arange(0, NP)[None, :]
        dg = tl.where(i < N, tl.sum(h * d, axis=2), 0.0)
        if GATE == "router":
            dlogits = g * (dg - tl.sum(g * dg, axis=1)[:, None])
            tl.store(dz_row[:, None] + LOGITS + i, dlogits, mask=live[:, None] & (i < N))
        if DW:
            dw_row = dweights + (row * n + j) * N
            tl.store(dw_row[:, None] + i, dg, mask=live[:, None] & (i < N))
        if R0 > 0:
            _scaled(du_row + MIXED, dz_row + SHARED, s0, live, R0, R0P)
        if PAD > 0 and j == n - 1:
            c = n * (SHARED + R0) + tl.arange(0, PAD)[None, :]
            zeros = tl.zeros((BT, PAD), tl.float32)
            tl.store(dz + row[:, None] * K + c, zeros, mask=live[:, None] & (c < K))


def mix_fits(N: int, r: int, r0: int = 0) -> bool:
    """Whether `mix_forward` and `mix_backward` take N branches of rank r and a shared one of r0."""
    return max(_padded(N) * _padded(r), _padded(r0)) <= MOST_ELEMENTS


def mix_forward(
    z: Tensor, n: int, N: int, r: int, share_A: bool, share_B: bool, router: bool,
    weights: Tensor | None, r0: int, s: float, s0: float,
) -> Tensor:  # fmt: skip
    """u (T, n*m), contiguous, in z's dtype; m = (r if share_B else N*r) + r0. See the module.

    Args:
        z: (T, K), rows of any stride. n: layers. N, r: branches and their rank. r0: 0 for none.
        router: whether z holds logits. weights: g instead, (T, n or 1, N), any strides and dtype,
            in which an expanded tensor costs nothing. With neither, g = 1.
        s, s0: scalings of the branches and the shared branch.

    Raises: ValueError where shapes, strides or dtypes do not fit, or not `mix_fits(N, r, r0)`.
    """
    constants, m = _plan(z, n, N, r, share_A, share_B, router, weights, r0)
    u = z.new_empty(len(z), n * m)
    _launch(constants, n, z, None, weights, u, None, None, s, s0)
    return u


def mix_backward(
    du: Tensor, z: Tensor, n: int, N: int, r: int, share_A: bool, share_B: bool, router: bool,
    weights: Tensor | None, r0: int, s: float, s0: float,
    need_dweights: bool = False, u: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dz (T, K) contiguous, padding 0; dweights in the shape and dtype of weights, or None).

    Args:
        du: (T, n*m), in z's dtype; copied first unless its rows are dense.
        need_dweights: whether `weights` were given and want a gradient.
        u: where to write u once more, (T, n*m) with dense rows, in z's dtype; or None.
        others: as in `mix_forward`.

    Raises: as `mix_forward`.
    """
    constants, m = _plan(z, n, N, r, share_A, share_B, router, weights, r0)
    for name, tensor in (("du", du), ("u", u)):
        if tensor is not None and (tensor.shape != (len(z), n * m) or tensor.dtype != z.dtype):
            raise ValueError(
                f"{name} must be {(len(z), n * m)} {z.dtype}, got {tuple(tensor.shape)} "
                f"{tensor.dtype}"
            )
    if u is not None and u.stride(1) != 1:
        raise ValueError(f"u is written in place and needs dense rows, got strides {u.stride()}")
    if need_dweights and weights is None:
        raise ValueError("need_dweights=True, but no weights were given")
    du = du if du.stride(1) == 1 else du.contiguous()
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dw = z.new_empty((len(z), n, N), dtype=torch.float32) if need_dweights else None
    _launch(constants, n, z, du, weights, u, dz, dw, s, s0)
    if dw is None or weights is None:
        return dz, None
    return dz, (dw if weights.shape[1] == n else dw.sum(1, keepdim=True)).to(weights.dtype)


def _padded(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _plan(
    z: Tensor, n: int, N: int, r: int, share_A: bool, share_B: bool, router: bool,
    weights: Tensor | None, r0: int,
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """The kernel's constants and m, the width of one layer in u; checks what was given."""
    block, m = (r if share_A else N * r) + N * router + r0, (r if share_B else N * r) + r0
    if z.dim() != 2 or z.shape[1] < n * block or z.stride(1) != 1 or z.dtype not in DTYPES:
        raise ValueError(
            f"z must be (T, at least {n * block}) with dense rows in float32 or less, got "
            f"{tuple(z.shape)}, strides {z.stride()}, {z.dtype}"
        )
    if weights is not None and (router or weights.shape not in ((len(z), n, N), (len(z), 1, N))):
        raise ValueError(
            f"weights must be {(len(z), n, N)}, or 1 for {n}, and router=False; got "
            f"{tuple(weights.shape)} and router={router}"
        )
    if not mix_fits(N, r, r0):
        raise ValueError(
            f"N={N}, r={r}, r0={r0}: padded to powers of two, a token's branches are more than the "
            f"{MOST_ELEMENTS} elements a kernel holds; use the torch operation (mix_fits says when)"
        )
    gate = "router" if router else "ones" if weights is None else "given"
    pad = z.shape[1] - n * block
    sizes = {"NP": _padded(N), "RP": _padded(r), "R0P": _padded(r0), "PAD": pad and _padded(pad)}
    # The kernel waits for memory, not for arithmetic, so many small programs are better than few
    # large ones: 2048 elements are 16 a thread, and 8192 tokens of 4 x 16 make 256 programs.
    widest = max(sizes["NP"] * sizes["RP"], sizes["R0P"], sizes["PAD"])
    warps = min(16, max(4, widest // 512))
    fixed = {"N": N, "R": r, "R0": r0, "A_ONE": share_A, "B_ONE": share_B, "GATE": gate}
    return fixed | sizes | {"BT": min(64, max(1, 2048 // widest)), "num_warps": warps}, m


def _launch(
    constants: dict[str, Any], n: int, z: Tensor, du: Tensor | None, weights: Tensor | None,
    u: Tensor | None, dz: Tensor | None, dweights: Tensor | None, s: float, s0: float,
) -> None:  # fmt: skip
    T, K = z.shape
    if not T * n:
        return
    w_t, w_j, w_i = (0, 0, 0) if weights is None else weights.stride()
    w_j = 0 if weights is None or weights.shape[1] == 1 else w_j
    # A pointer that is not followed still has to be one, hence z.
    pointers = [z if tensor is None else tensor for tensor in (du, weights, u, dz, dweights)]
    strides = [z.stride(0), 0 if du is None else du.stride(0), w_t, w_j, w_i]
    flags = {"BACKWARD": dz is not None, "WRITE_U": u is not None, "DW": dweights is not None}
    with torch.cuda.device_of(z):
        _mix[(triton.cdiv(T, constants["BT"]), n)](
            z, *pointers, T, K, *strides, 0 if u is None else u.stride(0), s, s0,
            **constants, **flags,
        )  # fmt: skip
