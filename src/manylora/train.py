"""The training run: a recipe in, a run folder out.

corpus -> frozen base + adapter -> TRL's SFTTrainer (loss on the answers alone) -> scores before and
after. A run that is stopped, by whatever, goes on from its last checkpoint to the same result.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig  # type: ignore[attr-defined]

from manylora.corpus import Collator, DrawOrder, dataset_of
from manylora.evaluate.held_out import Scorer
from manylora.evaluate.scores import Metrics
from manylora.precision import resolve_precision
from manylora.recipe import RECIPE_FILE, Recipe
from manylora.run import config_of, write_card, write_summary
from manylora.training.checkpoints import (
    CHECKPOINTS,
    last_checkpoint,
    new_partial,
    prune,
    publish_files,
    write_atomically,
)
from manylora.training.choosing import ChoosingCollator
from manylora.training.clusters import KEPT, keep
from manylora.training.compiled import check_compile, compiled_blocks
from manylora.training.interrupts import Interrupts
from manylora.training.keeping import errors_tell_what_is_kept, signals_tell_what_is_kept
from manylora.training.metering import check_energy, energy_of, metering
from manylora.training.out_of_memory import Batch, StartingPoint, smaller_batch
from manylora.training.packed_attention import packed_attention
from manylora.training.prepare import ADAPTER, Prepared, prepare
from manylora.training.progress import GradientCheck, MetricsFile, ProgressBar
from manylora.training.ranks import first_process, several_processes, use_own_gpu
from manylora.training.reporting import PROJECT, check_reporters, reporters
from manylora.training.run_folder import is_begun, refuse_used_folder, run_folder
from manylora.training.start import inherit, read_start
from manylora.training.survival import Saves, read_progress
from manylora.training.trainer import RunTrainer
from manylora.training.validation import BEST, Validation

# transformers' "constant" knows no warm-up.
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def train(recipe: Recipe, console: Console | None = None, resume: bool = False) -> Path:
    """Run a recipe and return its run folder, complete with adapter, scores and report data.

    resume: go on from the last checkpoint of the same recipe's run, or from its start when there
    is none; the result is the same as without the interruption.

    Raises RunError, which says what is kept, for what stops a run that has begun, and Interrupted
    for a signal.
    """
    console = console or Console(stderr=True)
    check_reporters(recipe.train.report_to)
    check_energy(recipe.train.energy)
    check_compile(recipe.train.compile)
    if recipe.start_from is not None:
        recipe = inherit(recipe, read_start(Path(recipe.start_from)))
    recipe = recipe.resolved()
    run = recipe.run
    use_own_gpu()
    if not first_process():
        train_along(recipe)
        return run
    with Interrupts() as interrupts, run_folder(run), signals_tell_what_is_kept(run):
        begun = resume and is_begun(recipe, console)
        if not begun:
            refuse_used_folder(run)
        with errors_tell_what_is_kept(run) if begun else nullcontext():
            prepared = prepare(recipe, console, run / KEPT if begun else None)
        with errors_tell_what_is_kept(run):
            save_recipe(prepared)
            finish(prepared, console, interrupts)
    return run


def train_along(recipe: Recipe) -> None:
    """What a process that is not the first does: train with the others, and write nothing."""
    quiet, kept = Console(quiet=True), recipe.run / KEPT
    with Interrupts() as interrupts:
        fit(prepare(recipe, quiet, kept if kept.is_dir() else None), quiet, interrupts)


def save_recipe(prepared: Prepared) -> None:
    """Write recipe.yaml, from which on the run has begun, and before it the run's discovery."""
    recipe, run = prepared.recipe, prepared.recipe.run
    partial = new_partial(run / RECIPE_FILE)
    recipe.save(partial)
    if prepared.discovery is not None and not (run / KEPT).is_dir():
        keep(prepared.discovery, partial)
    publish_files(partial, run, last=RECIPE_FILE)


def finish(prepared: Prepared, console: Console, interrupts: Interrupts) -> None:
    """From wherever the run stands to its last file."""
    recipe, run = prepared.recipe, prepared.recipe.run
    scorer = Scorer(recipe, prepared.corpus, prepared.tokenizer, console, prepared.tasks)
    before, seconds = scores_before(scorer, prepared, run)
    trainer = fit(prepared, console, interrupts)
    started = time.perf_counter()
    after = scorer.adapter(prepared.model)
    partial = new_partial(run / "finished")
    prepared.model.save_pretrained(str(partial))
    scorer.write(partial, before, *after)
    write_summary(
        partial,
        prepared.model,
        recipe,
        prepared.mixture,
        steps=trainer.state.global_step,
        train_tokens=trainer.tokens,
        batch_size=trainer.args.per_device_train_batch_size,
        gradient_accumulation=trainer.args.gradient_accumulation_steps,
        train_seconds=trainer.seconds,
        evaluate_seconds=seconds + time.perf_counter() - started,
        dead_gradients=trainer.dead,
        energy=energy_of(trainer),
    )
    write_card(partial, recipe, prepared.tasks)
    publish_files(partial, run, last="adapter_config.json")
    before_file(run).unlink(missing_ok=True)
    shutil.rmtree(run / BEST, ignore_errors=True)
    prune(run, keep=1)


def before_file(run: Path) -> Path:
    return run / CHECKPOINTS / "before.json"


