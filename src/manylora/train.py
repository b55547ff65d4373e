"""The training run: a recipe in, a run folder out.

corpus -> frozen base + adapter -> TRL's SFTTrainer (loss on the answers alone) -> scores before and
after.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig  # type: ignore[attr-defined]

from manylora.corpus import Collator
from manylora.corpus.encode import dataset_rows
from manylora.evaluate.held_out import Scorer
from manylora.precision import resolve_precision
from manylora.prepare import ADAPTER, Prepared, prepare
from manylora.progress import GradientCheck, MetricsFile, ProgressBar
from manylora.recipe import Recipe, load_recipe
from manylora.run import config_of, write_card, write_summary
from manylora.trainer import MixtureSampler, RunTrainer


def train(recipe: Recipe, console: Console | None = None, resume: bool = False) -> Path:
    """Run a recipe and return its run folder, complete with adapter, scores and report data.

    resume: go on from the last checkpoint of the same recipe's interrupted run; the result is the
    same as without the interruption. Raises FileNotFoundError when there is none.
    """
    console = console or Console(stderr=True)
    recipe = recipe.resolved()
    checkpoint = last_checkpoint(recipe) if resume else None
    if not resume:
        refuse_used_folder(recipe.run)
    prepared = prepare(recipe, console)
    run = recipe.run
    run.mkdir(parents=True, exist_ok=True)
    recipe.save(run)
    scorer = Scorer(recipe, prepared.corpus, prepared.tokenizer, console)
    clock = [time.perf_counter()]
    before = scorer.base(prepared.model)
    clock.append(time.perf_counter())
    trainer, dead = fit(prepared, run, console, checkpoint)
    clock.append(time.perf_counter())
    prepared.model.save_pretrained(str(run))
    scorer.write(run, before, *scorer.adapter(prepared.model))
    clock.append(time.perf_counter())
    write_summary(
        run,
        prepared.model,
        recipe,
        prepared.mixture,
        steps=trainer.state.global_step,
        train_tokens=trainer.tokens,
        train_seconds=clock[2] - clock[1],
        evaluate_seconds=clock[1] - clock[0] + clock[3] - clock[2],
        dead_gradients=dead,
    )
    write_card(run, recipe, prepared.corpus.tasks)
    return run


def refuse_used_folder(run: Path) -> None:
    if run.exists() and any(run.iterdir()):
        raise FileExistsError(
            f"the run folder {run} is not empty; choose another with output=FOLDER, or remove it"
        )


def last_checkpoint(recipe: Recipe) -> str:
    """The newest checkpoint of an interrupted run of this recipe."""
    found = None
    if (recipe.run / "checkpoints").is_dir():
        found = get_last_checkpoint(str(recipe.run / "checkpoints"))
    if found is None:
        raise FileNotFoundError(
            f"{recipe.run} has no checkpoint to resume from; checkpoints are written with "
            "train.checkpoint_every=STEPS, and without one the run has to start again"
        )
    known = load_recipe(recipe.run)
    if known != recipe:
        raise ValueError(
            f"the recipe is not the one that {recipe.run} was started with, so it cannot be "
            f"resumed; give the run folder itself: manylora train {recipe.run} --resume"
        )
    return str(found)


def fit(
    prepared: Prepared, run: Path, console: Console, checkpoint: str | None = None
) -> tuple[RunTrainer, list[str]]:
    """Train the adapter; returns the trainer and the names of tensors without a gradient."""
    recipe = prepared.recipe
    tasks = prepared.corpus.tasks
    sizes = {task: len(prepared.train[task]) for task in tasks}
    rows = dataset_rows((item for task in tasks for item in prepared.train[task]), tasks)
    check = GradientCheck(ADAPTER, console)
    metrics = MetricsFile(run / "metrics.jsonl")
    trainer = RunTrainer(
        MixtureSampler(sizes, recipe.mixture, recipe.seed),
        tasks,
        config_of(prepared.model).branches_of().needs_ids,
        model=prepared.model,
        processing_class=prepared.tokenizer,
        args=training_arguments(recipe, run, prepared.model.device),
        train_dataset=Dataset.from_list(rows),
        data_collator=Collator(int(prepared.tokenizer.pad_token_id), tasks),
        callbacks=[metrics, check, ProgressBar(console)],
    )
    trainer.remove_callback(PrinterCallback)
    metrics.trainer = check.trainer = trainer
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.read_task_losses()  # the steps after the last logged one count as well
    return trainer, check.dead


def training_arguments(recipe: Recipe, run: Path, device: torch.device) -> SFTConfig:
    """The recipe in the trainer's own terms."""
    train = recipe.train
    precision = resolve_precision(train.precision, device)
    return SFTConfig(
        output_dir=str(run / "checkpoints"),
        num_train_epochs=train.epochs,
        max_steps=-1 if train.max_steps is None else train.max_steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        gradient_checkpointing=train.gradient_checkpointing,
        logging_steps=train.log_every,
        logging_first_step=True,
        save_strategy="no" if train.checkpoint_every is None else "steps",
        save_steps=train.checkpoint_every or 500,
        save_total_limit=2,
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=device.type == "cuda",
    )
