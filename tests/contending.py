"""What the tests of a comparison's methods share: methods by name, and the real model with one."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, get_peft_model

from manylora.comparison.contenders import Contender, contenders, for_steps
from tiny import tiny_llama


def named(*names: str, budget: str = "lora:r=8", tasks: int = 3, **adapter: Any) -> list[Contender]:
    """On the tiny model. adapter: what the recipe's adapter says."""
    return contenders(names, budget, tiny_llama(), tasks, adapter)[1]


def attached(config: PeftConfig, **llama: Any) -> Any:
    """The real model with a method, as a run has it."""
    return get_peft_model(tiny_llama(**llama), for_steps(config, 20))


def trained(config: PeftConfig) -> int:
    return sum(p.numel() for p in attached(config).parameters() if p.requires_grad)
