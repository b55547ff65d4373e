"""A whole run on a tiny model: what it leaves, what it learns, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

import manylora
from manylora.base import load_model
from manylora.corpus import DrawOrder, Mixture
from manylora.evaluate.held_out import evaluate_run
from manylora.recipe import Recipe, load_recipe, parse_recipe
from manylora.report.page import write_report
from manylora.train import train
from manylora.training.trainer import MixtureSampler
from tiny import save_tiny_model

Make = Callable[..., Recipe]

METHODS = [
    {"method": "lora"},
    {"method": "lora_split"},
    {"method": "lora_split", "gate": "one_hot"},
    {"method": "multilora"},
    {"method": "hydralora"},
    {"method": "hydralora", "gate": "uniform"},
    {"method": "hydralora", "router_input": "Ax", "balance_loss": "switch"},
    {"method": "lora_moe", "gate": "task"},
    {"method": "branch_per_cluster", "shared_rank": 2},
]


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapter", METHODS, ids=lambda a: "-".join(map(str, a.values())))
def test_one_recipe_trains_every_method(make_recipe: Make, adapter: dict[str, object]) -> None:
    run = train(make_recipe(**adapter))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["dead_gradients"] == []
    assert summary["steps"] == 6
    scores = json.loads((run / "scores.json").read_text())["tasks"]
    assert sorted(scores) == ["colour", "copy", "parity"]
    for task in scores.values():
        assert task["after"]["nll"][0] < task["before"]["nll"][0]
    routed = adapter["method"] == "hydralora" and adapter.get("gate") is None
    assert (run / "routing.json").is_file() == routed
    by_task = adapter.get("gate") in ("one_hot", "task") or "shared_rank" in adapter
    assert (run / "branch_selector.safetensors").is_file() == by_task
    assert write_report(run).stat().st_size > 1000


def test_metrics_hold_the_loss_of_each_task(make_recipe: Make) -> None:
    run = train(make_recipe())
    logged = lines(run)
    assert [line["step"] for line in logged] == [1, 2, 4, 6]
    for line in logged:
        assert line["seconds"] > 0 and line["tokens"] > 0
        tasks = line["tasks"]
        assert tasks and set(tasks) <= {"colour", "copy", "parity"}
        assert all(task["tokens"] > 0 and task["loss"] > 0 for task in tasks.values())
    # The first line is one step: its loss is the mean over the answer tokens of that step.
    first = logged[0]["tasks"].values()
    total = sum(task["tokens"] for task in first)
    mean = sum(task["loss"] * task["tokens"] for task in first) / total
    assert mean == pytest.approx(logged[0]["loss"], rel=1e-4)


def test_run_loads_from_its_folder_alone(make_recipe: Make) -> None:
    recipe = make_recipe(method="multilora")
    run = train(recipe)
    model, tokenizer = manylora.load(run)
    assert not model.training
    model.cpu()
    base = load_model(recipe.model)
    tokens = torch.tensor([tokenizer("sky 3")["input_ids"]])
    with torch.inference_mode():
        live = model(tokens).logits
        plain = base(tokens).logits
        again = PeftModel.from_pretrained(base, str(run))(tokens).logits
    assert torch.equal(live, again)
    assert not torch.allclose(live, plain, atol=1e-3)
    assert "import manylora" in (run / "README.md").read_text()


def test_saved_recipe_gives_the_same_run_again(make_recipe: Make, tmp_path: Path) -> None:
    run = train(make_recipe())
    again = train(load_recipe(run, [f"output={tmp_path / 'again'}"]))
    first = load_file(str(run / "adapter_model.safetensors"))
    second = load_file(str(again / "adapter_model.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for name in ("scores.json", "routing.json"):
        assert (run / name).read_text() == (again / name).read_text()


def test_run_means_the_same_from_another_folder(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = make_recipe().model_dump()
    for key in ("model", "data"):
        monkeypatch.chdir(Path(values[key]).parent)
        values[key] = Path(values[key]).name
        shutil.copytree(values[key], tmp_path / values[key])
    monkeypatch.chdir(tmp_path)
    run = train(parse_recipe(values)).resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    manylora.load(run)
    evaluate_run(run, Console(stderr=True))


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantised_base_trains_and_loads(make_recipe: Make, quantize: str, tmp_path: Path) -> None:
    values = make_recipe(method="multilora").model_dump()
    values["model"] = str(save_tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=64))
    run = train(parse_recipe({**values, "quantize": quantize}))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["dead_gradients"] == []
    saved = load_file(str(run / "adapter_model.safetensors"))
    scales = {t.dtype for name, t in saved.items() if "manylora_scale" in name}
    assert scales == {torch.float32}
    assert any(t.any() for name, t in saved.items() if "manylora_scale" in name)
    model, _ = manylora.load(run)
    assert model.config.quantization_config.load_in_4bit == (quantize == "4bit")


def test_accumulated_steps_equal_whole_batches(make_recipe: Make, tmp_path: Path) -> None:
    whole = make_recipe("whole", balance_loss="cv_squared", balance_weight=0.0)
    parts = make_recipe("parts", balance_loss="cv_squared", balance_weight=0.0)
    parts.train.batch_size, parts.train.gradient_accumulation = 2, 4
    first = load_file(str(train(whole) / "adapter_model.safetensors"))
    second = load_file(str(train(parts) / "adapter_model.safetensors"))
    # Adam divides by the gradient's size, so rounding moves a weight by a share of the rate.
    assert all(torch.allclose(first[key], second[key], atol=5e-3) for key in first)


def test_gradient_checkpointing_changes_nothing(make_recipe: Make) -> None:
    plain = make_recipe("plain", method="branch_per_cluster", shared_rank=2)
    checkpointed = make_recipe("checkpointed", method="branch_per_cluster", shared_rank=2)
    checkpointed.train.gradient_checkpointing = True
    first = load_file(str(train(plain) / "adapter_model.safetensors"))
    second = load_file(str(train(checkpointed) / "adapter_model.safetensors"))
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)


def test_used_run_folder_is_refused(make_recipe: Make) -> None:
    recipe = make_recipe()
    recipe.run.mkdir()
    (recipe.run / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"not empty.*output=FOLDER"):
        train(recipe)
    assert (recipe.run / "mine.txt").read_text() == "keep"


def test_validation_rows_that_nothing_reads_are_said(
    make_recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    values = make_recipe().model_dump() | {"validation": 0.25}
    train(parse_recipe(values))
    said = " ".join(capsys.readouterr().err.split())
    assert "validation=0.25 keeps 24 rows out of training" in said
    assert said.count("train.evaluate_every=STEPS") == 1
    values["output"] += "-read"
    values["train"]["evaluate_every"] = 3
    train(parse_recipe(values))
    assert "out of training" not in capsys.readouterr().err


def test_unfinished_run_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="manylora train"):
        manylora.load(tmp_path)


def test_one_hot_needs_a_branch_for_each_task(make_recipe: Make) -> None:
    with pytest.raises(ValueError, match=r"3 tasks.*2 branches"):
        train(make_recipe(method="branch_per_cluster", num_branches=2))


def test_too_long_rows_are_counted_and_said(
    make_recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe()
    values = recipe.model_dump()
    values["max_length"] = 24
    train(parse_recipe(values))
    said = " ".join(capsys.readouterr().err.split())
    assert "of 32 rows have more than max_length=24 tokens and are left out" in said


def test_sampler_draws_anew_each_epoch_and_covers_every_row() -> None:
    sampler = MixtureSampler(DrawOrder({"a": 3, "b": 5}, Mixture(), seed=1))
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert len(sampler) == 8
