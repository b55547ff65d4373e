"""The rows that are decoded together, and what is kept of what they have read.

Keys and values of each layer are (rows, heads, width, size), padded on the left with zeros that the
mask (rows, width) hides; positions count a row's own tokens. Rows join by concatenation, leave by
selection, and columns that nobody uses any more are cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from manylora.adapter.ids import check_range
from manylora.adapter.state import BranchState
from manylora.evaluate.answers import left_padded
from manylora.run import config_of

BASE = "__base__"
"""PEFT's name for no adapter."""


@dataclass
class Row:
    """Which adapter (or `BASE`) and which of its branches (-1: the shared one) a row uses."""

    adapter: str
    branch: int


class Batch:
    """Rows with their cache; made from prompts."""

    def __init__(self, model: PeftModel, pad: int) -> None:
        self.model, self.pad = model, pad
        self.rows: list[Row] = []
        self.cache = DynamicCache()  # without a config: every layer keeps all it has read
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)

    def read(self, rows: Sequence[Row], prompts: Sequence[list[int]]) -> Tensor:
        """Fill an empty batch with prompts; logits (rows, vocabulary) of what follows them.

        Raises ValueError for a row whose adapter has no such branch.
        """
        for row in rows:
            self._check(row)
        ids, self.mask, positions = left_padded(list(prompts), self.pad, self.model.device)
        self.rows = list(rows)
        return self._forward(ids, positions)

    def step(self, tokens: Tensor) -> Tensor:
        """Each row's next token (rows,) is read; logits (rows, vocabulary) of the one after."""
        positions = self.mask.sum(1, keepdim=True)
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self._forward(tokens[:, None], positions)

    def join(self, other: Batch) -> None:
        """Take in the rows of another batch, after one's own."""
        if not self.rows:
            self.rows, self.cache, self.mask = other.rows, other.cache, other.mask
            return
        width = max(self.mask.shape[1], other.mask.shape[1])
        pairs = list(zip(self._layers(), other._layers(), strict=True))
        # All before any is put in place: without the memory for it, the batch stays as it was.
        joined = [
            (_both(a.keys, b.keys, width), _both(a.values, b.values, width)) for a, b in pairs
        ]
        for layer, (keys, values) in zip(self._layers(), joined, strict=True):
            layer.keys, layer.values = keys, values
        masks = [F.pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        self.mask = torch.cat(masks)
        self.rows = self.rows + other.rows

    def keep(self, places: Sequence[int]) -> None:
        """Only these rows stay, in this order."""
        self.rows = [self.rows[i] for i in places]
        if not places:
            self.cache, self.mask = DynamicCache(), self.mask[:0, :0]
            return
        chosen = torch.tensor(places, device=self.mask.device)
        mask = self.mask[chosen]
        spare = int(mask.any(0).long().argmax())
        self.mask = mask[:, spare:]
        for layer in self._layers():
            layer.keys = layer.keys[chosen, :, spare:]
            layer.values = layer.values[chosen, :, spare:]

    def _check(self, row: Row) -> None:
        if row.adapter != BASE:
            branches = config_of(self.model, row.adapter).branches_of()
            check_range(row.adapter, branches, torch.tensor(row.branch))

    def _layers(self) -> list[Any]:
        return list(self.cache.layers)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        names = [row.adapter for row in self.rows]
        # One adapter for all rows is computed without picking rows for every layer.
        alone = set(names) == {self.model.active_adapter}
        state = cast(BranchState, self.model.base_model.branch_state)
        # Set here, not with `branch_ids`: that checks the range of the active adapter alone, and
        # `read` has checked each row's own.
        state.hold(torch.tensor([row.branch for row in self.rows]), selected=False)
        try:
            output: Any = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
                **({} if alone else {"adapter_names": names}),
            )
        finally:
            state.hold(None, selected=False)
        logits: Tensor = output.logits[:, -1]
        return logits


def _both(first: Tensor, second: Tensor, width: int) -> Tensor:
    padded = [F.pad(part, (0, 0, width - part.shape[2], 0)) for part in (first, second)]
    return torch.cat(padded)


@torch.inference_mode()
def check_batching(model: PeftModel, adapters: Sequence[str], pad: int) -> None:
    """Read two tokens with every adapter in one batch, and refuse a model that cannot be batched.

    Raises ValueError: the model keeps something else than keys and values of all it has read
    (a state, a window), or adapters train copies of the base's own modules that others lack.
    """
    batch = Batch(model, pad)
    try:
        batch.read([Row(name, -1) for name in adapters], [[pad]] * len(adapters))
        batch.step(torch.full((len(adapters),), pad, device=model.device))
    except TypeError as error:
        raise ValueError(f"this model cannot be served in batches: {error}") from error
    kinds = {
        type(layer).__name__ for layer in batch.cache.layers if type(layer) is not DynamicLayer
    }
    if kinds or not batch.cache.layers or batch.mask.shape[1] != batch.cache.get_seq_length():
        raise ValueError(
            f"{type(model.get_base_model()).__name__} keeps {', '.join(kinds) or 'no cache'}, and "
            "only models that keep the keys and values of all their tokens can be served in "
            "batches; use `manylora predict` or `manylora chat`"
        )
