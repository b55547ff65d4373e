"""Who says which branch in a run: the row's task, or the selector, as it will in generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from manylora.corpus import dataset_of
from manylora.recipe import Recipe, parse_recipe
from manylora.run import config_of
from manylora.train import make_trainer, train
from manylora.training.interrupts import Interrupts
from manylora.training.out_of_memory import Batch
from manylora.training.prepare import Prepared, prepare

QUIET = Console(quiet=True)
Make = Callable[..., Recipe]


@pytest.fixture
def recipe(make_recipe: Make) -> Recipe:
    return make_recipe(method="branch_per_cluster", shared_rank=2)


def prepared(recipe: Recipe, **changes: Any) -> Prepared:
    """With a selector that sends every task to the next one's branch, and a few rows to none."""
    found = prepare(recipe.model_copy(update=changes), QUIET)
    selector: Any = config_of(found.model).branch_selector
    selector.centroids = selector.centroids.roll(1, 0)
    selector.thresholds = torch.full_like(selector.thresholds, 0.1)
    return found


def told_in_training(found: Prepared, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """(ids that the layers went by, task ids) of every micro-batch of a training."""
    with Interrupts() as interrupts:
        trainer, bar = make_trainer(found, Batch(4, 1), QUIET, interrupts, [])
        seen = []
        count = trainer._count

        def keep(tasks: torch.Tensor, mask: Any, labels: Any) -> None:
            seen.append((trainer.told_ids, tasks))
            count(tasks, mask, labels)

        monkeypatch.setattr(trainer, "_count", keep)
        trainer.go_on(None)
        bar.stop()
    assert seen
    return seen


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_may_train_what_its_selector_chooses(
    recipe: Recipe, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prepared(recipe, branches="selector", packing=packing)
    selector: Any = config_of(found.model).branch_selector
    data = dataset_of(found.train, found.tasks, found.encoder)
    rows = [data[i] for i in range(len(data))]
    wanted = selector.choose([row["input_ids"][: row["learned"][0][0]] for row in rows])
    owners = [row["task_id"] for row in rows]
    assert any(a != b for a, b in zip(wanted, owners, strict=True))
    pairs = set(zip(wanted, owners, strict=True))
    for told, tasks in told_in_training(found, monkeypatch):
        assert told is not None and told.shape == tasks.shape
        assert {(int(a), int(b)) for a, b in zip(told.flatten(), tasks.flatten(), strict=True)} <= (
            pairs | {(0, 0)}  # padding
        )


def test_a_run_is_told_the_task_unless_it_is_said(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    for told, tasks in told_in_training(prepared(recipe), monkeypatch):
        assert torch.equal(told, tasks)


def test_clusters_are_chosen_by_the_selector_by_default(recipe: Recipe) -> None:
    values = recipe.model_dump()
    assert recipe.choice == "told"
    assert parse_recipe({**values, "tasks": "discovered"}).choice == "selector"
    assert parse_recipe({**values, "tasks": "discovered", "branches": "told"}).choice == "told"


def test_scores_go_by_the_same_choice(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    from manylora.evaluate import answers

    real = answers.branch_ids

    def spy(model: Any, ids: Any) -> Any:
        asked.extend(torch.as_tensor(ids).flatten().tolist())
        return real(model, ids)

    monkeypatch.setattr(answers, "branch_ids", spy)
    monkeypatch.setattr(
        "manylora.adapter.selector.BranchSelector.choose", lambda self, prompts: [-1] * len(prompts)
    )
    run = train(recipe.model_copy(update={"branches": "selector"}))
    assert set(asked) == {-1}
    asked.clear()
    told = recipe.model_copy(update={"output": f"{recipe.output}-told"})
    train(told)
    assert set(asked) == {0, 1, 2}
    scores = [json.loads((Path(one) / "scores.json").read_text()) for one in (run, told.run)]
    assert scores[0] != scores[1]
