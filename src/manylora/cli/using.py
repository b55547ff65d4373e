"""Verbs on a run, and the doctor."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
        int, typer.Option(min=1, help="Programs written for each problem; 10 gives pass@10.")
    ] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="At which they are drawn; default 0.2 for several.")
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Benchmarks without the adapter too; twice the time.")
    ] = False,
    task: Annotated[str | None, typer.Option(help="The task whose branch answers.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Rows at a time; default 16, for held-out rows the recipe's."),
    ] = None,
) -> None:
    """Score a run on its held-out rows again, or with --tasks on benchmarks."""
    from manylora.report.page import PAGE_FILE, write_report

    if tasks is None:
        from manylora.evaluate.held_out import evaluate_run
        from manylora.evaluate.programs import Programs
        from manylora.evaluate.table import print_scores

        given = {"data-dir": data_dir, "shots": shots, "limit": limit, "task": task}
        _refuse({**given, "base": base or None}, "for benchmarks alone; name them with --tasks")
        sampled = {"samples": None if samples == 1 else samples, "temperature": temperature}
        if not allow_code:
            _refuse(sampled, "for programs that the model writes; add --allow-code to run them")
        programs = Programs(samples, temperature) if allow_code else None
        evaluate_run(run, console, programs, batch_size)
        write_report(run)
        print_scores(run, Console())
        return
    from manylora.evaluate.harness.run import evaluate_benchmarks
    from manylora.evaluate.harness.table import print_benchmarks

    _refuse({"temperature": temperature}, "for the run's own rows; benchmarks have their own")
    results = evaluate_benchmarks(
        run,
        [name.strip() for name in tasks.split(",") if name.strip()],
        console,
        data_dir=data_dir,
        shots=shots,
        limit=limit,
        batch_size=batch_size or 16,
        allow_code=allow_code,
        samples=samples,
        task=task,
        base=base,
    )
    if (run / PAGE_FILE).is_file():
        write_report(run)
    print_benchmarks(results, Console())
    console.print(f"{run}: benchmarks.json, benchmarks.parquet", highlight=False)


def _refuse(options: Mapping[str, object], why: str) -> None:
    """Options that would change nothing, given all the same."""
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        is_ = "is" if len(given) == 1 else "are"
        raise ValueError(f"{' and '.join(given)} {is_} {why}")


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
    conversation.check_task(task)
    while text := _ask():
        if text == "/new":
            conversation.messages.clear()
            continue
        conversation.say(text, lambda piece: typer.echo(piece, nl=False), task)
        typer.echo()


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
