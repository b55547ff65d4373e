"""Who says which branch a row goes to: its task, which is told, or a selector, from its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from manylora.adapter.selector import BranchSelector
from manylora.corpus import Collator
from manylora.corpus.batches import Row


@dataclass(frozen=True)
class ChoosingCollator:
    """A collator whose batches also have the branches (branch_ids) that a selector chose.

    It sees a row's prompt alone, what comes before the first learned token, and before the rows are
    padded or packed, so neither changes what it chooses.
    """

    collate: Collator
    selector: BranchSelector | None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        if self.selector is not None:
            chosen = self.selector.choose(
                [row["input_ids"][: row["learned"][0][0]] for row in rows]
            )
            rows = [{**row, "branch_id": own} for row, own in zip(rows, chosen, strict=True)]
        return self.collate(rows)
