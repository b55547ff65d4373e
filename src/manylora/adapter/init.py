"""How each tensor is held, and how it starts: every method equals the base model at step 0.

A and router: Kaiming-uniform, a = sqrt(5), so U(-1/sqrt(in), 1/sqrt(in)), as LoRA and HydraLoRA's
code; normal with std 0.02 as in MoLoRA on request. B: zero; for MultiLoRA Kaiming-uniform for each
branch by itself (fan-in r of that branch, not N r), with its scale c zero instead. The router and
the learned gate are never zero: with B = 0 as well, all branches of a shared A would get the same
gradient for ever (methods.md, section 0).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from manylora.adapter.config import ManyLoraConfig
from manylora.methods import METHODS, Branches


class Factor(nn.Module):
    """A leaf that holds one tensor; calling it returns it, so that ZeRO-3 gathers it in time."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def forward(self) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


@torch.no_grad()
def initialize(tensors: dict[str, Tensor], branches: Branches, config: ManyLoraConfig) -> None:
    """Fill the tensors of one adapter on one layer, in place (nothing is done on meta tensors)."""
    random_B = METHODS[config.method].init_B == "kaiming" or not config.init_weights
    for part, tensor in tensors.items():
        if part in ("A", "router") and config.init_A == "normal":
            nn.init.normal_(tensor, std=0.02)
        elif part in ("A", "router", "gate", "shared_A"):
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        elif part == "B" and random_B:
            _kaiming_per_branch(tensor, branches)
        elif part == "shared_B" and not config.init_weights:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        elif part == "scale" and not config.init_weights:
            nn.init.normal_(tensor)
        else:
            nn.init.zeros_(tensor)


def _kaiming_per_branch(B: Tensor, branches: Branches) -> None:
    ranks = branches.ranks[:1] if branches.share_B else branches.ranks
    fan_in = torch.tensor([float(r) for r in ranks for _ in range(r)])
    nn.init.uniform_(B, -1.0, 1.0)
    B.mul_(fan_in.rsqrt().to(B.device))
