"""The `manylora` command, one function a verb. Results go to stdout, progress to stderr."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from transformers.utils import logging

from manylora.training.interrupts import Interrupted

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune one language model for many tasks at once, with multi-branch LoRA.",
)
console = Console(stderr=True, highlight=False)

RunFolder = Annotated[Path, typer.Argument(help="A run folder, as `train` leaves it.")]
Changes = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe, as train.learning_rate=1e-3.")
]


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

    path, changes = _recipe_and_changes(recipe, changes)
    show_data(load_recipe(path, changes), Console(highlight=False), console, task, row)


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

    path, changes = _recipe_and_changes(recipe, changes)
    if resume and path is not None and path.is_dir():  # it may have been moved
        changes = [f"output={json.dumps(str(path))}", *changes]
    run = train(load_recipe(path, changes), console, resume)
    write_report(run)
    print_scores(run, Console())
    console.print(f"[bold]{run}[/bold]: adapter, scores.json, report.html")


@app.command("eval")
def evaluate(
    run: RunFolder,
    tasks: Annotated[
        str | None,
        typer.Option(help="Benchmarks: mmlu,gsm8k_cot,bbh,humaneval,super_glue, or lm-eval's."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Their files; else rows come from the hub.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples shown; default: the benchmark's own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many rows of each task.")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run programs that the model writes.")
    ] = False,
    samples: Annotated[
        int, typer.Option(min=1, help="Programs a problem of humaneval; 10 gives pass@10.")
    ] = 1,
    task: Annotated[str | None, typer.Option(help="The task whose branch answers.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of benchmarks.")] = 16,
) -> None:
    """Score a run on its held-out rows again, or with --tasks on benchmarks."""
    if tasks is None:
        from manylora.evaluate.held_out import evaluate_run
        from manylora.evaluate.table import print_scores
        from manylora.report.page import write_report

        evaluate_run(run, console)
        write_report(run)
        print_scores(run, Console())
        return
    from manylora.evaluate.harness.run import evaluate_benchmarks, print_benchmarks

    results = evaluate_benchmarks(
        run,
        [name.strip() for name in tasks.split(",") if name.strip()],
        console,
        data_dir=data_dir,
        shots=shots,
        limit=limit,
        batch_size=batch_size,
        allow_code=allow_code,
        samples=samples,
        task=task,
    )
    print_benchmarks(results, Console())
    console.print(f"{run}: benchmarks.json, benchmarks.parquet", highlight=False)


@app.command()
def predict(
    run: RunFolder,
    file: Annotated[Path, typer.Argument(help="Rows to answer: JSONL, JSON, CSV or Parquet.")],
    output: Annotated[Path | None, typer.Option(help="Where to write; default stdout.")] = None,
    task: Annotated[str | None, typer.Option(help="The task whose branch answers.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """Answer every row of a file, in batches."""
    from manylora.predict import predict_file, write_rows

    rows = predict_file(run, file, max_new_tokens, batch_size, task)
    if output is not None:
        console.print(f"{write_rows(rows, output)} rows to {output}")
        return
    for row in rows:
        typer.echo(json.dumps(row, ensure_ascii=False))


@app.command()
def chat(
    run: RunFolder,
    task: Annotated[str | None, typer.Option(help="The task whose branch answers.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
) -> None:
    """Talk to a run. An empty line or Ctrl-D ends it; /new starts over."""
    from manylora.predict import Conversation

    conversation = Conversation(run, max_new_tokens)
    while text := _ask():
        if text == "/new":
            conversation.messages.clear()
            continue
        conversation.say(text, lambda piece: typer.echo(piece, nl=False), task)
        typer.echo()


@app.command()
def export(
    run: RunFolder,
    output: Annotated[Path | None, typer.Option(help="Default: RUN/export.")] = None,
    static: Annotated[
        bool, typer.Option(help="Token-routed runs: fix the routing at its measured mean.")
    ] = False,
) -> None:
    """Write plain PEFT LoRA folders that load without manylora, each checked against the run."""
    from manylora.export import export_lora
    from manylora.report.page import write_report

    for done in export_lora(run, output or run / "export", static):
        kind = "exact" if done.exact else "approximation"
        typer.echo(
            f"{done.path}  {kind}, logits within {done.max_logit_difference:.1e}: {done.note}"
        )
    write_report(run)


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe to check as well.")] = None,
    changes: Changes = None,
) -> None:
    """What is installed, what the hardware can do, what would go wrong with a recipe."""
    from manylora.doctor import examine, print_findings
    from manylora.recipe import load_recipe

    path, changes = _recipe_and_changes(recipe, changes)
    wanted = load_recipe(path, changes) if path or changes else None
    raise typer.Exit(print_findings(examine(wanted), Console()))


def _recipe_and_changes(
    recipe: Path | None, changes: list[str] | None
) -> tuple[Path | None, list[str]]:
    """`manylora train data=x` has no recipe file: its first word is a change already."""
    if recipe is not None and "=" in str(recipe):
        return None, [str(recipe), *(changes or [])]
    return recipe, changes or []


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


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
