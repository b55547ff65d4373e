"""Verbs that bring an adapter of other code in, and that make PEFT know manylora by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from manylora.cli.app import app, console


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(help="A HydraLoRA checkpoint: adapter_model.bin, adapter_config.json.")
    ],
    output: Annotated[Path, typer.Option(help="The adapter folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="Its base model; else what the checkpoint says.")
    ] = None,
) -> None:
    """Bring a HydraLoRA checkpoint of the authors' code in, as a manylora adapter folder."""
    from manylora.importing.hydralora import import_hydralora

    done = import_hydralora(source, output, model)
    typer.echo(
        f"{done.folder}: {done.layers} layers, {done.branches} branches of rank {done.rank}, "
        f"for {done.base_model}"
    )
    console.print(f"load it: see {done.folder / 'README.md'}", markup=False)


@app.command()
def autoload(
    action: Annotated[
        Literal["status", "enable", "disable"], typer.Argument(help="What to do.")
    ] = "status",
    target: Annotated[
        Path | None, typer.Option(help="A site directory; else this environment's.")
    ] = None,
) -> None:
    """Let PEFT load manylora adapters without `import manylora`, in this environment."""
    from manylora.importing.autoload import disable, enable, status

    act = {"status": status, "enable": enable, "disable": disable}[action]
    typer.echo(act(target))
