"""The branch selector: prompts a second, and how often it is right about real tasks.

    python benchmarks/selector.py MULTITASK [--model DIR]

MULTITASK holds train/TASK.jsonl and test/TASK.jsonl (instruction, input, output) and
paraphrases.json. Writes benchmarks/results/selector.json. For each of five draws of 16 tasks the
selector is fitted to 250 training prompts of each; the test prompts of these tasks are its own, and
those of the other tasks are of none. Read in three ways: instructions as they are; paraphrased,
with other wordings in the test than in training; the input alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from here import about_here

from manylora.adapter.selector import BranchSelector
from manylora.base import load_tokenizer
from manylora.evaluate.answers import left_padded

RESULT = Path(__file__).parent / "results" / "selector.json"
READINGS = ("as_is", "paraphrased", "input_only")
TASKS, DRAWS, PROMPTS = 16, 5, 4000
MANY, TOKENS = 100_000, 80  # for speed

Record = dict[str, str]
Prompts = dict[str, list[list[int]]]


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def instruction(record: Record, reading: str, templates: dict[str, Any], split: str) -> str:
    if record["task"] == "instr_dolly" or reading == "as_is":
        return record["instruction"]
    if reading == "input_only":
        return ""
    own = templates[record["task"]]
    key = hashlib.sha256((record["task"] + record["input"]).encode()).hexdigest()
    text = str(own[split][int(key, 16) % len(own[split])])
    if own["extract"] is not None:
        text = text.replace("{slot}", re.search(own["extract"], record["instruction"])["slot"])
    return text


def texts(folder: Path, split: str, reading: str) -> dict[str, list[str]]:
    """The prompts of each task, spread over its file."""
    templates = json.loads((folder / "paraphrases.json").read_text(encoding="utf-8"))
    found = {}
    for path in sorted((folder / split).glob("*.jsonl")):
        rows = read(path)
        step = max(1, len(rows) // (PROMPTS // TASKS))
        found[path.stem] = [
            "\n\n".join(
                part for part in (instruction(row, reading, templates, split), row["input"]) if part
            )
            for row in rows[::step][: PROMPTS // TASKS]
        ]
    return found


def encode(tokenizer: Any, prompts: list[str], chat: bool) -> list[list[int]]:
    """Token ids of all texts in one batch; chat: in the chat template, as training has them."""
    if chat:
        conversations = [[{"role": "user", "content": text}] for text in prompts]
        prompts = tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=True
        )
    return list(tokenizer(prompts, add_special_tokens=False)["input_ids"])


def select(selector: BranchSelector, prompts: list[list[int]]) -> torch.Tensor:
    ids, mask, _ = left_padded(prompts, 0)
    return selector.select(ids, mask)


def draw(train: Prompts, test: Prompts, seed: int) -> dict[str, float]:
    own = sorted(random.Random(seed).sample(sorted(train), TASKS))
    prompts = [prompt for task in own for prompt in train[task]]
    owners = [i for i, task in enumerate(own) for _ in train[task]]
    selector = BranchSelector.fit(prompts, owners, own)
    # Known in two steps: 12 tasks, then 4 more.
    first = [i for i, owner in enumerate(owners) if owner < 12]
    later = [i for i, owner in enumerate(owners) if owner >= 12]
    grown = BranchSelector.fit(
        [prompts[i] for i in first], [owners[i] for i in first], own[:12]
    ).extended([prompts[i] for i in later], [owners[i] - 12 for i in later], own[12:])
    truth = torch.tensor([i for i, task in enumerate(own) for _ in test[task]])
    known = [prompt for task in own for prompt in test[task]]
    unknown = [prompt for task in test if task not in own for prompt in test[task]]
    chosen, others = select(selector, known), select(selector, unknown)
    anyhow = BranchSelector(
        selector.idf,
        selector.mean,
        selector.centroids,
        torch.full_like(selector.thresholds, -2),
        own,
    )
    return {
        "right_when_it_must_choose": float((select(anyhow, known) == truth).float().mean()),
        "right": float((chosen == truth).float().mean()),
        "own_refused": float((chosen == -1).float().mean()),
        "unknown_refused": float((others == -1).float().mean()),
        "right_when_extended": float((select(grown, known) == truth).float().mean()),
    }


def quality(folder: Path, tokenizer: Any) -> dict[str, dict[str, float]]:
    """The mean over the draws, for each reading."""
    found = {}
    for reading in READINGS:
        train, test = (
            {
                task: encode(tokenizer, rows, True)
                for task, rows in texts(folder, s, reading).items()
            }
            for s in ("train", "test")
        )
        draws = [draw(train, test, seed) for seed in range(DRAWS)]
        found[reading] = {
            name: round(float(np.mean([draw[name] for draw in draws])), 4) for name in draws[0]
        }
    return found


def rate(count: int, started: float) -> int:
    return round(count / (time.perf_counter() - started))


def speed(folder: Path, tokenizer: Any) -> dict[str, float]:
    """Prompts a second, on what is given to the process; prompts of at most `TOKENS` tokens."""
    rows = texts(folder, "train", "as_is")
    short = [text for own in rows.values() for text in own if len(text) < 4 * TOKENS]
    many = [short[i % len(short)] for i in range(MANY)]
    started = time.perf_counter()
    plain = encode(tokenizer, many, False)
    encoding = rate(MANY, started)
    started = time.perf_counter()
    prompts = encode(tokenizer, many, True)
    encoding_chat = rate(MANY, started)
    owners = [i % TASKS for i in range(MANY)]
    started = time.perf_counter()
    selector = BranchSelector.fit(prompts, owners, [str(i) for i in range(TASKS)])
    fitting = rate(MANY, started)
    ids, mask, _ = left_padded(prompts, 0)
    started = time.perf_counter()
    selector.select(ids, mask)
    selecting = rate(MANY, started)
    started = time.perf_counter()
    for i in range(200):
        selector.select(ids[i : i + 1], mask[i : i + 1])
    alone = (time.perf_counter() - started) / 200
    return {
        "prompts": MANY,
        "branches": TASKS,
        "mean_tokens": round(float(np.mean([len(prompt) for prompt in plain])), 1),
        "mean_tokens_in_chat_template": round(float(np.mean([len(p) for p in prompts])), 1),
        "select_per_second": selecting,
        "select_one_milliseconds": round(1000 * alone, 2),
        "fit_per_second": fitting,
        "encode_per_second": encoding,
        "encode_in_chat_template_per_second": encoding_chat,
        "text_to_branch_per_second": round(1 / (1 / encoding + 1 / selecting)),
        "text_to_branch_in_chat_template_per_second": round(
            1 / (1 / encoding_chat + 1 / selecting)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("multitask", type=Path)
    default = Path.home() / ".cache/manylora/smollm2-135m-instruct"
    parser.add_argument("--model", default=str(default), help="a folder with a tokenizer")
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.model)
    measured = {"speed": speed(given.multitask, tokenizer)}
    measured["quality"] = quality(given.multitask, tokenizer)
    RESULT.write_text(
        json.dumps({**about_here(), "result": measured}, indent=2) + "\n", encoding="utf-8"
    )
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
