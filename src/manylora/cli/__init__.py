"""The `manylora` command, one function a verb. Results go to stdout, progress to stderr.

The order of the imports is that of `manylora --help`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from rich.markup import escape
from transformers.utils import logging

# isort: off
from manylora.cli import looking, making, using, inspecting, shipping, serving, importing

# isort: on
from manylora.cli.app import app, console
from manylora.training.interrupts import Interrupted

__all__ = [
    "app",
    "importing",
    "inspecting",
    "looking",
    "main",
    "making",
    "serving",
    "shipping",
    "using",
]


def _quiet() -> None:
    """The libraries' advice and bars are not this command's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def main() -> None:
    """The entry point: errors that a person can act on are one message and exit code 1.

    A training run that a signal stopped is one message too, and exit code 128 + the signal.
    """
    _quiet()
    run: Callable[..., Any] = app
    try:
        run()
    except Interrupted as stop:
        console.print(str(stop), style="yellow", markup=False, soft_wrap=True)
        raise SystemExit(stop.code) from None
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("MANYLORA_DEBUG"):
            raise
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(1) from None
