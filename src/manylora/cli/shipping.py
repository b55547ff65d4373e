"""Verbs that take a run elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from manylora.cli.app import RunFolder, app, console

Target = Literal["lora", "merged", "gguf", "gguf-lora"]


@app.command()
def export(
    run: RunFolder,
    to: Annotated[Target, typer.Option("--to", help="What to write.")] = "lora",
    output: Annotated[
        Path | None, typer.Option(help="Default: RUN/export, RUN/merged, RUN/gguf, ...")
    ] = None,
    static: Annotated[
        bool,
        typer.Option("--static", help="Token-routed runs: the best static updates, measured."),
    ] = False,
    task: Annotated[
        str | None, typer.Option(help="merged, gguf: the task or branch to merge.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="lora --static: of the fitted LoRAs; default: the most."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=2, help="--static: of each task, to fit and to compare on.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="merged, gguf*: merge into this, the original of a quantised base."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="gguf: of the matrices; default: the base's."),
    ] = None,
) -> None:
    """Write what other programs load, each checked against the run: LoRA, merged model, GGUF."""
    from manylora.export.command import export_to
    from manylora.export.merged import Update
    from manylora.report.page import write_report

    update = Update(task, static, rows, base)
    lines = export_to(run, to, output, update, rank, dtype, console, Console())
    for line in lines:
        typer.echo(line)
    write_report(run)
