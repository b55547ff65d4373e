"""Validation during training: what it measures, what it leaves alone, and when it ends the run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

from manylora.adapter.training import ManyLoraTrainerMixin
from manylora.training.validation import BEST, Validation, ValidationMixin, restore_best, save_best
from tiny import attach, tiny_llama

TASKS = ["often", "seldom", "absent"]


def row(task: int, prompt: int, answer: int) -> dict[str, Any]:
    return {"input_ids": [5, prompt, answer], "labels": [-100, -100, answer], "task_ids": task}


# Learning that the answer is always 9 helps at first, and then costs more and more where it is 8.
ROWS = [row(i % 2, 20 + i % 4, 9) for i in range(16)]
HELD_OUT = [row(0, 20 + i % 4, 9 if i else 8) for i in range(6)] + [row(1, 21, 9), row(1, 22, 8)]


class TaskTrainer(ValidationMixin, ManyLoraTrainerMixin, Trainer):
    """Keeps the loss of each task, as a run's trainer does."""

    def __init__(self, **kwargs: Any) -> None:
        self.tasks, self.unread, self.tokens = TASKS, [], 0
        super().__init__(**kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        tasks, labels = inputs.pop("task_ids"), inputs["labels"]
        logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
        self.unread.append((tasks, losses.detach()))
        return losses.mean()

    def read_task_losses(self) -> dict[str, tuple[float, int]]:
        found: dict[str, tuple[float, int]] = {}
        for tasks, losses in self.unread:
            for task, loss in zip(tasks.tolist(), losses.tolist(), strict=True):
                total, count = found.get(TASKS[task], (0.0, 0))
                found[TASKS[task]] = (total + loss, count + 1)
                self.tokens += 1
        self.unread.clear()
        return found


def trainer(
    run: Path,
    model: PeftModel,
    every: int | None = 2,
    patience: int | None = None,
    console: Console | None = None,
    **arguments: Any,
) -> TaskTrainer:
    run.mkdir(exist_ok=True)
    options: dict[str, Any] = {
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_steps": 40,
        "per_device_train_batch_size": 4,
        "eval_strategy": "no" if every is None else "steps",
        "eval_steps": every,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    callbacks = [] if every is None else [Validation(run, every, patience, console or Console())]
    return TaskTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(run / "checkpoints"), **options | arguments),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(HELD_OUT),
        callbacks=callbacks,
    )


def hydra(**config: Any) -> PeftModel:
    return attach(tiny_llama(), method="hydralora", **config)


