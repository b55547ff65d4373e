"""How alike the A's (and B's) of two runs are, and how much of that their first values explain.

A run's matrix is its start and its change, M = M_0 + D, so for two runs 1 and 2, exactly,

    similarity = <M1, M2> / (|M1| |M2|)             cosine of the flattened matrices, -1 to 1
               = from_start + crossed + from_change
    from_start  = <M1_0, M2_0> / (|M1| |M2|)        the same denominator for all
    crossed     = (<M1_0, D2> + <D1, M2_0>) / (|M1| |M2|)
    from_change = <D1, D2> / (|M1| |M2|)
    explained   = from_start / similarity = <M1_0, M2_0> / <M1, M2>

explained is 1 where all likeness is that of the starts, 0 where none is, above 1 where the changes
point apart. at_start and of_change are the cosines of M_0 and of D by themselves. Cosines depend on
the basis of the r dimensions, which training is free to turn. So beside them stands the mean of the
squared cosines of the principal angles between the row spaces of A (column spaces of B), 0 to 1 and
about r / in for unrelated ones, which is phi(r, r) of Hu et al. (2106.09685, equation 4):

    subspace = |U1^T U2|_F^2 / min(r1, r2)

HydraLoRA (2404.19245, figure 3) reads alike A's as knowledge that tasks share; ALoRA (2509.25414,
figure 1) says they are alike where runs had the same seed. The baseline for a pair with the same
seed and other data is thus a pair with another seed (column `pair`), and the changes alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap
from torch import Tensor

from manylora.inspect.adapters import Adapter
from manylora.inspect.pieces import Piece, pieces_of
from manylora.recipe import RECIPE_FILE, Recipe, load_recipe

CHANCE = 4.0
"""A similarity within so many standard deviations of unrelated matrices' is not explained."""
RESAMPLES = 2000
_DATA = ("data", "fields", "tasks", "mixture")

Floats = NDArray[np.float64]
COLUMNS = (
    *("layer", "module", "depth", "matrix", "left", "right", "pair"),
    *("similarity", "at_start", "of_change", "explained", "from_start", "from_change"),
    *("subspace", "subspace_at_start", "subspace_of_change"),
)
MEASURES = COLUMNS[COLUMNS.index("pair") + 1 :]


@dataclass(frozen=True)
class Likeness:
    """Every pair of P matrices of one shape; each (P, P), NaN where it is not defined or known."""

    similarity: Floats
    at_start: Floats
    of_change: Floats
    explained: Floats
    from_start: Floats
    from_change: Floats
    subspace: Floats
    subspace_at_start: Floats
    subspace_of_change: Floats


