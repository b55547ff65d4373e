"""Adapter folders for the tests of inspection: one of every kind of update, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from manylora.adapter.layer import layers_of
from manylora.inspect.routing import Routing, write_routing
from manylora.methods import METHODS
from tiny import attach, tiny_llama

# Every row of the table, and what a row can be changed into.
KINDS: list[dict[str, Any]] = [
    *({"method": method} for method in METHODS),
    {"method": "lora", "use_rslora": True},
    {"method": "lora", "shared_rank": 3},
    {"method": "lora_split", "branch_ranks": [1, 4, 2]},
    {"method": "lora_split", "gate": "one_hot"},
    {"method": "multilora", "branch_ranks": [3, 1, 2], "use_rslora": True},
    {"method": "multilora", "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 3}},
    {"method": "multilora", "gate": "router", "shared_rank": 2},
    {"method": "hydralora", "gate": "uniform", "shared_rank": 2},
    {"method": "hydralora", "gate": "one_hot", "shared_rank": 3},
    {"method": "hydralora", "router_input": "Ax"},
    {"method": "lora_moe", "branch_ranks": [2, 5, 3]},
    {"method": "lora_moe", "share_B": True, "shared_rank": 2},
    {"method": "lora_moe", "gate": "task", "num_tasks": 2, "share_B": True},
    {"method": "lora_split", "gate": "task", "num_tasks": 4, "branch_ranks": [1, 4, 2]},
    {"method": "branch_per_cluster", "shared_rank": 2},
]


def name_of(kind: dict[str, Any]) -> str:
    return "-".join(str(value) for value in kind.values())


def routing_of(model: PeftModel, tasks: tuple[str, ...] = ("one", "two")) -> Routing:
    """Mean weights of every layer and task, each another."""
    layers = layers_of(model)
    count = layers[0].branches["default"].count
    drawn = torch.rand(len(tasks), len(layers), count, generator=torch.Generator().manual_seed(5))
    weights = (drawn / drawn.sum(-1, keepdim=True)).tolist()
    names = [layer.name for layer in layers]
    return Routing(branches=count, layers=names, tasks=dict(zip(tasks, weights, strict=True)))


def save_adapter(
    folder: Path, *, routed: bool = True, dtype: torch.dtype = torch.float64, **config: Any
) -> PeftModel:
    """A random update of the tiny model in a folder; returns the model that has it.

    routed: whether a token router's mean weights are beside it.
    """
    fields = {"init_weights": False, "r": 4, "target_modules": ["q_proj", "down_proj"], **config}
    model = attach(tiny_llama(dtype=dtype), **fields)
    model.save_pretrained(str(folder))
    if routed and layers_of(model)[0].branches["default"].gate == "router":
        write_routing(folder, routing_of(model))
    return model
