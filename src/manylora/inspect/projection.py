"""Where the A's and B's of runs lie beside each other: t-SNE or UMAP of the matrices, flattened.

Each layer's A, and each branch's B, is a point with r in (or out r) coordinates, its values as they
are. That is figures 3, 6 and 7 of HydraLoRA (2404.19245), whose points are all of one size (q_proj
and v_proj of LLaMA2-7B). Where layers differ in width, matrices of different shapes are vectors of
different spaces, drawn in the direct sum of these, so

    |a - b|^2 = |a|^2 + |b|^2 - 2 <a, b>,   <a, b> = 0 where the shapes differ

and distances within a shape are those of the paper. The method gets the exact principal components,
from the Gram matrix G (n x n) of n points instead of the n x r in matrix of their values:

    C G C = V diag(l) V^T (C centres),   points = V diag(l)^(1/2)     distances as before

which takes n^2 r in multiplications in float64 and, beside the adapters, two chunks of columns and
a few n x n matrices. t-SNE is scikit-learn's with PCA start, as in the paper's code; perplexity 30,
or (n - 1) / 3 for fewer points. All random numbers come from the seed (t-SNE from that start draws
next to none, so its pictures are the same for every seed), and one thread does the sums: the same
input gives the same picture.

Clusters of a picture are clusters of starts first (initialisation.py). `of="change"` draws M - M_0
instead, `of="start"` M_0 alone: what separates in the one and not in the other was learned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor

from manylora.inspect.adapters import Adapter
from manylora.inspect.pieces import Matrix, Piece, pieces_of
from manylora.inspect.starts import start_of

Method = Literal["tsne", "umap"]
State = Literal["trained", "start", "change"]
COLUMNS = ("run", "layer", "module", "depth", "part", "matrix", "x", "y")
FEWEST = 4
PERPLEXITY = 30.0
NEIGHBOURS = 15
CHUNK = 2**22
"""Numbers that are held in float64 at a time, 32 MiB."""

Floats = NDArray[np.float64]


def projection(
    adapters: Sequence[Adapter],
    matrix: Matrix = "A",
    method: Method = "tsne",
    seed: int = 0,
    of: State = "trained",
) -> pd.DataFrame:
    """A point of the plane for each A, or each B, of some adapters, in one picture.

    Columns: run, layer, module, depth, part (a branch, or "all branches" where they share the
    matrix), matrix, x, y. A full fine-tuning has no A or B, and gives no points.

    Raises ValueError for fewer than 4 points, and for `of` other than "trained" where the start of
    an adapter is not known; RuntimeError for UMAP without umap-learn.
    """
    pieces = [
        piece for adapter in adapters for piece in _pieces(adapter, of) if piece.matrix == matrix
    ]
    plane = embed([_value(piece, of) for piece in pieces], method, seed)
    rows = [
        (p.run, p.layer, p.module, p.depth, p.part, p.matrix, float(x), float(y))
        for p, (x, y) in zip(pieces, plane, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def embed(matrices: Sequence[Tensor], method: Method = "tsne", seed: int = 0) -> Floats:
    """(n, 2): the plane of n matrices. Raises as `projection`."""
    if len(matrices) < FEWEST:
        raise ValueError(
            f"a projection shows which of many matrices are near each other; there are "
            f"{len(matrices)} here, and it takes {FEWEST} at least: give more runs"
        )
    points = components(matrices)
    if not points.shape[1]:  # all of them the same
        return np.zeros((len(matrices), 2))
    with threadpool_limits(1):
        return _umap(points, seed) if method == "umap" else _tsne(points, seed)


def components(matrices: Sequence[Tensor]) -> Floats:
    """(n, k), k < n: coordinates of n flattened matrices in which their distances are the same."""
    gram = _gram(matrices)
    # Below are the last bits of the products, which are no direction of the points.
    least = gram.diagonal().max() * len(gram) * np.finfo(np.float64).eps
    gram -= gram.mean(0)
    gram -= gram.mean(1, keepdims=True)
    values, vectors = np.linalg.eigh(gram)
    kept = values > least
    found: Floats = vectors[:, kept] * np.sqrt(values[kept])
    return found[:, ::-1] * _signs(found[:, ::-1])


def _gram(matrices: Sequence[Tensor]) -> Floats:
    """(n, n) inner products; 0 for matrices of different shapes."""
    groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, tensor in enumerate(matrices):
        groups[tuple(tensor.shape)].append(place)
    gram = np.zeros((len(matrices), len(matrices)))
    for places in groups.values():
        flat = [matrices[place].flatten() for place in places]
        total = torch.zeros(len(places), len(places), dtype=torch.float64)
        step = max(1, CHUNK // len(places))
        for start in range(0, flat[0].numel(), step):
            chunk = torch.stack([vector[start : start + step] for vector in flat]).double()
            total.addmm_(chunk, chunk.T)
        gram[np.ix_(places, places)] = total.numpy()
    return gram


def _signs(columns: Floats) -> Floats:
    """An eigenvector may point either way: its largest value is positive here."""
    largest = np.abs(columns).argmax(0)
    return np.where(columns[largest, np.arange(columns.shape[1])] < 0, -1.0, 1.0)


def _tsne(points: Floats, seed: int) -> Floats:
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    tsne = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed)
    found: Floats = tsne.fit_transform(_at_least_two(points)).astype(np.float64)
    return found


def _umap(points: Floats, seed: int) -> Floats:
    if find_spec("umap") is None:
        raise RuntimeError(
            "method='umap' needs umap-learn, which is not installed: pip install 'manylora[umap]'; "
            "method='tsne' does without"
        )
    from umap import UMAP

    first = _at_least_two(points)[:, :2]
    neighbours = min(NEIGHBOURS, len(points) - 1)
    mapper = UMAP(n_neighbors=neighbours, init=first, random_state=seed, n_jobs=1)
    found: Floats = mapper.fit_transform(points).astype(np.float64)
    return found


def _at_least_two(points: Floats) -> Floats:
    """Points on a line get a second coordinate, zero."""
    return np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))


def _pieces(adapter: Adapter, of: State) -> Iterable[Piece]:
    if of == "trained" or adapter.method == "full":
        return pieces_of(adapter)
    start = start_of(adapter)
    if start.unknown is not None:
        raise ValueError(f"{adapter.name}: how it started is not known: {start.unknown}")
    return pieces_of(adapter, start)


def _value(piece: Piece, of: State) -> Tensor:
    if of == "trained":
        return piece.trained
    assert piece.start is not None  # or `_pieces` had raised
    return piece.start if of == "start" else piece.trained.float() - piece.start