def lines(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def state(model: PeftModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_each_task_counts_the_same(tmp_path: Path) -> None:
    model = hydra(init_weights=False)
    trainer(tmp_path, model, every=2, max_steps=2).train()
    (line,) = lines(tmp_path)
    assert line["step"] == 2 and list(line["validation"]) == ["often", "seldom"]
    model.eval()
    for number, task in enumerate(("often", "seldom")):
        mine = [item for item in HELD_OUT if item["task_ids"] == number]
        with torch.no_grad():
            logits = model(torch.tensor([item["input_ids"] for item in mine])).logits[:, 1]
        answers = torch.tensor([item["labels"][-1] for item in mine])
        assert line["validation"][task] == pytest.approx(float(cross_entropy(logits, answers)))
    mean = (line["validation"]["often"] + line["validation"]["seldom"]) / 2
    assert line["mean"] == pytest.approx(mean)


def test_validation_leaves_training_as_it_was(tmp_path: Path) -> None:
    runs = []
    for every in (None, 2):
        model = hydra(lora_dropout=0.3)
        run = trainer(tmp_path / str(every), model, every, max_steps=6)
        run.train()
        runs.append((state(model), run.read_task_losses(), run.tokens))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


def test_training_stops_and_goes_back_to_the_best_state(tmp_path: Path) -> None:
    said = Console(file=io.StringIO(), width=200)
    model = hydra()
    run = trainer(tmp_path, model, every=2, patience=3, console=said)
    run.train()
    means = {line["step"]: line["mean"] for line in lines(tmp_path)}
    best = min(means, key=means.__getitem__)
    assert best > 2, "it has to get better before it gets worse"
    assert run.state.global_step == best + 6 == max(means)
    assert run.evaluate()["eval_loss"] == means[best]
    assert f"back to the best state, of step {best} with" in said.file.getvalue()
    fresh = hydra(seed=5)
    restore_best(fresh, tmp_path / BEST, best)
    assert same(state(fresh), state(model))


def test_without_patience_the_last_state_stays(tmp_path: Path) -> None:
    model = hydra()
    run = trainer(tmp_path, model, every=4, max_steps=24)
    run.train()
    means = [line["mean"] for line in lines(tmp_path)]
    assert len(means) == 6 and min(means) < means[-1]
    assert run.evaluate()["eval_loss"] == means[-1]
    assert not (tmp_path / BEST).exists()


class StopAfter(TrainerCallback):
    """Ends the process's training there, as a kill would, before anything is restored."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("saved", [3, 6, 9, 12])
def test_resumed_stops_where_the_uninterrupted_run_does(tmp_path: Path, saved: int) -> None:
    """Checkpoints fall between evaluations, and before and after the best one."""
    options = {"every": 2, "patience": 3, "save_strategy": "steps", "save_steps": 3}
    whole = hydra(lora_dropout=0.1)
    first = trainer(tmp_path / "whole", whole, **options)
    first.train()
    run = tmp_path / "killed"
    killed = trainer(run, hydra(lora_dropout=0.1), **options)
    killed.add_callback(StopAfter(saved))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = hydra(seed=1, lora_dropout=0.1)
    second = trainer(run, resumed, **options)
    second.train(resume_from_checkpoint=str(run / "checkpoints" / f"checkpoint-{saved}"))
    assert same(state(whole), state(resumed))
    for key in ("global_step", "best_global_step", "best_metric"):
        assert getattr(first.state, key) == getattr(second.state, key)


class Signal(TrainerCallback):
    """Ends training in good order, as SIGTERM does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 13


def test_a_run_stopped_by_a_signal_keeps_its_last_state(tmp_path: Path) -> None:
    """It will go on from there; only a finished run goes back to the best state."""
    said = Console(file=io.StringIO())
    stopped, whole = hydra(), hydra()
    run = trainer(tmp_path / "stopped", stopped, patience=9, console=said)
    run.add_callback(Signal())
    run.train()
    assert 0 < run.state.best_global_step < 12
    trainer(tmp_path / "whole", whole, every=None, max_steps=13).train()
    assert same(state(stopped), state(whole))
    assert said.file.getvalue() == ""


def test_only_the_best_file_that_a_checkpoint_knows_is_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, hydra(), patience=3, save_strategy="steps", save_steps=2)
    run.train()
    kept = [file.name for file in (tmp_path / BEST).iterdir()]
    assert kept == [f"{run.state.best_global_step}.safetensors"]


def test_lost_best_file_is_named(tmp_path: Path) -> None:
    model = hydra()
    save_best(model, tmp_path / BEST, 4)
    with pytest.raises(FileNotFoundError, match=r"6.safetensors, the best state.*start_from"):
        restore_best(model, tmp_path / BEST, 6)


def test_a_lost_loss_is_never_the_best(tmp_path: Path) -> None:
    model = hydra()
    callback = Validation(tmp_path, 2, 2, Console())
    run = trainer(tmp_path, model, every=None)
    run.state.global_step = 2
    losses = {"eval_loss": float("nan"), "eval_tasks/often": float("nan")}
    callback.on_evaluate(run.args, run.state, run.control, metrics=losses, model=model)
    assert lines(tmp_path) == [{"step": 2, "validation": {"often": None}, "mean": None}]
    assert run.state.best_global_step is None and not (tmp_path / BEST).exists()
