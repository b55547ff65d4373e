"""The trainer mixin in TRL: balance loss under accumulation, small tensors, SFT and DPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import manylora
from manylora.adapter.layer import layers_of
from manylora.adapter.training import (
    ManyLoraTrainerMixin,
    dead_gradients,
    keep_small_tensors_in_float32,
)
from tiny import attach, tiny_llama


class MixedSFT(ManyLoraTrainerMixin, SFTTrainer):
    pass


class MixedTrainer(ManyLoraTrainerMixin, Trainer):
    pass


ROWS = [{"input_ids": [5, 9, 3, 7, 4], "labels": [-100, -100, 3, 7, 4]}] * 8
ARGUMENTS: dict[str, Any] = {
    "learning_rate": 0.1,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 1,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
    "bf16": False,
}


def sft(tiny_folder: Path, out: Path, model: nn.Module, batch: int, accumulation: int) -> MixedSFT:
    arguments = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_length=None,
        **ARGUMENTS,
    )
    return MixedSFT(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
    )


def hydra(**config: Any) -> PeftModel:
    model = tiny_llama(vocab_size=300)
    return attach(model, task_type="CAUSAL_LM", init_weights=False, **config)


def routers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "router" in n}


@pytest.mark.parametrize("trainer", ["sft", "plain"])
def test_balance_loss_weighs_the_same_under_accumulation(
    tiny_folder: Path, tmp_path: Path, trainer: str
) -> None:
    """All rows are equal, so one batch of 8 and 4 batches of 2 have the same balance loss."""
    moved = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = hydra(balance_loss="switch", balance_weight=100.0)
        if trainer == "sft":
            run = sft(tiny_folder, tmp_path, model, batch, accumulation)
        else:
            arguments = TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                **ARGUMENTS,
            )
            run = MixedTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(ROWS))
        before = routers(model)
        run.train()
        after = routers(model)
        moved.append({name: after[name] - before[name] for name in before})
    assert max(float(change.abs().max()) for change in moved[0].values()) > 1e-3
    for name in moved[0]:
        assert torch.allclose(moved[0][name], moved[1][name], atol=1e-5)


def test_balance_loss_reaches_the_router_through_trl(tiny_folder: Path, tmp_path: Path) -> None:
    moved = []
    for weight in (0.0, 100.0):
        model = hydra(balance_loss="cv_squared", balance_weight=weight)
        before = routers(model)
        sft(tiny_folder, tmp_path, model, 8, 1).train()
        after = routers(model)
        moved.append(max(float((after[n] - before[n]).abs().max()) for n in before))
    assert moved[1] > 10 * moved[0]


def test_balance_loss_of_a_plain_loop_is_the_mean_over_layers_and_then_forgotten() -> None:
    model = hydra(balance_loss="switch", balance_weight=0.5)
    model.train()
    model(torch.tensor([[3, 4, 5]]))
    losses = [layer.routing_loss["default"] for layer in layers_of(model)]
    total = manylora.balance_loss(model)
    assert torch.allclose(total, torch.stack(losses).mean())
    assert manylora.balance_loss(model) == 0.0


def test_branch_ids_column_reaches_the_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    model = hydra(method="branch_per_cluster")
    rows = [{**row, "branch_ids": i % 2} for i, row in enumerate(ROWS)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}
        return {**columns, "attention_mask": torch.ones_like(columns["input_ids"])}

    before = {n: p.detach().clone() for n, p in model.named_parameters() if "manylora_B" in n}
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        remove_unused_columns=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        **ARGUMENTS,
    )
    MixedSFT(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=collate,
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
    ).train()
    for name, start in before.items():
        change = (dict(model.named_parameters())[name] - start).abs().split(8, 1)
        assert float(change[0].max()) > 0 and float(change[1].max()) > 0
        assert float(change[2].max()) == 0  # no example had id 2


def test_operations_are_counted_as_transformers_counts_them(tmp_path: Path) -> None:
    rows = [{"input_ids": [5] * size, "labels": [5] * size} for size in (2, 7, 3)]
    counted = []
    for kind in (MixedTrainer, Trainer):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=1, **{**ARGUMENTS, "max_steps": 3}
        )
        trainer = kind(model=hydra(), args=arguments, train_dataset=Dataset.from_list(rows))
        trainer.train()
        counted.append(trainer.state.total_flos)
    assert counted[0] == counted[1] > 0


def test_small_tensors_stay_in_float32() -> None:
    for method, part in (("hydralora", "router"), ("multilora", "scale")):
        model = attach(tiny_llama(), method=method)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        keep_small_tensors_in_float32(model)
        layer = layers_of(model)[0]
        assert getattr(layer, f"manylora_{part}")["default"].weight.dtype == torch.float32
        assert layer.manylora_A["default"].weight.dtype == torch.bfloat16
        loss = model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss
        loss.backward()
        assert torch.isfinite(loss)


@pytest.mark.parametrize("method", ["hydralora", "multilora"])
def test_sft_trains_and_reloads(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    model = tiny_llama(vocab_size=300)
    model = attach(model, method=method, task_type="CAUSAL_LM")
    run = sft(tiny_folder, tmp_path, model, 4, 1)
    run.args.max_steps = 3
    run.train()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_llama(vocab_size=300), tmp_path / "adapter")
    tokens = torch.tensor([[5, 9, 3]])
    model.eval()
    again.eval()
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert not torch.equal(model(tokens).logits, tiny_llama(vocab_size=300)(tokens).logits)


@pytest.mark.parametrize("method", ["hydralora", "multilora"])
def test_dpo_learns_against_the_frozen_start(
    tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    rows = [{"prompt": "sky", "chosen": " blue", "rejected": " green"}] * 8
    model = attach(tiny_llama(vocab_size=300), method=method, task_type="CAUSAL_LM")
    arguments = {**ARGUMENTS, "max_steps": 8, "optim": "adamw_torch", "learning_rate": 0.02}
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(tmp_path), logging_steps=1, max_length=None, **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[0]) == pytest.approx(0.6931, abs=1e-3)  # log 2: policy equals reference
    assert float(losses[-1]) < 0.6


def test_dead_branch_is_named() -> None:
    model = attach(tiny_llama(), method="hydralora", init_weights=False)
    tokens = torch.tensor([[3, 4, 5]])
    model(tokens, labels=tokens).loss.backward()
    assert dead_gradients(model, "default") == []
    layer = layers_of(model)[0]
    layer.manylora_B["default"].weight.grad[:, 8:16] = 0
    layer.manylora_router["default"].weight.grad = None
    assert dead_gradients(model, "default") == [
        f"{layer.name}.manylora_B, branch 1",
        f"{layer.name}.manylora_router",
    ]


@pytest.mark.parametrize("method", ["hydralora", "multilora", "lora_moe", "lora_split"])
def test_gradients_that_are_zero_by_design_are_not_called_dead(method: str) -> None:
    model = attach(tiny_llama(), method=method)
    tokens = torch.tensor([[3, 4, 5]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        assert dead_gradients(model, "default") == []
        optimizer.step()


def test_branches_without_an_example_yet_are_not_called_dead() -> None:
    model = attach(tiny_llama(), method="branch_per_cluster", init_weights=False)
    tokens = torch.tensor([[3, 4, 5]])
    with manylora.branch_ids(model, 1):
        model(tokens, labels=tokens).loss.backward()
    assert dead_gradients(model, "default", {1}) == []
    assert any("branch 0" in name for name in dead_gradients(model, "default", {0, 1}))
