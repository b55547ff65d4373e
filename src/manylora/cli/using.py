"""Verbs on a run, and the doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from manylora.cli.app import Changes, RunFolder, app, console, recipe_and_changes


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

    path, changes = recipe_and_changes(recipe, changes)
    wanted = load_recipe(path, changes) if path or changes else None
    raise typer.Exit(print_findings(examine(wanted), Console()))


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
