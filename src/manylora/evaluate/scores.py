"""Per-task scores with 95 % intervals, on held-out rows.

    nll              -log p(answer | prompt) / tokens of the answer, nats a token, end of turn
                     included; mean over rows
    exact_match      greedy decoding writes exactly the answer's tokens and stops
    choice_accuracy  the right answer is the likeliest of the task's answers, where it has a closed
                     set of them (at most 20, each seen 4 times in training on average)
    token_f1         overlap of the words of the generated and the right answer; open tasks
    rouge_l, bleu    of the same generated answer, where a task's answers are text: half of them
                     have three words or more (text.py says how each is counted)
    pass@k           of programs that the model writes, where the user lets them run; rows with
                     tests alone (programs.py)

Intervals are percentile bootstraps over a task's rows (2,000 resamples, seeded).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap
from transformers import PreTrainedTokenizerBase

from manylora.corpus import Corpus, Encoded, Encoder, Example, Message
from manylora.evaluate.answers import (
    Model,
    Question,
    Sampling,
    generate_answers,
    score_answers,
)
from manylora.evaluate.programs import Programs
from manylora.evaluate.text import text_scores
from manylora.inspect.recorder import shortest
from manylora.inspect.routing import RoutingMeter
from manylora.training.checkpoints import write_atomically

SCORES_FILE = "scores.json"
MAX_CHOICES = 20
SEED = 0

Interval = list[float]  # mean, low, high
Metrics = dict[str, Interval]


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows of one task; choices: its closed set of answers, or empty."""

    name: str
    examples: list[Example]
    encoded: list[Encoded]
    choices: list[str]

    @property
    def tested(self) -> list[int]:
        """The places of the rows that carry tests."""
        return [i for i, example in enumerate(self.examples) if example.tests]


def held_out(
    corpus: Corpus, encoder: Encoder, rows_per_task: int
) -> tuple[list[HeldOut], list[str]]:
    """The rows to score, in file order from the top, and notes about what is not scored."""
    tasks, notes = [], []
    for name in corpus.tasks:
        examples = list(corpus.test[name][:rows_per_task]) if name in corpus.test else []
        encoded, too_long = encoder.split_too_long(examples)
        if too_long:
            notes.append(
                f"{name}: {len(too_long)} of {len(examples)} held-out rows have more than "
                f"max_length={encoder.max_length} tokens and are not scored"
            )
        if len(encoded) < 2:
            notes.append(f"{name}: {len(encoded)} held-out rows give no interval; not scored")
            continue
        left_out = {id(example) for example in too_long}
        kept = [example for example in examples if id(example) not in left_out]
        tasks.append(HeldOut(name, kept, encoded, closed_answers(corpus.train[name], kept)))
    return tasks, notes


