"""Who says which branch in a comparison, and tasks that are scored without being trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from manylora.adapter.selector import BranchSelector
from manylora.base import load_model
from manylora.comparison.cell import Cell, run_cell
from manylora.comparison.command import compare
from manylora.comparison.contenders import Contender, contenders
from manylora.comparison.ground import Ground, prepare_ground
from manylora.comparison.store import key_of
from manylora.corpus import CorpusError, dataset_of
from manylora.recipe import Recipe, parse_recipe
from manylora.training.prepare import prompts_of

QUIET = Console(quiet=True)


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    values = make_recipe().model_dump(mode="json")
    values["validation"] = 0.2
    values["train"] |= {"max_steps": 4, "batch_size": 4}
    values["adapter"] = {}
    return parse_recipe(values)


@pytest.fixture
def unseen(tmp_path: Path) -> Path:
    rows = [{"instruction": "count?", "input": "a " * i, "output": str(i)} for i in range(1, 6)]
    file = tmp_path / "unseen" / "counting.jsonl"
    file.parent.mkdir()
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file.parent


def branch_per_task(recipe: Recipe) -> Contender:
    base = load_model(recipe.model, recipe.dtype, None)
    return contenders(["branch_per_cluster_shared"], "lora:r=16", base, 3, {})[1][0]


def never_refusing(ground: Ground) -> BranchSelector:
    owners = {ground.tasks.index(task): rows for task, rows in ground.train.items()}
    prompts, branches = prompts_of(owners, ground.encoder)
    return BranchSelector.fit(prompts, branches, ground.tasks, refuse=0)


def test_a_selector_that_is_always_right_is_as_good_as_being_told(recipe: Recipe) -> None:
    told = prepare_ground(recipe, QUIET)
    selector = never_refusing(told)
    selector.thresholds.fill_(-1)
    chosen = replace(told, selector=selector)
    for split in (told.train, told.validation):
        data = dataset_of(split, told.tasks, told.encoder)
        rows = [data[i] for i in range(len(data))]
        assert torch.equal(chosen.collator()(rows)["branch_ids"], told.collator()(rows)["task_ids"])
    cell = Cell(branch_per_task(recipe), 1e-2, 0, "rate")
    (_, first), (_, second) = (run_cell(ground, cell, "one") for ground in (told, chosen))
    assert first.equals(second)
    wrong = replace(selector, centroids=selector.centroids.roll(1, 0))
    _, third = run_cell(replace(told, selector=wrong), cell, "one")
    assert not first.equals(third)


def test_a_branch_is_chosen_from_the_prompt_and_not_from_the_answer(recipe: Recipe) -> None:
    ground = prepare_ground(recipe, QUIET, "selector")
    assert ground.selector is not None and ground.choice == "selector"
    owners = {i: ground.test[task] for i, task in enumerate(ground.tasks)}
    prompts, _ = prompts_of(owners, ground.encoder)
    alone = [int(ground.selector.select(torch.tensor([p]), torch.ones(1, len(p)))) for p in prompts]
    data = dataset_of(ground.test, ground.tasks, ground.encoder)
    batch = ground.collator()([data[i] for i in range(len(data))])
    assert batch["branch_ids"].tolist() == alone == ground.selector.choose(prompts)


def with_long_rows(recipe: Recipe, folder: Path) -> Recipe:
    """Its data with some rows that are long enough for others to share one."""
    folder.mkdir()
    for file in Path(str(recipe.data)).glob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines()
        first = json.loads(lines[0])
        longer = [json.dumps({**first, "output": f"{first['output']} {i} " * 9}) for i in range(9)]
        (folder / file.name).write_text("\n".join([*lines, *longer]), encoding="utf-8")
    return recipe.model_copy(update={"data": str(folder)})


def test_packing_changes_neither_the_choice_nor_what_is_learned(
    recipe: Recipe, tmp_path: Path
) -> None:
    recipe = with_long_rows(recipe, tmp_path / "data")
    ground = prepare_ground(recipe, QUIET, "selector")
    data = dataset_of(ground.train, ground.tasks, ground.encoder)
    rows = [data[i] for i in range(len(data))]
    padded, packed = ground.collator()(rows), ground.collator(packing=True)(rows)
    assert packed["input_ids"].shape[0] < padded["input_ids"].shape[0]
    by_source = dict(zip(padded["sources"], padded["branch_ids"].tolist(), strict=True))
    starts = (packed["position_ids"] == 0) & packed["token_mask"].bool()
    assert packed["branch_ids"][starts].tolist() == [by_source[one] for one in packed["sources"]]
    cell = Cell(branch_per_task(recipe), 1e-2, 0, "rate")
    (_, one), (_, other) = (
        run_cell(replace(ground, recipe=recipe.model_copy(update={"packing": on})), cell, "one")
        for on in (False, True)
    )
    assert one["example"].equals(other["example"]) and one["tokens"].equals(other["tokens"])
    np.testing.assert_allclose(one["nll"], other["nll"], rtol=1e-4)


def test_a_method_with_tokens_of_its_own_is_not_packed(recipe: Recipe, tmp_path: Path) -> None:
    packed = recipe.model_copy(update={"packing": True})
    with pytest.raises(ValueError, match=r"Prompt tuning .* puts tokens of its own before a row"):
        compare(packed, ["prompt_tuning"], "lora:r=1", 1, 1e-2, tmp_path / "c", 1, QUIET)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"rates": {"B": 4.0}}, "train.rates=.*leave it out"),
        ({"weight_decays": {"A": 0.1}}, "train.weight_decays=.*leave it out"),
        ({"early_stopping": 2, "evaluate_every": 2}, "train.early_stopping=2.*leave it out"),
    ],
)
def test_what_a_comparison_does_not_do_is_refused(
    recipe: Recipe, train: dict[str, Any], said: str
) -> None:
    values = recipe.model_dump(mode="json")
    values["train"] |= train
    with pytest.raises(ValueError, match=said):
        prepare_ground(parse_recipe(values), QUIET)


def test_a_selectors_numbers_count_for_those_who_need_it(recipe: Recipe) -> None:
    base = load_model(recipe.model, recipe.dtype, None)
    names = ["lora:r=2", "branch_per_cluster:r=2", "hydralora:r=2"]
    _, told = contenders(names, "lora:r=4", base, 3, {})
    _, chosen = contenders(names, "lora:r=4", base, 3, {}, selector=1000)
    more = [b.params - a.params for a, b in zip(told, chosen, strict=True)]
    assert more == [0, 1000, 0]
    selector = prepare_ground(recipe, QUIET, "selector").selector
    assert selector is not None and selector.size == 8192 * (2 + 3) + 3


def test_unseen_tasks_are_scored_and_are_in_no_figure(
    recipe: Recipe, unseen: Path, tmp_path: Path
) -> None:
    found = compare(
        recipe,
        ["lora", "branch_per_cluster_shared"],
        "lora:r=8",
        1,
        1e-2,
        tmp_path / "c",
        1,
        QUIET,
        unseen=unseen,
    )
    rows = pq.read_table(tmp_path / "c" / "rows.parquet").to_pylist()
    own = [row for row in rows if row["stage"] == "unseen"]
    assert [row["task"] for row in own] == ["counting"] * 10
    assert all(row["nll"] > 0 for row in own)
    assert {task.task for score in found.scores for task in score.tasks} == {
        "colour",
        "copy",
        "parity",
    }


def test_an_unseen_task_that_is_trained_on_is_refused(recipe: Recipe) -> None:
    with pytest.raises(CorpusError, match="colour, copy, parity is trained on too"):
        prepare_ground(recipe, QUIET, unseen_data=Path(str(recipe.data)))


def test_a_task_that_is_left_out_neither_chooses_the_rate_nor_counts(recipe: Recipe) -> None:
    less = recipe.model_copy(update={"leave_out": ["copy"]})
    for choice in ("told", "selector"):
        ground = prepare_ground(less, QUIET, choice)  # type: ignore[arg-type]
        for split in (ground.train, ground.validation, ground.test):
            assert list(split) == ["colour", "parity"]
    clusters = less.model_copy(update={"tasks": "discovered", "leave_out": ["1-copy"]})
    with pytest.raises(ValueError, match="names clusters, but rows are scored by the tasks"):
        prepare_ground(clusters, QUIET, "selector")


def test_a_cell_is_kept_by_who_chose_and_what_was_scored(recipe: Recipe, unseen: Path) -> None:
    cell = Cell(branch_per_task(recipe), 1e-2, 0, "test")
    grounds = [
        prepare_ground(recipe, QUIET),
        prepare_ground(recipe, QUIET, "selector"),
        prepare_ground(recipe, QUIET, "told", unseen),
    ]
    assert len({key_of(ground, cell) for ground in grounds}) == 3


def test_by_cluster_a_selector_trains_and_tasks_are_scored(recipe: Recipe, tmp_path: Path) -> None:
    clusters = recipe.model_copy(update={"tasks": "discovered"})
    ground = prepare_ground(clusters, QUIET, "selector")
    assert list(ground.test) == ["colour", "copy", "parity"]
    assert set(ground.train) == set(ground.tasks) and set(ground.tasks) != set(ground.test)
    cell = Cell(branch_per_task(recipe), 1e-2, 0, "rate")
    config = cell.contender.config
    assert config is not None and config.num_branches >= len(ground.tasks)
    _, rows = run_cell(ground, cell, "one")
    assert set(rows["task"].to_pylist()) == {"colour", "copy", "parity"}
