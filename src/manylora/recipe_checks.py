"""What a recipe's adapter may be beyond what the adapter's own configuration refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from manylora.adapter.config import ManyLoraConfig


def check_adapter(adapter: Mapping[str, Any]) -> None:
    """Raise ValueError for a number that cannot be, or a value that would change nothing.

    A saved recipe has every key, so one that is at its default counts as left out.
    """
    alphas = {"lora_alpha": adapter["lora_alpha"]}
    alphas |= {f"alpha_pattern.{key}": alpha for key, alpha in adapter["alpha_pattern"].items()}
    for name, alpha in alphas.items():
        if not 0 < alpha < math.inf:
            raise ValueError(f"adapter.{name}={alpha} must be a finite number above 0")
    weight = adapter["balance_weight"]
    if not 0 <= weight < math.inf:
        raise ValueError(f"adapter.balance_weight={weight} must be a finite number, 0 or more")
    if adapter["balance_loss"] is None and weight != ManyLoraConfig().balance_weight:
        raise ValueError(
            f"adapter.balance_weight={weight} weighs nothing without a balance_loss; add "
            "adapter.balance_loss=cv_squared or switch, or leave it out"
        )
    if adapter["dropout_per_branch"] and not adapter["lora_dropout"]:
        raise ValueError(
            "adapter.dropout_per_branch=true drops nothing with lora_dropout=0; set "
            "adapter.lora_dropout=0.1, or leave it out"
        )
