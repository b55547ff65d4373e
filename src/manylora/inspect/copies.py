"""Whether branches hold the same update.

    cosine[i, j] = sum over layers <D_i, D_j> / sqrt(sum |D_i|^2  sum |D_j|^2),   D_i = s B'_i A_i

with <B A, B' A'> = sum of the elements of (B^T B') * (A A'^T), so that no (out, in) matrix is made.
B' has MultiLoRA's scale in it. Float64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.mixing import owners
from manylora.adapter.ops import fold_scale
from manylora.inspect.adapters import Adapter, Branched
from manylora.inspect.starts import stored

Floats = npt.NDArray[np.float64]


def similarity(adapter: Adapter) -> Floats | None:
    """Cosines (N, N) of the branches' updates over all layers, NaN for a branch whose update is 0.

    None for an adapter without several branches.
    """
    layers = [layer for layer in adapter.layers.values() if isinstance(layer, Branched)]
    if not layers or stored(layers[0])[0].count < 2:
        return None
    products = sum(_products(layer) for layer in layers)
    lengths = np.sqrt(np.diag(products))
    lengths[lengths == 0] = np.nan
    found: Floats = products / np.outer(lengths, lengths)
    return found


def shares_A(adapter: Adapter) -> bool:
    """Whether the branches differ in B alone."""
    config = adapter.config
    return isinstance(config, ManyLoraConfig) and config.branches_of().share_A


def _products(layer: Branched) -> Floats:
    """<D_i, D_j> of one layer, (N, N)."""
    branches, t = stored(layer)
    B = fold_scale(t["B"].double(), branches, t["scale"].double() if "scale" in t else None)
    A, count = t["A"].double(), branches.count
    of_A = (A @ A.T).repeat(*[count if branches.share_A else 1] * 2)
    of_B = (B.T @ B).repeat(*[count if branches.share_B else 1] * 2)
    own = owners(branches.ranks, A)  # (N, K)
    (scaling,) = layer.layer.scaling.values()
    found: Floats = (scaling**2 * (own @ (of_A * of_B) @ own.T)).numpy()
    return found
