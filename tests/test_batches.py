"""What must not change an answer: half precision, autocast, empty batches, batch mates, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tiny import OneLayer, adapter_tensors, attach, base_layer, ids_of, tiny_llama

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "lora_split": {"method": "lora_split"},
    "lora_split uneven": {"method": "lora_split", "branch_ranks": [1, 4, 2]},
    "lora_split one B": {"method": "lora_split", "share_B": True},
    "multilora": {"method": "multilora"},
    "multilora uneven": {"method": "multilora", "branch_ranks": [1, 4, 2]},
    "hydralora": {"method": "hydralora"},
    "hydralora router on Ax": {"method": "hydralora", "router_input": "Ax"},
    "hydralora uniform": {"method": "hydralora", "gate": "uniform", "shared_rank": 2},
    "lora_moe": {"method": "lora_moe"},
    "lora_moe uneven": {"method": "lora_moe", "branch_ranks": [1, 4, 2]},
    "cluster": {"method": "branch_per_cluster", "shared_rank": 2},
    "task gate": {"method": "hydralora", "gate": "task", "num_tasks": 3},
}
by_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())


def one_layer(config: dict[str, Any], dtype: torch.dtype) -> PeftModel:
    torch.manual_seed(0)
    return attach(
        OneLayer(base_layer("linear", 13, 7, dtype)),
        target_modules=["linear"],
        r=4,
        init_weights=False,
        **config,
    )


@by_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_base_gives_half_output_of_a_float32_adapter(
    config: dict[str, Any], dtype: torch.dtype
) -> None:
    half, full = one_layer(config, dtype), one_layer(config, torch.float32)
    for name, tensor in adapter_tensors(half).items():
        assert tensor.dtype == torch.float32, name
        tensor.data.copy_(adapter_tensors(full)[name])
    x = torch.randn(2, 3, 13).to(dtype)
    base = half.get_base_model().linear.base_layer(x)
    full.get_base_model().linear.base_layer.weight.data.zero_()
    full.get_base_model().linear.base_layer.bias.data.zero_()
    with ids_of(half, [2, 0]), ids_of(full, [2, 0]):
        y, update = half(x), full(x.float())
    assert y.dtype == dtype
    # The update's products are in half precision, summed in float32, and it is added rounded once.
    step = torch.finfo(dtype).eps
    off = (y.float() - (base + update)).abs()
    assert (off <= step * (base + update).abs() + 4 * step * update.abs().max()).all()
    y.float().square().sum().backward()
    for name, tensor in adapter_tensors(half).items():
        assert tensor.grad.dtype == torch.float32, name
        assert tensor.grad.isfinite().all(), name


@by_kind
def test_autocast_trains_a_float32_adapter(config: dict[str, Any]) -> None:
    model = one_layer(config, torch.float32)
    x = torch.randn(2, 3, 13)
    with ids_of(model, [2, 0]):
        exact = model(x)
        exact.sum().backward()
        exact = exact.detach()
        gradients = {n: t.grad.clone() for n, t in adapter_tensors(model).items()}
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
    for name, tensor in adapter_tensors(model).items():
        assert tensor.grad.dtype == torch.float32
        top = float(gradients[name].abs().max())
        torch.testing.assert_close(tensor.grad, gradients[name], rtol=0.05, atol=0.1 * top + 1e-3)


@by_kind
@pytest.mark.parametrize("shape", [(0, 13), (0, 5, 13), (2, 0, 13)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(
    config: dict[str, Any], shape: tuple[int, ...], dropout: float
) -> None:
    model = one_layer({"lora_dropout": dropout, **config}, torch.float32).train()
    with ids_of(model, 0):
        y = model(torch.zeros(shape))
    assert y.shape == (*shape[:-1], 7)
    y.sum().backward()
    assert not any(t.grad.any() for t in adapter_tensors(model).values())


def logits(model: PeftModel, rows: list[list[int]], ids: list[int], side: str) -> list[Tensor]:
    """Logits of the real tokens of each row of a padded batch."""
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    if side == "left":
        batch = [p + row for p, row in zip(pads, rows, strict=True)]
        mask = [p + [1] * len(row) for p, row in zip(pads, rows, strict=True)]
    else:
        batch = [row + p for p, row in zip(pads, rows, strict=True)]
        mask = [[1] * len(row) + p for p, row in zip(pads, rows, strict=True)]
    keep = torch.tensor(mask)
    with torch.no_grad(), ids_of(model, ids):
        out = model(input_ids=torch.tensor(batch), attention_mask=keep).logits
    return [row[real.bool()] for row, real in zip(out, keep, strict=True)]


@by_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_mates_and_padding_change_nothing(config: dict[str, Any], side: str) -> None:
    model = attach(tiny_llama(), r=4, init_weights=False, **config).eval()
    rows, ids = [[5, 9, 33], [7, 8, 9, 10, 11, 12, 13], [40, 3, 3, 21, 60]], [1, 0, 2]
    together = logits(model, rows, ids, side)
    with model.disable_adapter():
        base = logits(model, rows[:1], ids[:1], side)
    assert not torch.allclose(base[0], together[0], atol=1e-2)  # the adapter does something
    for row, k, mine in zip(rows, ids, together, strict=True):
        alone = logits(model, [row], [k], side)[0]
        torch.testing.assert_close(mine, alone, rtol=0, atol=1e-5)