def scores_before(
    scorer: Scorer, prepared: Prepared, run: Path
) -> tuple[dict[str, Metrics], float]:
    """The base model's scores and how long they took; a resumed run reads them back."""
    path = before_file(run)
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["data"] != prepared.corpus.content:
            raise ValueError(
                f"the data are not what they were when {run} began, so it cannot go on; put them "
                "back, or start a new run"
            )
        return found["scores"], found["seconds"]
    started = time.perf_counter()
    scores = scorer.base(prepared.model)
    seconds = time.perf_counter() - started
    path.parent.mkdir(exist_ok=True)
    known = {"data": prepared.corpus.content, "seconds": seconds, "scores": scores}
    write_atomically(path, json.dumps(known))
    return scores, seconds


def fit(prepared: Prepared, console: Console, interrupts: Interrupts) -> RunTrainer:
    """Train the adapter, in smaller batches where the memory asks for it."""
    run, train = prepared.recipe.run, prepared.recipe.train
    batch = Batch(train.batch_size, train.gradient_accumulation)
    if (checkpoint := last_checkpoint(run)) is not None:
        done = read_progress(checkpoint)
        batch = Batch(done["batch_size"], done["gradient_accumulation"])
    start = None
    more = validations(prepared.recipe, console)
    more += reporters(train.report_to, run) if first_process() else []
    while True:
        trainer, bar = make_trainer(prepared, batch, console, interrupts, more)
        start = start or StartingPoint(prepared.model)
        try:
            device = prepared.model.device
            with (
                interrupts.waiting(),
                metering(trainer, device, train.energy),
                packed_attention(prepared.model, prepared.recipe.packing),
                compiled_blocks(prepared.model, train.compile),
            ):
                trainer.go_on(last_checkpoint(run))
            trainer.read_task_losses()  # the steps after the last logged one count as well
            return trainer
        except torch.OutOfMemoryError:
            if several_processes():
                raise
            # Its traceback holds the step's tensors, so the rest has to be outside of it.
        finally:
            bar.stop()
        batch = smaller_batch(batch, console)
        trainer.accelerator.unwrap_model(prepared.model, keep_fp32_wrapper=False)
        trainer.accelerator.free_memory()
        start.restore(prepared.model)
        del trainer, bar
        gc.collect()
        torch.cuda.empty_cache()


def validations(recipe: Recipe, console: Console) -> list[TrainerCallback]:
    train = recipe.train
    if train.evaluate_every is None:
        return []
    return [Validation(recipe.run, train.evaluate_every, train.early_stopping, console)]


def make_trainer(
    prepared: Prepared,
    batch: Batch,
    console: Console,
    interrupts: Interrupts,
    more: list[TrainerCallback],
) -> tuple[RunTrainer, ProgressBar]:
    """A trainer and its progress bar; `more` are callbacks that come after metrics.jsonl's."""
    recipe, validation = prepared.recipe, prepared.validation
    sizes = {task: len(rows) for task, rows in prepared.train.items()}
    saves = Saves(recipe.train.checkpoint_every, interrupts)
    check = GradientCheck(ADAPTER, console)
    metrics = MetricsFile(recipe.run / "metrics.jsonl")
    bar = ProgressBar(console)
    trainer = RunTrainer(
        DrawOrder(sizes, recipe.mixture, recipe.seed),
        prepared.tasks,
        config_of(prepared.model).branches_of().needs_ids,
        recipe.train,
        model=prepared.model,
        processing_class=prepared.tokenizer,
        args=training_arguments(recipe, batch, prepared.model.device),
        train_dataset=dataset_of(prepared.train, prepared.tasks, prepared.encoder),
        eval_dataset=dataset_of(validation, prepared.tasks, prepared.encoder)
        if recipe.train.evaluate_every
        else None,
        data_collator=ChoosingCollator(
            Collator(int(prepared.tokenizer.pad_token_id), recipe.packing),
            config_of(prepared.model).branch_selector if recipe.choice == "selector" else None,
        ),
        callbacks=[saves, metrics, *more, check, bar],
    )
    trainer.remove_callback(PrinterCallback)
    saves.trainer = metrics.trainer = check.trainer = trainer
    return trainer, bar


def training_arguments(recipe: Recipe, batch: Batch, device: torch.device) -> SFTConfig:
    """The recipe in the trainer's own terms."""
    train = recipe.train
    precision = resolve_precision(train.precision, device)
    arguments = SFTConfig(
        output_dir=str(recipe.run / CHECKPOINTS),
        num_train_epochs=train.epochs,
        max_steps=-1 if train.max_steps is None else train.max_steps,
        per_device_train_batch_size=batch.size,
        gradient_accumulation_steps=batch.accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type=SCHEDULES[train.schedule],
        warmup_steps=train.warmup,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        gradient_checkpointing=train.gradient_checkpointing,
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",  # `Saves` decides
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        eval_strategy="steps" if train.evaluate_every else "no",
        eval_steps=train.evaluate_every,
        per_device_eval_batch_size=recipe.evaluate.batch_size,
        report_to="none",  # `reporters` does
        run_name=recipe.run.name,
        project=PROJECT,
        dataloader_num_workers=train.workers,
        disable_tqdm=True,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=device.type == "cuda",
    )
    # A process trains on one GPU: on more, transformers would split its batches (DataParallel).
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
