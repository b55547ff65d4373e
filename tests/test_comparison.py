"""A comparison from a recipe to its page, on a tiny model: fair, resumable, the same again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from manylora.base import load_model
from manylora.comparison import grid as grids
from manylora.comparison import side_by_side
from manylora.comparison.cell import Cell, run_cell, steps_of
from manylora.comparison.command import compare
from manylora.comparison.contenders import contenders
from manylora.comparison.ground import prepare_ground
from manylora.comparison.result import Comparison, RatePoint
from manylora.comparison.store import CellStore, key_of
from manylora.recipe import Recipe, parse_recipe

COLUMNS = [
    "run",
    "method",
    "params",
    "lr",
    "seed",
    "stage",
    "task",
    "example",
    "tokens",
    "nll",
    "correct",
]
METHODS = ["lora", "branch_per_cluster", "adalora"]
QUIET = Console(quiet=True)


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    values = make_recipe().model_dump(mode="json")
    values["validation"] = 0.2
    values["train"] |= {"max_steps": 4, "batch_size": 4}
    values["adapter"] = {}
    return parse_recipe(values)


def compared(recipe: Recipe, output: Path, **options: Any) -> Comparison:
    given = {"methods": METHODS, "budget": "lora:r=4", "seeds": 2, "rate": None, "parallel": 1}
    return compare(recipe, output=output, console=QUIET, **given | options)


def test_every_method_gets_five_trials_and_every_seed_on_the_same_rows(
    recipe: Recipe, tmp_path: Path
) -> None:
    found = compared(recipe, tmp_path / "c")
    rows = pq.read_table(tmp_path / "c" / "rows.parquet")
    assert rows.column_names == COLUMNS
    cells = {
        (row["method"], row["lr"], row["seed"], row["stage"])
        for row in rows.select(["method", "lr", "seed", "stage"]).to_pylist()
    }
    for info in found.methods:
        tried = sorted(
            lr for method, lr, _, stage in cells if (method, stage) == (info.name, "rate")
        )
        assert [point.lr for point in info.rates] == tried and len(tried) == 5
        assert info.best_lr == min(info.rates, key=lambda point: point.nll).lr
        tested = {(lr, seed) for m, lr, seed, stage in cells if (m, stage) == (info.name, "test")}
        assert tested == {(info.best_lr, 0), (info.best_lr, 1)}
    test = rows.to_pandas().query("stage == 'test'")
    examples = test.groupby(["method", "seed"])["example"].apply(lambda e: tuple(sorted(e)))
    assert examples.nunique() == 1
    validation = set(rows.to_pandas().query("stage == 'rate'")["example"])
    assert not validation & set(test["example"])


def test_no_method_with_a_size_exceeds_the_budget(recipe: Recipe, tmp_path: Path) -> None:
    found = compared(recipe, tmp_path / "c", seeds=1, rate=1e-2)
    for info in found.methods:
        assert info.params <= found.budget_params, info.label
    assert found.methods[0].params == found.budget_params


def test_what_was_run_is_not_run_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compared(recipe, tmp_path / "c", methods=["lora", "ia3"], rate=1e-2)
    ran: list[Cell] = []

    def counted(ground: Any, cell: Cell, *more: Any) -> Any:
        ran.append(cell)
        return run_cell(ground, cell, *more)

    monkeypatch.setattr(grids, "run_cell", counted)
    again = compared(recipe, tmp_path / "c", methods=["lora", "ia3"], rate=1e-2)
    assert not ran
    assert again.scores == first.scores and again.differences == first.differences
    compared(recipe, tmp_path / "c", methods=["lora", "ia3"], rate=1e-2, seeds=3)
    assert [(cell.contender.name, cell.seed) for cell in ran] == [("lora", 2), ("ia3", 2)]


def test_a_comparison_stopped_midway_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compared(recipe, tmp_path / "whole", methods=["lora", "ia3"], rate=1e-2)

    def fails(ground: Any, cell: Cell, *more: Any) -> Any:
        if cell.contender.name == "ia3":
            raise KeyboardInterrupt
        return run_cell(ground, cell, *more)

    monkeypatch.setattr(grids, "run_cell", fails)
    with pytest.raises(KeyboardInterrupt):
        compared(recipe, tmp_path / "c", methods=["lora", "ia3"], rate=1e-2)
    monkeypatch.undo()
    assert (
        compared(recipe, tmp_path / "c", methods=["lora", "ia3"], rate=1e-2).scores == whole.scores
    )


def test_runs_side_by_side_give_what_runs_in_turn_give(recipe: Recipe, tmp_path: Path) -> None:
    turn = compared(recipe, tmp_path / "a", methods=["lora", "hydralora"], rate=1e-2)
    recipe.train.workers = 1  # a process beside the training, as it is by default
    side = compared(recipe, tmp_path / "b", methods=["lora", "hydralora"], rate=1e-2, parallel=2)
    assert side.scores == turn.scores


@pytest.mark.parametrize(
    ("best", "trials", "found"),
    [(0.0, 7, 0.125 / 4), (0.125, 7, 0.125), (0.25, 5, 0.25), (2.0, 5, 2.0), (90.0, 7, 32.0)],
)
def test_wider_rates_are_tried_where_the_lowest_or_highest_is_the_best(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    best: float,
    trials: int,
    found: float,
) -> None:
    """The loss of a trial is how far its rate is from the best, in parts of the method's centre."""
    centre = 1e-3
    monkeypatch.setattr(
        grids,
        "rate_point",
        lambda rows, lr: RatePoint(lr=lr, nll=abs(lr / centre - best), correct=0.0),
    )
    said = compared(recipe, tmp_path / "c", methods=["lora"], seeds=1, wider_rates=True)
    (info,) = said.methods
    assert len(info.rates) == trials and info.best_lr == pytest.approx(found * centre)
    assert "two beyond" in said.settings["rates"]
    assert info.at_edge is (best in (0.0, 90.0))
    without = compared(recipe, tmp_path / "c", methods=["lora"], seeds=1)
    assert len(without.methods[0].rates) == 5 and "two beyond" not in without.settings["rates"]


