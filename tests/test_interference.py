"""Interference on tasks built to agree, to conflict, and to have nothing to do with each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from manylora.adapter.ids import branch_ids
from manylora.corpus import Encoder
from manylora.evaluate.scores import held_out
from manylora.inspect import interference as module
from manylora.inspect.conflicts import conflicts, matrix, separation
from manylora.inspect.frames import COLUMNS
from manylora.inspect.interference import cosines, interference
from manylora.recipe import Recipe, parse_recipe
from manylora.run import load, recipe_of
from manylora.train import train
from tiny import OneLayer, attach, tiny_llama

IN, OUT = 6, 5
Task = tuple[Tensor, Tensor, int]  # inputs, what to add to the output, branch id


def adapted(method: str = "lora", layers: int = 1, **config: Any) -> PeftModel:
    """Linear layers one after the other, float64, every adapter tensor random."""
    torch.manual_seed(0)
    width = IN if layers > 1 else OUT
    model: nn.Module = OneLayer(
        nn.Linear(IN, OUT).double()
        if layers == 1
        else nn.Sequential(*(nn.Linear(IN, width).double() for _ in range(layers)))
    )
    targets = ["linear"] if layers == 1 else [str(i) for i in range(layers)]
    found = attach(model, method=method, r=2, target_modules=targets, init_weights=False, **config)
    return found.double().eval()


def losses(model: PeftModel, tasks: dict[str, Task]) -> module.Losses:
    """Half the squared distance to the output as it is plus the task's wish, a row a piece."""

    def of(x: Tensor, wish: Tensor, ids: int) -> Iterator[Tensor]:
        needed = model.peft_config["default"].branches_of().needs_ids
        for row, wanted in zip(x, wish, strict=True):
            if needed:
                with branch_ids(model, ids):
                    yield from piece(row, wanted)
            else:
                yield from piece(row, wanted)

    def piece(row: Tensor, wanted: Tensor) -> Iterator[Tensor]:
        y = model(row[None])
        yield 0.5 * (y - (y.detach() + wanted)).square().sum()

    return {name: lambda task=task: of(*task) for name, task in tasks.items()}  # type: ignore[misc]


def table(model: PeftModel, tasks: dict[str, Task], **options: Any) -> pd.DataFrame:
    return cosines(model, losses(model, tasks), "run", **options)


def same_inputs(sign: float = -1.0) -> dict[str, Task]:
    """Two tasks that wish the opposite (or the same) of the same inputs."""
    torch.manual_seed(1)
    x, wish = torch.randn(4, IN).double(), torch.randn(4, OUT).double()
    return {"one": (x, wish, 0), "other": (x, sign * wish, 1)}


METHODS: list[dict[str, Any]] = [
    {"method": "lora"},
    {"method": "lora_split"},
    {"method": "multilora"},
    {"method": "hydralora"},
    {"method": "lora_moe"},
    {"method": "lora_split", "shared_rank": 2},
]


