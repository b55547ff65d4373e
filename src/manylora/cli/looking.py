"""Verbs before a run: a first one, a recipe, the data, the tasks hidden in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from manylora.cli.app import Changes, app, console, recipe_and_changes


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/quickstart"),
    changes: Changes = None,
) -> None:
    """Train HydraLoRA on bundled real tasks, score it, export it: a first run in minutes."""
    from manylora.quickstart import quickstart

    quickstart(output, changes or [], console)


@app.command()
def init(
    data: Annotated[list[str], typer.Argument(help="Files, a folder, or a hub data set.")],
    output: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="The base model; else the default.")] = None,
) -> None:
    """Write a commented recipe for your own files."""
    from manylora.base import DEFAULT_MODEL
    from manylora.init import init

    recipe = init(data, output, console, model or DEFAULT_MODEL)
    typer.echo(f"{output}: a recipe for {recipe.data}")
    typer.echo(f"next: manylora data {output}, then manylora train {output}")


@app.command()
def data(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML) or a run folder.")] = None,
    changes: Changes = None,
    task: Annotated[str | None, typer.Option(help="Show a row of this task alone.")] = None,
    row: Annotated[int, typer.Option(min=0, help="Which of its training rows.")] = 0,
) -> None:
    """Show the mixture, and rows as tokens with what is learned marked."""
    from manylora.recipe import load_recipe
    from manylora.show import show_data
    from manylora.training.clusters import kept_for

    path, changes = recipe_and_changes(recipe, changes)
    loaded = load_recipe(path, changes)
    kept = kept_for(loaded, path) if path is not None and path.is_dir() else None
    show_data(loaded, Console(highlight=False), console, task, row, kept)


@app.command()
def discover(
    data: Annotated[
        list[str],
        typer.Argument(help="Files, folders, hub data sets; perhaps fields.prompt=COLUMN."),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write.")] = Path("runs/discovered"),
    model: Annotated[str | None, typer.Option(help="The base model; else the default.")] = None,
    features: Annotated[
        Literal["tfidf", "model"], typer.Option(help="What a document is known by.")
    ] = "tfidf",
    clusters: Annotated[int | None, typer.Option(min=1, help="Default: found out.")] = None,
    max_clusters: Annotated[int, typer.Option(min=2, help="How far to look.")] = 32,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Find the tasks hidden in your data, and so how many branches they are worth."""
    from manylora.base import DEFAULT_MODEL
    from manylora.discovery.command import discover_files, print_found
    from manylora.discovery.options import DiscoveryOptions

    options = DiscoveryOptions(features=features, clusters=clusters, max_clusters=max_clusters)
    found = discover_files(data, output, options, model or DEFAULT_MODEL, seed, console)
    print_found(found, output, Console())