def closed_answers(train: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """The answers of a task that has a closed set of them, sorted; else none."""
    answers: set[str] = set()
    for example in train:
        answers.add(example.output)
        if len(answers) > MAX_CHOICES:
            return []
    few = len(answers) >= 2 and len(train) >= 4 * len(answers)
    return sorted(answers) if few and {example.output for example in test} <= answers else []


def score_tasks(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[HeldOut],
    all_tasks: Sequence[str],
    batch_size: int = 16,
    branches: Mapping[str, list[int]] | None = None,
    generate: bool = True,
    meter: RoutingMeter | None = None,
    programs: Programs | None = None,
) -> dict[str, Metrics]:
    """Metric intervals for each task.

    all_tasks: names in the order of their ids. branches: of each task's rows, for an adapter that
    goes by them. programs: programs that the model writes may run.
    """
    pad = int(tokenizer.pad_token_id)
    result = {}
    for task in tasks:
        task_id = list(all_tasks).index(task.name)
        own = None if branches is None else branches[task.name]
        written: list[str] = []
        questions = [_question(task, i, tokenizer, task_id) for i in range(len(task.examples))]
        for place, row in enumerate(shortest([len(item.input_ids) for item in task.encoded])):
            questions[row] = replace(questions[row], shown=place)
        if own is not None:
            questions = [replace(q, branch=id_) for q, id_ in zip(questions, own, strict=True)]
        scores = score_answers(model, questions, pad, batch_size, meter)
        right = [found[q.gold] for found, q in zip(scores, questions, strict=True)]
        values = {
            "nll": [-score.log_likelihood / score.tokens for score in right],
            "exact_match": [float(score.greedy) for score in right],
        }
        if task.choices:
            values["choice_accuracy"] = [
                float(max(found, key=lambda score: score.log_likelihood) is best)
                for found, best in zip(scores, right, strict=True)
            ]
        elif generate:
            written = _written(model, tokenizer, task, batch_size, own)
            values |= text_scores(written, [example.output for example in task.examples])
        if programs is not None and len(task.tested) > 1:
            values |= _pass_rates(model, tokenizer, task, batch_size, own, programs, written)
        result[task.name] = {metric: interval(value) for metric, value in values.items()}
    return result


def _question(
    task: HeldOut, row: int, tokenizer: PreTrainedTokenizerBase, task_id: int
) -> Question:
    example, encoded = task.examples[row], task.encoded[row]
    prompt = encoded.input_ids[: encoded.prompt_length]
    right = encoded.input_ids[encoded.prompt_length :]
    if not task.choices:
        return Question(prompt, [right], 0, task_id)
    answers = [
        right if choice == example.output else _answer(example, choice, tokenizer)
        for choice in task.choices
    ]
    return Question(prompt, answers, task.choices.index(example.output), task_id)


def _answer(example: Example, answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    message: Message = {"role": "assistant", "content": answer}
    other = Example(example.task, [*example.prompt, message], example.source)
    encoded = Encoder(tokenizer, max_length=2**31).encode(other)
    return encoded.input_ids[encoded.prompt_length :]


def _written(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    task: HeldOut,
    batch_size: int,
    branches: Sequence[int] | None,
    rows: Sequence[int] | None = None,
    sampling: Sampling | None = None,
) -> list[str]:
    """The model's own answer to each row of the task, or to each of `rows`."""
    rows = range(len(task.encoded)) if rows is None else rows
    asked = [task.encoded[row] for row in rows]
    prompts = [item.input_ids[: item.prompt_length] for item in asked]
    limit = 2 * max(len(item.input_ids) - item.prompt_length for item in task.encoded)
    ends = sorted({item.input_ids[-1] for item in task.encoded} | {int(tokenizer.eos_token_id)})
    ids = None if branches is None else [branches[row] for row in rows]
    answers = generate_answers(
        model, prompts, int(tokenizer.pad_token_id), ends, limit, batch_size, ids, sampling
    )
    return [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]


def _pass_rates(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    task: HeldOut,
    batch_size: int,
    branches: Sequence[int] | None,
    programs: Programs,
    greedy: Sequence[str],
) -> dict[str, list[float]]:
    """greedy: what the model writes to each row, where that is known."""
    tested = [task.examples[row] for row in task.tested]
    if greedy and programs.sampling is None:
        return programs.pass_rates(tested, [[greedy[row]] for row in task.tested])
    n = programs.samples
    rows = [row for row in task.tested for _ in range(n)]
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        written = _written(model, tokenizer, task, batch_size, branches, rows, programs.sampling)
    answers = [written[i : i + n] for i in range(0, len(written), n)]
    return programs.pass_rates(tested, answers)


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % percentile bootstrap bounds of at least two values."""
    if len(set(values)) == 1:
        return [float(values[0])] * 3
    result = bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return [float(np.mean(values)), float(low), float(high)]


def write_scores(
    run: Path,
    tasks: Sequence[HeldOut],
    before: dict[str, Metrics],
    after: dict[str, Metrics],
) -> None:
    """scores.json in the form that the design fixes; with "tests", the number of rows that carry
    tests, where a task has such."""
    scores = {
        task.name: {
            "n": len(task.examples),
            **({"tests": len(task.tested)} if task.tested else {}),
            "before": before[task.name],
            "after": after[task.name],
        }
        for task in tasks
    }
    write_atomically(run / SCORES_FILE, json.dumps({"tasks": scores}, indent=2))
