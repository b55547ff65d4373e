"""Rate and weight decay of each part: what is in which group, and what training then does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.layer import layers_of
from manylora.adapter.training import ManyLoraTrainerMixin, dead_gradients
from manylora.recipe import RecipeError, load_recipe
from manylora.train_recipe import TrainRecipe
from manylora.training.optimizer import PartRatesMixin, check_parts, parameter_groups, parts_of
from tiny import attach, tiny_llama

METHODS: list[tuple[dict[str, Any], list[str]]] = [
    ({"method": "lora"}, ["A", "B"]),
    ({"method": "multilora"}, ["A", "B", "scale"]),
    ({"method": "hydralora", "shared_rank": 2}, ["A", "B", "router", "shared"]),
    ({"method": "lora_moe", "gate": "task", "num_tasks": 2}, ["A", "B", "gate"]),
    ({"method": "lora", "bias": "manylora_only"}, ["A", "B", "other"]),
    ({"method": "lora", "modules_to_save": ["lm_head"]}, ["A", "B", "other"]),
]
ROWS = [{"input_ids": [5, 9, 3, 7, 4], "labels": [-100, -100, 3, 7, 4]}] * 16


class PartTrainer(PartRatesMixin, ManyLoraTrainerMixin, Trainer):
    def __init__(self, recipe: TrainRecipe, **kwargs: Any) -> None:
        self.train_recipe = recipe
        super().__init__(**kwargs)


def hydra(**config: Any) -> PeftModel:
    return attach(tiny_llama(), method="hydralora", **config)


def trainer(out: Path, recipe: TrainRecipe, model: PeftModel, **arguments: Any) -> PartTrainer:
    options: dict[str, Any] = {
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup,
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return PartTrainer(
        recipe,
        model=model,
        args=TrainingArguments(output_dir=str(out), **options | arguments),
        train_dataset=Dataset.from_list(ROWS),
    )


def parts(model: PeftModel) -> dict[str, list[Tensor]]:
    """Copies of the tensors of each part, found by the layers' attributes."""
    found: dict[str, list[Tensor]] = {}
    for layer in layers_of(model):
        for attribute in layer.adapter_layer_names:
            for factor in getattr(layer, attribute).values():
                found.setdefault(attribute, []).append(factor.weight.detach().clone())
    return found


@pytest.mark.parametrize(("config", "expected"), METHODS, ids=lambda v: str(v))
def test_each_trained_tensor_is_in_one_group(config: dict[str, Any], expected: list[str]) -> None:
    model = attach(tiny_llama(attention_bias=True), **config)
    assert parts_of(model.peft_config["default"]) == expected
    groups = parameter_groups(model, TrainRecipe())
    grouped = [id(tensor) for group in groups for tensor in group["params"]]
    trained = [id(tensor) for tensor in model.parameters() if tensor.requires_grad]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trained)
    assert list(dict.fromkeys(group["part"] for group in groups)) == expected


