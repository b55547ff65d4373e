"""What a stopped run has kept and how to go on with it: the end of every message about one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manylora.recipe import RECIPE_FILE
from manylora.training.checkpoints import last_checkpoint, step_of
from manylora.training.interrupts import Interrupted, name_of


class RunError(RuntimeError):
    """A run that had to stop: why, what is kept, and how to go on."""


@contextmanager
def errors_tell_what_is_kept(run: Path) -> Iterator[None]:
    """An error that ends the run becomes a RunError with what is kept in its message."""
    try:
        yield
    except RunError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{_sentence(str(error))} {what_is_kept(run)}") from error


@contextmanager
def signals_tell_what_is_kept(run: Path) -> Iterator[None]:
    """A signal that ends the run leaves with what is kept in its message."""
    try:
        yield
    except Interrupted as stop:
        message = f"stopped by {name_of(stop.number)}. {what_is_kept(run)}"
        raise Interrupted(stop.number, message) from None


def what_is_kept(run: Path) -> str:
    """One or two sentences."""
    if not (run / RECIPE_FILE).is_file():
        return f"{run} holds nothing of the run; start it again with the command you gave."
    go_on = f"`manylora train {shlex.quote(str(run))} --resume`"
    checkpoint = last_checkpoint(run)
    if checkpoint is None:
        return f"No checkpoint is written yet; {go_on} starts again from step 0."
    return f"{checkpoint} is kept; go on from step {step_of(checkpoint)} with {go_on}."


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
