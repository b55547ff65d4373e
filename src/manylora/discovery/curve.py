"""K-means for every K, and what each K is worth (HydraLoRA, arXiv 2404.19245, section 3.2.1).

    SSE(K) = sum over documents of |z - nearest of K centres|^2

K-means starts from the K clusters of Ward's tree and from two random draws (k-means++), and the
best of the three counts, so that the curve is smooth enough to have an elbow. Silhouette and
Davies-Bouldin, which the paper does not use, are measured beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, ward
from sklearn.cluster import KMeans
from sklearn.metrics import davies_bouldin_score, silhouette_score

from manylora.discovery.result import Candidate
from manylora.discovery.space import Rows

_TREE_ROWS, _SILHOUETTE_ROWS = 8000, 3000


@dataclass(frozen=True)
class Tree:
    """Ward's tree over some of the rows; gains[k]: SSE that the k-th cluster saves, from k = 2."""

    rows: Rows
    links: npt.NDArray[np.float64]

    @classmethod
    def over(cls, rows: Rows, seed: int) -> Tree:
        few = some(rows, _TREE_ROWS, seed)
        return cls(few, ward(few))

    def centres(self, k: int) -> Rows:
        """Centres of the k clusters that the tree falls into."""
        labels = fcluster(self.links, k, "maxclust")
        means = [self.rows[labels == label].mean(0) for label in np.unique(labels)]
        return np.stack(means).astype(np.float32)

    def gains(self, most: int) -> dict[int, float]:
        """SSE that going from k - 1 to k clusters saves, for k up to `most`."""
        saved = self.links[:, 2] ** 2 / 2
        return {k: float(saved[-(k - 1)]) for k in range(2, min(most, len(saved) + 1) + 1)}


@dataclass(frozen=True)
class Curve:
    """One candidate for each K from 1, and the tree they started from; none for one point."""

    candidates: list[Candidate]
    tree: Tree | None


def measure(rows: Rows, most: int, seed: int, told: Callable[[int], None]) -> Curve:
    """The curve over K = 1 ... most; `most` is at most the number of different rows."""
    whole = float(((rows - rows.mean(0)) ** 2).sum())
    candidates = [Candidate(k=1, sse=whole)]
    if most < 2:
        return Curve(candidates, None)
    tree = Tree.over(rows, seed)
    for k in range(2, most + 1):
        candidates.append(_candidate(rows, cluster(rows, k, seed, tree), seed))
        told(k)
    return Curve(candidates, tree)


def cluster(rows: Rows, k: int, seed: int, tree: Tree) -> KMeans:
    """K-means with k clusters: the best of the tree's start and two random ones."""
    start = tree.centres(k)
    tries = [KMeans(k, n_init=2, random_state=seed).fit(rows)]
    if len(start) == k:
        tries.append(KMeans(k, init=start, n_init=1, random_state=seed).fit(rows))
    return min(tries, key=lambda found: found.inertia_)


def _candidate(rows: Rows, found: KMeans, seed: int) -> Candidate:
    labels = found.labels_
    if not 2 <= len(np.unique(labels)) < len(rows):
        return Candidate(k=found.n_clusters, sse=float(found.inertia_))
    picked = np.random.default_rng(seed).permutation(len(rows))[:_SILHOUETTE_ROWS]
    few = 2 <= len(np.unique(labels[picked])) < len(picked)
    return Candidate(
        k=found.n_clusters,
        sse=float(found.inertia_),
        silhouette=float(silhouette_score(rows[picked], labels[picked])) if few else None,
        davies_bouldin=float(davies_bouldin_score(rows, labels)),
    )


def some(rows: Rows, most: int, seed: int) -> Rows:
    """At most so many rows, drawn at random, in their order."""
    if len(rows) <= most:
        return rows
    picked = np.random.default_rng(seed).permutation(len(rows))[:most]
    return np.asarray(rows[np.sort(picked)])
