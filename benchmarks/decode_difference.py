"""What per-prompt mixing changes in what a trained run says, on its held-out rows.

Of each task: nll, -log p(answer | prompt) / tokens of the answer, nats a token, the answer given
token by token after its prompt, as it is decoded; and the share of rows for which greedy decoding
writes the same answer with both. Intervals as in scores.json (95 %, over rows), of the paired
difference: per prompt minus per token. In the run's own dtype, without autocast.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from here import about_here
from peft import PeftModel
from rich.console import Console
from transformers import DynamicCache, PreTrainedTokenizerBase

from manylora import prompt_mixing
from manylora.corpus import Encoder
from manylora.evaluate.answers import generate_answers, left_padded
from manylora.evaluate.scores import HeldOut, held_out, interval
from manylora.run import config_of, load, recipe_of
from manylora.training.clusters import KEPT, settle

BATCH = 16


def write_difference(run: Path, rows_per_task: int, output: Path) -> None:
    """Measure a run and write OUTPUT/decode_difference.json; ValueError where it has no router."""
    recipe, console = recipe_of(run), Console(stderr=True)
    model, tokenizer = load(run)
    with prompt_mixing(model):  # refuses a model without a router before the work begins
        pass
    corpus = settle(recipe, recipe.load_corpus(), console, run / KEPT).corpus
    tasks, notes = held_out(corpus, Encoder(tokenizer, recipe.max_length), rows_per_task)
    for note in notes:
        console.print(note, markup=False)
    found = {}
    for task in tasks:
        console.print(f"{task.name}: {len(task.encoded)} rows")
        found[task.name] = _of_task(model, tokenizer, task)
    config = config_of(model)
    what = {
        "model": recipe.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "method": config.method,
        "r": config.r,
        "n": config.branches_of().count,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / "decode_difference.json"
    path.write_text(json.dumps({**about_here(), **what, "tasks": found}, indent=1) + "\n")
    print(path.read_text())


def _of_task(model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: HeldOut) -> dict[str, Any]:
    prompts = [row.input_ids[: row.prompt_length] for row in task.encoded]
    answers = [row.input_ids[row.prompt_length :] for row in task.encoded]
    pad, limit = int(tokenizer.pad_token_id), 2 * max(map(len, answers))
    ends = sorted({answer[-1] for answer in answers} | {int(tokenizer.eos_token_id)})
    nll: dict[str, list[float]] = {}
    written: dict[str, list[list[int]]] = {}
    for mixing in ("token", "prompt"):
        with _mixing(model, mixing):
            nll[mixing] = _nll(model, prompts, answers, pad)
            written[mixing] = generate_answers(model, prompts, pad, ends, limit, BATCH)
    same = [a == b for a, b in zip(written["token"], written["prompt"], strict=True)]
    changes = [b - a for a, b in zip(nll["token"], nll["prompt"], strict=True)]
    return {
        "n": len(prompts),
        "answer_tokens": sum(map(len, answers)),
        "nll_per_token_mixing": sum(nll["token"]) / len(prompts),
        "nll_per_prompt_mixing": sum(nll["prompt"]) / len(prompts),
        "nll_difference": interval(changes),
        "greedy_agreement": sum(same) / len(same),
    }


def _mixing(model: PeftModel, mixing: str) -> AbstractContextManager[None]:
    return prompt_mixing(model) if mixing == "prompt" else nullcontext()


@torch.inference_mode()
def _nll(
    model: PeftModel, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad: int
) -> list[float]:
    """Nats a token of each answer."""
    found = [0.0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        tokens, mask, positions = left_padded([prompts[i] for i in some], pad, model.device)
        cache, width = DynamicCache(config=model.config), max(len(answers[i]) for i in some)
        for place in range(width):
            logits = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1]
            logs = torch.log_softmax(logits.float(), -1)
            given = [(answers[i] + [pad] * width)[place] for i in some]
            for row, i in enumerate(some):
                if place < len(answers[i]):
                    found[i] -= float(logs[row, given[row]]) / len(answers[i])
            tokens = torch.tensor(given, device=model.device)[:, None]
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            positions = positions[:, -1:] + 1
    return found
