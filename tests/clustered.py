"""Rows of three made-up tasks in one file that names none, and recipes that find the tasks in it.

The test files that use the fixtures name this module in `pytest_plugins`.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from manylora.recipe import Recipe, parse_recipe
from manylora.training.clusters import Settled, settle

Make = Callable[..., Recipe]

TASKS = {
    "sum": (48, "Add the numbers.", "plus and minus seven eight twelve forty digits total"),
    "colour": (30, "Which colour is it?", "sky grass rose snow lemon coal ocean sunset leaf"),
    "city": (18, "Name the capital.", "France Peru Kenya Japan Norway Chile Egypt Spain Cuba"),
}


def rows_of(task: str, count: int | None = None) -> list[dict[str, str]]:
    """Rows of one made-up task; every question is another one."""
    rows, instruction, words = TASKS[task]
    rng = random.Random(task)
    return [
        {
            "instruction": instruction,
            "input": f"{' '.join(rng.sample(words.split(), 5))} {task}{i}",
            "output": task,
        }
        for i in range(rows if count is None else count)
    ]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """All rows in one file that names no task."""
    rows = [row for task in TASKS for row in rows_of(task)]
    random.Random(0).shuffle(rows)
    return write(tmp_path / "all.jsonl", rows)


def write(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def make(make_recipe: Make, data: Path, own_cache: None) -> Make:
    """As `make_recipe`, on clusters of the one file. changes: of the recipe's own keys."""

    def one(output: str = "run", adapter: dict[str, Any] | None = None, **changes: Any) -> Recipe:
        values = make_recipe(output, **(adapter or {})).model_dump()
        values |= {"data": str(data), "tasks": "discovered", "max_length": 256}
        values["train"] |= changes.pop("train", {})
        return parse_recipe({**values, **changes})

    return one


def settled(recipe: Recipe, console: Console | None = None) -> Settled:
    return settle(recipe, recipe.load_corpus(), console or quiet())


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


@pytest.fixture
def folder(make: Make, tmp_path: Path) -> Path:
    """A discovery of all rows, as `manylora discover` leaves it."""
    found = settled(make()).folder
    assert found is not None
    return Path(shutil.copytree(found, tmp_path / "found"))
