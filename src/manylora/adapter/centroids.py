"""What the branch selector computes: prompts as weighted token counts, centroids, thresholds.

Sparse rows throughout, and no BLAS: its sums depend on the number of threads and on what else is in
the batch, so a prompt near a threshold could be answered now so and now otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.special import stdtrit

CHUNK = 16_384  # prompts looked at together
_FOLDS = 10
_LEAST = 1e-6  # a prompt with nothing in common is in no branch

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
Rows = Any  # scipy.sparse.csr_matrix: one row for each prompt


def count_prompts(prompts: Sequence[Sequence[int]], buckets: int) -> Rows:
    """As `count_tokens`, for prompts in lists."""
    found = []
    for start in range(0, len(prompts), CHUNK):
        some = prompts[start : start + CHUNK]
        ids = np.fromiter(chain.from_iterable(some), np.int64)
        found.append(count_tokens(ids, np.array([len(prompt) for prompt in some]), buckets))
    return sparse.vstack(found, format="csr")


def count_tokens(ids: Numbers, lengths: Numbers, buckets: int) -> Rows:
    """How often each bucket occurs in each prompt; `ids` are the prompts one after the other."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ones = np.ones(len(ids), dtype=np.float32)
    counts = sparse.csr_matrix((ones, ids % buckets, starts), shape=(len(lengths), buckets))
    counts.sum_duplicates()
    return counts


def inverse_frequency(counts: Rows) -> Floats:
    """The idf of each bucket: 0 for what every prompt has."""
    prompts, buckets = counts.shape
    having = np.bincount(counts.indices, minlength=buckets)
    idf: Floats = np.log((1 + prompts) / (1 + having)).astype(np.float32)
    return idf


def weigh(counts: Rows, idf: Floats) -> Rows:
    """Features: unit rows, or zeros where no token weighs anything. The counts are written over."""
    counts.data = np.log1p(counts.data) * idf[counts.indices]
    norms = np.sqrt(np.asarray(counts.multiply(counts).sum(1))).ravel()
    counts.data /= np.repeat(np.maximum(norms, 1e-12), np.diff(counts.indptr))
    return counts


def cosines(features: Rows, mean: Floats, centroids: Floats) -> Floats:
    """Of features without the mean to centroids (prompts, N); -1 for a row of zeros."""
    products = features @ np.ascontiguousarray(np.vstack([centroids, mean]).T)
    norms = np.sqrt(np.maximum(1 - 2 * products[:, -1] + (mean * mean).sum(), 1e-12))
    found: Floats = (products[:, :-1] - (centroids * mean).sum(1)) / norms[:, None]
    found[np.asarray(features.sum(1)).ravel() == 0] = -1
    return found


def branch_means(features: Rows, owner: Numbers, count: int) -> Floats:
    """The mean features of each branch (count, buckets); `owner`: the branch of each row."""
    shares = (1 / np.maximum(np.bincount(owner, minlength=count), 1)).astype(np.float32)
    shape = (count, len(owner))
    members = sparse.csr_matrix((shares[owner], (owner, np.arange(len(owner)))), shape=shape)
    means: Floats = (members @ features).toarray()
    return means


def centroids_of(features: Rows, owner: Numbers, count: int, mean: Floats) -> Floats:
    """Unit rows: the means of the branches without the mean of all."""
    rows = branch_means(features, owner, count) - mean
    lengths = np.sqrt((rows * rows).sum(1, keepdims=True))
    unit: Floats = rows / np.maximum(lengths, np.float32(1e-12))
    return unit


def thresholds_of(
    features: Rows, owner: Numbers, mean: Floats, refuse: float, known: Floats
) -> Floats:
    """The cosine under which a prompt is not of a branch; `known`: those of earlier branches.

    A branch of one prompt, which tells nothing of its spread, gets the lowest of all.
    """
    sizes = np.bincount(owner)
    own = _own_cosines(features, owner, mean)
    thresholds = np.zeros(len(sizes), dtype=np.float32)
    for branch in np.flatnonzero(sizes > 1):
        thresholds[branch] = max(_lowest(own[owner == branch], refuse), _LEAST)
    thresholds[sizes == 1] = min([*known, *thresholds[sizes > 1]], default=_LEAST)
    return thresholds


def _lowest(own: Floats, refuse: float) -> float:
    """What a new prompt of the branch falls below with probability `refuse`.

    The quantile that promises this of prompts drawn alike (conformal prediction); a branch with too
    few prompts for it gets the lower prediction limit of a normal distribution.
    """
    place = int(refuse * (len(own) + 1))
    if place > 0:
        return float(np.sort(own)[place - 1])
    if refuse == 0:
        return _LEAST
    spread = float(own.std(ddof=1)) * (1 + 1 / len(own)) ** 0.5
    limit: float = float(own.mean()) + spread * float(stdtrit(len(own) - 1, refuse))
    return limit


def _own_cosines(features: Rows, owner: Numbers, mean: Floats) -> Floats:
    """The cosine of each prompt to its branch made without it, in up to ten folds of each branch.

    A fold is a stretch of the prompts as they are given, for neighbours are often near copies.
    """
    sizes = np.bincount(owner)
    order = np.argsort(owner, kind="stable")
    place = np.empty_like(owner)
    place[order] = np.arange(len(owner)) - (np.cumsum(sizes) - sizes)[owner[order]]
    fold = place * _FOLDS // sizes[owner]
    own = np.zeros(len(owner), dtype=np.float32)
    for number in np.unique(fold):
        inside, rest = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        centroids = centroids_of(features[rest], owner[rest], len(sizes), mean)
        found = cosines(features[inside], mean, centroids)
        own[inside] = found[np.arange(len(inside)), owner[inside]]
    return own
