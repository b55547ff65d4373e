"""Singular values of weight updates, and how evenly they are spread, from the factors alone.

    B = Q_B R_B (out, k),  A' = Q_A R_A (in, k):   B A = Q_B (R_B R_A') Q_A',
    so sigma(B A) = sigma(R_B R_A'), a k x k matrix; the (out, in) matrix is never formed

MultiLoRA (2311.11501) looks at how the singular values of an update are distributed, as the
importance of the unitary transforms that it is made of: LoRA's is "dominated by a small number of
top singular vectors", full fine-tuning's is more "democratic". That is said of sigma itself, not of
sigma^2, and so are these numbers, which are ours. With p_i = sigma_i / sum sigma, i = 1..k, largest
first:

    rank            k, the largest rank that the part can have
    frobenius       sqrt(sum sigma^2), the size of the update
    top1            p_1
    top_quarter     p_1 + ... + p_ceil(k/4)
    entropy         H = -sum p ln p, nats
    effective_rank  exp H, from 1 to k (Roy and Vetterli, EUSIPCO 2007)
    gini            sum_ij |sigma_i - sigma_j| / (2 k sum sigma), from 0 (all alike) to 1 - 1/k

Of an update that is zero, as every untrained adapter's is, all but the rank are 0: it has no
direction, so its effective rank is 0 and nothing has a share. An even spectrum has top1 = 1/k and
effective_rank = k, so parts of unlike k (full fine-tuning has min(out, in)) differ by that alone.

One layer after the other: copying layers of one shape into a batch takes longer than LAPACK needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch

from manylora.inspect.adapters import Adapter, Part
from manylora.inspect.long import long_form
from manylora.inspect.places import place_of
from manylora.inspect.threads import one_thread

Place = tuple[str, str, str, int, str]
Numbers = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

MEASURES = ("rank", "frobenius", "top1", "top_quarter", "entropy", "effective_rank", "gini")
_PLACE = ("run", "layer", "module", "depth", "part")


def values_of(part: Part) -> Numbers:
    """sigma of B A, largest first (k,), k = min(out, in, rank); computed in float64."""
    if part.values is not None:
        return part.values.double().numpy()
    rights = torch.linalg.qr(part.A.double().T, mode="r").R
    lefts = torch.linalg.qr(part.B.double(), mode="r").R
    # R is (min(rows, rank), rank), so its product has the right number of values by itself.
    return torch.linalg.svdvals(lefts @ rights.T).numpy()


@one_thread()
def singular_values(adapter: Adapter) -> pd.DataFrame:
    """run, layer, module, depth, part, index (1 is the largest), value; parts as in adapters.py."""
    return _values_table(list(_spectra(adapter)))


@one_thread()
def spectra(adapter: Adapter) -> pd.DataFrame:
    """run, layer, module, depth, part and the measures above, one row for each part of a layer."""
    return _measures_table(list(_spectra(adapter)))


@one_thread()
def both(adapter: Adapter) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What `singular_values` and `spectra` give, from one decomposition of each part."""
    found = list(_spectra(adapter))
    return _values_table(found), _measures_table(found)


def _values_table(found: Sequence[tuple[Place, Numbers]]) -> pd.DataFrame:
    values = [values for _, values in found]
    index = [np.arange(1, len(own) + 1) for own in values]
    places = [place for place, _ in found]
    return long_form(_PLACE, places, {"index": index, "value": values})


def _measures_table(found: Sequence[tuple[Place, Numbers]]) -> pd.DataFrame:
    rows = [(*place, *measures_of(values)) for place, values in found]
    return pd.DataFrame(rows, columns=[*_PLACE, *MEASURES])


def measures_of(sigma: Numbers) -> tuple[int, float, float, float, float, float, float]:
    """rank, frobenius, top1, top_quarter, entropy, effective_rank, gini of sigma, largest first."""
    k, total = len(sigma), sigma.sum()
    if not total:
        return (k, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    p = sigma / total
    used = p[p > 0]
    entropy = -float((used * np.log(used)).sum())
    # Sorted upwards, the sum over pairs is 2 sum_i (2 i - k - 1) sigma_i.
    gini = float(((2 * np.arange(1, k + 1) - k - 1) * p[::-1]).sum() / k)
    top_quarter = float(p[: -(-k // 4)].sum())
    size = float(np.sqrt((sigma**2).sum()))
    return (k, size, float(p[0]), top_quarter, entropy, float(np.exp(entropy)), gini)


def _spectra(adapter: Adapter) -> Iterator[tuple[Place, Numbers]]:
    for layer in adapter.layers:
        for name, part in adapter.parts(layer).items():
            yield (adapter.name, layer, *place_of(layer), name), values_of(part)