@pytest.mark.parametrize("config", METHODS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_opposite_wishes_conflict_and_equal_ones_agree_in_every_part(
    config: dict[str, Any], sign: float
) -> None:
    found = table(adapted(**config), same_inputs(sign))
    assert set(found["part"]) >= {"all"}
    assert found["cosine"].to_numpy() == pytest.approx(sign, abs=1e-5)
    pair = conflicts(found).iloc[0]
    assert pair["cosine"] == pytest.approx(sign, abs=1e-5)
    assert pair["conflict"] == pytest.approx(1.0 if sign < 0 else 0.0, abs=1e-5)
    assert pair["agreement"] == pytest.approx(0.0 if sign < 0 else 1.0, abs=1e-5)


def test_tasks_of_other_inputs_and_outputs_are_orthogonal() -> None:
    model = adapted()
    tensors = {name: p for name, p in model.named_parameters() if "manylora_" in name}
    for name, tensor in tensors.items():  # A and B that keep the two tasks' directions apart
        tensor.data.zero_()
        if "manylora_A" in name:
            tensor.data[0, 0] = tensor.data[1, 3] = 1.0
        else:
            tensor.data[0, 0] = tensor.data[4, 1] = 1.0
    first, last = torch.zeros(1, IN).double(), torch.zeros(1, IN).double()
    first[0, 0], last[0, 3] = 2.0, 3.0
    up, down = torch.zeros(1, OUT).double(), torch.zeros(1, OUT).double()
    up[0, 0], down[0, 4] = 1.0, -1.0
    found = table(model, {"one": (first, up, 0), "other": (last, down, 0)})
    assert (found["norm"] > 0).all()
    assert found["cosine"].to_numpy() == pytest.approx(0.0, abs=1e-9)


def test_a_cosine_of_a_known_angle() -> None:
    """B alone is trained, on one input: its gradient is -wish (A x)^T, so wishes give the angle."""
    x = torch.ones(1, IN).double()
    up = torch.tensor([[1.0, 0, 0, 0, 0]]).double()
    tilted = torch.tensor([[3.0, 4, 0, 0, 0]]).double()
    found = table(adapted(), {"one": (x, up, 0), "other": (x, tilted, 0)}, frozen={"A"})
    assert set(found["part"]) == {"all", "branch 0"}
    assert found["cosine"].to_numpy() == pytest.approx(0.6, abs=1e-6)
    one = found[(found["part"] == "all") & (found["task"] == "one")].iloc[0]
    assert one["other_norm"] == pytest.approx(5 * one["norm"], rel=1e-5)


def test_one_hot_branches_take_conflicting_tasks_apart() -> None:
    """Each task has a branch, so the same opposite wishes no longer meet."""
    apart = table(adapted("lora_split", gate="one_hot", num_branches=2), same_inputs())
    by_part = apart.set_index(["part", "task"])["cosine"]
    assert by_part["all"].to_numpy() == pytest.approx(0.0, abs=1e-12)
    assert apart[apart["part"].str.startswith("branch")]["cosine"].isna().all()
    zero = apart[(apart["part"] == "branch 0") & (apart["task"] == "other")].iloc[0]
    assert zero["norm"] == 0.0 and zero["other_norm"] > 0
    assert conflicts(apart).loc[0, "conflict"] == 0.0
    together = table(adapted("lora_split", num_branches=2), same_inputs())
    assert conflicts(together).loc[0, "conflict"] == pytest.approx(1.0, abs=1e-5)


def test_separation_is_against_one_branch_in_the_place_of_all() -> None:
    """A shared A: one-hot branches bring a cosine of -1 to 0; what is shared conflicts still."""
    config = {"method": "hydralora", "gate": "one_hot", "num_branches": 2}
    found = table(adapted(**config), same_inputs())
    both = separation(found).iloc[0]
    assert both["as_one"] == pytest.approx(-1.0, abs=1e-5)
    assert both["apart"] == pytest.approx(0.0, abs=1e-12)
    # With different B's the two tasks see different A gradients: a conflict, or none, is real.
    assert found[found["part"] == "A"]["cosine"].notna().all()
    assert separation(table(adapted("lora_split"), same_inputs())).empty


def test_branches_as_one_is_the_gradient_of_the_single_branch() -> None:
    """A uniform mix of equal branches is one branch: the sum of their gradients is its own."""
    torch.manual_seed(2)
    tasks = {
        "one": (torch.randn(3, IN).double(), torch.randn(3, OUT).double(), 0),
        "other": (torch.randn(3, IN).double(), torch.randn(3, OUT).double(), 0),
    }
    many = adapted("hydralora", gate="uniform", num_branches=3)
    one = adapted("lora")
    for (name, mine), (_, theirs) in zip(parameters(one), parameters(many), strict=True):
        whole = theirs.data
        if "manylora_B" in name:
            whole.copy_(whole[:, :2].repeat(1, 3))
            whole = whole[:, :2]
        mine.data.copy_(whole)
    found = table(many, tasks).set_index(["part", "task"])
    expected = table(one, tasks, frozen={"A"}).set_index(["part", "task"])
    for column in ("cosine", "norm"):
        assert found.loc[("branches as one", "one"), column] == pytest.approx(
            expected.loc[("branch 0", "one"), column], rel=1e-5
        )


def parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if "manylora_" in name]


