"""Finished cells on disk: DIR/cells/KEY.json and KEY.parquet, and KEY/ for what else is kept.

KEY is a hash of the data, the recipe and the method, so a cell is run once however often the
comparison is started, and never mistaken for another. Each says on what device and with what
versions it was run, and the comparison names all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manylora.comparison.cell import Cell
from manylora.comparison.ground import Ground
from manylora.training.checkpoints import write_atomically

FORMAT = 1
# What a cell's result does not depend on.
_NOT_IN_A_KEY = {"output", "adapter", "start_from", "data", "branches"}
_NOT_IN_TRAINING = {
    *("learning_rate", "checkpoint_every", "report_to", "workers", "log_every"),
    "energy",
}


def key_of(ground: Ground, cell: Cell) -> str:
    # Keys of cells from before there was leave_out, compile or branch_dropout are what they were.
    nothing = set() if ground.recipe.leave_out else {"leave_out"}
    recipe = ground.recipe.model_dump(mode="json", exclude=_NOT_IN_A_KEY | nothing)
    own = _NOT_IN_TRAINING | (set() if ground.recipe.train.compile else {"compile"})
    recipe["train"] = {name: value for name, value in recipe["train"].items() if name not in own}
    config = None if cell.contender.config is None else cell.contender.config.to_dict()
    if config is not None:
        config = {**config, "peft_version": None}
        if not config.get("branch_dropout"):
            config.pop("branch_dropout", None)
    values = [
        FORMAT,
        ground.content,
        recipe,
        cell.contender.name,
        config,
        [cell.lr, cell.seed, cell.stage],
        *([] if ground.choice == "told" else [ground.choice]),
    ]
    text = json.dumps(values, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: object) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


class CellStore:
    """The cells of one comparison's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cells"

    def beside(self, key: str) -> Path:
        """A folder for what a cell keeps besides its rows: what a full fine-tuning changed."""
        return self.folder / key

    def summary(self, key: str) -> dict[str, Any] | None:
        """What the run of a finished cell took; None when it has not finished."""
        file = self.folder / f"{key}.json"
        if not file.is_file():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def write(self, key: str, summary: dict[str, Any], rows: pa.Table) -> None:
        """The summary last: a cell with one is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{key}.parquet"
        partial = file.with_suffix(f".{os.getpid()}.partial")
        pq.write_table(rows, partial, compression="zstd")
        os.replace(partial, file)
        write_atomically(self.folder / f"{key}.json", json.dumps(summary, indent=1))

    def rows(self, keys: Sequence[str]) -> pa.Table:
        """The rows of finished cells, one cell after the other."""
        return pa.concat_tables([pq.read_table(self.folder / f"{key}.parquet") for key in keys])
