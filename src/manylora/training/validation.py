"""Validation during training, and early stopping.

Every `evaluate_every` steps the validation rows are scored: for each task the loss in nats per
answer token, and their mean, each task counting the same however many rows it has. With
`early_stopping: N` training ends after N evaluations without a better mean, and the adapter goes
back to the best state.

The best state is a file of its own, `best/STEP.safetensors` in the run folder, so that it does not
depend on when checkpoints are written. What decides is in the trainer's state, which checkpoints
hold: best mean and its step. An older best file goes only once a later checkpoint is there, so a
run that resumes finds the file that its checkpoint speaks of.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from manylora.training.checkpoints import partial_of, sync
from manylora.training.progress import finite

BEST = "best"
_TASK = "eval_tasks/"


class ValidationMixin:
    """Left of a trainer that keeps task losses (`unread`, `read_task_losses`): scores each task.

    `eval_dataset` holds the validation rows of all tasks. Evaluating leaves training as it was:
    its random numbers, its running losses, its count of tokens.
    """

    unread: list[Any]
    tokens: int
    tasks: list[str]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        trainer = cast(Any, self)
        unread, tokens = self.unread, self.tokens
        self.unread = []
        try:
            eval_mode(trainer.model)  # the next training step switches back
            with (
                torch.random.fork_rng(devices=[]),
                torch.no_grad(),
                trainer.compute_loss_context_manager(),
            ):
                for inputs in dataloader:
                    trainer.compute_loss(trainer.model_wrapped, trainer._prepare_inputs(inputs))
            losses = self._over_processes(trainer.read_task_losses())
        finally:
            self.unread, self.tokens = unread, tokens
        if not losses:
            raise ValueError(
                "no task has a validation row with an answer to score; raise `validation`, the "
                "share of the training rows that is kept for it"
            )
        metrics = {f"{metric_key_prefix}_tasks/{task}": loss for task, loss in losses.items()}
        metrics[f"{metric_key_prefix}_loss"] = sum(losses.values()) / len(losses)
        rows = len(dataloader.dataset)
        return EvalLoopOutput(np.empty(0), label_ids=None, metrics=metrics, num_samples=rows)

    def _over_processes(self, losses: dict[str, tuple[float, int]]) -> dict[str, float]:
        """Nats per answer token of each task, summed over the processes of the run."""
        trainer = cast(Any, self)
        sums = torch.tensor([losses.get(task, (0.0, 0)) for task in self.tasks])
        if trainer.accelerator.num_processes > 1:
            sums = trainer.accelerator.reduce(sums.to(trainer.args.device), "sum").cpu()
        return {
            task: loss / count
            for task, (loss, count) in zip(self.tasks, sums.tolist(), strict=True)
            if count
        }


def eval_mode(model: nn.Module) -> None:
    """The model in eval mode, except 4-bit layers.

    In eval mode on a CPU, bitsandbytes repacks 4-bit weights for good, and no gradient passes them
    any more; the layer has nothing else that its mode would change.
    """
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()


class Validation(TrainerCallback):
    """Writes each evaluation to metrics.jsonl; with a patience, stops and restores the best state.

    every: steps between evaluations, as in the trainer's `eval_steps`.
    patience: evaluations without a better mean after which training ends; None never ends it.
    """

    def __init__(self, run: Path, every: int, patience: int | None, console: Console) -> None:
        self.metrics, self.folder = run / "metrics.jsonl", run / BEST
        self.every, self.patience, self.console = every, patience, console

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for file in self.folder.glob("*.safetensors"):  # of steps that will be done again
            if int(file.stem) > state.global_step and state.is_world_process_zero:
                file.unlink()
        control.should_training_stop |= self._worn_out(state)

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: Any = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        mean = metrics["eval_loss"]
        tasks = {
            name.removeprefix(_TASK): finite(loss)
            for name, loss in metrics.items()
            if name.startswith(_TASK)
        }
        if state.is_world_process_zero:
            line = {"step": state.global_step, "validation": tasks, "mean": finite(mean)}
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.patience is None:
            return
        if mean < (math.inf if state.best_metric is None else state.best_metric):
            state.best_metric, state.best_global_step = mean, state.global_step
            if state.is_world_process_zero:
                save_best(model, self.folder, state.global_step)
        if self._worn_out(state):
            control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint that knows the best step is there, so older best files can go."""
        if state.best_global_step and state.is_world_process_zero:
            for file in self.folder.glob("*.safetensors"):
                if int(file.stem) < state.best_global_step:
                    file.unlink()

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        worn_out = self._worn_out(state)
        stopped_midway = not worn_out and state.global_step < state.max_steps  # by a signal
        if self.patience is None or stopped_midway:
            return
        if state.best_global_step in (None, state.global_step):
            return
        restore_best(model, self.folder, state.best_global_step)
        if worn_out:
            reason = f"no better validation loss in {self.patience} evaluations, training ended"
        else:
            reason = "training is done"
        self.console.print(
            f"step {state.global_step}: {reason}; back to the best state, of step "
            f"{state.best_global_step} with a mean loss of {state.best_metric:.4f} nats a token",
            soft_wrap=True,
        )

    def _worn_out(self, state: Any) -> bool:
        if self.patience is None or not state.best_global_step:
            return False
        return bool(state.global_step - state.best_global_step >= self.patience * self.every)


def save_best(model: PeftModel, folder: Path, step: int) -> None:
    """Keep the adapter's state as the best one; the file is whole or not there."""
    folder.mkdir(exist_ok=True)
    state: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    file = folder / f"{step}.safetensors"
    partial = partial_of(file)
    save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, str(partial))
    sync(partial)
    os.replace(partial, file)
    sync(folder)


def restore_best(model: PeftModel, folder: Path, step: int) -> None:
    """Put the adapter back to the best state; FileNotFoundError when its file is gone."""
    file = folder / f"{step}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}, the best state of the run by its validation loss, is not there any more; "
            "the last state is in the newest checkpoint: start again from that one with start_from"
        )
    set_peft_model_state_dict(model, load_file(str(file)))
