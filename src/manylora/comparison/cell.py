"""One cell of a comparison: one training run of one method, scored row by row.

The rows, the split and the batches' order depend on the recipe and the seed alone, so two methods
with the same seed see the same rows in the same order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pyarrow as pa
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PrinterCallback, set_seed

from manylora.adapter.ids import branch_ids
from manylora.base import load_model
from manylora.comparison.contenders import Contender, for_steps
from manylora.comparison.ground import Ground
from manylora.comparison.reading import read, sums_by_row
from manylora.comparison.rows import SCHEMA
from manylora.comparison.site import needs_ids
from manylora.comparison.trainer import CellTrainer, has_own_tokens, prepared
from manylora.corpus import DrawOrder, Rows, dataset_of
from manylora.energy import energy_meter
from manylora.inspect import full_update
from manylora.precision import autocast
from manylora.recipe import Recipe
from manylora.run import device_name, peak_memory, versions
from manylora.train import training_arguments
from manylora.training.compiled import compiled_blocks
from manylora.training.out_of_memory import Batch
from manylora.training.packed_attention import packed_attention
from manylora.training.validation import eval_mode

Stage = Literal["rate", "test"]


@dataclass(frozen=True, eq=False)
class Cell:
    """A method at a rate with a seed; rate: scored on validation rows, test: on held-out rows."""

    contender: Contender
    lr: float
    seed: int
    stage: Stage


def run_cell(
    ground: Ground,
    cell: Cell,
    name: str,
    parallel: int = 1,
    energy: bool = False,
    keep: Path | None = None,
) -> tuple[dict[str, Any], pa.Table]:
    """Train and score; returns what the run took, and a row for each scored example.

    name: of the run, as the rows carry it. parallel: how many run side by side, this one included.
    energy: whether its energy is measured (training alone). keep: a folder for what a full
    fine-tuning that is scored on held-out rows changed (inspect/full_update.py).
    """
    started = time.perf_counter()
    recipe = ground.recipe
    train = recipe.train.model_copy(update={"learning_rate": cell.lr, "evaluate_every": None})
    recipe = recipe.model_copy(update={"train": train, "seed": cell.seed})
    set_seed(cell.seed)
    model = _model(recipe, cell.contender, steps_of(ground))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        model.to("cuda")
    use_ids = needs_ids(cell.contender.config)
    device: Any = next(model.parameters()).device
    meter = energy_meter(device, parallel=parallel) if energy else None
    with meter or nullcontext():
        steps, loss = _train(ground, recipe, model, use_ids)
    trained = time.perf_counter() - started
    scored = {"rate": ground.validation}
    if cell.stage == "test":
        scored = {"test": ground.test, "unseen": ground.unseen}
    with autocast(recipe.train.precision, device):
        table = [
            {"stage": stage, **row}
            for stage, rows in scored.items()
            for row in score_rows(ground, model, rows, use_ids)
        ]
    summary = {
        "method": cell.contender.name,
        "params": cell.contender.params,
        "lr": cell.lr,
        "seed": cell.seed,
        "stage": cell.stage,
        "steps": steps,
        "train_loss": loss,
        "train_seconds": trained,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(device),
        "device": device_name(device),
        "versions": versions(),
        "energy": None if meter is None else asdict(meter.energy),
        "full_update": None,
    }
    if keep is not None and cell.contender.config is None and cell.stage == "test":
        summary["full_update"] = _keep_update(recipe, model, keep)
    same = {
        "run": name,
        "method": cell.contender.name,
        "params": cell.contender.params,
        "lr": cell.lr,
        "seed": cell.seed,
    }
    return summary, pa.Table.from_pylist([same | row for row in table], schema=SCHEMA)


def steps_of(ground: Ground) -> int:
    """Optimizer steps of a run."""
    train = ground.recipe.train
    if train.max_steps is not None:
        return train.max_steps
    batches = math.ceil(sum(map(len, ground.train.values())) / train.batch_size)
    return math.ceil(math.ceil(batches / train.gradient_accumulation) * train.epochs)


def _model(recipe: Recipe, contender: Contender, steps: int) -> nn.Module:
    base = load_model(recipe.model, recipe.dtype, recipe.quantize)
    if contender.config is None:
        return base.requires_grad_(True)
    base.requires_grad_(False)
    return get_peft_model(base, for_steps(contender.config, steps))


def _keep_update(recipe: Recipe, model: nn.Module, folder: Path) -> str:
    """The name of the file of a full fine-tuning's update, or why it has none.

    The weights that it began with are read again, so that training does not hold them.
    """
    try:
        return full_update.save(folder, recipe.model, model).name
    except full_update.DivergedError as error:
        return str(error)  # a rate that is too high is a result of the comparison


def _train(ground: Ground, recipe: Recipe, model: Any, use_ids: bool) -> tuple[int, float]:
    """Train the model; returns the steps, and the mean loss of their last tenth, nats a token."""
    sizes = {task: len(rows) for task, rows in ground.train.items()}
    device = next(model.parameters()).device
    batch = Batch(recipe.train.batch_size, recipe.train.gradient_accumulation)
    # The trainer makes its output folder, though nothing is saved in it.
    with TemporaryDirectory(prefix="manylora-compare-") as folder:
        trainer = CellTrainer(
            DrawOrder(sizes, recipe.mixture, recipe.seed),
            use_ids,
            model=model,
            args=training_arguments(recipe.model_copy(update={"output": folder}), batch, device),
            train_dataset=dataset_of(ground.train, ground.tasks, ground.encoder),
            data_collator=ground.collator(recipe.packing),
        )
        trainer.remove_callback(PrinterCallback)
        with (
            packed_attention(model, recipe.packing),
            compiled_blocks(model, recipe.train.compile),
        ):
            trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    last = losses[-max(1, len(losses) // 10) :]
    return trainer.state.global_step, float(sum(last) / len(last))


@torch.inference_mode()
def score_rows(
    ground: Ground, model: Any, rows: dict[str, Rows], use_ids: bool
) -> list[dict[str, Any]]:
    """task, example, tokens, nll and correct of every row, tasks one after the other."""
    eval_mode(model)
    before_text = isinstance(model, PeftModel) and has_own_tokens(model)
    device = next(model.parameters()).device
    collate = ground.collator()
    found = []
    for task, own in rows.items():
        data = dataset_of({task: own}, [task], ground.encoder)
        order = sorted(range(len(own)), key=lambda i: int(own.sizes[i]))
        for places in _batches(order, ground.recipe.evaluate.batch_size):
            batch = collate([data[i] for i in places])
            ids = batch["task_ids"].fill_(ground.task_id(task))
            if ground.selector is not None:
                ids = batch["branch_ids"]
            on_device = {k: v.to(device) for k, v in batch.items() if k != "sources"}
            inputs, _ = prepared(on_device, False, before_text)
            with branch_ids(model, ids) if use_ids else nullcontext():
                answers = sums_by_row(read(model, inputs))
            for source, tokens, nll, correct in zip(batch["sources"], *answers, strict=True):
                found.append(
                    {
                        "task": task,
                        "example": source,
                        "tokens": int(tokens),
                        "nll": float(nll),
                        "correct": bool(correct),
                    }
                )
    return found


def _batches(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]
