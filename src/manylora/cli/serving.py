"""The verb that answers over HTTP."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from manylora.cli.app import app, console

_PACKAGES = ("starlette", "uvicorn", "prometheus_client")


@app.command()
def serve(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, all on the same base model.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    allow_anyone: Annotated[
        bool, typer.Option("--allow-anyone", help="Other machines may ask without a key.")
    ] = False,
    rows: Annotated[int, typer.Option(min=1, help="Answers written at once.")] = 64,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 4096,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a prompt; default: the model's context.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1 << 20,
) -> None:
    """Answer over HTTP as OpenAI does, runs side by side; MANYLORA_API_KEY sets a key."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ValueError(
            f"serve needs {', '.join(missing)}, which is not installed: run  "
            "pip install 'manylora[serve]'"
        )
    from manylora.serve.limits import Limits
    from manylora.serve.server import serve as run_server

    limits = Limits(rows, queue, max_body, max_tokens, max_prompt_tokens)
    run_server(runs, host, port, limits, console, allow_anyone)
