"""Where a token router sends its tokens: what is measured for each layer, task and branch.

    mean_w[layer, task, i] = mean over the task's real tokens of g_i(x)              (N,)
    entropy[layer, task]   = mean over the task's real tokens of -sum_i g_i log g_i  nats

and a few examples token by token (`recorder.py`). Measured by watching the input of every routed
layer during the forward passes that score the run, and kept in its routing.json, so that looking at
a run needs no forward pass. Files of older versions hold the means alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from manylora.adapter.layer import ManyLoraLayer, layers_of
from manylora.adapter.router import router_weights
from manylora.inspect.recorder import Examples, TokenRecorder
from manylora.training.checkpoints import write_atomically

ROUTING_FILE = "routing.json"
_DIGITS = 7  # what a float32 weight below 1 has


class Routing(TypedDict):
    """branches N; layer names; for each task a list of N mean weights for each layer, in order.

    entropies: for each task the mean entropy of a token's weights in each layer, in nats. tokens:
    how many were counted. examples: some of them. Files of older versions lack these three.
    """

    branches: int
    layers: list[str]
    tasks: dict[str, list[list[float]]]
    entropies: NotRequired[dict[str, list[float]]]
    tokens: NotRequired[dict[str, int]]
    examples: NotRequired[Examples]


class RoutingMeter:
    """Sums router weights and their entropies by task while `watching` forward passes."""

    def __init__(self, model: nn.Module, tasks: list[str], adapter: str = "default") -> None:
        self.tasks = tasks
        self.adapter = adapter
        self.layers = [
            layer
            for layer in layers_of(model)
            if adapter in layer.branches and layer.branches[adapter].gate == "router"
        ]
        self.sums: dict[str, Tensor] = {}  # (tasks, N + 1): weights, entropy
        self.counts = torch.zeros(len(tasks), dtype=torch.float64)
        self.recorder = TokenRecorder(
            [layer.name for layer in self.layers], self.branches, len(tasks)
        )

    @property
    def branches(self) -> int:
        """N; 0 for a model without a router."""
        return self.layers[0].branches[self.adapter].count if self.layers else 0

    @contextmanager
    def watching(
        self,
        mask: Tensor,
        task_ids: Tensor,
        ids: Tensor | None = None,
        shown: Sequence[int | None] = (),
    ) -> Iterator[None]:
        """mask: (batch, tokens), true for tokens to count; task_ids: (batch,).

        ids: (batch, tokens), of the tokens; shown: for each row its place among the examples of its
        task that are kept token by token, or None.
        """
        by_task = F.one_hot(task_ids, len(self.tasks)).to(mask.device, torch.float64)
        share = mask.to(torch.float64).unsqueeze(-1) * by_task.unsqueeze(1)  # (b, t, tasks)
        if ids is not None:
            self.recorder.begin(mask, task_ids, ids, shown)

        def watch(layer: ManyLoraLayer, args: tuple[Any, ...]) -> None:
            weights = self._weights(layer, args[0])
            entropy = torch.special.entr(weights).sum(-1, keepdim=True)
            measured = torch.cat([weights, entropy], -1)
            total = share.flatten(0, 1).to(weights.device).T @ measured
            self.sums[layer.name] = self.sums.get(layer.name, torch.zeros(())) + total
            if ids is not None:
                self.recorder.add(layer.name, weights)

        handles = [layer.register_forward_pre_hook(watch) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.counts += share.sum((0, 1)).cpu()

    def _weights(self, layer: ManyLoraLayer, x: Tensor) -> Tensor:
        """g(x) of every token, (batch * tokens, N), in float64."""
        t = layer.tensors(self.adapter)
        if layer.branches[self.adapter].router_input == "Ax":
            x = F.linear(x.to(t["A"].dtype), t["A"])
        return router_weights(x, t["router"]).double().flatten(0, -2)

    def result(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Routing | None:
        """The means, or None for a model without a router; tasks without a token are left out.

        tokenizer: what writes the text of the examples, which are left out without it.
        """
        if not self.layers:
            return None
        counts = self.counts.clamp(min=1).unsqueeze(-1)
        means = [(total.cpu() / counts).tolist() for total in self.sums.values()]
        seen = {i: task for i, task in enumerate(self.tasks) if self.counts[i] > 0}
        routing = Routing(
            branches=self.branches,
            layers=list(self.sums),
            tasks={
                task: [[round(w, _DIGITS) for w in layer[i][:-1]] for layer in means]
                for i, task in seen.items()
            },
            entropies={
                task: [round(layer[i][-1], _DIGITS) for layer in means] for i, task in seen.items()
            },
            tokens={task: int(self.counts[i]) for i, task in seen.items()},
        )
        if tokenizer is not None:
            routing["examples"] = self.recorder.examples(self.tasks, tokenizer)
        return routing


def write_routing(run: Path, routing: Routing) -> None:
    write_atomically(run / ROUTING_FILE, json.dumps(routing, separators=(",", ":")))


def read_routing(run: Path) -> Routing:
    routing: Routing = json.loads((run / ROUTING_FILE).read_text(encoding="utf-8"))
    return routing
