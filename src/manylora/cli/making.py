"""Verbs that train, compare or combine adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from manylora.cli.app import Changes, app, console, recipe_and_changes


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML) or a run folder.")] = None,
    changes: Changes = None,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run.")] = False,
) -> None:
    """Train an adapter from a recipe; `data=FOLDER` alone is enough."""
    from manylora.evaluate.table import print_scores
    from manylora.recipe import load_recipe
    from manylora.report.page import write_report
    from manylora.train import train

    path, changes = recipe_and_changes(recipe, changes)
    if resume and path is not None and path.is_dir():  # it may have been moved
        changes = [f"output={json.dumps(str(path))}", *changes]
    run = train(load_recipe(path, changes), console, resume)
    write_report(run)
    print_scores(run, Console())
    console.print(f"[bold]{run}[/bold]: adapter, scores.json, report.html")


@app.command()
def compare(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML): data and model.")] = None,
    changes: Changes = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated, the first is the reference; name:field=value.")
    ] = "lora,multilora,hydralora",
    budget: Annotated[
        str, typer.Option(help="Trained parameters: as lora:r=16, or a number.")
    ] = "lora:r=16",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method at its rate.")] = 3,
    lr: Annotated[str, typer.Option(help="auto: tuned for each method; or one rate.")] = "auto",
    wider_rates: Annotated[
        bool,
        typer.Option(
            "--wider-rates", help="Two more beyond the lowest or highest, where that is the best."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="The folder; a stopped one goes on. Default: the recipe's output."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=0, help="Runs side by side; 0: what fits.")] = 0,
    energy: Annotated[
        bool, typer.Option("--energy", help="Measure each run's with CodeCarbon.")
    ] = False,
    branches: Annotated[
        Literal["told", "selector"] | None,
        typer.Option(
            help="Who says which branch: the row's task, or a selector from the prompt. "
            "Default: the recipe's, else told."
        ),
    ] = None,
    unseen: Annotated[
        Path | None, typer.Option(help="Tasks to score without training on them.")
    ] = None,
) -> None:
    """Methods at equal parameters, each at its best rate, over seeds, with intervals."""
    from manylora.comparison.command import PAGE_FILE, compare, rate_of
    from manylora.recipe import load_recipe

    path, changes = recipe_and_changes(recipe, changes)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    read = load_recipe(path, changes)
    output = output or (read.run if "output" in read.model_fields_set else Path("runs/comparison"))
    found = compare(
        read,
        names,
        budget,
        seeds,
        rate_of(lr),
        output,
        parallel,
        console,
        energy,
        branches or read.branches or "told",
        unseen,
        wider_rates,
    )
    Console(highlight=False).print(found.verdict, markup=False, soft_wrap=True)
    console.print(
        f"[bold]{output / PAGE_FILE}[/bold], comparison.json, comparison.md, rows.parquet"
    )


@app.command()
def compose(
    adapters: Annotated[
        list[Path], typer.Argument(help="LoRA adapter folders, runs or exports, of one base model.")
    ],
    data: Annotated[str, typer.Option(help="The new task's rows: a file, folder or hub data set.")],
    examples: Annotated[int, typer.Option(min=1, help="Rows that the search sees.")] = 20,
    way: Annotated[
        Literal["products", "factors"],
        typer.Option(help="Sum of w B A, or the authors' (sum of w B) (sum of w A)."),
    ] = "products",
    budget: Annotated[
        int, typer.Option(min=1, help="Vectors of weights to try, besides all 0.")
    ] = 40,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    output: Annotated[Path, typer.Option(help="The folder to write.")] = Path("runs/composed"),
) -> None:
    """LoraHub: combine trained adapters for a new task, from a few examples."""
    from manylora.compose import compose
    from manylora.composing.folder import print_weights
    from manylora.evaluate.table import print_scores

    folder = compose(adapters, data, examples, way, budget, seed, output, console)
    print_weights(folder, Console())
    print_scores(folder, Console())
    console.print(f"[bold]{folder}[/bold]: a plain LoRA, compose.json, scores.json")
