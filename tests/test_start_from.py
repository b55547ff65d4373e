"""Starting from a trained adapter: what is read, inherited, kept and refused; adding a task."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import manylora
from manylora.adapter.layer import layers_of
from manylora.adapter.selector import BranchSelector
from manylora.base import load_model
from manylora.recipe import Recipe, load_recipe, parse_recipe
from manylora.train_recipe import TrainRecipe
from manylora.training.optimizer import parameter_groups
from manylora.training.start import (
    forgetting,
    inherit,
    read_start,
    selector_for,
    start_from,
    task_order,
)

X = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
RANGES = {"law": (4, 14), "medicine": (14, 24), "code": (24, 34)}
OLD = ["medicine", "law"]  # not in the order of the alphabet


def prompts(task: str, seed: int = 0, count: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    low, high = RANGES[task]
    body = torch.randint(low, high, (count, 10), generator=generator)
    return [[1, 3, *row] for row in body.tolist()]


def fitted(tasks: list[str]) -> BranchSelector:
    owners = [i for i, _ in enumerate(tasks) for _ in range(8)]
    return BranchSelector.fit([p for task in tasks for p in prompts(task)], owners, tasks)


def chosen(selector: BranchSelector, rows: list[list[int]]) -> list[str]:
    ids = selector.select(torch.tensor(rows), torch.ones(len(rows), len(rows[0])))
    return ["none" if i == -1 else selector.names[i] for i in ids.tolist()]


def recipe_for(tiny_folder: Path, run: Path, **adapter: Any) -> Recipe:
    values = {"model": str(tiny_folder), "data": "d", "output": str(run), "adapter": adapter}
    return parse_recipe(values).resolved()


def fresh(recipe: Recipe, tasks: int = 1, seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(load_model(recipe.model), recipe.config(tasks))


def make_run(tiny_folder: Path, run: Path, **adapter: Any) -> Path:
    """A run folder with a trained adapter for the tasks of OLD."""
    run.mkdir()
    recipe = recipe_for(tiny_folder, run, r=4, **adapter)
    model = fresh(recipe, tasks=2, seed=3)
    for layer in layers_of(model):
        for factor in layer.manylora_B.values():
            torch.nn.init.normal_(factor.weight, std=0.1)
    config = model.peft_config["default"]
    if config.branches_of().needs_ids:
        config.branch_selector = fitted(OLD)
    recipe.save(run)
    model.save_pretrained(str(run))
    return run


@torch.no_grad()
def logits(model: PeftModel, ids: int | None) -> Tensor:
    model.eval().cpu()
    if ids is None:
        return model(X).logits
    with manylora.branch_ids(model, ids):
        return model(X).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


CONTINUED = [
    ({"method": "multilora"}, None),
    ({"method": "hydralora", "shared_rank": 2}, None),
    ({"method": "branch_per_cluster"}, 1),
    ({"method": "lora_moe", "gate": "task"}, 1),
]


@pytest.mark.parametrize(("adapter", "ids"), CONTINUED, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["run", "checkpoint"])
def test_a_new_run_starts_where_the_old_one_ended(
    tiny_folder: Path, tmp_path: Path, adapter: dict[str, Any], ids: int | None, checkpoint: bool
) -> None:
    run = make_run(tiny_folder, tmp_path / "old", **adapter)
    folder = run
    if checkpoint:
        folder = run / "checkpoints" / "checkpoint-40"
        shutil.copytree(run, folder)
        for file in (folder / "recipe.yaml", run / "adapter_model.safetensors"):
            file.unlink()
    before = contents(run)
    start = read_start(folder)
    recipe = inherit(parse_recipe({"data": "new", "output": str(tmp_path / "new")}), start)
    model = fresh(recipe, tasks=2)
    start_from(start, recipe, model)
    old = PeftModel.from_pretrained(load_model(recipe.model), str(folder))
    assert torch.equal(logits(model, ids), logits(old, ids))
    ours = [tensor for name, tensor in model.named_parameters() if "manylora_" in name]
    assert ours and all(tensor.requires_grad for tensor in ours)
    assert contents(run) == before


def test_what_the_recipe_says_wins_over_what_it_inherits(tiny_folder: Path, tmp_path: Path) -> None:
    run = make_run(tiny_folder, tmp_path / "old", method="lora_split", lora_dropout=0.1)
    start = read_start(run)
    given = {"data": "new", "adapter": {"num_branches": 5}, "train": {"learning_rate": 0.5}}
    recipe = inherit(parse_recipe(given), start)
    assert (recipe.adapter.method, recipe.adapter.r, recipe.adapter.lora_dropout) == (
        "lora_split",
        4,
        0.1,
    )
    assert (recipe.adapter.num_branches, recipe.train.learning_rate) == (5, 0.5)
    assert recipe.model == str(tiny_folder) and recipe.data == parse_recipe(given).data
    recipe.save(tmp_path)
    assert inherit(load_recipe(tmp_path), start) == recipe


def test_known_tasks_keep_their_ids_and_branches_follow_the_tasks(
    tiny_folder: Path, tmp_path: Path
) -> None:
    adapter = {"method": "branch_per_cluster", "num_branches": 2}
    start = read_start(make_run(tiny_folder, tmp_path / "old", **adapter))
    tasks = task_order(start, ["code", "law"])
    assert tasks == ["medicine", "law", "code"]
    recipe = inherit(parse_recipe({"data": "new"}), start)
    assert recipe.config(len(tasks)).branches_of().count == 3
    routed = read_start(make_run(tiny_folder, tmp_path / "routed", method="hydralora"))
    assert task_order(routed, ["code", "law"]) == ["code", "law"]


@pytest.mark.parametrize("share_A", [False, True])
def test_a_new_task_leaves_the_old_ones_bit_for_bit(
    tiny_folder: Path, tmp_path: Path, share_A: bool
) -> None:
    adapter = {"method": "branch_per_cluster", "shared_rank": 2, "share_A": share_A}
    run = make_run(tiny_folder, tmp_path / "old", **adapter)
    start = read_start(run)
    recipe = inherit(parse_recipe({"data": "new"}), start)
    tasks = task_order(start, ["code"])
    model = fresh(recipe, len(tasks))
    start_from(start, recipe, model)
    rates = {"shared": 0, "A": 0} if share_A else {"shared": 0}
    train = TrainRecipe(learning_rate=0.05, rates=rates)
    config = model.peft_config["default"]
    assert forgetting(config, train, OLD) is None
    before = [logits(model, i) for i in range(3)]
    optimizer = torch.optim.AdamW(parameter_groups(model, train))
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        with manylora.branch_ids(model, tasks.index("code")):
            model(X, labels=X).loss.backward()
        optimizer.step()
    after = [logits(model, i) for i in range(3)]
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not torch.allclose(before[2], after[2], atol=1e-3)


FORGETTING: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({"method": "branch_per_cluster"}, {}, None),
    ({"method": "branch_per_cluster"}, {"weight_decay": 0.1}, "train.weight_decays.A=0 .*decays.B"),
    ({"method": "branch_per_cluster", "shared_rank": 2}, {}, "set train.rates.shared=0, or give"),
    ({"method": "branch_per_cluster", "share_A": True}, {}, "training A, which all tasks share"),
    ({"method": "branch_per_cluster", "share_A": True}, {"rates": {"A": 0}}, None),
    ({"method": "lora_moe", "gate": "task", "num_tasks": 2}, {"rates": {"A": 0, "B": 0}}, None),
    ({"method": "lora_moe", "gate": "task", "num_tasks": 2}, {}, "rates.A=0 train.rates.B=0, or"),
    ({"method": "hydralora"}, {}, "A, B, router, which all .*; to keep it give their data too"),
]


@pytest.mark.parametrize(("config", "train", "message"), FORGETTING, ids=lambda v: str(v)[:40])
def test_it_says_why_tasks_without_rows_change(
    config: dict[str, Any], train: dict[str, Any], message: str | None
) -> None:
    said = forgetting(manylora.ManyLoraConfig(**config), TrainRecipe(**train), ["law"])
    if message is None:
        assert said is None
    else:
        assert said is not None and said.startswith("law: ")
        assert re.search(message, said)
    assert forgetting(manylora.ManyLoraConfig(**config), TrainRecipe(**train), []) is None


def test_the_mean_branch_uses_the_measured_routing(tiny_folder: Path, tmp_path: Path) -> None:
    run = make_run(tiny_folder, tmp_path / "old", method="hydralora", num_branches=2)
    layers = [layer.name for layer in layers_of(fresh(load_recipe(run)))]
    tasks = {"a": [[0.9, 0.1]] * len(layers), "b": [[0.5, 0.5]] * len(layers)}
    routing = {"branches": 2, "layers": layers, "tasks": tasks}
    (run / "routing.json").write_text(json.dumps(routing), encoding="utf-8")
    start = read_start(run)
    recipe = inherit(parse_recipe({"data": "d", "adapter": {"num_branches": 3}}), start)
    model = fresh(recipe)
    start_from(start, recipe, model)
    B = layers_of(model)[0].manylora_B["default"].weight.detach()
    torch.testing.assert_close(B[:, 8:], 0.7 * B[:, :4] + 0.3 * B[:, 4:8])


def test_old_prompts_still_go_to_their_tasks_and_new_ones_to_the_new() -> None:
    selector = fitted(OLD).extended(prompts("code"), [0] * 8, ["code"])
    for task in RANGES:
        assert chosen(selector, prompts(task, seed=7)) == [task] * 8
    assert chosen(selector, [[1, 3, *range(50, 60)]]) == ["none"]
    with pytest.raises(ValueError, match="already has a branch for law"):
        selector.extended(prompts("code"), [0] * 8, ["law"])
    with pytest.raises(ValueError, match="no training prompt for art"):
        selector.extended(prompts("code"), [0] * 8, ["music", "art"])


def test_selector_of_the_new_run(tiny_folder: Path, tmp_path: Path) -> None:
    start = read_start(make_run(tiny_folder, tmp_path / "old", method="branch_per_cluster"))
    old = start.config.branch_selector
    assert old is not None
    tasks = [*OLD, "code"]
    some = selector_for(start, prompts("law") + prompts("code"), [1] * 8 + [2] * 8, tasks)
    assert some.names == tasks and torch.equal(some.idf, old.idf)
    assert (
        chosen(some, prompts("medicine", 9) + prompts("code", 9)) == ["medicine"] * 8 + ["code"] * 8
    )
    every = [p for task in tasks for p in prompts(task, 5)]
    anew = selector_for(start, every, [i for i in range(3) for _ in range(8)], tasks)
    assert anew.names == tasks and not torch.equal(anew.idf, old.idf)
    assert selector_for(start, prompts("law"), [1] * 8, OLD) is old


def test_folders_that_are_no_start_say_what_to_give(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe.yaml .*finished run, or a checkpoint"):
        read_start(tmp_path)
    run = make_run(tiny_folder, tmp_path / "old", method="multilora")
    shutil.copytree(run, run / "checkpoints" / "checkpoint-8")
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"not a finished run; start from .*checkpoint-8"):
        read_start(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(FileNotFoundError, match="give a finished run"):
        read_start(run)


def test_what_does_not_fit_is_said_with_the_folder(tiny_folder: Path, tmp_path: Path) -> None:
    run = make_run(tiny_folder, tmp_path / "old", method="hydralora")
    start = read_start(run)
    other = inherit(parse_recipe({"data": "d", "adapter": {"r": 8}}), start)
    with pytest.raises(ValueError, match=r"start_from=.*old: .*\n  r: 4 there, 8 here"):
        start_from(start, other, fresh(other))
    recipe = inherit(parse_recipe({"data": "d", "model": "owner/else"}), start)
    with pytest.raises(ValueError, match=r"model: '.*' there, 'owner/else' here"):
        start_from(start, recipe, fresh(load_recipe(run)))
