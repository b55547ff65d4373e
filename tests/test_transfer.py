"""Leaving a task out: what is trained, that it is trained once, and what the differences say."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from manylora.corpus import CorpusError, DrawOrder
from manylora.inspect import transfer as module
from manylora.inspect.frames import COLUMNS
from manylora.inspect.transfer import recipe_without, transfer
from manylora.recipe import Recipe, load_recipe, parse_recipe
from manylora.train import train
from manylora.training.keeping import RunError
from manylora.training.trainer import RunTrainer

Make = Callable[..., Recipe]
QUIET = Console(file=io.StringIO())
ROWS = {"yes": 40, "no": 40, "also_yes": 40, "shout": 20}


@pytest.fixture
def conflicting(tmp_path: Path) -> Path:
    """yes and also_yes answer alike, no answers the same questions otherwise, shout is apart."""
    folder = tmp_path / "conflicting"
    folder.mkdir()
    answers = {"yes": "yes", "also_yes": "yes", "no": "off", "shout": "HEY"}
    for name, answer in answers.items():
        asked = "loud" if name == "shout" else "good"
        lines = [
            json.dumps({"instruction": f"is {i} {asked}", "output": answer}) + "\n"
            for i in range(ROWS[name])
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def trained(make_recipe: Make, conflicting: Path) -> Callable[..., Path]:
    def make(steps: int | None = 60, mixture: Any = "proportional", **adapter: Any) -> Path:
        values = make_recipe(**adapter).model_dump()
        values |= {"data": str(conflicting), "mixture": mixture}
        values["train"] |= {"max_steps": steps, "epochs": 1.0}
        return train(parse_recipe(values), QUIET)

    return make


def table(found: pd.DataFrame) -> pd.DataFrame:
    return found.set_index(["left_out", "task"])


def test_a_helpful_task_is_missed_and_a_harmful_one_is_not(trained: Callable[..., Path]) -> None:
    run = trained(method="lora")
    found = transfer(run, ["no", "also_yes"], console=QUIET)
    assert list(found.columns) == list(COLUMNS["transfer"])
    assert set(found["run"]) == {run.name} and set(found["left_out"]) == {"no", "also_yes"}
    assert len(found) == 2 * 4  # every task, the left-out one too: lora needs no branch for it
    change = table(found)
    assert change.loc[("no", "yes"), "high"] < 0  # without its opponent it does better
    assert change.loc[("also_yes", "yes"), "low"] > 0  # and worse without its friend
    # Nobody else teaches `no`; `yes` teaches what `also_yes` would have.
    assert change.loc[("no", "no"), "low"] > change.loc[("also_yes", "also_yes"), "high"]
    assert (found["low"] <= found["nll"]).all() and (found["nll"] <= found["high"]).all()


def test_a_run_without_a_task_is_kept_and_never_trained_again(
    trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(method="hydralora", steps=6)
    first = transfer(run, ["shout"], rows=4, console=QUIET)
    kept = run / "transfer" / "without_shout"
    assert (kept / "adapter_model.safetensors").is_file()
    assert load_recipe(kept).leave_out == ["shout"]
    assert [row["task"] for row in json.loads((kept / "summary.json").read_text())["mixture"]] == [
        *("also_yes", "no", "yes")
    ]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "train", refuse)
    pd.testing.assert_frame_equal(transfer(run, ["shout"], rows=4, console=QUIET), first)
    with pytest.raises(AssertionError, match="trained again"):
        transfer(run, ["no"], rows=4, console=QUIET)
    changed = (kept / "recipe.yaml").read_text().replace("seed: 0", "seed: 7")
    (kept / "recipe.yaml").write_text(changed)
    with pytest.raises(ValueError, match=r"without_shout was made by another recipe.*remove it"):
        transfer(run, ["shout"], rows=4, console=QUIET)


def test_a_stopped_run_without_a_task_goes_on(
    trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(method="lora", steps=12)
    steps: list[int] = []
    whole = RunTrainer.compute_loss

    def compute_loss(trainer: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(trainer.state.global_step)
        if len(steps) == 5:
            raise RuntimeError("stopped here")
        return whole(trainer, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "compute_loss", compute_loss)
    with pytest.raises(RunError, match="stopped here"):
        transfer(run, ["shout"], rows=4, console=QUIET)
    found = transfer(run, ["shout"], rows=4, console=QUIET)
    assert len(found) == 4
    summary = json.loads((run / "transfer/without_shout/summary.json").read_text())
    assert summary["steps"] == round(12 * (1 - 16 / 112))


def test_a_branch_a_task_is_one_branch_less_and_cannot_answer_the_task(
    trained: Callable[..., Path],
) -> None:
    run = trained(method="branch_per_cluster", steps=6)
    found = transfer(run, ["no"], rows=4, console=QUIET)
    assert list(found["task"]) == ["also_yes", "shout", "yes"]
    config = json.loads((run / "transfer/without_no/adapter_config.json").read_text())
    assert config["num_branches"] == 3


@pytest.mark.parametrize("mixture", ["proportional", "balanced", "weights"])
@pytest.mark.parametrize("steps", [None, 70])
def test_the_other_tasks_are_drawn_as_often_as_before(
    trained: Callable[..., Path], mixture: str, steps: int | None
) -> None:
    """By the order that both runs draw their rows in, not by the formula."""
    weights = {"yes": 1.0, "no": 4.0, "also_yes": 2.0, "shout": 3.0}
    run = trained(6, {"weights": weights} if mixture == "weights" else mixture, method="lora")
    recipe = load_recipe(run)
    recipe.train.max_steps, recipe.train.epochs = steps, 2.0
    without = recipe_without(run, recipe, "shout", run / "x")
    sizes = {"also_yes": 32, "no": 32, "shout": 16, "yes": 32}
    less = {task: rows for task, rows in sizes.items() if task != "shout"}
    before = DrawOrder(sizes, recipe.mixture, 0)
    after = DrawOrder(less, without.mixture, 0)
    for task in less:
        if steps is None:
            counts = [
                order.draws[task] * of.train.epochs
                for order, of in ((before, recipe), (after, without))
            ]
        else:
            counts = [
                order.draws[task] / order.length * (of.train.max_steps or 0) * 8
                for order, of in ((before, recipe), (after, without))
            ]
        assert counts[1] == pytest.approx(counts[0], rel=0.05)
    assert without.train.learning_rate == recipe.train.learning_rate
    assert without.seed == recipe.seed


def test_clusters_stay_the_same_when_one_is_left_out(make_recipe: Make, conflicting: Path) -> None:
    values = make_recipe(method="lora").model_dump()
    discovery = {"clusters": 3}
    values |= {"data": str(conflicting), "tasks": "discovered", "discovery": discovery}
    run = train(parse_recipe(values), QUIET)
    tasks = (
        list(json.loads((run / "routing.json").read_text())["tasks"])
        if (run / "routing.json").is_file()
        else [row["task"] for row in json.loads((run / "summary.json").read_text())["mixture"]]
    )
    found = transfer(run, tasks[:1], rows=4, console=QUIET)
    assert set(found["left_out"]) == {tasks[0]}
    left = json.loads((run / "transfer" / f"without_{tasks[0]}" / "summary.json").read_text())
    assert [row["task"] for row in left["mixture"]] == tasks[1:]


def test_what_cannot_be_left_out_is_named(trained: Callable[..., Path]) -> None:
    run = trained(method="lora", steps=6)
    with pytest.raises(ValueError, match="was not trained on chess; its tasks are also_yes"):
        transfer(run, ["chess"], console=QUIET)
    with pytest.raises(ValueError, match="rows=1: an interval needs two"):
        transfer(run, rows=1, console=QUIET)


def test_a_run_of_one_task_has_none_to_leave_out(make_recipe: Make) -> None:
    values = make_recipe(method="lora").model_dump()
    values["data"] = {"copy": str(Path(values["data"]) / "copy.jsonl")}
    run = train(parse_recipe(values), QUIET)
    with pytest.raises(ValueError, match="trained on one task"):
        transfer(run, console=QUIET)


def test_a_recipe_that_leaves_out_too_much_is_refused(make_recipe: Make) -> None:
    values = make_recipe(method="lora").model_dump()
    with pytest.raises(CorpusError, match="leave_out names chess, and the tasks are colour"):
        train(parse_recipe(values | {"leave_out": ["chess"]}), QUIET)
    with pytest.raises(CorpusError, match="leaves no task to train on"):
        train(parse_recipe(values | {"leave_out": ["colour", "copy", "parity"]}), QUIET)


def test_tasks_of_any_name_get_folders_that_differ() -> None:
    names = module._names(["a/b", "a_b", "..", "a\\b"], ["a_b", "a/b", "..", "a\\b"])
    assert len(set(names)) == 4
    assert all("/" not in name and "\\" not in name for name in names)
