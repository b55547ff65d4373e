"""manylora: many LoRA branches, one model. Importing it registers the method with PEFT."""

from __future__ import annotations

import os
from typing import Any

# Nothing leaves the machine unasked: read by huggingface_hub when PEFT imports it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from manylora.adapter.config import HydraLoraConfig, ManyLoraConfig, MultiLoraConfig
from manylora.adapter.ids import branch_ids
from manylora.adapter.prompt_mixing import prompt_mixing
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
    "prompt_mixing",
]

register()


def __getattr__(name: str) -> Any:
    """`manylora.load`, without loading recipes and corpora for those who only use the adapter."""
    if name == "load":
        from manylora.run import load

        return load
    raise AttributeError(f"module 'manylora' has no attribute {name!r}")
