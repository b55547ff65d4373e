"""How far two weight updates point in the same directions: phi of their leading subspaces.

    phi(i, j) = || U_a[:, :i]' U_b[:, :j] ||_F^2 / min(i, j)      (Hu et al., 2106.09685, eq. 4)

with the singular vectors of an update B A = U diag(sigma) V', largest sigma first: of its output
side U (out, k), or of its input side V (in, k) in the place of U. 1: the smaller of the two
subspaces lies inside the other; 0: they are orthogonal. Hu et al. take the right singular vectors
of A alone, which has the directions of V but not their order. Subspaces drawn at random have
E phi = max(i, j) / d in d dimensions (`by_chance`): what is not above that says nothing.

A part has i up to its own rank: below sigma_1 max(out, in) eps its vectors are anybody's. So an
untrained adapter, whose update is zero, has no row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from manylora.inspect.adapters import Adapter, Part
from manylora.inspect.long import long_form
from manylora.inspect.places import place_of
from manylora.inspect.spectra import Numbers
from manylora.inspect.threads import one_thread

MOST = 16
SIDES = ("input", "output")
_PLACE = ("layer", "module", "depth", "left", "right", "side")


class Subspaces(NamedTuple):
    """Singular vectors of an update that belong to a value that is not zero, largest first."""

    input: Tensor
    output: Tensor


def subspaces_of(part: Part, most: int | None = None) -> Subspaces:
    """V (in, k) and U (out, k) of B A in float64, at most `most` of each; B A is never formed."""
    right = torch.linalg.qr(part.A.double().T)
    left = torch.linalg.qr(part.B.double())
    U, sigma, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    width = max(part.A.shape[1], len(part.B))
    alive = int((sigma > sigma[:1] * width * torch.finfo(sigma.dtype).eps).sum())
    k = alive if most is None else min(alive, most)
    return Subspaces(right.Q @ Vh[:k].T, left.Q @ U[:, :k])


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """phi(i, j) as a table (k_a, k_b), row i - 1, of orthonormal columns a (d, k_a), b (d, k_b)."""
    inside = (a.T @ b).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, a.shape[1] + 1), torch.arange(1, b.shape[1] + 1)
    return inside / torch.minimum(i[:, None], j)


def by_chance(i: int, j: int, features: int) -> float:
    """The mean of phi(i, j) over subspaces drawn at random in that many dimensions."""
    return max(i, j) / features


@one_thread()
def subspaces(
    a: Adapter,
    b: Adapter,
    pairs: Sequence[tuple[str, str]] | None = None,
    layers: Sequence[str] | None = None,
    most: int = MOST,
) -> pd.DataFrame:
    """phi of the layers that both have: layer, module, depth, left, right, side, i, j, phi.

    left and right are "run: part"; side is "input" or "output"; i and j count from 1.

    Args:
        a, b: two updates of one base model, or one and the same, to compare its branches.
        pairs: names of a part of each. None: the parts of one name, and the whole of either with
            every part of the other; of one and the same, each two of its branches.
        layers: None is all that both have.
        most: i and j go up to this.

    Raises ValueError when no layer, or no part, is in both, or they are of different base models.
    """
    own = _shared_layers(a, b) if layers is None else list(layers)
    found = [row for layer in own for row in _of_layer(a, b, layer, pairs, most)]
    if not found and not pairs:
        raise ValueError(
            f"{a.name} and {b.name} have no two parts to compare; name them with `pairs`"
        )
    phis = [phi for _, phi in found]
    grids = [np.indices(phi.shape).reshape(2, -1) + 1 for phi in phis]
    numbers = {
        "i": [grid[0] for grid in grids],
        "j": [grid[1] for grid in grids],
        "phi": [phi.ravel() for phi in phis],
    }
    return long_form(_PLACE, [place for place, _ in found], numbers)


def _shared_layers(a: Adapter, b: Adapter) -> list[str]:
    found = [layer for layer in a.layers if layer in b.layers]
    if not found:
        raise ValueError(
            f"{a.name} and {b.name} adapt no layer of the same name: {next(iter(a.layers))}, ... "
            f"and {next(iter(b.layers))}, ...; compare updates of one base model"
        )
    return found


def _pairs(left: dict[str, Part], right: dict[str, Part], same: bool) -> list[tuple[str, str]]:
    if same:
        return list(combinations([name for name in left if name.startswith("branch ")], 2))
    return [(p, q) for p in left for q in right if p == q or "whole" in (p, q)]


def _of_layer(
    a: Adapter, b: Adapter, layer: str, pairs: Sequence[tuple[str, str]] | None, most: int
) -> Iterator[tuple[tuple[object, ...], Numbers]]:
    """(layer, module, depth, left, right, side) and phi (k_a, k_b); a part is decomposed once."""
    left = a.parts(layer)
    right = left if a is b else b.parts(layer)
    pairs = _pairs(left, right, a is b) if pairs is None else pairs
    for name, other in pairs:
        if name not in left or other not in right:
            raise ValueError(
                f"no parts {name!r} and {other!r}: {layer} of {a.name} has {', '.join(left)}; of "
                f"{b.name} {', '.join(right)}"
            )
    mine = {name: subspaces_of(left[name], most) for name in {name for name, _ in pairs}}
    theirs = {name: subspaces_of(right[name], most) for name in {other for _, other in pairs}}
    for name, other in pairs:
        ends = f"{a.name}: {name}", f"{b.name}: {other}"
        for side, u, v in zip(SIDES, mine[name], theirs[other], strict=True):
            if len(u) != len(v):
                raise ValueError(
                    f"{layer} has {len(u)} {side} features in {a.name}, {len(v)} in {b.name}; "
                    "compare updates of one base model"
                )
            yield (layer, *place_of(layer), *ends, side), similarity(u, v).numpy()
