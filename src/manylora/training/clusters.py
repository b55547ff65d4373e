"""Clusters of prompts in a run: as its tasks (`tasks`), and as its number of branches (`auto`).

    tasks: discovered      clusters of the training rows' prompts take the place of the named tasks
    tasks: FOLDER          those that `manylora discover` left there do
    num_branches: auto     as many as the clusters are worth

Which cluster a row is in is looked up by its question in a discovery's folder, always: FOLDER, one
in the cache for what is found here (other processes of the run, and later runs, find it there), or
RUN/discovery once the run has begun, so that it goes on and is scored with the clusters it has.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from rich.console import Console

from manylora import discovery
from manylora.base import pinned
from manylora.cache import cache_folder
from manylora.corpus import Corpus, CorpusError, Rows, absolute
from manylora.corpus.mixture import mixed
from manylora.corpus.store import forget_old
from manylora.discovery.result import (
    ASSIGNMENTS_FILE,
    DISCOVERY_FILE,
    Discovery,
    read_discovery,
)
from manylora.discovery.show import headline
from manylora.recipe import AUTO, Recipe, RecipeError, load_recipe

if TYPE_CHECKING:  # loads scikit-learn, which most runs do without
    from manylora.discovery.folder import Assignments

KEPT = "discovery"
# What decides which rows there are and the cluster of each.
_DECIDES = (
    *("data", "fields", "on_bad_row", "holdout", "validation", "seed"),
    *("tasks", "discovery", "model"),
)


@dataclass(frozen=True)
class Settled:
    """A recipe without `auto`, its rows by task or cluster, and the discovery behind both."""

    recipe: Recipe
    corpus: Corpus
    folder: Path | None = None
    found: Discovery | None = None


def needs_discovery(recipe: Recipe) -> bool:
    return recipe.tasks != "named" or recipe.num_branches == AUTO


def settle(recipe: Recipe, corpus: Corpus, console: Console, kept: Path | None = None) -> Settled:
    """What the recipe leaves to discovery, found and said.

    kept: RUN/discovery of a run that has begun. Raises RecipeError or CorpusError for a folder
    that is none or does not know a row.
    """
    if not needs_discovery(recipe):
        return Settled(recipe, corpus.without(recipe.leave_out))
    folder = _folder(recipe, corpus, console, kept)
    found = read_discovery(folder)
    whole = with_branches(recipe, found)
    if kept is None:
        _tell(found, recipe, whole, console)
    if recipe.tasks != "named":
        advice = (
            "the data are not what they were when the run began; put them back, or start a new run"
            if kept is not None
            else "it was not there when the folder was made, or has changed since; run `manylora "
            "discover DATA --output NEW_FOLDER` on the data as they are now, read in the same way"
        )
        corpus = by_cluster(corpus, folder, found.names, advice, console)
    return Settled(whole, corpus.without(recipe.leave_out), folder, found)


def with_branches(recipe: Recipe, found: Discovery) -> Recipe:
    """The recipe with a number for `num_branches: auto`."""
    if recipe.num_branches != AUTO:
        return recipe
    adapter = recipe.adapter.model_copy(update={"num_branches": found.branches})
    return recipe.model_copy(update={"adapter": adapter})


def keep(folder: Path, written: Path) -> None:
    """Copy a discovery into a run's folder that is being written."""
    from manylora.discovery.folder import PAGE_FILE

    (written / KEPT).mkdir()
    for name in (DISCOVERY_FILE, ASSIGNMENTS_FILE, PAGE_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, written / KEPT / name)


def kept_for(recipe: Recipe, run: Path) -> Path | None:
    """RUN/discovery, for a recipe that is the run's; None where changes ask for other clusters."""
    own = load_recipe(run)
    same = all(getattr(own, key) == getattr(recipe, key) for key in _DECIDES)
    return run / KEPT if same and needs_discovery(own) else None


def _folder(recipe: Recipe, corpus: Corpus, console: Console, kept: Path | None) -> Path:
    if kept is not None:
        if not kept.is_dir():
            raise CorpusError(
                f"{kept}, the clusters that the run began with, is not there any more; put it "
                "back, or start a new run"
            )
        return kept
    if recipe.tasks in ("named", "discovered"):
        return _discovered(recipe, corpus, console)
    if not Path(recipe.tasks).is_dir():
        raise RecipeError(
            f"tasks={recipe.tasks!r} is no folder; tasks is named, discovered, or a folder that "
            "`manylora discover` wrote"
        )
    return Path(recipe.tasks)


