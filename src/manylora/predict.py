"""Answers from a run: for the rows of a file in batches, or for one prompt at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TextStreamer

from manylora.adapter.ids import branch_ids
from manylora.adapter.selector import BranchSelector
from manylora.corpus import CorpusError, Encoder, Example, Fields, Message, read_examples
from manylora.evaluate.answers import generate_answers, left_padded
from manylora.run import config_of, load, recipe_of


def predict_file(
    run: Path,
    file: Path,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    task: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Each row of a file with the model's greedy answer as `prediction`, in file order.

    task: the branch of all rows, for adapters that choose it by task; else the saved selector
    chooses for each prompt, and what it chose is in the row as `branch`.

    Raises CorpusError for a row that cannot be read, before the model is loaded.
    """
    examples = read_prompts(file, recipe_of(run).fields)
    model, tokenizer = load(run)
    encoder = Encoder(tokenizer, max_length=2**31)
    prompts = [encoder.prompt_ids(example.prompt) for example in examples]
    selector = config_of(model).branch_selector
    _check_task(run, selector, task)
    ids = None if selector is None else _choose(selector, prompts, task)
    answers = generate_answers(
        model,
        prompts,
        int(tokenizer.pad_token_id),
        end_tokens(model, tokenizer),
        max_new_tokens,
        batch_size,
        ids,
    )
    for i, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        row: dict[str, Any] = {"source": example.source, "messages": example.prompt}
        if ids is not None and selector is not None:
            row["branch"] = selector.names[ids[i]] if ids[i] >= 0 else None
        yield {**row, "prediction": tokenizer.decode(answer, skip_special_tokens=True)}


def read_prompts(file: Path, fields: Fields) -> list[Example]:
    """The rows to answer; the first that cannot be is raised as a CorpusError."""
    if not file.is_file():
        raise CorpusError(f"{file}: no such file. Give a file of rows to answer.")
    examples = []
    for found in read_examples(file, fields, file.stem, answered=False):
        if isinstance(found, CorpusError):
            raise found
        examples.append(found)
    return examples


def _check_task(run: Path, selector: BranchSelector | None, task: str | None) -> None:
    """Raise CorpusError for a task that the run has not, or that would choose nothing."""
    if task is None:
        return
    if selector is None:
        raise CorpusError(
            f"{run} does not choose its branch by task, so task={task!r} has no "
            "meaning; leave it out"
        )
    if task not in selector.names:
        raise CorpusError(f"no task {task!r} in this run; it has {', '.join(selector.names)}")


def _choose(selector: BranchSelector, prompts: Sequence[list[int]], task: str | None) -> list[int]:
    if task is None:
        return selector.choose(prompts)
    return [selector.names.index(task)] * len(prompts)


def end_tokens(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's and the model's own."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({*own, int(tokenizer.eos_token_id)})


class _Pieces(TextStreamer):
    """Hands each piece of text on as soon as it is whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


class Conversation:
    """A chat with a run: keeps what was said and streams each reply."""

    def __init__(self, run: Path, max_new_tokens: int = 512) -> None:
        self.run = run
        self.model, self.tokenizer = load(run)
        self.max_new_tokens = max_new_tokens
        self.encoder = Encoder(self.tokenizer, max_length=2**31)
        self.messages: list[Message] = []

    def check_task(self, task: str | None) -> None:
        """Raise CorpusError for a task that the run has not, or that would choose nothing."""
        _check_task(self.run, config_of(self.model).branch_selector, task)

    def say(self, text: str, show: Callable[[str], None], task: str | None = None) -> str:
        """The reply to `text`; `show` gets its pieces as they come. task: as in `predict_file`."""
        self.check_task(task)
        self.messages.append({"role": "user", "content": text})
        ids, mask, _ = left_padded([self.encoder.prompt_ids(self.messages)], 0, self.model.device)
        selector = config_of(self.model).branch_selector
        branch = None if selector is None else _choose(selector, ids.tolist(), task)
        ends = end_tokens(self.model, self.tokenizer)
        with nullcontext() if branch is None else branch_ids(self.model, branch):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                streamer=_Pieces(self.tokenizer, show),
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=ends,
            )
        reply = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": str(reply)})
        return str(reply)


def write_rows(rows: Iterator[dict[str, Any]], output: Path) -> int:
    """Write rows as JSON lines; returns how many. OSError, before any is made, where it cannot."""
    count = 0
    try:
        file = output.open("w", encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"{output} cannot be written: {error.strerror}; choose another with --output, in a "
            "folder that is there"
        ) from None
    with file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
