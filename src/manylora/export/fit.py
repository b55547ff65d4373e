"""The plain LoRA that is nearest to a routed layer on the tokens it was measured on.

    min over M of rank k:  sum_t |dW(x_t) x_t - M x_t|^2 + lambda |M - Q P|^2

Q P is the update at the mean mixing weights, to which M falls back in directions that the tokens
do not show. With C' = C + lambda I = L L^T and Z' = Z + lambda P this is, up to a constant,
|M L - Q Z' L^-T|^2, so M L is the truncated SVD of Q Z' L^-T (Eckart-Young; whitening with L is
whitening with C'^1/2 turned by a rotation). A router that is constant gives Q P, whatever lambda.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import cholesky, qr, solve_triangular, svd

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Values of lambda to choose from, as shares of the mean of C's diagonal."""


@dataclass(frozen=True)
class Seen:
    """Moments of layers that read the same tokens: C (in, in), and Z (K, in) of each layer."""

    second: Tensor
    cross: tuple[Tensor, ...]

    def __add__(self, other: Seen) -> Seen:
        both = zip(self.cross, other.cross, strict=True)
        return Seen(self.second + other.second, tuple(one + two for one, two in both))


@dataclass(frozen=True)
class Space:
    """What a layer's update is made of: Q (out, K), and P (K, in) at the mean mixing weights."""

    up: Tensor
    mean: Tensor


def fits(
    seen: Seen, spaces: Sequence[Space], rank: int | None, ridge: float
) -> list[tuple[Tensor, Tensor]]:
    """A (k, in) and B (out, k) of each layer's best M = B A.

    rank: the most that k may be; None: K. ridge: lambda as a share of the mean of C's diagonal.
    """
    level = float(seen.second.diagonal().mean()) or 1.0  # no input at all: M is the mean's
    penalty = ridge * level
    L = cholesky(seen.second + penalty * torch.eye(len(seen.second)).to(seen.second))
    found = []
    for cross, space in zip(seen.cross, spaces, strict=True):
        whitened = solve_triangular(L, (cross + penalty * space.mean).T, upper=False).T
        left, right = qr(space.up)
        U, S, Vh = svd(right @ whitened, full_matrices=False)
        root = S[:rank].sqrt()
        A = solve_triangular(L.T, (root[:, None] * Vh[:rank]).T, upper=True).T
        found.append((A, left @ (U[:, :rank] * root)))
    return found


def excess(A: Tensor, B: Tensor, second: Tensor, cross: Tensor, up: Tensor) -> float:
    """sum_t |dW(x_t) x_t - B A x_t|^2 less what does not depend on A and B."""
    own = ((A @ second @ A.T) * (B.T @ B)).sum()
    return float(own - 2 * ((A @ cross.T) * (B.T @ up)).sum())


def fits_held_apart(
    seen: Seen, apart: Seen, spaces: Sequence[Space], rank: int | None
) -> list[tuple[Tensor, Tensor]]:
    """`fits` on all the tokens, each layer with the ridge that is best for those held apart."""
    errors = []
    for ridge in RIDGES:
        found = zip(fits(seen, spaces, rank, ridge), apart.cross, spaces, strict=True)
        errors.append([excess(*AB, apart.second, cross, space.up) for AB, cross, space in found])
    best = [RIDGES[column.index(min(column))] for column in map(list, zip(*errors, strict=True))]
    whole = {ridge: fits(seen + apart, spaces, rank, ridge) for ridge in set(best)}
    return [whole[ridge][i] for i, ridge in enumerate(best)]
