"""Prompts of three made-up branches, each of tokens of its own, and a selector fitted to them."""

from __future__ import annotations

import torch

from manylora.adapter.selector import BranchSelector

NAMES = ["law", "medicine", "code"]
RANGES = [(4, 14), (14, 24), (24, 34)]  # each branch's prompts have their own tokens
UNKNOWN = (40, 60)
TEMPLATE = [1, 3]  # every prompt starts so


def prompt(low: int, high: int, seed: int, length: int = 12) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return TEMPLATE + torch.randint(low, high, (length - 2,), generator=generator).tolist()


def fitted(order: tuple[int, ...] = (0, 1, 2)) -> BranchSelector:
    owners = [i for i in range(3) for _ in range(8)]
    prompts = [prompt(*RANGES[order[owner]], seed) for seed, owner in enumerate(owners)]
    return BranchSelector.fit(prompts, owners, NAMES, buckets=512)


PROMPTS = torch.tensor([prompt(*RANGES[k], 100 + k) for k in (2, 0, 1, 0)])
IDS = torch.tensor([2, 0, 1, 0])
