"""Whole runs with the options of a recipe: a trained start, rates by part, validation, reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import manylora
from manylora.evaluate.held_out import evaluate_run
from manylora.export import export_lora
from manylora.recipe import Recipe, load_recipe, parse_recipe
from manylora.report.page import write_report
from manylora.train import train

Make = Callable[..., Recipe]


@pytest.fixture
def new_task(tmp_path: Path) -> Path:
    rows = [{"question": f"shout {i}", "answer": f"AH {i % 3}"} for i in range(40)]
    file = tmp_path / "shout.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def changed(recipe: Recipe, output: Path, **changes: Any) -> Recipe:
    """The few keys that a person would give, with what a tiny run needs."""
    train_keys = {**recipe.train.model_dump(exclude_unset=True), **changes.pop("train", {})}
    given = {"data": recipe.data, "holdout": 0.2, "evaluate": {"rows_per_task": 6}} | changes
    return parse_recipe({**given, "train": train_keys, "output": str(output)})


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(str(run / "adapter_model.safetensors"))


def nll(run: Path, when: str = "after") -> dict[str, float]:
    tasks = json.loads((run / "scores.json").read_text())["tasks"]
    return {task: scores[when]["nll"][0] for task, scores in tasks.items()}


def test_a_task_is_added_and_the_others_stay_to_the_bit(
    make_recipe: Make, tmp_path: Path, new_task: Path
) -> None:
    old = train(make_recipe("old", method="branch_per_cluster"))
    kept = {file.name: file.read_bytes() for file in old.iterdir() if file.is_file()}
    recipe = changed(make_recipe(), tmp_path / "more", data=str(new_task), start_from=str(old))
    run = train(recipe)
    assert {file.name: file.read_bytes() for file in old.iterdir() if file.is_file()} == kept
    model, _ = manylora.load(run)
    config: Any = model.peft_config["default"]
    assert config.branch_selector.names == ["colour", "copy", "parity", "shout"]
    before, after = tensors(old), tensors(run)
    for name, tensor in before.items():
        if "manylora_A" in name:
            assert torch.equal(after[name][: len(tensor)], tensor)
        if "manylora_B" in name:
            assert torch.equal(after[name][:, : tensor.shape[1]], tensor)
            assert after[name][:, tensor.shape[1] :].any()
    assert nll(run)["shout"] < nll(run, "before")["shout"]
    scores = (run / "scores.json").read_text()
    evaluate_run(run, Console(stderr=True))
    assert (run / "scores.json").read_text() == scores
    assert len(export_lora(run, tmp_path / "export")) == 4


def test_a_finished_run_is_trained_on(make_recipe: Make, tmp_path: Path) -> None:
    old = train(make_recipe("old", method="hydralora"))
    gently = {"learning_rate": 0.002}
    run = train(changed(make_recipe(), tmp_path / "on", start_from=str(old), train=gently))
    assert sum(nll(run).values()) < sum(nll(old).values()) + 0.05
    assert load_recipe(run).adapter.r == 4  # what the recipe leaves out is as it was
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    start = json.loads((old / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < start["loss"] - 0.1


@pytest.mark.parametrize("method", ["hydralora", "multilora", "lora_moe"])
def test_a_branch_is_added(make_recipe: Make, tmp_path: Path, method: str) -> None:
    old = train(make_recipe("old", method=method))
    grown = changed(
        make_recipe(), tmp_path / "grown", start_from=str(old), adapter={"num_branches": 4}
    )
    run = train(grown)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["dead_gradients"] == []
    model, _ = manylora.load(run)
    config: Any = model.peft_config["default"]
    assert config.branches_of().count == 4
    assert sum(nll(run).values()) < sum(nll(run, "before").values())


def test_validation_rates_packing_and_tensorboard_in_one_run(
    make_recipe: Make, tmp_path: Path
) -> None:
    values = make_recipe("run", method="hydralora").model_dump()
    values["train"] |= {
        "max_steps": 200,
        "rates": {"B": 4, "router": 0},
        "weight_decays": {"A": 0.1},
        "evaluate_every": 2,
        "early_stopping": 2,
        "learning_rate": 1.0,  # so high that it gets worse soon
        "report_to": "tensorboard",
    }
    run = train(parse_recipe(values | {"validation": 0.2, "packing": True}))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    means = {line["step"]: line["mean"] for line in lines if "validation" in line}
    best = min(means, key=lambda step: means[step])
    assert max(means) == best + 4 < 200  # stopped after two evaluations without a better one
    assert set(lines[-1].get("validation", lines[-2].get("validation"))) == {
        "colour",
        "copy",
        "parity",
    }
    assert list((run / "logs").glob("events.out.tfevents.*"))
    assert not (run / "best").exists()
    page = write_report(run).read_text()
    assert "dashed: on the rows kept apart" in page
    routers = [tensor for name, tensor in tensors(run).items() if "router" in name]
    again = make_recipe("again", method="hydralora")
    start = [t for name, t in tensors(train(again)).items() if "router" in name]
    assert all(not torch.equal(a, b) for a, b in zip(routers, start, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"evaluate_every": 5}}, "validation=0.05"),
        ({"train": {"early_stopping": 2}}, "evaluate_every=STEPS"),
        ({"adapter": {"method": "lora"}, "train": {"rates": {"router": 1}}}, "has no router"),
        ({"train": {"rates": {"C": 1}}}, "'A', 'B', 'router'"),
        ({"mixture": {"temperature": 2, "weights": {"a": 1}}}, "do not fit"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_loaded(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="cannot be run") as caught:
        parse_recipe({"data": "nowhere"} | change)
    assert message in str(caught.value)


def test_constant_schedule_warms_up(make_recipe: Make) -> None:
    recipe = make_recipe()
    recipe.train.schedule, recipe.train.warmup, recipe.train.log_every = "constant", 0.5, 1
    run = train(recipe)
    lines = [json.loads(line)["learning_rate"] for line in (run / "metrics.jsonl").open()]
    assert lines == pytest.approx([0.0, 0.02 / 3, 0.04 / 3, 0.02, 0.02, 0.02])
