"""What density-based clustering says of the number of clusters: DBSCAN and HDBSCAN.

The HydraLoRA authors name DBSCAN as an alternative to K-means (arXiv 2404.19245, appendix B). Both
need no K, leave documents out as noise, and look at a sample, because DBSCAN compares all pairs.
"""

from __future__ import annotations

import numpy as np
from kneed import KneeLocator
from sklearn.cluster import DBSCAN, HDBSCAN
from sklearn.neighbors import NearestNeighbors

from manylora.discovery.curve import some
from manylora.discovery.result import Criterion
from manylora.discovery.space import Rows

_ROWS = 4000
_NEIGHBOURS = 10


def density(rows: Rows, seed: int) -> list[Criterion]:
    """DBSCAN and HDBSCAN over a sample of the rows; None where all of it is noise."""
    few = some(rows, _ROWS, seed)
    if len(few) <= 2 * _NEIGHBOURS:
        note = f"not tried: fewer than {2 * _NEIGHBOURS + 1} documents"
        return [Criterion(name=name, k=None, note=note) for name in ("dbscan", "hdbscan")]
    reach = _reach(few)
    smallest = max(_NEIGHBOURS, len(few) // 100)
    return [
        _count("dbscan", DBSCAN(eps=reach, min_samples=_NEIGHBOURS).fit_predict(few), smallest),
        _count("hdbscan", HDBSCAN(min_cluster_size=smallest, copy=True).fit_predict(few), smallest),
    ]


def _reach(rows: Rows) -> float:
    """DBSCAN's radius: where the sorted distances to the tenth neighbour start to rise sharply."""
    distances = NearestNeighbors(n_neighbors=_NEIGHBOURS + 1).fit(rows).kneighbors(rows)[0][:, -1]
    rising = np.sort(distances)
    knee = KneeLocator(range(len(rising)), rising, curve="convex", direction="increasing").knee
    found = float(rising[-1] if knee is None else rising[knee])
    return max(found, 1e-6)


def _count(name: str, labels: np.ndarray, smallest: int) -> Criterion:
    sizes = np.bincount(labels[labels >= 0], minlength=1)
    k = int((sizes >= smallest).sum())
    noise = float((labels < 0).mean())
    note = f"clusters of at least {smallest} of {len(labels):,} documents; {noise:.0%} in none"
    return Criterion(name=name, k=k or None, note=note)