def initialisation(adapters: Sequence[Adapter]) -> pd.DataFrame:
    """Each pair of A's, and of B's, of one layer and one shape: between runs and within a run.

    Columns: those of COLUMNS; left and right are "run: part" (a branch, or "all branches" where
    they share the matrix), pair how the two runs differ. What needs the start is NaN for an adapter
    whose start is not known (a plain PEFT folder, or `starts.start_of` says why), and explained
    where the similarity itself is no more than chance: |similarity| <= 4 / sqrt(rows columns).
    """
    recipes = [_recipe(adapter) for adapter in adapters]
    groups: defaultdict[tuple[str, str, tuple[int, ...]], list[tuple[int, Piece]]]
    groups = defaultdict(list)
    for run, adapter in enumerate(adapters):
        for piece in pieces_of(adapter):
            groups[piece.layer, piece.matrix, tuple(piece.trained.shape)].append((run, piece))
    kinds = {
        (i, j): _pair(recipes[i], recipes[j]) if i != j else "one run"
        for i in range(len(recipes))
        for j in range(len(recipes))
    }
    rows = [row for group in groups.values() for row in _rows(group, kinds)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def likeness(
    trained: Sequence[Tensor], starts: Sequence[Tensor | None], columns: bool = False
) -> Likeness:
    """All pairs of some matrices of one shape (rows, columns).

    Args:
        starts: what each was before training; None where that is not known.
        columns: compare the spaces of the columns, as for B, rather than of the rows, as for A.
    """
    now = torch.stack([tensor.double() for tensor in trained])
    unknown = torch.full_like(now[0], torch.nan)
    start = torch.stack([unknown if first is None else first.double() for first in starts])
    change = now - start
    inner = [_inner(stack) for stack in (now, start, change)]
    size = np.sqrt(np.diagonal(inner[0]))
    scale = _nan_for_zero(np.outer(size, size))
    similarity, from_start, from_change = (g / scale for g in inner)
    chance = CHANCE / np.sqrt(now[0].numel())
    spaces = [_subspace(stack if columns else stack.mT) for stack in (now, start, change)]
    return Likeness(
        similarity,
        _cosine(inner[1]),
        _cosine(inner[2]),
        np.where(np.abs(similarity) > chance, from_start / _nan_for_zero(similarity), np.nan),
        from_start,
        from_change,
        *spaces,
    )


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over layers with 95 % percentile bootstrap intervals, layers resampled.

    One row for each matrix, kind of pair and measure: [matrix, pair, layers, measure, mean, low,
    high]. explained is the ratio of the means of from_start and similarity, and NaN where the
    interval of the similarity holds 0: there is nothing to explain.
    """
    rows: list[tuple[object, ...]] = []
    for (matrix, pair), group in frame.groupby(["matrix", "pair"], sort=False):
        by_layer = group.groupby("layer", sort=False)[list(MEASURES)].mean()
        for measure in MEASURES:
            found = _explained(by_layer) if measure == "explained" else _mean(by_layer[measure])
            rows.append((matrix, pair, len(by_layer), measure, *found))
    names = ["matrix", "pair", "layers", "measure", "mean", "low", "high"]
    return pd.DataFrame(rows, columns=names)


def _rows(
    group: Sequence[tuple[int, Piece]], kinds: Mapping[tuple[int, int], str]
) -> Iterator[tuple[object, ...]]:
    runs, pieces = zip(*group, strict=True)
    first: Piece = pieces[0]
    found = likeness(
        [piece.trained for piece in pieces],
        [piece.start for piece in pieces],
        columns=first.matrix == "B",
    )
    values = [getattr(found, measure) for measure in MEASURES]
    names = [f"{piece.run}: {piece.part}" for piece in pieces]
    for i, j in combinations(range(len(names)), 2):
        layer = first.layer, first.module, first.depth, first.matrix
        pair = names[i], names[j], kinds[runs[i], runs[j]]
        yield *layer, *pair, *(float(value[i, j]) for value in values)


def _recipe(adapter: Adapter) -> Recipe | None:
    known = (adapter.folder / RECIPE_FILE).is_file()
    return load_recipe(adapter.folder) if known else None


def _pair(one: Recipe | None, other: Recipe | None) -> str:
    """How two runs differ, in words."""
    if one is None or other is None:
        return "unknown"
    seed = "same" if one.seed == other.seed else "other"
    alike = all(getattr(one, key) == getattr(other, key) for key in _DATA)
    return f"{seed} seed, {'same' if alike else 'other'} data"


def _inner(stack: Tensor) -> Floats:
    """(P, P) inner products of P flattened matrices; NaN where one of the two is unknown."""
    flat = stack.flatten(1)
    found: Floats = (flat @ flat.T).numpy()
    return found


def _cosine(inner: Floats) -> Floats:
    size = np.sqrt(np.diagonal(inner))
    found: Floats = inner / _nan_for_zero(np.outer(size, size))
    return found


def _subspace(stack: Tensor) -> Floats:
    """(P, P): how much of the smaller column space lies in the other; stack: (P, dimension, r)."""
    known = torch.isfinite(stack).flatten(1).all(1)
    U, s, _ = torch.linalg.svd(torch.where(known[:, None, None], stack, 0.0), full_matrices=False)
    # As numpy's matrix_rank, for values that were stored as float32.
    least = s[:, :1] * max(stack.shape[1:]) * torch.finfo(torch.float32).eps
    kept = s > least
    ranks = kept.sum(1).double()
    bases = torch.where(kept[:, None, :], U, 0.0)  # a basis of each space, zeros beside it
    overlap = torch.stack([(bases.mT @ basis).square().sum((1, 2)) for basis in bases])
    smaller = torch.minimum(ranks[:, None], ranks[None, :]).numpy()
    found: Floats = overlap.numpy() / _nan_for_zero(smaller)
    return found


def _nan_for_zero(values: Floats) -> Floats:
    return np.where(values == 0, np.nan, values)


def _mean(values: pd.Series) -> tuple[float, float, float]:
    known = values.dropna().to_numpy()
    return _bounds((known,), np.mean)


def _explained(by_layer: pd.DataFrame) -> tuple[float, float, float]:
    known = by_layer[["from_start", "similarity"]].dropna()
    _, low, high = _mean(known["similarity"])
    if not (low > 0 or high < 0):
        return np.nan, np.nan, np.nan

    def ratio(starts: Floats, similarities: Floats, axis: int = -1) -> Floats:
        found: Floats = starts.mean(axis=axis) / similarities.mean(axis=axis)
        return found

    return _bounds((known["from_start"].to_numpy(), known["similarity"].to_numpy()), ratio)


def _bounds(
    data: tuple[Floats, ...], statistic: Callable[..., Floats]
) -> tuple[float, float, float]:
    """The statistic and its 95 % bounds over layers; no bounds (NaN) for a single layer."""
    if len(data[0]) == 0:
        return np.nan, np.nan, np.nan
    value = float(statistic(*data, axis=-1))
    if len(data[0]) == 1:
        return value, np.nan, np.nan
    if all(np.ptp(values) == 0 for values in data):
        return value, value, value
    rng = np.random.default_rng(0)
    found = bootstrap(
        data, statistic, n_resamples=RESAMPLES, method="percentile", paired=True, rng=rng
    ).confidence_interval
    return value, float(found.low), float(found.high)