def test_groups_have_the_rates_and_decays_of_the_recipe() -> None:
    recipe = TrainRecipe(
        learning_rate=0.01,
        weight_decay=0.1,
        rates={"B": 16, "router": 0.5},
        weight_decays={"router": 0.0, "shared": 0.3},
    )
    groups = parameter_groups(hydra(shared_rank=2), recipe)
    got = {group["part"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert got == {
        "A": (0.01, 0.1),
        "B": (0.16, 0.1),
        "router": (0.005, 0.0),
        "shared": (0.01, 0.3),
    }


def test_biases_do_not_decay() -> None:
    model = attach(tiny_llama(attention_bias=True), method="lora", bias="manylora_only")
    groups = parameter_groups(model, TrainRecipe(weight_decay=0.1))
    assert [group["weight_decay"] for group in groups if group["part"] == "other"] == [0.0]
    assert {group["weight_decay"] for group in groups if group["part"] != "other"} == {0.1}


def test_frozen_part_has_no_group_and_is_not_called_dead() -> None:
    model = hydra(init_weights=False, shared_rank=2)
    groups = parameter_groups(model, TrainRecipe(rates={"A": 0, "shared": 0}))
    assert [group["part"] for group in groups] == ["B", "router"]
    frozen = [name for name, tensor in model.named_parameters() if not tensor.requires_grad]
    ours = [name for name in frozen if "manylora_" in name]
    assert ours and all("_A." in name or "_shared_B." in name for name in ours)
    tokens = torch.tensor([[3, 4, 5]])
    model(tokens, labels=tokens).loss.backward()
    assert dead_gradients(model, "default") == []


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"rates": {"scale": 2}}, r"rates.scale=2.0.*no scale; its parts are A, B, router$"),
        ({"weight_decays": {"gate": 0}}, "weight_decays.gate=0.0.*no gate"),
        ({"rates": {"shared": 0}}, "no shared"),
        ({"rates": {"A": 0, "B": 0, "router": 0}}, "nothing is left to train"),
    ],
)
def test_part_that_the_method_has_not_is_refused(recipe: dict[str, Any], message: str) -> None:
    train = TrainRecipe(**recipe)
    with pytest.raises(ValueError, match=message):
        check_parts(train, ManyLoraConfig(method="hydralora"))
    with pytest.raises(ValueError, match=message):
        parameter_groups(hydra(), train)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.rates.C=1", "should be 'A', 'B', 'router'.*got 'C'"),
        ("train.rates.B=-1", "B is -1.0; it must be 0 or more"),
        ("train.rates.B=.nan", "it must be 0 or more"),
        ("train.early_stopping=3", "set evaluate_every=STEPS"),
        ("train.report_to=[mlflow]", "'tensorboard', 'wandb' or 'trackio'"),
    ],
)
def test_wrong_options_are_refused_by_the_recipe(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, ["data=d", change])


def test_training_leaves_a_frozen_part_and_moves_the_others(tmp_path: Path) -> None:
    model = hydra(init_weights=False)
    before = parts(model)
    trainer(tmp_path, TrainRecipe(rates={"A": 0}, weight_decay=0.1), model).train()
    after = parts(model)
    assert all(map(torch.equal, before["manylora_A"], after["manylora_A"]))
    for part in ("manylora_B", "manylora_router"):
        assert not any(map(torch.equal, before[part], after[part]))


def test_first_step_moves_a_part_by_its_rate(tmp_path: Path) -> None:
    """Adam's first step moves a weight that has a gradient by the learning rate."""
    model = hydra(init_weights=False)
    before = parts(model)
    recipe = TrainRecipe(learning_rate=1e-3, rates={"B": 16, "router": 0.5}, schedule="constant")
    trainer(tmp_path, recipe, model, max_steps=1, warmup_steps=0).train()
    after = parts(model)
    for part, moved in (("A", 1e-3), ("B", 1.6e-2), ("router", 5e-4)):
        pairs = zip(before[f"manylora_{part}"], after[f"manylora_{part}"], strict=True)
        most = max(float((new - old).abs().max()) for old, new in pairs)
        assert most == pytest.approx(moved, rel=1e-2)


class RateWatch(TrainerCallback):
    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.rates.append({group["part"]: group["lr"] for group in optimizer.param_groups})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_every_part_follows_the_schedule(tmp_path: Path, schedule: str) -> None:
    """What is logged is the recipe's rate, also when the first group has another."""
    recipe = TrainRecipe(learning_rate=0.01, rates={"A": 4, "router": 0.5}, schedule=schedule)
    run = trainer(tmp_path, recipe, hydra(), warmup_steps=0.25)
    run.add_callback(watch := RateWatch())
    run.train()
    logged = [line["learning_rate"] for line in run.state.log_history if "loss" in line]
    for rate, parts_of_step in zip(logged, watch.rates, strict=True):
        assert parts_of_step == pytest.approx({"A": 4 * rate, "B": rate, "router": rate / 2})
    assert max(logged) == pytest.approx(0.01)
    assert schedule == "constant" or (logged[0] == 0.0 and 0 < logged[-1] < 0.005)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_equals_uninterrupted(tmp_path: Path, precision: str) -> None:
    recipe = TrainRecipe(learning_rate=0.01, rates={"A": 0, "B": 16}, weight_decays={"router": 0.1})
    options = {"save_strategy": "steps", "save_steps": 4, "bf16": precision == "bf16"}
    whole = hydra()
    trainer(tmp_path, recipe, whole, **options).train()
    resumed = hydra(seed=1)
    run = trainer(tmp_path, recipe, resumed, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    first, second = parts(whole), parts(resumed)
    assert first.keys() == second.keys()
    for part in first:
        assert all(map(torch.equal, first[part], second[part])), part
