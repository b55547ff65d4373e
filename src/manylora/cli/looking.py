"""Verbs before a run: a first one, a recipe, the data, the tasks hidden in them, what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from manylora.cli.app import Changes, app, console, recipe_and_changes


@app.command()
def quickstart(
    output: Annotated[
        Path | None, typer.Option(help="The run folder; default runs/quickstart.")
    ] = None,
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


@app.command()
def bench(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML) or a run folder.")] = None,
    changes: Changes = None,
    model: Annotated[
        str | None, typer.Option(help="The base model, instead of the recipe's.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated, as frozen,peft_lora,lora,hydralora.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Of a step: ROWSxLENGTH; default 4x512, on a CPU 1x64.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of a branch; default 16.")] = None,
    branches: Annotated[int | None, typer.Option(min=1, help="Default 3.")] = None,
    dropout: Annotated[float | None, typer.Option(min=0, max=0.99)] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Measured of each; default 20, on a CPU 10.")
    ] = None,
    mode: Annotated[Literal["eager", "compiled"], typer.Option(help="torch.compile.")] = "eager",
    adapter_dtype: Annotated[
        Literal["bfloat16", "float32"] | None, typer.Option(help="Default: the model's.")
    ] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Append each step's time to this JSON Lines file.")
    ] = None,
) -> None:
    """Measure a training step of each method on this device, at your sizes."""
    from manylora.bench import Sizes, bench, shown
    from manylora.recipe import load_recipe
    from manylora.speed.results import append

    path, changes = recipe_and_changes(recipe, changes)
    loaded = load_recipe(path, changes) if path is not None or changes else None
    sizes = Sizes(
        methods, tokens, rank, branches, dropout, steps, mode, adapter_dtype, checkpointing
    )
    rows = bench(loaded, model, sizes, lambda line: console.print(line, markup=False))
    if output is not None:
        append(output, rows)
    typer.echo(shown(rows))
