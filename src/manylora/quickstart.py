"""`manylora quickstart`: the first minutes, on the same path as `manylora train`."""

from __future__ import annotations

import json
import time
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from manylora.evaluate.table import print_scores
from manylora.export import export_lora
from manylora.recipe import Recipe, load_recipe
from manylora.report.page import write_report
from manylora.train import train

RECIPE = Path(str(files("manylora"))) / "quickstart.yaml"


def quickstart(output: Path | None, changes: list[str], console: Console) -> None:
    """Train the bundled recipe, export it, write the report and say what to try next."""
    started = time.perf_counter()
    recipe = _recipe(output, changes)
    run = train(recipe, console)
    console.print("exporting to plain PEFT, and checking that in a process without manylora")
    exports = export_lora(run, run / "export", static=True)
    report = write_report(run)
    print_scores(run, Console())
    worst = max(export.max_logit_difference for export in exports)
    exact = all(export.exact for export in exports)
    out = Console(highlight=False, soft_wrap=True)
    out.print(f"\n{time.perf_counter() - started:.0f} s in all. The run is [bold]{run}[/bold]:")
    out.print(f"  {report}  open it in a browser")
    out.print(
        f"  {run / 'export'}  {len(exports)} plain PEFT LoRA, which PEFT loads without "
        f"manylora (checked; logits within {worst:.0e})"
    )
    if not exact:
        out.print(
            "  A router mixes branches anew for every token, so these static exports fix it "
            "at its measured mean and are approximations; the run itself is exact. MultiLoRA "
            "and one-hot runs export exactly."
        )
    out.print("\nNext:")
    for command in next_commands(run, recipe.config().method):
        out.print(f"  [bold]{command}[/bold]")


def _recipe(output: Path | None, changes: list[str]) -> Recipe:
    chosen = [] if output is None else [f"output={json.dumps(str(output))}"]
    recipe = load_recipe(RECIPE, [*chosen, *changes])
    if output is not None and recipe.run.resolve() != output.resolve():
        raise ValueError(
            f"--output {output} and output={recipe.output} are two run folders; give one of them"
        )
    return recipe


def next_commands(run: Path, method: str) -> list[str]:
    other = "hydralora" if method == "multilora" else "multilora"
    return [
        f"manylora chat {run}",
        f"manylora quickstart --output runs/{other} adapter.method={other}",
        "manylora train data=FOLDER output=runs/mine   # your own tasks: one JSONL file each",
    ]
