"""`manylora export`: the right export for its options, and what it prints."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from manylora.export import Export, ExportError
from manylora.export.command import export_to
from manylora.export.merged import Update
from manylora.export.plans import Plan, named
from manylora.export.record import record, written_whole
from manylora.export.static_table import print_gaps
from manylora.recipe import Recipe
from manylora.train import train

Make = Callable[..., Recipe]

OPTIONS: dict[str, Any] = {
    "to": "lora",
    "output": None,
    "rank": None,
    "dtype": None,
}


def command(run: Path, **options: Any) -> tuple[list[str], str]:
    """The lines, and the table."""
    out = Console(file=io.StringIO(), width=160)
    of_update = {field.name for field in fields(Update)}
    update = Update(**{name: value for name, value in options.items() if name in of_update})
    others = {name: value for name, value in options.items() if name not in of_update}
    consoles = {"console": Console(quiet=True), "out": out}
    lines = export_to(run, **OPTIONS | others | consoles, update=update)
    assert isinstance(out.file, io.StringIO)
    return lines, out.file.getvalue()


def test_one_run_goes_everywhere_under_folders_of_its_own(make_recipe: Make) -> None:
    run = train(make_recipe(method="branch_per_cluster"))
    lines, _ = command(run)
    assert lines[0].startswith(f"{run / 'export' / 'colour'}  exact, logits within ")
    text = "\n".join(lines)
    for name in ("colour", "copy", "parity"):
        assert f"{name}={run / 'export' / name}" in text
    assert "--max-lora-rank 8" in text and text.count("unverified") == 4
    assert (run / "export" / "branch_selector.safetensors").is_file()
    (line,), _ = command(run, to="merged", task="copy")
    assert line.startswith(f"{run / 'merged'}  exact") and (run / "merged" / "README.md").is_file()
    with pytest.raises(ExportError, match="not empty"):
        command(run, to="merged", task="copy")
    with pytest.raises(ValueError, match="--static is for runs that route every token"):
        command(run, static=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "copy"}, "--task is for --to merged and --to gguf"),
        ({"to": "gguf-lora", "task": "copy"}, "--task is for"),
        ({"to": "merged", "dtype": "float16"}, "--dtype is for --to gguf"),
        ({"rank": 4}, "--rank is for --static with --to lora"),
        ({"to": "gguf", "rows": 8}, "--rows is for --static"),
        ({"base": "other"}, "--base is for --to merged, gguf and gguf-lora"),
        ({"to": "merged", "static": True, "rank": 4}, "--rank is for --static with --to lora"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        command(tmp_path, **options)


def test_static_prints_its_table_and_serves_with_the_largest_rank(make_recipe: Make) -> None:
    run = train(make_recipe(method="hydralora"))
    lines, table = command(run, static=True, rows=8)
    text = "\n".join(lines)
    assert f"fit_copy={run / 'static' / 'fit_copy'}" in text
    assert "--max-lora-rank 16" in text  # all 3 x 4 of the branches
    assert "=" + str(run / "static" / "mean_copy") not in text  # the fits are the ones to serve
    assert "fit, all tasks" in table and "copy" in table


def test_table_has_every_gap_in_its_column() -> None:
    def done(name: str, gap: dict[str, list[float]]) -> Export:
        return Export(f"run/static/{name}", "lora", False, 0.0, "", gap)

    exports = [
        done("mean_all_tasks", {"a_b": [0.101, 0.1, 0.2], "c": [0.5, 0.4, 0.6]}),
        done("fit_all_tasks", {"a_b": [0.02, 0.01, 0.03]}),
        done("mean_a_b", {"a_b": [0.03, 0.02, 0.04]}),
        done("fit_a_b", {"a_b": [0.004, -0.001, 0.006]}),
    ]
    out = Console(file=io.StringIO(), width=160)
    print_gaps(exports, out)
    assert isinstance(out.file, io.StringIO)
    (row,) = [line for line in out.file.getvalue().splitlines() if "a_b" in line]
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells == [
        "a_b",
        "10.10 (10.00 to 20.00)",
        "2.00 (1.00 to 3.00)",
        "3.00 (2.00 to 4.00)",
        "0.40 (-0.10 to 0.60)",
    ]


def test_names_stay_inside_the_folder_and_differ() -> None:
    odd = ["../up", "a/b", "a_b", "shared", "shared", ".hidden", "ok.v2"]
    plans = named(Plan(name, {}, None, True, "") for name in odd)
    names = [plan.name for plan in plans]
    assert names == ["__up", "a_b", "a_b_", "shared", "shared_", "_hidden", "ok.v2"]
    assert all((Path("out") / name).parent == Path("out") for name in names)


def test_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def fails() -> None:
        with written_whole(tmp_path / "new" / "out") as partial:
            (partial / "file").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert not (tmp_path / "new" / "out").exists() and not any((tmp_path / "new").iterdir())
    (tmp_path / "out").mkdir()
    with written_whole(tmp_path / "out") as partial:
        (partial / "file").write_text("whole")
        assert not (tmp_path / "out" / "file").exists()
    assert (tmp_path / "out" / "file").read_text() == "whole"
    (tmp_path / "a file").write_text("mine")
    with pytest.raises(ExportError, match="is a file"), written_whole(tmp_path / "a file"):
        pass
    assert (tmp_path / "a file").read_text() == "mine"


def test_record_replaces_what_is_written_anew(tmp_path: Path) -> None:
    record(tmp_path, [Export("a", "lora", True, 0.1, "old"), Export("b", "lora", True, 0.1, "")])
    record(tmp_path, [Export("a", "lora", True, 0.2, "new")])
    saved = (tmp_path / "exports.json").read_text()
    assert saved.count('"path"') == 2 and "new" in saved and "old" not in saved