def test_the_matrix_is_the_cosine_of_the_whole_gradients() -> None:
    """Against autograd's own gradients of all layers as one vector."""
    torch.manual_seed(3)
    model = adapted("multilora", layers=3)
    wish = {name: torch.randn(4, IN).double() for name in ("a", "b", "c")}
    tasks = {name: (torch.randn(4, IN).double(), own, 0) for name, own in wish.items()}
    found = matrix(table(model, tasks))
    whole = {}
    for name, (x, wanted, _) in tasks.items():
        tensors = [p.requires_grad_(True) for _, p in parameters(model)]
        y = model(x)
        loss = 0.5 * (y - (y.detach() + wanted)).square().sum()
        whole[name] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, tensors)])
    for name, mine in whole.items():
        for other, theirs in whole.items():
            expected = torch.cosine_similarity(mine, theirs, 0).item()
            assert found.loc[name, other] == pytest.approx(expected, abs=1e-5)
    assert len(table(model, tasks)["layer"].unique()) == 3


def test_layers_in_groups_give_the_same_and_leave_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted("hydralora", layers=3)
    tasks = {name: (x, y[:, :1].repeat(1, IN), i) for name, (x, y, i) in same_inputs().items()}
    tasks["other"] = (tasks["other"][0].flip(1), *tasks["other"][1:])
    model.requires_grad_(False)
    next(iter(parameters(model)))[1].requires_grad_(True)
    before = [(p.requires_grad, p.detach().clone()) for p in model.parameters()]
    whole = table(model, tasks)
    monkeypatch.setattr(module, "MOST_BYTES", 1.0)
    passes: list[str] = []
    counted = {
        name: lambda name=name, own=own: (passes.append(name), own())[1]
        for name, own in losses(model, tasks).items()
    }
    pd.testing.assert_frame_equal(cosines(model, counted, "run"), whole)
    assert len(passes) == 2 * 3  # a pass for each layer
    for parameter, (wanted, value) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad == wanted and parameter.grad is None
        assert torch.equal(parameter, value)


def conflicting_data(folder: Path) -> Path:
    """Two tasks that answer the same questions in opposite ways, and a third one."""
    folder.mkdir()
    rows = 40
    wanted = {
        "yes": [(f"is {i} good", "yes") for i in range(rows)],
        "no": [(f"is {i} good", "off") for i in range(rows)],
        "also_yes": [(f"is {i} good", "yes") for i in range(rows)],
    }
    for name, pairs in wanted.items():
        lines = [json.dumps({"instruction": q, "output": a}) + "\n" for q, a in pairs]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def trained(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Path]:
    """A run on `conflicting_data`."""

    def make(**adapter: Any) -> Path:
        values = make_recipe(**adapter).model_dump()
        values["data"] = str(conflicting_data(tmp_path / "conflicting"))
        values["train"]["max_steps"] = 60
        values["evaluate"]["rows_per_task"] = 0
        return train(parse_recipe(values))

    return make


def test_a_run_shows_which_of_its_tasks_conflict(trained: Callable[..., Path]) -> None:
    run = trained(method="lora")
    found = interference(run, rows=4)
    assert list(found.columns) == [*COLUMNS["interference"], "norm", "other_norm"]
    assert set(found["run"]) == {run.name} and set(found["depth"]) == {0, 1}
    assert "q_proj" in set(found["module"])
    worst = conflicts(found)
    named = [frozenset(pair) for pair in zip(worst["task"], worst["other"], strict=True)]
    assert named[-1] == {"yes", "also_yes"} and worst["cosine"].iloc[-1] > 0.9
    assert (worst["cosine"].iloc[:2] < 0).all() and (worst["conflict"].iloc[:2] > 0.1).all()


