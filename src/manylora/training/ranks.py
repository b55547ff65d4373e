"""A run on several GPUs, as `torchrun --nproc-per-node 4 -m manylora train recipe.yaml` starts it.

The first process writes the run folder, scores and tells; the others only train along. The batch of
a step is batch_size x gradient_accumulation x processes.
"""

from __future__ import annotations

import os

import torch


def first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def use_own_gpu() -> None:
    """Each process of a host has a GPU of its own."""
    if torch.cuda.is_available() and several_processes():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
