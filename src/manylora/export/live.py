"""What the run itself computes, for exports to be compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from manylora.adapter.ids import branch_ids
from manylora.export.plans import Plan, adapted


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
    """The model without its adapter, and with the plan's update beside each adapted layer.

    No weight is touched, so the base may be quantised.
    """
    factors = plan.factors(model, adapter)
    handles = []
    try:
        for layer in adapted(model, adapter):
            A, B = (factor.to(model.device) for factor in factors[layer.name])
            handles.append(layer.register_forward_hook(partial(_added, A, B)))
        with model.disable_adapter():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _added(A: Tensor, B: Tensor, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """y + B A x, for x (..., in) and y (..., out)."""
    return y + linear(linear(args[0].to(A), A), B).to(y)
