"""The verb that looks inside runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from manylora.cli.app import app, console


@app.command("inspect")
def inspect_(
    runs: Annotated[
        list[Path], typer.Argument(help="Run or adapter folders; several are set side by side.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The page; default RUN/report.html, of several ./inspect.html."),
    ] = None,
    interference: Annotated[
        bool,
        typer.Option("--interference", help="Gradients between tasks, on held-out rows."),
    ] = False,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(help="Train again without this task, and score all; may be repeated."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=2, help="Of each task, for --interference; default 16.")
    ] = None,
    plane: Annotated[
        Literal["tsne", "umap"], typer.Option(help="How matrices are put on a plane.")
    ] = "tsne",
) -> None:
    """See why a run works or does not: directions, routing, conflicts between tasks; as a page."""
    from manylora.inspect.command import inspect_runs, lines_of
    from manylora.inspect.gather import Options
    from manylora.inspect.interference import ROWS

    if rows is not None and not interference:
        raise ValueError("--rows is for --interference alone; add it")
    options = Options(interference, tuple(leave_out or ()), rows or ROWS, plane)
    found, page = inspect_runs(runs, output, options, console)
    for line in lines_of(found, page):
        typer.echo(line)
