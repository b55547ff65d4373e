"""A live adapter as an lm-eval model.

lm-eval's own class for transformers models does the work. It pads on the right and gives no
attention mask, so an adapter that chooses its branch from the prompt would choose it from padding
and answers too; here the branch of each request is chosen from its prompt alone, and requests of
one branch are run together. Import this after `require_lm_eval`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.ids import branch_ids
from manylora.adapter.selector import BranchSelector
from manylora.evaluate.answers import Model, left_padded
from manylora.precision import Precision

DTYPES: dict[Precision, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
BATCHES_A_PIECE = 16
"""Scoring goes to lm-eval in pieces of so many batches: what the progress bar moves by."""


class AdapterLM(HFLM):
    """`HFLM` that tells the adapter each request's branch, and shows its progress.

    precision: to compute in, as in a recipe; written answers are in fp32 on a CPU, where autocast
    would cast every frozen weight again for each token. task: the branch of all prompts, for
    adapters that choose it by task; else their saved selector chooses for each prompt.
    truncated: how many requests were longer than the model reads, and lost the beginning of their
    prompt.

    Raises ValueError for a task that the adapter does not have.
    """

    mixed_precision_dtype: torch.dtype | None

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        console: Console,
        task: str | None = None,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype=torch.float32,  # else likelihoods of bf16 logits have three digits
            mixed_precision_dtype=DTYPES[precision],
        )
        self.selector = _selector(model, task)
        self.fixed = None if task is None or self.selector is None else _place(self.selector, task)
        self.console = console
        self.truncated = 0
        self._keep = 0

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Each request: (texts, prompt ids, answer ids)."""
        if self.selector is not None and self.fixed is None and any(r[0] is None for r in requests):
            raise ValueError(
                "this task scores texts that have no prompt, from which the adapter could choose "
                f"its branch; give task=, one of {', '.join(self.selector.names)}"
            )
        lengths = [len(prompt) + len(answer) for _, prompt, answer in requests]
        self.truncated += sum(length > self.max_length + 1 for length in lengths)
        return self._by_branch(
            "scoring answers",
            requests,
            [prompt for _, prompt, _ in requests],
            lengths,
            int(self.batch_size) * BATCHES_A_PIECE,
            lambda piece: self._score_piece(piece, override_bs),
        )

    def _score_piece(self, piece: list[Any], override_bs: int | None) -> list[Any]:
        ends = [min(len(prompt) + len(answer) - 1, self.max_length) for _, prompt, answer in piece]
        starts = [end - len(answer) for end, (_, _, answer) in zip(ends, piece, strict=True)]
        self._keep = max(ends) - min(starts)
        return HFLM._loglikelihood_tokens(self, piece, True, override_bs)

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits of the last tokens alone, as many as a piece needs: lm-eval counts from the end.

        Those of all tokens, over a vocabulary of today, would fill the memory.
        """
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            ),
        ):
            logits: Tensor = self.model(inps, logits_to_keep=self._keep).logits
        return logits

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to requests of lm-eval."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        for request, prompt in zip(requests, prompts, strict=True):
            room = self.max_length - request.args[1].get("max_gen_toks", self.max_gen_toks)
            if room <= 0:
                raise ValueError(
                    f"{request.task_name}: answers of up to {self.max_length - room} tokens leave "
                    f"no room for a prompt in the {self.max_length} tokens that the model reads"
                )
            self.truncated += len(prompt) > room
        with self._no_autocast_on_cpu():
            return self._by_branch(
                "writing answers",
                requests,
                prompts,
                [len(prompt) for prompt in prompts],
                int(self.batch_size),
                lambda piece: HFLM.generate_until(self, piece, True),
            )

    @contextmanager
    def _no_autocast_on_cpu(self) -> Iterator[None]:
        before = self.mixed_precision_dtype
        self.mixed_precision_dtype = None if self.device.type == "cpu" else before
        try:
            yield
        finally:
            self.mixed_precision_dtype = before

    def _by_branch(
        self,
        what: str,
        requests: Sequence[Any],
        prompts: list[list[int]],
        lengths: list[int],
        size: int,
        run: Callable[[list[Any]], list[Any]],
    ) -> list[Any]:
        """Run the requests in pieces of one branch and of like lengths, longest first."""
        branches = self._branches(prompts)
        answers: list[Any] = [None] * len(requests)
        with _progress(self.console) as bar:
            shown = bar.add_task(what, total=len(requests))
            for piece in _pieces(branches, lengths, prompts, size):
                with self._branch(branches[piece[0]]):
                    found = run([requests[i] for i in piece])
                for i, answer in zip(piece, found, strict=True):
                    answers[i] = answer
                bar.update(shown, advance=len(piece))
        return answers

    def _branches(self, prompts: list[list[int]]) -> list[int | None]:
        if self.selector is None or self.fixed is not None:
            return [self.fixed] * len(prompts)
        chosen: dict[tuple[int, ...], int] = {}
        distinct = list({tuple(prompt): None for prompt in prompts})
        for start in range(0, len(distinct), 64):
            some = distinct[start : start + 64]
            ids, mask, _ = left_padded([list(prompt) for prompt in some], 0)
            picked = self.selector.select(ids, mask.bool()).tolist()
            chosen.update(zip(some, picked, strict=True))
        return [chosen[tuple(prompt)] for prompt in prompts]

    def _branch(self, branch: int | None) -> AbstractContextManager[Any]:
        return nullcontext() if branch is None else branch_ids(self.model, branch)


def _selector(model: Model, task: str | None) -> BranchSelector | None:
    """What chooses the branch, for adapters of which each prompt uses one."""
    config = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    if isinstance(config, ManyLoraConfig) and config.branches_of().needs_ids:
        if config.branch_selector is None:
            raise ValueError(
                "the adapter uses one branch for each prompt and has no selector to choose it; "
                "adapters of `manylora train` have one"
            )
        return config.branch_selector
    if task is not None:
        raise ValueError(
            f"the adapter does not choose its branch by task, so task={task!r} has no meaning; "
            "leave it out"
        )
    return None


def _place(selector: BranchSelector, task: str) -> int:
    if task not in selector.names:
        raise ValueError(f"no task {task!r} in the adapter; it has {', '.join(selector.names)}")
    return selector.names.index(task)


def _pieces(
    branches: Sequence[int | None],
    lengths: Sequence[int],
    prompts: Sequence[list[int]],
    size: int,
) -> Iterator[list[int]]:
    """Row numbers in pieces of one branch. Rows of one prompt are neighbours: lm-eval reads a
    prompt once for all its one-token answers."""

    def key(i: int) -> tuple[int, int, list[int]]:
        branch = branches[i]
        return (-1 if branch is None else branch, -lengths[i], prompts[i])

    piece: list[int] = []
    for i in sorted(range(len(lengths)), key=key):
        if piece and (len(piece) == size or branches[i] != branches[piece[0]]):
            yield piece
            piece = []
        piece.append(i)
    if piece:
        yield piece


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
