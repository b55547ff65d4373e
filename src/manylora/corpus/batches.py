"""Rows to batches: encoded when a batch needs them, padded, or packed several to a row.

Packed or padded, a batch holds the same examples and gives the same loss; packing only saves the
padding. Short examples share a row as long as that is no longer than the batch's longest example.
Positions start again with each example, from which transformers builds an attention mask that keeps
them apart (no 2-D mask may be given with it); `cu_seq_lens` says the same to attention that needs
no mask (training/packed_attention.py). Task ids are one for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor

from manylora.corpus.encode import Encoder, TooLongError
from manylora.corpus.store import Rows

IGNORED = -100


class Row(TypedDict):
    """One example of the training data set; learned: spans of input_ids that carry loss.

    branch_id: that its prompt was given, where that is not its task's id.
    """

    input_ids: list[int]
    learned: list[tuple[int, int]]
    task_id: int
    source: str
    branch_id: NotRequired[int]


def dataset_of(rows: dict[str, Rows], tasks: Sequence[str], encoder: Encoder) -> Dataset:
    """A data set over the rows of all tasks in turn, each encoded only when it is asked for.

    A task's id is its place in `tasks`.
    """
    every = list(rows.values())
    ids = [tasks.index(task) for task in rows]
    ends = np.cumsum([len(rows) for rows in every])
    numbers = pa.array(np.arange(int(ends[-1]), dtype=np.uint32))

    def encoded(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        places = batch["row"]
        owners = np.searchsorted(ends, places, side="right").tolist()
        examples = [
            every[task][place - int(ends[task])] for task, place in zip(owners, places, strict=True)
        ]
        found = encoder.encode_many(examples)
        too_long = [item for item in found if isinstance(item, TooLongError)]
        if too_long:
            raise too_long[0]
        kept = [item for item in found if not isinstance(item, TooLongError)]
        return {
            "input_ids": [item.input_ids for item in kept],
            "learned": [item.learned for item in kept],
            "task_id": [ids[task] for task in owners],
            "source": [item.source for item in kept],
        }

    return Dataset(pa.table({"row": numbers})).with_transform(encoded)


@dataclass(frozen=True, slots=True)
class Collator:
    """Rows to a batch of tensors.

    What is padding is known from the lengths. Comparing ids with pad_token_id would also hide the
    end of turn wherever the two are one token, and the model would not learn to stop.
    """

    pad_token_id: int
    packing: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        sizes = [len(row["input_ids"]) for row in rows]
        longest = max(sizes)
        groups = first_fit(sizes, longest) if self.packing else [[i] for i in range(len(rows))]
        shape = (len(groups), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
            "token_mask": torch.zeros(shape, dtype=torch.long),
            "task_ids": torch.zeros(shape, dtype=torch.long),
        }
        if chosen := "branch_id" in rows[0]:
            batch["branch_ids"] = torch.zeros(shape, dtype=torch.long)
        for line, group in enumerate(groups):
            # Padding on the right: on the left it would be queries that may attend to nothing, for
            # which some attention kernels on GPUs give NaN, and 0 x NaN spoils the other tokens.
            start = 0
            for i in group:
                start = _put(batch, line, start, rows[i])
        sources = [rows[i]["source"] for group in groups for i in group]
        if self.packing:
            batch["cu_seq_lens"] = _boundaries(
                [[sizes[i] for i in group] for group in groups], longest
            )
        else:
            batch["attention_mask"] = batch["token_mask"]
            batch["task_ids"] = torch.tensor([row["task_id"] for row in rows])
            if chosen:
                batch["branch_ids"] = torch.tensor([row["branch_id"] for row in rows])
        return {**batch, "sources": sources}


def _put(batch: dict[str, Tensor], line: int, start: int, row: Row) -> int:
    """Write an example into a line of a batch; returns where it ends."""
    ids = torch.tensor(row["input_ids"])
    stop = start + len(ids)
    batch["input_ids"][line, start:stop] = ids
    batch["position_ids"][line, start:stop] = torch.arange(len(ids))
    batch["token_mask"][line, start:stop] = 1
    batch["task_ids"][line, start:stop] = row["task_id"]
    if "branch_id" in row:
        batch["branch_ids"][line, start:stop] = row["branch_id"]
    for first, last in row["learned"]:
        batch["labels"][line, start + first : start + last] = ids[first:last]
    return stop


def _boundaries(groups: Sequence[Sequence[int]], width: int) -> Tensor:
    """Where each example begins in the lines laid end to end, and where the last one ends; what a
    line has of padding is an example by itself."""
    parts = [size for own in groups for size in (*own, width - sum(own)) if size]
    return torch.tensor([0, *np.cumsum(parts)], dtype=torch.int32)


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the examples that share a row of that many tokens: first fit, longest first."""
    groups: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((n for n, free in enumerate(left) if free >= lengths[i]), len(groups))
        if place == len(groups):
            groups.append([])
            left.append(room)
        groups[place].append(i)
        left[place] -= lengths[i]
    return groups
