"""Examples as token ids, with the loss on the answer alone.

    input_ids = [ prompt tokens | answer tokens, end of turn ]
    labels    = [ -100 ...      | the same ids              ]

The prompt is the user message in the model's own chat template, with the opening of the
assistant's turn, tokenised on its own: training sees exactly the tokens that generation sees.
The answer is what the template writes after it, up to and including the end-of-turn token; what
follows (often a newline) is dropped. A tokenizer without a chat template gets
prompt + "\\n" + answer + eos. Nothing is cut: an example that is too long is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from manylora.corpus.formats import CorpusError, Example

IGNORED = -100

# Put in an answer's place to see what the template writes after it: a short answer such as "e"
# could be found inside the end-of-turn token itself.
_STAND_IN = "the-answer-stands-here"


class TooLongError(CorpusError):
    """An example has more tokens than the given length."""


class Row(TypedDict):
    """One row of the training data set."""

    input_ids: list[int]
    prompt_length: int
    task_id: int


@dataclass(frozen=True, slots=True)
class Encoded:
    task: str
    input_ids: list[int]
    prompt_length: int
    """Tokens before the answer."""

    @property
    def answer_tokens(self) -> int:
        """Tokens that carry loss, the end of turn included."""
        return len(self.input_ids) - self.prompt_length


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens after which the model is to write its answer."""
    if tokenizer.chat_template is None:
        return _with_bos(f"{prompt}\n", tokenizer)
    return _ids(_rendered_prompt(prompt, tokenizer), tokenizer)


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """One example as token ids; TooLongError when they are more than `max_length`."""
    before = prompt_ids(example.prompt, tokenizer)
    ids = before + _answer_ids(example, tokenizer)
    if len(ids) > max_length:
        raise TooLongError(
            f"{example.source}: {len(ids)} tokens ({len(before)} of them the prompt), more than "
            f"max_length={max_length}. Raise max_length or shorten the row."
        )
    return Encoded(task=example.task, input_ids=ids, prompt_length=len(before))


def encode_all(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Encoded], list[Example]]:
    """The encoded examples, and those that are too long: the caller reports how many."""
    encoded: list[Encoded] = []
    too_long: list[Example] = []
    for example in examples:
        try:
            encoded.append(encode(example, tokenizer, max_length))
        except TooLongError:
            too_long.append(example)
    return encoded, too_long


def dataset_rows(encoded: Iterable[Encoded], tasks: Sequence[str]) -> list[Row]:
    """Plain rows for a data set; a task's id is its place in `tasks`."""
    index = {task: number for number, task in enumerate(tasks)}
    return [
        Row(
            input_ids=item.input_ids,
            prompt_length=item.prompt_length,
            task_id=index[item.task],
        )
        for item in encoded
    ]


@dataclass(frozen=True, slots=True)
class Collator:
    """Rows to a batch, padded on the left with own position ids, so that answers end together.

    What is padding is known from the lengths. Comparing ids with pad_token_id would also hide the
    end of turn wherever the two are one token, and the model would not learn to stop.
    """

    pad_token_id: int
    tasks: list[str]

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED, dtype=torch.long)
        for number, row in enumerate(rows):
            if not 0 <= row["task_id"] < len(self.tasks):
                raise CorpusError(
                    f"row {number} of the batch has task_id={row['task_id']}; the tasks are "
                    f"{', '.join(self.tasks)}, numbered from 0. Make rows with dataset_rows."
                )
            ids = torch.tensor(row["input_ids"], dtype=torch.long)
            start = shape[1] - len(ids)
            input_ids[number, start:] = ids
            attention_mask[number, start:] = 1
            labels[number, start + row["prompt_length"] :] = ids[row["prompt_length"] :]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
            "labels": labels,
            "task_ids": torch.tensor([row["task_id"] for row in rows], dtype=torch.long),
        }


def _answer_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.chat_template is None:
        return [*_ids(example.output, tokenizer), _eos(tokenizer)]
    before = _rendered_prompt(example.prompt, tokenizer)
    whole = _rendered_answer(example.prompt, example.output, tokenizer)
    closing = _rendered_answer(example.prompt, _STAND_IN, tokenizer).rpartition(_STAND_IN)[2]
    answer = whole.removeprefix(before).removesuffix(closing).rstrip()
    # Some templates strip the answer that they are given, so its own spaces do not count here.
    if not (whole.startswith(before) and whole.endswith(closing)) or not answer.endswith(
        example.output.strip()
    ):
        raise CorpusError(
            f"{example.source}: the chat template of {tokenizer.name_or_path or 'the tokenizer'} "
            f"writes the conversation as {whole[-120:]!r}, which does not continue the prompt "
            f"{before[-60:]!r} with the answer. Set tokenizer.chat_template to a template that "
            "does, or to None for plain text."
        )
    return [*_ids(answer, tokenizer), _end_of_turn(closing, tokenizer)]


def _end_of_turn(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The first special token of what the template writes after an answer; eos if it has none."""
    for token in _ids(text, tokenizer):
        added = tokenizer.added_tokens_decoder.get(token)
        if token == tokenizer.eos_token_id or (added is not None and added.special):
            return token
    return _eos(tokenizer)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    token = tokenizer.eos_token_id
    if not isinstance(token, int):
        raise CorpusError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so the model "
            "could not learn to stop. Set tokenizer.eos_token."
        )
    return token


def _rendered_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return _render([{"role": "user", "content": prompt}], tokenizer, add_generation_prompt=True)


def _rendered_answer(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return _render(messages, tokenizer, add_generation_prompt=False)


def _render(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool
) -> str:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert isinstance(text, str)
    return text


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _with_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of plain text, with the first token that the tokenizer itself would put before it.

    Its other special tokens stay out: an end token after the prompt would end the answer too.
    """
    bos = tokenizer.bos_token_id
    starts_with_bos = bos is not None and tokenizer(text)["input_ids"][:1] == [bos]
    ids = _ids(text, tokenizer)
    return [bos, *ids] if starts_with_bos and ids[:1] != [bos] else ids
