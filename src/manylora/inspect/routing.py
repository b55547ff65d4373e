"""Where a token router sends its tokens: mean weights for each layer, task and branch.

    mean_w[layer, task, i] = mean over the task's real tokens of g_i(x)

Measured by watching the input of every routed layer during forward passes that run anyway.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manylora.adapter.layer import ManyLoraLayer, layers_of
from manylora.adapter.router import router_weights
from manylora.training.checkpoints import write_atomically

ROUTING_FILE = "routing.json"


class Routing(TypedDict):
    """branches N; layer names; for each task a list of N mean weights for each layer, in order."""

    branches: int
    layers: list[str]
    tasks: dict[str, list[list[float]]]


class RoutingMeter:
    """Sums router weights by task while `watching` forward passes of a model."""

    def __init__(self, model: nn.Module, tasks: list[str], adapter: str = "default") -> None:
        self.tasks = tasks
        self.adapter = adapter
        self.layers = [
            layer
            for layer in layers_of(model)
            if adapter in layer.branches and layer.branches[adapter].gate == "router"
        ]
        self.sums: dict[str, Tensor] = {}
        self.counts = torch.zeros(len(tasks), dtype=torch.float64)

    @contextmanager
    def watching(self, mask: Tensor, task_ids: Tensor) -> Iterator[None]:
        """mask: (batch, tokens), true for tokens to count; task_ids: (batch,)."""
        by_task = F.one_hot(task_ids, len(self.tasks)).to(mask.device, torch.float64)
        share = mask.to(torch.float64).unsqueeze(-1) * by_task.unsqueeze(1)  # (b, t, tasks)

        def watch(layer: ManyLoraLayer, args: tuple[Any, ...]) -> None:
            x = args[0]
            t = layer.tensors(self.adapter)
            if layer.branches[self.adapter].router_input == "Ax":
                x = F.linear(x.to(t["A"].dtype), t["A"])
            weights = router_weights(x, t["router"])
            total = share.flatten(0, 1).T @ weights.double().flatten(0, -2)
            self.sums[layer.name] = self.sums.get(layer.name, torch.zeros(())) + total.cpu()

        handles = [layer.register_forward_pre_hook(watch) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.counts += share.sum((0, 1)).cpu()

    def result(self) -> Routing | None:
        """The means, or None for a model without a router; tasks without a token are left out."""
        if not self.layers:
            return None
        means = {
            name: total / self.counts.clamp(min=1).unsqueeze(-1)
            for name, total in self.sums.items()
        }
        return Routing(
            branches=self.layers[0].branches[self.adapter].count,
            layers=list(means),
            tasks={
                task: [mean[i].tolist() for mean in means.values()]
                for i, task in enumerate(self.tasks)
                if self.counts[i] > 0
            },
        )


def write_routing(run: Path, routing: Routing) -> None:
    write_atomically(run / ROUTING_FILE, json.dumps(routing))


def read_routing(run: Path) -> Routing:
    routing: Routing = json.loads((run / ROUTING_FILE).read_text(encoding="utf-8"))
    return routing
