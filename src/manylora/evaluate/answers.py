"""How likely a model finds given answers, and what it answers itself: the model calls of scoring.

Prompts are padded on the left with their own position ids and read once, whatever the number of
answers to compare; each answer continues from the prompt's cache. Neither padding nor batch mates
change a score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from manylora.adapter.ids import branch_ids
from manylora.inspect.routing import RoutingMeter

Model = PreTrainedModel | PeftModel


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and possible answers as token ids (each at least one token); gold: the right one.

    branch: that the adapter is told, where it goes by that. shown: its place among the examples of
    its task whose routing a meter keeps token by token.
    """

    prompt: list[int]
    answers: list[list[int]]
    gold: int
    task_id: int
    branch: int | None = None
    shown: int | None = None


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """log_likelihood of the answer in nats; greedy: whether greedy decoding would write it."""

    log_likelihood: float
    tokens: int
    greedy: bool


@torch.inference_mode()
def score_answers(
    model: Model,
    questions: Sequence[Question],
    pad_token_id: int,
    batch_size: int = 16,
    meter: RoutingMeter | None = None,
) -> list[list[AnswerScore]]:
    """Score every answer of every question; all have the same number of answers, and all or none
    a branch.

    meter: counts routing over the tokens of prompts and right answers.
    """
    scores: list[list[AnswerScore]] = [[] for _ in questions]
    for batch in _batches([len(question.prompt) for question in questions], batch_size):
        picked = [questions[i] for i in batch]
        for i, found in zip(batch, _score(model, picked, pad_token_id, meter), strict=True):
            scores[i] = found
    return scores


def _score(
    model: Model,
    questions: list[Question],
    pad: int,
    meter: RoutingMeter | None,
) -> list[list[AnswerScore]]:
    ids, mask, positions = left_padded([q.prompt for q in questions], pad, model.device)
    tasks = torch.tensor([q.task_id for q in questions])
    branches = [q.branch for q in questions]
    shown = [q.shown for q in questions]
    with _watched(meter, mask, tasks, ids, shown), _told(model, branches):
        read = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=DynamicCache(config=model.config),
            use_cache=True,
            logits_to_keep=1,
        )
    count = len(questions[0].answers)
    answers = [answer for q in questions for answer in q.answers]
    predicted = read.logits[:, -1:].repeat_interleave(count, 0)
    width = max(len(answer) for answer in answers) - 1
    if width:
        read.past_key_values.batch_repeat_interleave(count)
        more = torch.tensor([a[:-1] + [pad] * (width + 1 - len(a)) for a in answers])
        real = torch.tensor([[i < len(a) - 1 for i in range(width)] for a in answers])
        real = real.to(mask)
        gold = torch.tensor([i == q.gold for q in questions for i in range(count)])
        tasks, more = tasks.repeat_interleave(count), more.to(ids)
        start = mask.sum(1, keepdim=True).repeat_interleave(count, 0)
        counted = real * gold[:, None].to(real)
        shown = [q.shown if i == q.gold else None for q in questions for i in range(count)]
        with (
            _watched(meter, counted, tasks, more, shown),
            _told(model, [branch for branch in branches for _ in range(count)]),
        ):
            rest = model(
                input_ids=more,
                past_key_values=read.past_key_values,
                use_cache=True,
                attention_mask=torch.cat([mask.repeat_interleave(count, 0), real], 1),
                position_ids=start + torch.arange(width, device=ids.device),
            )
        predicted = torch.cat([predicted, rest.logits], 1)
    found = [_one(logits, answer) for logits, answer in zip(predicted, answers, strict=True)]
    return [found[i : i + count] for i in range(0, len(found), count)]


def _one(logits: Tensor, answer: list[int]) -> AnswerScore:
    predicted = torch.log_softmax(logits[: len(answer)].float(), -1)
    wanted = torch.tensor(answer, device=logits.device)
    likelihood = predicted.gather(1, wanted[:, None]).double().sum()
    return AnswerScore(float(likelihood), len(answer), bool((predicted.argmax(-1) == wanted).all()))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn, where they are not the likeliest ones."""

    temperature: float
    top_p: float


@torch.inference_mode()
def generate_answers(
    model: Model,
    prompts: Sequence[list[int]],
    pad_token_id: int,
    eos_token_ids: list[int],
    max_new_tokens: int | Sequence[int],
    batch_size: int = 16,
    ids: Sequence[int] | None = None,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """Greedy answers as token ids, without the end of turn.

    max_new_tokens: one limit, or one for each prompt. ids: a branch id for each prompt. sampling:
    draw the answers instead, from torch's own random numbers.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    answers: list[list[int]] = [[] for _ in prompts]
    for batch in _batches([len(prompt) for prompt in prompts], batch_size):
        tokens, mask, _ = left_padded([prompts[i] for i in batch], pad_token_id, model.device)
        chosen = None if ids is None else torch.tensor([ids[i] for i in batch])
        with (
            nullcontext() if chosen is None else branch_ids(model, chosen),
            _no_autocast_on_cpu(model.device),
        ):
            generate: Any = model.generate
            output = generate(
                input_ids=tokens,
                attention_mask=mask,
                do_sample=sampling is not None,
                num_beams=1,
                max_new_tokens=max(limits[i] for i in batch),
                pad_token_id=pad_token_id,
                eos_token_id=eos_token_ids,
                temperature=None if sampling is None else sampling.temperature,
                top_p=None if sampling is None else sampling.top_p,
                top_k=None if sampling is None else 0,
            )
        for place, i in enumerate(batch):
            new = output[place, tokens.shape[1] :].tolist()[: limits[i]]
            ends = [new.index(eos) for eos in eos_token_ids if eos in new]
            answers[i] = new[: min(ends)] if ends else new
    return answers


def _no_autocast_on_cpu(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would cast every frozen weight again for each new token, longer than the token."""
    return torch.autocast("cpu", enabled=False) if device.type == "cpu" else nullcontext()


def _watched(
    meter: RoutingMeter | None,
    mask: Tensor,
    tasks: Tensor,
    ids: Tensor,
    shown: Sequence[int | None],
) -> AbstractContextManager[Any]:
    return nullcontext() if meter is None else meter.watching(mask, tasks, ids, shown)


def _told(model: Model, branches: Sequence[int | None]) -> AbstractContextManager[Any]:
    given = [branch for branch in branches if branch is not None]
    return branch_ids(model, given) if given else nullcontext()


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of like lengths, longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def left_padded(
    rows: list[list[int]], pad_token_id: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and position ids, each (rows, longest row)."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return ids.to(device), mask.to(device), positions.to(device)
