"""Taking a run folder into use: writable, this process's alone, and clean of unfinished files."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from manylora.discovery.result import read_discovery
from manylora.recipe import RECIPE_FILE, Recipe, load_recipe
from manylora.run import is_finished
from manylora.training.checkpoints import (
    CHECKPOINTS,
    last_checkpoint,
    make_writable,
    partial_of,
    partials,
    remove_folder,
    step_of,
    sweep,
)
from manylora.training.clusters import KEPT, with_branches

# What a resumed run may change: it moves neither the weights nor the scores.
FREE: dict[str, Any] = {
    "output": True,
    "train": {"checkpoint_every", "workers"},
    "evaluate": {"batch_size"},
}


_held: set[int] = set()


def _close_held() -> None:
    """A loader's worker must not hold the lock on after the run itself was killed."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_held)


@contextmanager
def run_folder(run: Path) -> Iterator[None]:
    """Make the folder, and keep other processes out until this one leaves or dies.

    Raises OSError when it cannot be written, RuntimeError when another process trains in it. A
    folder that stays empty is removed again.
    """
    make_writable(run, f"the run folder {run}", "output=FOLDER")
    handle = os.open(run, os.O_RDONLY)
    _held.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process is training in {run}; wait for it or stop it, or choose "
                "another folder with output=FOLDER"
            ) from None
        yield
    finally:
        _held.discard(handle)
        os.close(handle)
        with suppress(OSError):  # not empty: the run is in it
            run.rmdir()


def refuse_used_folder(run: Path) -> None:
    """A new run starts in an empty folder; what a killed start left there does not count."""
    unfinished = partials(run)
    if partial_of(run / RECIPE_FILE) in unfinished:
        unfinished.append(run / KEPT)  # it gets its name just before recipe.yaml does
    if set(run.iterdir()) - set(unfinished):
        begun = f"; to go on with the run in it: manylora train {run} --resume"
        raise FileExistsError(
            f"the run folder {run} is not empty; choose another with output=FOLDER, or remove it"
            + (begun if (run / RECIPE_FILE).is_file() and not is_finished(run) else "")
        )
    if (run / KEPT).is_dir():
        remove_folder(run / KEPT)
    sweep(run)


def is_begun(recipe: Recipe, console: Console) -> bool:
    """Is there a run of this recipe to go on with? False when its folder is still empty.

    Raises FileExistsError for a finished run, ValueError for one of another recipe.
    """
    run = recipe.run
    if not (run / RECIPE_FILE).is_file():
        console.print(f"{run} has nothing to resume yet; starting from step 0", highlight=False)
        return False
    if is_finished(run):
        raise FileExistsError(
            f"{run} is finished; to train it further, start a new run from it: "
            f"manylora train {run} start_from={run} output=NEW_FOLDER train.epochs=3"
        )
    if (run / KEPT).is_dir():
        recipe = with_branches(recipe, read_discovery(run / KEPT))
    if load_recipe(run).model_dump(exclude=FREE) != recipe.model_dump(exclude=FREE):
        raise ValueError(
            f"the recipe is not the one that {run} was started with, so it cannot be "
            f"resumed; give the run folder itself: manylora train {run} --resume"
        )
    sweep(run)
    sweep(run / CHECKPOINTS)
    checkpoint = last_checkpoint(run)
    where = "no checkpoint yet; starting from step 0"
    if checkpoint is not None:
        where = f"going on from step {step_of(checkpoint)}"
    console.print(f"{run}: {where}", highlight=False)
    return True
