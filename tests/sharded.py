"""One of two processes that train a tiny model sharded between them; run by test_sharded.py.

    python tests/sharded.py KIND METHOD RANK PORT FILE      KIND: fsdp1, fsdp2, zero3, ...

Writes the losses of three steps on the whole batch, of which each process has half.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from manylora.adapter.ids import branch_ids
from tiny import attach, tiny_llama

METHODS: dict[str, dict[str, Any]] = {
    "hydralora": {"method": "hydralora", "num_branches": 3},
    "multilora": {"method": "multilora"},
    "branch_per_cluster": {"method": "branch_per_cluster", "num_branches": 3, "shared_rank": 2},
}
TOKENS = torch.arange(32).reshape(4, 8) + 3
IDS = torch.tensor([0, 1, 2, 1])


def made(method: str) -> nn.Module:
    return attach(tiny_llama(), r=4, init_weights=False, **METHODS[method]).train()


def losses(model: nn.Module, adapter: nn.Module, rows: slice, steps: int = 3) -> list[float]:
    """Of each step before it, on this process's rows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(steps):
        with branch_ids(adapter, IDS[rows]):
            logits = model(input_ids=TOKENS[rows], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].mT, TOKENS[rows][:, 1:])
            loss.backward()
        found.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return found


def zero_losses(model: nn.Module, stage: int, rows: slice, steps: int = 3) -> list[float]:
    """`losses` under DeepSpeed's ZeRO, which has a training loop of its own."""
    import deepspeed

    trained = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=1e-2), config=config
    )
    found = []
    for _ in range(steps):
        with branch_ids(model, IDS[rows]):
            logits = engine(input_ids=TOKENS[rows], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].mT, TOKENS[rows][:, 1:])
            engine.backward(loss)
        found.append(float(loss))
        engine.step()
    return found


def sharded(model: Any, kind: str) -> nn.Module:
    """fsdp1: by decoder layers, with the original parameters; fsdp2: by layers, or by products."""
    if kind == "fsdp1":
        policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    mesh = init_device_mesh("cpu", (2,))
    for module in reversed(list(model.modules())):
        product = kind == "fsdp2 by products" and isinstance(module, nn.Linear)
        if isinstance(module, LlamaDecoderLayer) or product:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model  # type: ignore[no-any-return]


def main(kind: str, method: str, rank: str, port: str, file: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE="2")
    os.environ["LOCAL_RANK"] = rank
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    half = slice(2 * int(rank), 2 * int(rank) + 2)
    model = made(method)
    if kind.startswith("zero"):
        mine = torch.tensor(zero_losses(model, int(kind[-1]), half))
    else:
        mine = torch.tensor(losses(sharded(model, kind), model, half))
    dist.all_reduce(mine)
    if rank == "0":
        Path(file).write_text(json.dumps((mine / 2).tolist()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