def test_a_method_does_not_wait_for_the_trials_of_another(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once; one of LoRA's trials is slow, and the other method is finished before it."""
    ground = prepare_ground(recipe, QUIET)
    base = load_model(recipe.model, recipe.dtype, None)
    _, found = contenders(["lora", "ia3"], "lora:r=4", base, 3, {})
    order: list[Cell] = []
    monkeypatch.setattr(grids, "SideBySide", partial(_InThisProcess, order))
    grid = grids.Grid(ground, CellStore(tmp_path), QUIET, parallel=2)
    rates = grid.run(found, 2, None)
    slow = order.index(next(iter(grid.keys)))
    assert [c.contender.name for c in order[:slow]] == ["lora"] * 2 + ["ia3"] * 7
    assert [c.contender.name for c in grid.keys] == ["lora"] * 7 + ["ia3"] * 7
    assert [c.stage for c in grid.keys] == (["rate"] * 5 + ["test"] * 2) * 2
    assert all(c.lr == rates[c.contender.name] for c in grid.keys if c.stage == "test")


class _InThisProcess:
    """Two places; one is held by the first cell for as long as another can be run."""

    def __init__(self, order: list[Cell], ground: Any, store: CellStore, *more: Any) -> None:
        self.order, self.ground, self.store = order, ground, store
        self.cells: list[Cell] = []

    def __enter__(self) -> _InThisProcess:
        return self

    def __exit__(self, *error: Any) -> None:
        assert not self.cells

    @property
    def running(self) -> int:
        return len(self.cells)

    @property
    def free(self) -> int:
        return 2 - len(self.cells)

    def start(self, cell: Cell) -> None:
        self.cells.append(cell)

    def finished(self) -> list[Cell]:
        cell = self.cells.pop()
        self.order.append(cell)
        key = key_of(self.ground, cell)
        self.store.write(key, *run_cell(self.ground, cell, key))
        return [cell]


def test_each_gpu_has_processes_of_its_own(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert side_by_side.gpus() == ["3", "5"]
    monkeypatch.setattr(side_by_side, "_run_there", _name_own_gpu)
    ground = prepare_ground(recipe, QUIET)
    base = load_model(recipe.model, recipe.dtype, None)
    _, found = contenders(["lora", "ia3"], "lora:r=4", base, 3, {})
    cells = [Cell(found[i % 2], 1e-3, i, "test") for i in range(6)]
    store = CellStore(tmp_path)
    done = []
    with side_by_side.SideBySide(ground, store, 1, False) as processes:
        while cells or processes.running:
            while cells and processes.free:
                processes.start(cells.pop())
            done += processes.finished()
    assert sorted(cell.seed for cell in done) == list(range(6))
    assert {file.read_text() for file in (tmp_path / "cells").iterdir()} == {"3", "5"}


def _name_own_gpu(cell: Cell) -> None:
    folder = side_by_side._here[0].store.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(cell.seed)).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    time.sleep(0.5)


def test_files_say_the_same_as_what_is_returned(recipe: Recipe, tmp_path: Path) -> None:
    found = compared(recipe, tmp_path / "c", methods=["lora", "ia3"], rate=1e-2)
    said = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert Comparison.model_validate(said) == found
    page = (tmp_path / "c" / "comparison.html").read_text()
    table = (tmp_path / "c" / "comparison.md").read_text()
    for info in found.methods:
        assert info.label in page and f"{info.params:,}" in table
    assert "one learning rate that was given" in page and "several learning rates" not in page


def test_a_key_depends_on_what_the_result_depends_on(recipe: Recipe, tmp_path: Path) -> None:
    ground = prepare_ground(recipe, QUIET)
    base = load_model(recipe.model, recipe.dtype, None)
    _, (lora, hydra) = contenders(["lora", "hydralora"], "lora:r=4", base, 3, {})
    start = key_of(ground, Cell(lora, 1e-3, 0, "test"))
    assert start == key_of(ground, Cell(lora, 1e-3, 0, "test"))
    others = [
        key_of(ground, Cell(hydra, 1e-3, 0, "test")),
        key_of(ground, Cell(lora, 2e-3, 0, "test")),
        key_of(ground, Cell(lora, 1e-3, 1, "test")),
        key_of(ground, Cell(lora, 1e-3, 0, "rate")),
    ]
    longer = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"max_steps": 5}), "output": "elsewhere"}
    )
    others.append(key_of(prepare_ground(longer, QUIET), Cell(lora, 1e-3, 0, "test")))
    assert len({start, *others}) == 6
    elsewhere = recipe.model_copy(update={"output": "elsewhere"})
    assert key_of(prepare_ground(elsewhere, QUIET), Cell(lora, 1e-3, 0, "test")) == start


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_method_is_told_the_steps_that_it_gets(recipe: Recipe, accumulation: int) -> None:
    train = {"max_steps": None, "epochs": 0.7, "batch_size": 5}
    train["gradient_accumulation"] = accumulation
    ground = prepare_ground(
        recipe.model_copy(update={"train": recipe.train.model_copy(update=train)}), QUIET
    )
    base = load_model(recipe.model, recipe.dtype, None)
    _, (adalora,) = contenders(["adalora"], "lora:r=4", base, 3, {})
    summary, _ = run_cell(ground, Cell(adalora, 1e-3, 0, "rate"), "one")
    assert summary["steps"] == steps_of(ground) > 3


def test_energy_is_measured_and_said_how(recipe: Recipe, tmp_path: Path) -> None:
    found = compared(recipe, tmp_path / "c", methods=["lora"], rate=1e-2, seeds=1, energy=True)
    energy = found.methods[0].energy_kwh
    assert energy is not None and set(energy) == {"cpu", "gpu", "ram"} and energy["ram"] > 0
    assert "estimated" in found.settings["energy"] or "measured" in found.settings["energy"]
    without = compared(recipe, tmp_path / "d", methods=["lora"], rate=1e-2, seeds=1)
    assert without.methods[0].energy_kwh is None


def test_nothing_is_left_where_the_recipe_says_that_a_run_goes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.chdir(tmp_path)
    compared(recipe, tmp_path / "c", methods=["lora"], rate=1e-2, seeds=1)
    assert {path.name for path in tmp_path.iterdir()} == {"c", "scratch"}
    assert not list(scratch.glob("manylora*"))
    assert not recipe.run.exists()


def test_without_validation_rows_there_is_nothing_to_tune_on(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"validation=0\.1"):
        compared(make_recipe(), tmp_path / "c")
