"""`manylora export`: from the verb's options to the right export, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from manylora.base import resolve
from manylora.base.load import Dtype
from manylora.export.engines import command_lines
from manylora.export.gguf_files import export_gguf, export_gguf_lora
from manylora.export.lora import export_lora
from manylora.export.merged import Update, export_merged
from manylora.export.plans import is_routed
from manylora.export.record import Export
from manylora.export.static import export_static
from manylora.export.static_table import print_gaps
from manylora.run import recipe_of

Target = Literal["lora", "merged", "gguf", "gguf-lora"]

_FOLDERS = {"lora": "export", "merged": "merged", "gguf": "gguf", "gguf-lora": "gguf_lora"}


def export_to(
    run: Path,
    to: Target,
    output: Path | None,
    update: Update,
    rank: int | None,
    dtype: Dtype | None,
    console: Console,
    out: Console,
) -> list[str]:
    """Export, print the table of a static export to `out`, and return the lines to print.

    Raises ValueError for options that would change nothing.
    """
    static = update.static
    fits = static and to == "lora"
    _refuse({"task": update.task}, to in ("merged", "gguf"), "for --to merged and --to gguf")
    _refuse({"base": update.base}, to != "lora", "for --to merged, gguf and gguf-lora")
    _refuse({"dtype": dtype}, to == "gguf", "for --to gguf")
    _refuse({"rank": rank}, fits, "for --static with --to lora")
    _refuse({"rows": update.rows}, static, "for --static")
    if static and not is_routed(run):
        raise ValueError(
            f"--static is for runs that route every token; {run} does not, and exports exactly "
            "without it"
        )
    folder = output or run / ("static" if fits else _FOLDERS[to])
    if fits:
        done = export_static(run, folder, rank, update.rows, console)
        print_gaps(done, out)
    elif to == "lora":
        done = export_lora(run, folder)
    elif to == "merged":
        done = export_merged(run, folder, update, console)
    elif to == "gguf":
        done = export_gguf(run, folder, update, getattr(torch, dtype) if dtype else None, console)
    else:
        done = export_gguf_lora(run, folder, update, console)
    # Of a static export the fits are what to serve; the means are there to compare.
    served = [one for one in done if not fits or Path(one.path).name.startswith("fit_")]
    return [*map(_line, done), *(_serving(run, served) if to == "lora" else [])]


def _line(done: Export) -> str:
    kind = "exact" if done.exact else "approximation"
    return f"{done.path}  {kind}, logits within {done.max_logit_difference:.1e}: {done.note}"


def _serving(run: Path, served: list[Export]) -> list[str]:
    loras = {Path(export.path).name: Path(export.path) for export in served}
    ranks = [
        json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        for path in loras.values()
    ]
    return command_lines(resolve(recipe_of(run).model), loras, max(ranks))


def _refuse(options: Mapping[str, object], meant: bool, where: str) -> None:
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given and not meant:
        raise ValueError(f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} {where}")
