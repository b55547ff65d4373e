"""Preference pairs as TRL's DPOTrainer wants them, with the branch of each pair.

    {"prompt": "...", "chosen": "...", "rejected": "...", "task": "support"}

One JSON object a line. prompt, chosen and rejected are texts or lists of messages; `task`, where
rows have it, becomes the column `branch_ids`, which `ManyLoraTrainerMixin` gives to the adapter.
Loss: Rafailov et al., arXiv 2305.18290, eq. 7, in TRL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from datasets import Dataset

from manylora.corpus.json_rows import read_json_lines
from manylora.corpus.layouts import CorpusError, Message, RowError
from manylora.corpus.turns import turns_of
from manylora.corpus.values import task_name, text_of

_ANSWERS = ("chosen", "rejected")
_COLUMNS = ("prompt", *_ANSWERS)


class Preference(TypedDict):
    """A conversation and two ways to go on; task is empty where rows name none."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    task: str


def read_preferences(path: Path, tasks: Sequence[str] | None = None) -> Dataset:
    """A JSONL file of preference pairs as a data set for DPOTrainer.

    tasks: the names that the branches 0, 1, ... stand for, as in the run that is trained on;
        without, the names in the file, sorted.

    Raises CorpusError naming the file, the line, what is wrong with it and what to do.
    """
    rows = []
    for item in _pairs(Path(path)):
        if isinstance(item, CorpusError):
            raise item
        rows.append(item)
    if not rows:
        raise CorpusError(f"{path}: no rows. Write one preference pair on each line.")
    return preference_dataset(rows, tasks)


def preference_dataset(pairs: Sequence[Preference], tasks: Sequence[str] | None = None) -> Dataset:
    """The pairs as a data set, with `branch_ids` when they name tasks. Raises CorpusError."""
    named = {pair["task"] for pair in pairs}
    if named == {""} and tasks is None:
        return Dataset.from_list([dict(pair) for pair in pairs]).remove_columns("task")
    if "" in named:
        raise CorpusError("some pairs name a task and some do not; name one in each pair.")
    names = sorted(named) if tasks is None else list(tasks)
    unknown = sorted(named - set(names))
    if unknown:
        raise CorpusError(
            f"no branch stands for task {unknown[0]!r}; known are {', '.join(names)}."
        )
    return Dataset.from_list([{**pair, "branch_ids": names.index(pair["task"])} for pair in pairs])


def _pairs(path: Path) -> Iterator[Preference | CorpusError]:
    if not path.is_file():
        raise CorpusError(f"{path}: no such file. Give a JSONL file of preference pairs.")
    for item in read_json_lines(path):
        if isinstance(item, CorpusError):
            yield item
            continue
        place, row = item
        try:
            yield _pair(row)
        except RowError as error:
            yield CorpusError(f"{path}:{place}: {error}")


def _pair(row: dict[str, object]) -> Preference:
    missing = [column for column in _COLUMNS if column not in row]
    if missing:
        raise RowError(
            f"no {' and no '.join(missing)} (it has {', '.join(sorted(row))[:200]}). A preference "
            "pair has prompt, chosen and rejected."
        )
    prompt, chosen, rejected = (_turns(row, column) for column in _COLUMNS)
    if prompt[-1]["role"] == "assistant":
        raise RowError("the prompt ends with the assistant's turn. End it with the user's.")
    if chosen == rejected:
        raise RowError("chosen and rejected are the same, so nothing is preferred. Take it out.")
    task = task_name(row["task"], 'field "task"') if "task" in row else ""
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, task=task)


def _turns(row: dict[str, object], column: str) -> list[Message]:
    value = row[column]
    if isinstance(value, list):
        return turns_of(value, column, False, set())
    role = "assistant" if column in _ANSWERS else "user"
    return [Message(role=role, content=text_of(value, f'field "{column}"'))]
