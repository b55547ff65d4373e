"""What the routing tables say of routers, gates and tasks that were made to have the answer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from manylora.adapter.selector import BranchSelector
from manylora.inspect.frames import COLUMNS
from manylora.inspect.usage import entropy, information, usage
from routers import COLLAPSE, EVEN, SPLIT, TASKS, built, measured, one_hot, routed, save
from tiny import OneLayer, attach, tiny_llama

LOG3 = math.log(3)


def test_a_router_that_splits_the_tasks_says_all_there_is_of_them(tmp_path: Path) -> None:
    run = built(tmp_path / "run", SPLIT)
    weights = usage(run).pivot(index="task", columns="branch", values="weight").loc[TASKS]
    assert weights.to_numpy() == pytest.approx(torch.eye(3).numpy(), abs=1e-6)
    (row,) = information(run).to_dict("records")
    assert row["nats"] == pytest.approx(LOG3, abs=1e-6)
    assert row["share"] == pytest.approx(1, abs=1e-6)
    assert (row["run"], row["layer"], row["module"], row["depth"]) == (
        "run",
        "linear",
        "linear",
        -1,
    )
    assert entropy(run)[["of_mean", "mean_of_tokens"]].to_numpy() == pytest.approx(0, abs=1e-5)


def test_a_uniform_router_has_all_the_entropy_and_says_nothing(tmp_path: Path) -> None:
    run = built(tmp_path / "run", EVEN)
    assert usage(run)["weight"].to_numpy() == pytest.approx(1 / 3, abs=1e-6)
    assert entropy(run)[["of_mean", "mean_of_tokens"]].to_numpy() == pytest.approx(LOG3, abs=1e-5)
    assert information(run)["nats"].tolist() == pytest.approx([0], abs=1e-6)


def test_a_collapsed_router_has_neither_entropy_nor_information(tmp_path: Path) -> None:
    run = built(tmp_path / "run", COLLAPSE)
    assert usage(run).groupby("branch")["weight"].mean().tolist() == pytest.approx([0, 1, 0])
    assert entropy(run)[["of_mean", "mean_of_tokens"]].to_numpy() == pytest.approx(0, abs=1e-5)
    assert information(run)["nats"].tolist() == pytest.approx([0], abs=1e-6)


def test_tokens_that_disagree_within_a_task_are_not_taken_for_tokens_that_are_unsure(
    tmp_path: Path,
) -> None:
    model, tasks = routed(SPLIT), torch.tensor([0, 1])
    x = torch.eye(3).expand(2, 3, 3)  # in both tasks one token to each branch
    run = save(tmp_path / "run", model, measured(model, x, tasks))
    found = entropy(run)
    assert found["task"].tolist() == TASKS[:2]  # no row of the third
    assert found["of_mean"].tolist() == pytest.approx([LOG3] * 2, abs=1e-5)
    assert found["mean_of_tokens"].tolist() == pytest.approx([0] * 2, abs=1e-5)
    assert information(run)["nats"].tolist() == pytest.approx([0], abs=1e-6)


def test_tasks_count_alike_however_many_tokens_they_have(tmp_path: Path) -> None:
    model, tasks = routed(SPLIT), torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 2])
    run = save(tmp_path / "run", model, measured(model, one_hot(tasks), tasks))
    assert information(run)["nats"].tolist() == pytest.approx([LOG3], abs=1e-6)


def test_two_tasks_that_share_a_branch_say_what_is_left(tmp_path: Path) -> None:
    together = [SPLIT[0], [0.0, SPLIT[1][1], SPLIT[2][2]], [-60.0] * 3]
    run = built(tmp_path / "run", together)
    left = -(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3)  # H(1/3, 2/3)
    (row,) = information(run).to_dict("records")
    assert row["nats"] == pytest.approx(left, abs=1e-6)
    assert row["share"] == pytest.approx(left / LOG3, abs=1e-6)


def test_share_is_of_what_the_fewer_of_tasks_and_branches_allow(tmp_path: Path) -> None:
    model, tasks = routed(SPLIT), torch.tensor([0, 1])
    run = save(tmp_path / "run", model, measured(model, one_hot(tasks), tasks))
    (row,) = information(run).to_dict("records")
    assert row["nats"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["share"] == pytest.approx(1, abs=1e-6)


def test_one_task_leaves_nothing_to_tell(tmp_path: Path) -> None:
    model, tasks = routed(SPLIT), torch.tensor([1])
    run = save(tmp_path / "run", model, measured(model, one_hot(tasks), tasks))
    assert information(run).empty
    assert len(usage(run)) == 3


def test_a_learned_row_for_each_task_is_known_without_tokens(tmp_path: Path) -> None:
    base = OneLayer(nn.Linear(4, 5, bias=False))
    config = {"method": "lora_moe", "gate": "task", "num_tasks": 2, "num_branches": 2}
    model = attach(base, target_modules=["linear"], r=2, **config)
    gate = model.get_parameter("base_model.model.linear.manylora_gate.default.weight")
    with torch.no_grad():
        gate.copy_(torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]))
    run = save(tmp_path / "run", model)
    assert usage(run)["weight"].tolist() == pytest.approx([0.5, 0.5, 0.75, 0.25])
    second = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    for column in ("of_mean", "mean_of_tokens"):
        assert entropy(run)[column].tolist() == pytest.approx([math.log(2), second])
    mean = -0.625 * math.log(0.625) - 0.375 * math.log(0.375)
    expected = mean - (math.log(2) + second) / 2
    assert information(run)["nats"].tolist() == pytest.approx([expected])


def test_a_one_hot_gate_uses_the_branch_that_is_named_for_the_task(tmp_path: Path) -> None:
    model = attach(tiny_llama(), method="branch_per_cluster", r=2, num_branches=2)
    prompts = [[9, 10, 11], [20, 21, 22]] * 2
    selector = BranchSelector.fit(prompts, [0, 1, 0, 1], ["law", "code"], buckets=64)
    model.peft_config["default"].branch_selector = selector
    run = save(tmp_path / "run", model)
    found = usage(run)
    used = found[found["weight"] == 1]
    assert set(zip(used["task"], used["branch"], strict=True)) == {("law", 0), ("code", 1)}
    assert set(used["module"]) >= {"q_proj", "down_proj"} and set(used["depth"]) == {0, 1}
    assert set(found["weight"]) == {0.0, 1.0}
    assert information(run)["nats"].to_numpy() == pytest.approx(math.log(2))
    assert entropy(run)[["of_mean", "mean_of_tokens"]].to_numpy() == pytest.approx(0)


@pytest.mark.parametrize("config", [{"method": "lora"}, {"method": "multilora"}])
def test_constant_weights_choose_nothing(config: dict[str, str], tmp_path: Path) -> None:
    base = OneLayer(nn.Linear(4, 5, bias=False))
    run = save(tmp_path / "run", attach(base, target_modules=["linear"], r=2, **config))
    for name, measure in (("usage", usage), ("entropy", entropy), ("information", information)):
        found = measure(run)
        assert found.empty and tuple(found.columns) == COLUMNS[name]


def test_tables_have_the_columns_that_pages_know_them_by(tmp_path: Path) -> None:
    run = built(tmp_path / "run", SPLIT)
    for name, measure in (("usage", usage), ("entropy", entropy), ("information", information)):
        assert tuple(measure(run).columns) == COLUMNS[name]


def test_a_file_of_means_alone_is_read_and_what_it_lacks_is_said(tmp_path: Path) -> None:
    run = built(tmp_path / "run", SPLIT)
    routing = json.loads((run / "routing.json").read_text())
    old = {key: routing[key] for key in ("branches", "layers", "tasks")}
    (run / "routing.json").write_text(json.dumps(old))
    assert len(usage(run)) == 9
    assert information(run)["nats"].tolist() == pytest.approx([LOG3], abs=1e-6)
    with pytest.raises(FileNotFoundError, match=r"routing.json has no entropies.*manylora eval"):
        entropy(run)


def test_a_router_that_was_not_measured_is_said(tmp_path: Path) -> None:
    run = save(tmp_path / "run", routed(SPLIT))
    with pytest.raises(FileNotFoundError, match=r"no routing.json.*manylora eval"):
        usage(run)
