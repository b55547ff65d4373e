"""The training run: a recipe in, a run folder out.

corpus -> frozen base + adapter -> TRL's SFTTrainer (loss on the answers alone) -> scores before and
after. `RunTrainer` adds what several tasks need: each example's task as its branch id, the order of
the mixture, the loss of each task.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from manylora.adapter.selector import BranchSelector
from manylora.adapter.training import ManyLoraTrainerMixin
from manylora.base import load_model, load_tokenizer
from manylora.corpus import (
    Collator,
    Corpus,
    Encoded,
    Strategy,
    encode_all,
    load_corpus,
    mixture_table,
    print_mixture,
    sample_order,
)
from manylora.corpus.encode import IGNORED, dataset_rows
from manylora.evaluate.held_out import Scorer
from manylora.precision import resolve_precision
from manylora.progress import GradientCheck, MetricsFile, ProgressBar
from manylora.recipe import Recipe, load_recipe
from manylora.run import write_card, write_summary

ADAPTER = "default"


@dataclass
class Prepared:
    """Everything a run trains with, loaded and checked."""

    recipe: Recipe
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    model: PeftModel
    train: dict[str, list[Encoded]]
    use_ids: bool


class MixtureSampler(Sampler[int]):
    """Row numbers in the order of the mixture, drawn anew for each epoch."""

    def __init__(self, sizes: dict[str, int], strategy: Strategy, seed: int) -> None:
        self.sizes, self.strategy, self.seed, self.epoch = sizes, strategy, seed, 0
        starts = [0, *torch.tensor(list(sizes.values())).cumsum(0).tolist()]
        self.starts = dict(zip(sizes, starts, strict=False))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for task, row in sample_order(self.sizes, self.strategy, self.seed, self.epoch):
            yield self.starts[task] + row

    def __len__(self) -> int:
        return len(sample_order(self.sizes, self.strategy, self.seed, 0))


class AnswerTrainer(SFTTrainer):
    """SFTTrainer that keeps the log-probability of each answer token in `log_probs`.

    Without a GPU, TRL projects every position to the vocabulary, a large part of a step on a small
    model; here only the answers are, which the collator has aligned at the end.
    """

    log_probs: Tensor

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if inputs["input_ids"].device.type == "cpu":
            return self._answer_loss(model, inputs, kwargs.get("num_items_in_batch"))
        outputs: list[Any] = []
        handle = model.register_forward_hook(lambda *hook: outputs.append(hook[2]))
        try:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            handle.remove()
        self.log_probs = outputs[0].log_probs.detach()
        return loss

    def _answer_loss(self, model: Any, inputs: dict[str, Any], items: Any) -> Tensor:
        labels = inputs.pop("labels")
        learned = (labels != IGNORED).any(0)
        keep = labels.shape[1] - int(learned.int().argmax())
        logits = model(**inputs, logits_to_keep=keep + 1, use_cache=False).logits[:, :-1]
        wanted = labels[:, -keep:]
        log_probs = -cross_entropy(
            logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(wanted)
        self.log_probs = log_probs.detach()
        inputs["labels"] = labels
        return -log_probs.sum() / ((wanted != IGNORED).sum() if items is None else items)


class RunTrainer(ManyLoraTrainerMixin, AnswerTrainer):
    """Knows the task of each example: its branch id, its loss, its place in the mixture."""

    def __init__(self, prepared: Prepared, sampler: MixtureSampler, **kwargs: Any) -> None:
        self.sampler = sampler
        self.use_ids = prepared.use_ids
        self.tasks = prepared.corpus.tasks
        self.step_ids: set[int] = set()
        self.unread: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.tokens = 0
        super().__init__(model=prepared.model, processing_class=prepared.tokenizer, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> MixtureSampler:
        return self.sampler

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tasks: Tensor = inputs.pop("task_ids")
        if self.use_ids:
            inputs["branch_ids"] = tasks
        if self.state.global_step < GradientCheck.STEPS:
            self.step_ids.update(tasks.tolist())
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        answers = (inputs["labels"] != IGNORED).sum(1)
        tokens = inputs["attention_mask"].sum()
        self.unread.append((tasks, -self.log_probs.sum(1), answers, tokens))
        return loss

    def read_task_losses(self) -> dict[str, tuple[float, int]]:
        """Summed loss (nats) and answer tokens of each task since the last call; counts tokens."""
        losses = torch.zeros(2, len(self.tasks), dtype=torch.float64)
        for tasks, loss, answers, tokens in self.unread:
            losses[0].index_add_(0, tasks.cpu(), loss.to("cpu", torch.float64))
            losses[1].index_add_(0, tasks.cpu(), answers.to("cpu", torch.float64))
            self.tokens += int(tokens)
        self.unread.clear()
        return {
            task: (loss, int(count))
            for task, loss, count in zip(self.tasks, *losses.tolist(), strict=True)
            if count
        }


def prepare(recipe: Recipe, console: Console) -> Prepared:
    """Read the corpus, load the base model and attach the adapter.

    Raises CorpusError, BaseModelError or ValueError before anything is written.
    """
    corpus = load_corpus(recipe.data_path, recipe.holdout, recipe.seed)
    tokenizer = load_tokenizer(recipe.model)
    train = {}
    for task, examples in corpus.train.items():
        train[task], too_long = encode_all(examples, tokenizer, recipe.max_length)
        if too_long:
            console.print(
                f"[yellow]{task}: {len(too_long)} of {len(examples)} training rows have "
                f"more than max_length={recipe.max_length} tokens and are left out"
            )
    print_mixture(mixture_table(train, recipe.mixture), console)
    set_seed(recipe.seed)
    base = load_model(recipe.model, recipe.dtype, recipe.quantize)
    if recipe.quantize is not None:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    config = recipe.config(len(corpus.tasks))
    branches = config.branches_of()
    if branches.gate == "one_hot" and branches.count != len(corpus.tasks):
        raise ValueError(
            f"adapter.gate='one_hot' trains one branch for each of the {len(corpus.tasks)} tasks, "
            f"but the adapter has {branches.count} branches; leave num_branches out"
        )
    if branches.needs_ids:
        config.branch_selector = fit_selector(train, corpus.tasks)
    model = get_peft_model(base, config, adapter_name=ADAPTER)
    if torch.cuda.is_available() and recipe.quantize is None:
        model.to("cuda")
    return Prepared(recipe, corpus, tokenizer, model, train, branches.needs_ids)


def fit_selector(train: dict[str, list[Encoded]], tasks: list[str]) -> BranchSelector:
    """Learn from the training prompts which task a prompt belongs to."""
    prompts = [item.input_ids[: item.prompt_length] for task in tasks for item in train[task]]
    owners = [i for i, task in enumerate(tasks) for _ in train[task]]
    return BranchSelector.fit(prompts, owners, tasks)


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
        mixture_table(prepared.train, recipe.mixture),
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
        prepared,
        MixtureSampler(sizes, recipe.mixture, recipe.seed),
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
