"""How much of what training gave a static export loses, by task.

    gap = (NLL static - NLL live) / (NLL base - NLL live)

NLL is the mean over held-out rows of -log p(answer | prompt) a token, as in scores.json; 0 is the
live run, 1 the base model. Intervals are 95 % percentile bootstraps over rows, all three resampled
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from peft import PeftModel
from scipy.stats import bootstrap
from transformers import PreTrainedTokenizerBase

from manylora.evaluate.answers import Question, score_answers
from manylora.evaluate.scores import HeldOut
from manylora.export.live import fixed
from manylora.export.plans import Plan

Array = np.ndarray[Any, Any]


def gaps_of(
    model: PeftModel,
    adapter: str,
    plans: Sequence[tuple[Plan, str | None]],
    tasks: Sequence[HeldOut],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> list[dict[str, list[float]]]:
    """For each plan, task -> [gap, low, high]; plans come with the task that they are for, or None.

    A task on which the run is no better than its base has no gap, and is left out.
    """
    pad = int(tokenizer.pad_token_id)
    live = {task.name: row_nll(model, task, pad, batch_size) for task in tasks}
    with model.disable_adapter():
        base = {task.name: row_nll(model, task, pad, batch_size) for task in tasks}
    found = []
    for plan, only in plans:
        own = [task for task in tasks if only in (None, task.name)]
        with fixed(model, adapter, plan):
            static = {task.name: row_nll(model, task, pad, batch_size) for task in own}
        gaps = {name: gap(static[name], live[name], base[name]) for name in static}
        found.append({name: interval for name, interval in gaps.items() if interval})
    return found


def row_nll(model: PeftModel, task: HeldOut, pad: int, batch_size: int) -> list[float]:
    """Nats a token of each held-out row's right answer."""
    questions = [
        Question(item.input_ids[: item.prompt_length], [item.input_ids[item.prompt_length :]], 0, 0)
        for item in task.encoded
    ]
    scores = score_answers(model, questions, pad, batch_size)
    return [-score.log_likelihood / score.tokens for (score,) in scores]


def gap(static: Sequence[float], live: Sequence[float], base: Sequence[float]) -> list[float]:
    """[gap, low, high] of rows' NLL; empty where the run is no better than its base."""

    def ratio(s: Array, v: Array, b: Array, axis: int = -1) -> Array:
        lost, gained = s.mean(axis) - v.mean(axis), b.mean(axis) - v.mean(axis)
        return np.asarray(lost / gained)

    data = np.asarray(static), np.asarray(live), np.asarray(base)
    if data[2].mean() <= data[1].mean():
        return []
    value = float(ratio(data[0], data[1], data[2]))
    if np.array_equal(data[0], data[1]):
        return [value] * 3
    result = bootstrap(
        data,
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return [value, float(low), float(high)]