def test_at_the_start_only_b_has_a_gradient(trained: Callable[..., Path]) -> None:
    """B is zero then, and nothing behind it moves the output; its gradient is -wish (A x)^T."""
    run = trained(method="hydralora")
    files = sorted(path.name for path in run.iterdir())
    found = interference(run, rows=4, state="start").set_index(["part", "task"])
    assert (found.loc["A", "norm"] == 0).all() and found.loc["A", "cosine"].isna().all()
    assert (found.loc["router", "norm"] == 0).all()
    assert (found.loc["branch 0", "norm"] > 0).all()
    trained_now = interference(run, rows=4).set_index(["part", "task"])
    assert (trained_now.loc["A", "norm"] > 0).all()
    assert sorted(path.name for path in run.iterdir()) == files


def test_a_run_of_a_branch_a_task_has_no_conflict_left(trained: Callable[..., Path]) -> None:
    found = interference(trained(method="branch_per_cluster"), rows=4)
    assert conflicts(found)["cosine"].to_numpy() == pytest.approx(0.0, abs=1e-12)
    assert (found[found["part"] == "all"]["norm"] > 0).all()


def test_a_runs_gradients_are_those_of_its_answers(trained: Callable[..., Path]) -> None:
    """The norms against a plain backward pass over all rows at once."""
    run = trained(method="hydralora")
    found = interference(run, rows=4)
    found = found[(found["task"] == "yes") & (found["other"] == "no") & (found["part"] == "all")]
    model, tokenizer = load(run)
    model.cpu().requires_grad_(False)
    for _, parameter in parameters(model):
        parameter.requires_grad_(True)
    losses = []

    recipe = recipe_of(run)
    (task,) = [
        task
        for task in held_out(recipe.load_corpus(), Encoder(tokenizer, recipe.max_length), 4)[0]
        if task.name == "yes"
    ]
    for item in task.encoded:
        logits = model(input_ids=torch.tensor([item.input_ids])).logits[0]
        for start, stop in item.learned:
            targets = torch.tensor(item.input_ids[start:stop])
            losses.append(
                nn.functional.cross_entropy(logits[start - 1 : stop - 1], targets, reduction="none")
            )
    torch.cat(losses).mean().backward()
    for layer, norm in zip(found["layer"], found["norm"], strict=True):
        own = [p.grad for name, p in parameters(model) if f".{layer}." in f".{name}"]
        assert norm == pytest.approx(float(torch.cat([g.flatten() for g in own]).norm()), rel=1e-4)


def test_interference_needs_two_tasks(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    values = make_recipe().model_dump()
    values["data"] = {"copy": str(Path(values["data"]) / "copy.jsonl")}
    with pytest.raises(ValueError, match="interference is between tasks, and 1 of its tasks"):
        interference(train(parse_recipe(values)), rows=4)


def test_an_unknown_part_is_named() -> None:
    found = table(adapted(), same_inputs())
    with pytest.raises(ValueError, match="no part 'branch 7'; the table has all, branch 0"):
        conflicts(found, "branch 7")


def test_a_matrix_is_of_one_run() -> None:
    found = table(adapted(), same_inputs())
    both = pd.concat([found, found.assign(run="second")])
    with pytest.raises(ValueError, match="the table has run, second"):
        matrix(both)
    assert list(conflicts(both)["run"]) == ["run", "second"]


def test_tiny_llama_gradients_agree_with_autograd() -> None:
    """Layers that share an input are computed together; in eval mode too their gradients hold."""
    model = attach(tiny_llama(), method="hydralora", r=4, init_weights=False).eval()
    tokens = torch.arange(24).reshape(2, 12) + 3

    def loss() -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    found = cosines(model, {"a": lambda: iter([loss()]), "b": lambda: iter([2 * loss()])})
    whole = torch.autograd.grad(loss(), [p.requires_grad_(True) for _, p in parameters(model)])
    squares = float(
        np.square(found[(found["part"] == "all") & (found["task"] == "a")]["norm"]).sum()
    )
    assert squares == pytest.approx(sum(float(g.square().sum()) for g in whole), rel=1e-4)
    assert found["cosine"].to_numpy() == pytest.approx(1.0, abs=1e-5)
