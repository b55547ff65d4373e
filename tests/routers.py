"""Adapters of one layer whose router is set by hand, watched on chosen inputs, and saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from manylora.inspect.routing import Routing, RoutingMeter, write_routing
from tiny import OneLayer, attach

SURE = 60.0
"""A logit beside which others get nothing in float64: exp(-60) is 1e-26."""
TASKS = ["law", "medicine", "code"]


def routed(R: Sequence[Sequence[float]], **config: Any) -> PeftModel:
    """A linear layer called "linear", with a HydraLoRA of N branches and the router R (N, in)."""
    router = torch.tensor(R)
    count, width = router.shape
    fields = {"method": "hydralora", "r": 2, "num_branches": count, "init_weights": False}
    base = OneLayer(nn.Linear(width, 5, bias=False))
    model = attach(base, target_modules=["linear"], **fields | config)
    with torch.no_grad():
        model.get_parameter("base_model.model.linear.manylora_router.default.weight").copy_(router)
    return model.eval()


def one_hot(tasks: Tensor, tokens: int = 4, width: int = 3) -> Tensor:
    """Inputs (batch, tokens, width): every token of a row is the unit vector of the row's task."""
    return torch.eye(width)[tasks].unsqueeze(1).expand(-1, tokens, -1)


def measured(model: PeftModel, x: Tensor, tasks: Tensor, mask: Tensor | None = None) -> Routing:
    """What a meter finds of inputs (batch, tokens, in) of rows of these tasks."""
    meter = RoutingMeter(model, TASKS)
    with meter.watching(torch.ones(x.shape[:2]) if mask is None else mask, tasks):
        model(x)
    result = meter.result()
    assert result is not None
    return result


def save(folder: Path, model: PeftModel, routing: Routing | None = None) -> Path:
    """The adapter folder of a model, with routing.json where it was measured."""
    model.save_pretrained(str(folder))
    if routing is not None:
        write_routing(folder, routing)
    return folder


def built(folder: Path, R: Sequence[Sequence[float]], **config: Any) -> Path:
    """A saved adapter with the router R (N, 3), measured on two rows of each of three tasks."""
    model, tasks = routed(R, **config), torch.tensor([0, 0, 1, 1, 2, 2])
    return save(folder, model, measured(model, one_hot(tasks), tasks))


SPLIT = [[SURE, 0, 0], [0, SURE, 0], [0, 0, SURE]]
"""Each task to a branch of its own."""
EVEN = [[0.0] * 3] * 3
"""Every token to all branches alike."""
COLLAPSE = [[0.0] * 3, [SURE] * 3, [0.0] * 3]
"""Every token to branch 1."""
ONE_DEAD = [[2.0, 0, 1], [0, 2.0, 1], [-SURE] * 3]
"""Branch 2 gets nothing; the others share every task."""
