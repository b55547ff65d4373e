"""What an inspection warns of: adapters that were made to fail in one way, and ones that work."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from branch_prompts import NAMES, RANGES, UNKNOWN, fitted, prompt
from manylora.adapter.selector import BranchSelector
from manylora.corpus import Encoded
from manylora.inspect.adapters import read
from manylora.inspect.copies import similarity
from manylora.inspect.routing import read_routing, write_routing
from manylora.inspect.selector import choices_of, write_choices
from manylora.inspect.warnings import findings
from manylora.recipe import parse_recipe
from routers import COLLAPSE, EVEN, ONE_DEAD, SPLIT, built, measured, routed, save
from tiny import OneLayer, attach


def said(run: Path) -> list[str]:
    return [finding.text for finding in findings(run)]


def test_a_router_that_splits_the_tasks_is_not_warned_of(tmp_path: Path) -> None:
    assert findings(built(tmp_path / "run", SPLIT)) == []


def test_collapse_is_found_and_names_the_branch(tmp_path: Path) -> None:
    (found,) = findings(built(tmp_path / "run", COLLAPSE))
    assert found.topic == "routing" and found.status == "note"
    assert "collapse: branch 1 takes 95% or more of the weight in 1 of 1 layers" in found.text
    assert "adapter.balance_loss=cv_squared" in found.remedy


def test_a_dead_branch_is_found_and_the_number_to_use(tmp_path: Path) -> None:
    (found,) = findings(built(tmp_path / "run", ONE_DEAD))
    assert "branch 2 is dead" in found.text
    assert "adapter.num_branches=2" in found.remedy


def test_a_branch_that_one_task_uses_is_not_dead(tmp_path: Path) -> None:
    run = built(tmp_path / "run", ONE_DEAD)
    routing = read_routing(run)
    routing["tasks"]["code"] = [[0.4, 0.4, 0.2]]
    write_routing(run, routing)
    assert not any("dead" in text for text in said(run))


def test_branches_that_every_token_mixes_evenly_are_said_to_be_averaged(tmp_path: Path) -> None:
    (found,) = findings(built(tmp_path / "run", EVEN))
    assert "the branches are averaged: in 1 of 1 layers" in found.text
    assert "adapter.method=lora" in found.remedy and "train.rates.router=10" in found.remedy


def test_a_constant_mix_that_is_not_even_is_said_to_ignore_the_input(tmp_path: Path) -> None:
    constant = [[0.0] * 3, [1.0] * 3, [0.5] * 3]
    (found,) = findings(built(tmp_path / "run", constant))
    assert "the routing ignores the input: in 1 of 1 layers" in found.text


def test_a_router_that_tells_tokens_apart_and_not_tasks_is_said_to(tmp_path: Path) -> None:
    model, tasks = routed(SPLIT), torch.tensor([0, 1, 2])
    x = torch.eye(3).expand(3, 3, 3)  # in every task one token to each branch
    run = save(tmp_path / "run", model, measured(model, x, tasks))
    (found,) = findings(run)
    assert "tells tokens apart, and not tasks" in found.text
    assert "branch_per_cluster" in found.remedy


def test_few_odd_layers_are_no_finding(tmp_path: Path) -> None:
    run = built(tmp_path / "run", SPLIT)
    routing = read_routing(run)
    name = routing["layers"][0]
    # As if the adapter had two layers, of which one collapsed: half are not most.
    routing["layers"] = [name, name]
    for task, rows in routing["tasks"].items():
        rows.append([1.0, 0.0, 0.0])
        routing["entropies"][task].append(0.0)
    write_routing(run, routing)
    assert findings(run) == []


def test_a_learned_row_that_is_even_is_said_with_what_fits_a_gate(tmp_path: Path) -> None:
    base = OneLayer(nn.Linear(4, 5, bias=False))
    config: dict[str, Any] = {"method": "lora_moe", "gate": "task", "num_tasks": 2}
    model = attach(base, target_modules=["linear"], r=2, init_weights=False, **config)
    gate = model.get_parameter("base_model.model.linear.manylora_gate.default.weight")
    with torch.no_grad():
        gate.zero_()
    (found,) = findings(save(tmp_path / "even", model))
    assert "averaged" in found.text and "train.rates.gate=10" in found.remedy
    with torch.no_grad():
        gate[:, 1] = 60
    (found,) = findings(save(tmp_path / "one", model))
    assert "collapse: branch 1" in found.text and "balance_loss" not in found.remedy


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    run = built(tmp_path / "old", SPLIT)
    routing = json.loads((run / "routing.json").read_text())
    old = {key: routing[key] for key in ("branches", "layers", "tasks")}
    (run / "routing.json").write_text(json.dumps(old))
    (found,) = findings(run)
    assert "was not measured" in found.text and "manylora eval" in found.remedy
    (text,) = said(save(tmp_path / "never", routed(SPLIT)))
    assert "no routing.json" in text and "manylora eval" in text


def with_branches(*rows: list[float], **config: Any) -> Any:
    """A HydraLoRA of one layer whose B (2, N) has these columns, at r = 1, and A = [1 0]."""
    base = OneLayer(nn.Linear(2, 2, bias=False))
    fields = {"method": "hydralora", "gate": "uniform", "num_branches": len(rows), "r": 1}
    model = attach(base, target_modules=["linear"], **fields | config)
    prefix = "base_model.model.linear.manylora"
    with torch.no_grad():
        model.get_parameter(f"{prefix}_A.default.weight").copy_(torch.tensor([[1.0, 0.0]]))
        model.get_parameter(f"{prefix}_B.default.weight").copy_(torch.tensor(rows).T)
    return model


def test_the_cosine_of_branches_is_that_of_their_updates(tmp_path: Path) -> None:
    run = save(tmp_path / "run", with_branches([1, 0], [1, 1], [0, 0]))
    found = similarity(read(run))
    assert found is not None
    assert found[0, 0] == pytest.approx(1) and found[0, 1] == pytest.approx(math.sqrt(0.5))
    assert all(math.isnan(value) for value in found[2])


@pytest.mark.parametrize(
    "kind",
    [
        {"method": "lora_split"},
        {"method": "lora_split", "branch_ranks": [1, 3, 2]},
        {"method": "multilora"},
        {"method": "hydralora"},
        {"method": "lora_moe", "share_B": True},
    ],
    ids=str,
)
def test_cosines_equal_those_of_whole_matrices(kind: dict[str, Any], tmp_path: Path) -> None:
    base = OneLayer(nn.Linear(6, 5, bias=False))
    model = attach(base, target_modules=["linear"], r=2, init_weights=False, **kind)
    adapter = read(save(tmp_path / "run", model))
    parts = adapter.parts("linear")
    whole = [(parts[f"branch {i}"].B @ parts[f"branch {i}"].A).flatten() for i in range(3)]
    expected = torch.stack([part / part.norm() for part in whole])
    found = similarity(adapter)
    assert found is not None
    assert found == pytest.approx((expected @ expected.T).numpy(), abs=1e-5)


def test_copies_are_found_and_the_closest_pair_named(tmp_path: Path) -> None:
    near = [1.0, 2.0], [2.0, 4.01], [2.0, -1.0]
    (text,) = said(save(tmp_path / "copies", with_branches(*near)))
    assert "1 of 3 pairs of branches are nearly copies" in text
    assert "of branches 0 and 1 1.000" in text
    below = [1.0, 0.0], [0.89, math.sqrt(1 - 0.89**2)]
    assert said(save(tmp_path / "below", with_branches(*below))) == []
    above = [1.0, 0.0], [0.91, math.sqrt(1 - 0.91**2)]
    (text,) = said(save(tmp_path / "above", with_branches(*above)))
    assert "of branches 0 and 1 0.910" in text


def test_branches_that_learned_nothing_are_found(tmp_path: Path) -> None:
    texts = said(save(tmp_path / "empty", with_branches([1, 2], [0, 0], [2, -1])))
    assert len(texts) == 1 and "branch 1 has no update in any layer" in texts[0]
    assert said(save(tmp_path / "well", with_branches([1, 2], [2, 1], [2, -1]))) == []


def test_an_adapter_without_branches_has_nothing_to_warn_of(tmp_path: Path) -> None:
    base = OneLayer(nn.Linear(4, 5, bias=False))
    assert (
        findings(save(tmp_path / "run", attach(base, target_modules=["linear"], method="lora")))
        == []
    )


def selected(folder: Path, law: list[list[int]]) -> Path:
    """A one-hot adapter whose selector saw these held-out prompts of law and ten of code."""
    base = OneLayer(nn.Linear(4, 5, bias=False))
    config = {"method": "branch_per_cluster", "num_branches": 3, "init_weights": False}
    model = attach(base, target_modules=["linear"], r=2, **config)
    selector: BranchSelector = fitted()
    model.peft_config["default"].branch_selector = selector
    save(folder, model)
    prompts = {"law": law, "code": [prompt(*RANGES[2], 700 + i) for i in range(10)]}
    held_out = {
        task: [Encoded(task, [*ids, 2], [(len(ids), len(ids) + 1)]) for ids in own]
        for task, own in prompts.items()
    }
    write_choices(folder, choices_of(selector, held_out))
    return folder


def test_a_selector_that_refuses_many_of_its_own_prompts_is_said(tmp_path: Path) -> None:
    known = [prompt(*RANGES[0], 500 + i) for i in range(10)]
    unknown = [prompt(*UNKNOWN, i) for i in range(4)]
    assert findings(selected(tmp_path / "well", known)) == []
    (found,) = findings(selected(tmp_path / "refusing", known[:6] + unknown))
    assert "finds no branch for 4 of 20 held-out prompts" in found.text
    assert "most of all of law (4)" in found.text and "branch_ids" in found.remedy


def test_a_selector_that_mistakes_tasks_is_said(tmp_path: Path) -> None:
    known = [prompt(*RANGES[0], 500 + i) for i in range(6)]
    as_medicine = [prompt(*RANGES[1], 600 + i) for i in range(4)]
    (found,) = findings(selected(tmp_path / "run", known + as_medicine))
    assert "gives 4 of 20 held-out prompts another task's branch" in found.text
    assert f"law that of {NAMES[1]} (4)" in found.text


def test_a_selector_that_was_not_measured_is_said(tmp_path: Path) -> None:
    run = selected(tmp_path / "run", [prompt(*RANGES[0], 1)])
    (run / "selector.json").unlink()
    (text,) = said(run)
    assert "no selector.json" in text and "manylora eval" in text


def test_what_is_advised_is_what_a_recipe_takes() -> None:
    for change in (
        {"adapter": {"balance_loss": "cv_squared"}},
        {"adapter": {"balance_loss": "switch"}},
        {"adapter": {"dropout_per_branch": True, "lora_dropout": 0.1}},
        {"adapter": {"method": "lora_moe"}},
        {"adapter": {"method": "hydralora", "gate": "router"}},
        {"adapter": {"method": "branch_per_cluster", "shared_rank": 4}},
        {"adapter": {"method": "lora_moe", "gate": "task"}, "train": {"rates": {"gate": 10}}},
        {"train": {"rates": {"router": 10}}},
        {"tasks": "discovered"},
    ):
        parse_recipe({"data": "d", **change})
