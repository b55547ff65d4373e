"""Rank shared out among branches by what each needs (docs/research.md, stage 4).

    rows    in proportion to a cluster's training rows
    loss    to its loss under LoRA, nats a token of its rows that are kept apart
    gain    to how far a branch of its own had lowered that loss, beside the shared one

Loss and gain come from the kept rows of another part, each method at the best rate of its trials;
no held-out row is looked at. Every branch has at least rank 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
from research_kept import best_trials
from research_parts import SHARED, Part
from rich.console import Console

from manylora.recipe import Recipe
from manylora.training.clusters import settle
from manylora.training.prepare import read_corpus

NEEDS = ("rows", "loss", "gain")
ASKED = re.compile(rf":r=(\d+):branch_ranks=({'|'.join(NEEDS)})$")


def with_ranks(part: Part, recipe: Recipe, kept: Path) -> dict[str, str]:
    """Each method's name as `manylora compare` takes it, with numbers in the place of a need.

    kept: the table with the rows of the part that this one is compared against.
    """
    found = {name: name for name in part.methods}
    asked = {name: match for name in part.methods if (match := ASKED.search(name))}
    if not asked:
        return found
    clusters = _clusters(recipe)
    losses = _losses(clusters, kept, str(part.against))
    for name, match in asked.items():
        each, need = int(match[1]), match[2]
        ranks = shared_out(_need(need, clusters, losses), each * len(clusters))
        found[name] = f"{name[: match.start(2)]}{'+'.join(map(str, ranks))}"
    return found


def shared_out(need: Sequence[float], total: int) -> list[int]:
    """`total` in whole parts of at least 1, otherwise in proportion to the need, which is at least
    0 (largest remainders)."""
    share = np.maximum(np.asarray(need, dtype=float), 0)
    if not share.sum():
        share = np.ones_like(share)
    ranks = np.ones(len(share), dtype=int)
    for _ in range(total - len(share)):
        # One more to the one that is furthest below its part of the whole.
        ranks[np.argmax(share / share.sum() * total - ranks)] += 1
    return ranks.tolist()


def _clusters(recipe: Recipe) -> dict[str, tuple[int, list[str]]]:
    """How many training rows each cluster has, and which rows of it are kept apart, by branch."""
    console = Console(quiet=True)
    recipe = recipe.resolved()
    corpus = settle(recipe, read_corpus(recipe, console), console).corpus
    kept_apart = corpus.validation
    return {
        name: (len(corpus.train[name]), kept_apart[name].sources if name in kept_apart else [])
        for name in corpus.tasks
    }


def _losses(
    clusters: dict[str, tuple[int, list[str]]], kept: Path, part: str
) -> Callable[[str], pd.Series]:
    """method -> nats a token by cluster, at the best rate of its trials."""
    cluster_of = {source: name for name, (_, own) in clusters.items() for source in own}
    rows = pq.read_table(kept, filters=[("part", "==", part), ("stage", "==", "rate")])
    best = best_trials(rows)

    def loss(method: str) -> pd.Series:
        if method not in best:
            raise ValueError(f"{kept} has no trial of {method!r} in {part}: run and keep it first")
        trial = rows.filter(pc.equal(rows["run"], best[method][1])).to_pandas()
        cluster = trial["example"].map(cluster_of)
        sums = trial.groupby(cluster)[["nll", "tokens"]].sum()
        found = sums["nll"] / sums["tokens"]
        # A cluster without a row that is kept apart needs what the others do.
        return found.reindex(list(clusters)).fillna(found.mean())

    return loss


def _need(
    need: str,
    clusters: dict[str, tuple[int, list[str]]],
    losses: Callable[[str], pd.Series],
) -> list[float]:
    if need == "rows":
        return [float(count) for count, _ in clusters.values()]
    lora = losses("lora")
    return list(lora if need == "loss" else lora - losses(SHARED))
