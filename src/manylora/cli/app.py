"""What the verbs share: the command itself, where progress goes, the words that several take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune one language model for many tasks at once, with multi-branch LoRA.",
)
console = Console(stderr=True, highlight=False)

RunFolder = Annotated[Path, typer.Argument(help="A run folder, as `train` leaves it.")]
Changes = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe, as train.learning_rate=1e-3.")
]


def recipe_and_changes(
    recipe: Path | None, changes: list[str] | None
) -> tuple[Path | None, list[str]]:
    """`manylora train data=x` has no recipe file: its first word is a change already."""
    # A path may have "=" in it too.
    if recipe is not None and "=" in str(recipe) and not os.path.exists(recipe):
        return None, [str(recipe), *(changes or [])]
    return recipe, changes or []
