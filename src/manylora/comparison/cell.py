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
from typing import Any, Literal

import pyarrow as pa
import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.ids import branch_ids
from manylora.base import load_model, load_tokenizer
from manylora.comparison.contenders import Contender, for_steps
from manylora.comparison.reading import read, sums_by_row
from manylora.comparison.rows import SCHEMA
from manylora.comparison.trainer import CellTrainer, has_own_tokens, prepared
from manylora.corpus import Collator, Corpus, DrawOrder, Encoder, Rows, dataset_of
from manylora.energy import energy_meter
from manylora.precision import autocast
from manylora.recipe import Recipe
from manylora.run import device_name, peak_memory, versions
from manylora.train import training_arguments
from manylora.training.clusters import settle
from manylora.training.out_of_memory import Batch
from manylora.training.prepare import fitting, read_corpus
from manylora.training.validation import eval_mode

Stage = Literal["rate", "test"]


@dataclass(frozen=True, eq=False)
class Cell:
    """A method at a rate with a seed; rate: scored on validation rows, test: on held-out rows."""

    contender: Contender
    lr: float
    seed: int
    stage: Stage


@dataclass(frozen=True)
class Ground:
    """What all cells share: the recipe, its rows, and how they are encoded.

    train, validation, test: rows that fit max_length, by task; of the scored ones at most
    evaluate.rows_per_task.
    """

    recipe: Recipe
    content: str
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    tasks: list[str]
    train: dict[str, Rows]
    validation: dict[str, Rows]
    test: dict[str, Rows]


def prepare_ground(recipe: Recipe, console: Console) -> Ground:
    """Read the recipe's rows; ValueError when it keeps no validation rows to tune the rates on."""
    most = recipe.evaluate.rows_per_task
    if most < 2:
        raise ValueError(
            f"evaluate.rows_per_task={most}: a comparison scores held-out rows; give 2 or more"
        )
    if not recipe.validation:
        raise ValueError(
            "a comparison tunes each method's learning rate on validation rows; set "
            "validation=0.1, the share of the training rows that is kept apart for it"
        )
    settled = settle(recipe, read_corpus(recipe, console), console)
    corpus: Corpus = settled.corpus
    tokenizer = load_tokenizer(recipe.model)
    encoder = Encoder(tokenizer, recipe.max_length)

    def fit(split: dict[str, Rows], most: int | None = None) -> dict[str, Rows]:
        rows = {task: fitting(task, own, encoder, console) for task, own in split.items()}
        return rows if most is None else {task: own.spread(most) for task, own in rows.items()}

    return Ground(
        settled.recipe,
        corpus.content,
        tokenizer,
        encoder,
        corpus.tasks,
        fit(corpus.train),
        fit(corpus.validation, most),
        fit(corpus.test, most),
    )


def run_cell(
    ground: Ground, cell: Cell, name: str, parallel: int = 1, energy: bool = False
) -> tuple[dict[str, Any], pa.Table]:
    """Train and score; returns what the run took, and a row for each scored example.

    name: of the run, as the rows carry it. parallel: how many run side by side, this one included.
    energy: whether its energy is measured (training alone).
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
    use_ids = _uses_ids(cell.contender)
    device: Any = next(model.parameters()).device
    meter = energy_meter(device, parallel=parallel) if energy else None
    with meter or nullcontext():
        steps, loss = _train(ground, recipe, model, use_ids)
    trained = time.perf_counter() - started
    rows = ground.validation if cell.stage == "rate" else ground.test
    with autocast(recipe.train.precision, device):
        table = score_rows(ground, model, rows, use_ids)
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
    }
    same = {
        "run": name,
        "method": cell.contender.name,
        "params": cell.contender.params,
        "lr": cell.lr,
        "seed": cell.seed,
        "stage": cell.stage,
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


def _uses_ids(contender: Contender) -> bool:
    config = contender.config
    return isinstance(config, ManyLoraConfig) and config.branches_of().needs_ids


def _train(ground: Ground, recipe: Recipe, model: Any, use_ids: bool) -> tuple[int, float]:
    """Train the model; returns the steps, and the mean loss of their last tenth, nats a token."""
    sizes = {task: len(rows) for task, rows in ground.train.items()}
    device = next(model.parameters()).device
    batch = Batch(recipe.train.batch_size, recipe.train.gradient_accumulation)
    trainer = CellTrainer(
        DrawOrder(sizes, recipe.mixture, recipe.seed),
        use_ids,
        model=model,
        args=training_arguments(recipe, batch, device),
        train_dataset=dataset_of(ground.train, ground.tasks, ground.encoder),
        data_collator=Collator(int(ground.tokenizer.pad_token_id)),
    )
    trainer.remove_callback(PrinterCallback)
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
    collate = Collator(int(ground.tokenizer.pad_token_id))
    found = []
    for task, own in rows.items():
        data = dataset_of({task: own}, ground.tasks, ground.encoder)
        order = sorted(range(len(own)), key=lambda i: int(own.sizes[i]))
        for places in _batches(order, ground.recipe.evaluate.batch_size):
            batch = collate([data[i] for i in places])
            ids = batch["task_ids"]
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