def _tell(found: Discovery, recipe: Recipe, whole: Recipe, console: Console) -> None:
    """How many clusters and why; how many branches."""
    said = [f"{headline(found)} ({found.chosen_by}). {found.heterogeneity.advice}"]
    if recipe.num_branches == AUTO:
        said.append(f"num_branches: {whole.num_branches}.")
    console.print(" ".join(said), markup=False, highlight=False, soft_wrap=True)
    if found.disagreement:
        console.print(found.disagreement, style="yellow", markup=False, soft_wrap=True)


def _discovered(recipe: Recipe, corpus: Corpus, console: Console) -> Path:
    """The folder of what is found in these rows, looked for unless that was done before."""
    from manylora.discovery.corpus import discover_corpus
    from manylora.discovery.embeddings import embeddings

    folder = cache_folder() / "discoveries" / _identity(recipe, corpus)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")), console.status("looking for clusters") as status:
        if not (folder / DISCOVERY_FILE).is_file():
            forget_old(folder.parent)

            def say(text: str) -> None:
                status.update(f"looking for clusters: {text}")

            embedding = embeddings(recipe.discovery, recipe.model, recipe.seed, say)
            discover_corpus(corpus, recipe.discovery, recipe.seed, folder, embedding, say)
        os.utime(folder)
    return folder


def _identity(recipe: Recipe, corpus: Corpus) -> str:
    """The same only where the same would be found: rows, split, options, and the way to look."""
    options = recipe.discovery
    values = [
        corpus.content,
        absolute(recipe.data),
        [recipe.holdout, recipe.validation, recipe.seed],
        options.model_dump(),
        pinned(recipe.model) if options.features == "model" else None,
    ]
    name = hashlib.sha256(json.dumps(values).encode())
    for file in sorted(Path(str(discovery.__file__)).parent.glob("*.py")):
        name.update(file.read_bytes())
    return name.hexdigest()[:32]


def by_cluster(
    corpus: Corpus, folder: Path, names: list[str], advice: str, console: Console
) -> Corpus:
    """The corpus filed under the clusters of a discovery; rows in none of them are left out.

    names: of the clusters, in order; one without a training row is none of the tasks. Raises
    CorpusError for a row that the folder does not know, with the advice.
    """
    from manylora.discovery.folder import read_assignments

    known = read_assignments(folder)
    filed = []
    none = rows = 0
    for split in (corpus.train, corpus.validation, corpus.test):
        clusters, apart = _filed(split, known, names, advice)
        filed.append(clusters)
        none, rows = none + apart, rows + sum(map(len, split.values()))
    train, validation, test = filed
    if not train:
        raise CorpusError(f"none of the training rows is in a cluster of {folder}")
    _warn(f"{none:,} of {rows:,} rows are in no cluster and are left out", none, console)
    for what, split in (("validation", validation), ("held-out", test)):
        lost = sum(len(rows) for name, rows in split.items() if name not in train)
        said = f"{lost:,} {what} rows are in a cluster without a training row and are left out"
        _warn(said, lost, console)
    return replace(
        corpus,
        train=train,
        validation={name: rows for name, rows in validation.items() if name in train},
        # Scores are of the first rows: in file order those would be of the first task alone.
        test={
            name: rows.at(np.argsort(mixed(rows.keys, "scored"), kind="stable"))
            for name, rows in test.items()
            if name in train
        },
    )


def _filed(
    split: dict[str, Rows], known: Assignments, names: list[str], advice: str
) -> tuple[dict[str, Rows], int]:
    """(the rows of each cluster that has some, how many are in none)."""
    if not split:
        return {}, 0
    store = next(iter(split.values())).store
    numbers = np.sort(np.concatenate([rows.numbers for rows in split.values()]))
    every = Rows(store, numbers)
    missing = np.flatnonzero(known.places(every.keys) < 0)
    if len(missing):
        more = f", and {len(missing) - 1:,} rows more" if len(missing) > 1 else ""
        raise CorpusError(
            f"{every[int(missing[0])].source}{more}: not in {known.folder / ASSIGNMENTS_FILE}; "
            f"{advice}"
        )
    labels = known.cluster_of(every.keys)
    places = [np.flatnonzero(labels == cluster) for cluster in range(len(names))]
    found = {
        name: Rows(store, numbers[own], name)
        for name, own in zip(names, places, strict=True)
        if len(own)
    }
    return found, int((labels < 0).sum())


def _warn(said: str, count: int, console: Console) -> None:
    if count:
        console.print(said, style="yellow", markup=False, highlight=False)
