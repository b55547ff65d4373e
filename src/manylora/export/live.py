"""What the run itself computes, for exports to be compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from manylora.adapter.ids import branch_ids
from manylora.export.plans import Plan


def probe(model: PeftModel) -> Tensor:
    """Token ids (2, 16) to compare logits on, the same for the same vocabulary."""
    base = cast(PreTrainedModel, model.get_base_model())
    size = base.config.get_text_config().vocab_size
    return torch.randint(0, size, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def live_logits(model: PeftModel, adapter: str, plan: Plan, tokens: Tensor) -> Tensor:
    """Logits of the run itself; for an approximation, of the run with its update fixed so."""
    if not plan.exact:
        with fixed(model, adapter, plan):
            return logits_of(model, tokens)
    with nullcontext() if plan.ids is None else branch_ids(model, plan.ids):
        return logits_of(model, tokens)


@torch.inference_mode()
def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens).logits
    return logits.float()


@contextmanager
def fixed(model: PeftModel, adapter: str, plan: Plan) -> Iterator[None]:
    """The model with the plan's update in its base weights, which are put back bit for bit."""
    kept = []
    try:
        for layer, delta in plan.deltas(model, adapter):
            weight = layer.get_base_weight().detach()
            kept.append((layer, weight.clone()))
            layer.set_base_weight(weight + delta.to(weight))
        with model.disable_adapter():
            yield
    finally:
        for layer, weight in kept:
            layer.set_base_weight(weight)
