"""manylora: many LoRA branches, one model. Importing it registers the method with PEFT."""

from __future__ import annotations

from typing import Any

from manylora.adapter.config import HydraLoraConfig, ManyLoraConfig, MultiLoraConfig
from manylora.adapter.ids import branch_ids
from manylora.adapter.training import ManyLoraTrainerMixin, balance_loss
from manylora.adapter.tuner import ManyLoraModel, register

__version__ = "0.1.0"
__all__ = [
    "HydraLoraConfig",
    "ManyLoraConfig",
    "ManyLoraModel",
    "ManyLoraTrainerMixin",
    "MultiLoraConfig",
    "balance_loss",
    "branch_ids",
    "load",
]

register()


def __getattr__(name: str) -> Any:
    """`manylora.load`, without loading recipes and corpora for those who only use the adapter."""
    if name == "load":
        from manylora.run import load

        return load
    raise AttributeError(f"module 'manylora' has no attribute {name!r}")
