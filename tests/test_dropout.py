"""Dropout acts on the input of A alone: one mask for all branches, or an own mask for each.

A_i is the identity and B_i puts branch i into its own slot of the output, so that an output of ones
shows each branch's mask: 0 where dropped, 1 / (1 - p) where kept.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import manylora
from loops import softmax
from manylora.adapter import masks
from manylora.adapter.layout import Layout
from manylora.methods import resolve
from tiny import OneLayer, adapter_tensors, attach

WIDTH, COUNT, P, TOKENS = 8, 3, 0.4, 500


def show_masks(per_branch: bool, **config: Any) -> PeftModel:
    """W = 0, s = 1, A_i = I, B_i into slot i: output slot i is g_i times the dropped-out input."""
    base = nn.Linear(WIDTH, COUNT * WIDTH, bias=False, dtype=torch.float64)
    nn.init.zeros_(base.weight)
    fields = {"r": WIDTH, "lora_alpha": WIDTH, "num_branches": COUNT} | config
    model = attach(
        OneLayer(base),
        target_modules=["linear"],
        lora_dropout=P,
        dropout_per_branch=per_branch,
        **fields,
    )
    t = adapter_tensors(model)
    with torch.no_grad():
        t["A"].copy_(torch.eye(WIDTH).repeat(len(t["A"]) // WIDTH, 1))
        t["B"].copy_(torch.eye(COUNT * WIDTH))
        if "scale" in t:
            t["scale"].fill_(1.0)
    return model


def slots(y: Tensor) -> Tensor:
    """(N, tokens, width)"""
    return y.unflatten(-1, (COUNT, WIDTH)).movedim(-2, 0)


METHODS: list[dict[str, Any]] = [
    {"method": "lora_split"},
    {"method": "multilora"},
    {"method": "lora_split", "share_A": True},
    {"method": "hydralora"},
    {"method": "hydralora", "router_input": "Ax"},
    {"method": "lora_moe"},
]


@pytest.mark.parametrize("config", METHODS, ids=str)
@pytest.mark.parametrize("per_branch", [False, True], ids=["one mask", "own masks"])
def test_masks_are_one_or_independent_and_the_router_never_sees_them(
    config: dict[str, Any], per_branch: bool
) -> None:
    model = show_masks(per_branch, **config).train()
    torch.manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    t = adapter_tensors(model)
    g = torch.ones(TOKENS, COUNT, dtype=torch.float64)
    if "router" in t:
        h = x if t["router"].shape[1] == WIDTH else x.repeat(1, len(t["A"]) // WIDTH)
        g = torch.stack([softmax(t["router"] @ token) for token in h])  # of x without dropout
    masks = slots(model(x)) / (g.T.unsqueeze(-1) * x)

    kept = masks.abs() > 0.5
    torch.testing.assert_close(masks, kept.double() / (1 - P), rtol=1e-9, atol=1e-9)
    rate = kept.double().mean((1, 2))
    five_sigma = 5 * (P * (1 - P) / (TOKENS * WIDTH)) ** 0.5
    assert ((rate - (1 - P)).abs() < five_sigma).all()
    for i in range(COUNT):
        for j in range(i):
            both = (kept[i] & kept[j]).double().mean()
            if per_branch:
                assert abs(both - (1 - P) ** 2) < five_sigma
            else:
                assert torch.equal(kept[i], kept[j])


def test_own_masks_of_uneven_branches_are_independent() -> None:
    base = nn.Linear(WIDTH, 3 + 5, bias=False, dtype=torch.float64)
    model = attach(
        OneLayer(base),
        target_modules=["linear"],
        method="lora_split",
        r=1,
        lora_alpha=1,
        branch_ranks=[3, 5],
        lora_dropout=P,
        dropout_per_branch=True,
    )
    nn.init.zeros_(base.weight)
    t = adapter_tensors(model)
    with torch.no_grad():
        t["A"].copy_(torch.cat([torch.eye(3, WIDTH), torch.eye(5, WIDTH)]))
        t["B"].copy_(torch.eye(8))
    torch.manual_seed(0)
    kept = model.train()(torch.ones(2000, WIDTH, dtype=torch.float64)) > 0.5
    both = (kept[:, :3] & kept[:, 3:6]).double().mean()
    assert abs(both - (1 - P) ** 2) < 0.03
    assert abs(kept.double().mean() - (1 - P)) < 0.03


@pytest.mark.parametrize("config", METHODS, ids=str)
@pytest.mark.parametrize("per_branch", [False, True], ids=["one mask", "own masks"])
def test_dropout_keeps_the_mean(config: dict[str, Any], per_branch: bool) -> None:
    model = show_masks(per_branch, **config)
    torch.manual_seed(0)
    x = torch.randn(WIDTH, dtype=torch.float64).expand(4000, WIDTH)
    expected = model.eval()(x[:1]).squeeze(0)
    mean = model.train()(x).mean(0)
    sigma = expected.abs() * (P / (1 - P) / 4000) ** 0.5
    assert ((mean - expected).abs() <= 5 * sigma).all()


@pytest.mark.parametrize("config", METHODS, ids=str)
@pytest.mark.parametrize("per_branch", [False, True], ids=["one mask", "own masks"])
def test_a_dropped_input_gets_no_gradient_through_a(
    config: dict[str, Any], per_branch: bool
) -> None:
    model = show_masks(per_branch, **config | {"gate": "ones", "router_input": "x"}).train()
    torch.manual_seed(0)
    x = torch.ones(50, WIDTH, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, slots(y).sum(0).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_branch", [False, True], ids=["one mask", "own masks"])
def test_the_shared_branch_has_dropout_too(per_branch: bool) -> None:
    model = show_masks(per_branch, method="branch_per_cluster", shared_rank=WIDTH).train()
    t = adapter_tensors(model)
    with torch.no_grad():
        t["shared_A"].copy_(torch.eye(WIDTH))
        t["shared_B"].copy_(torch.eye(COUNT * WIDTH, WIDTH))
    torch.manual_seed(0)
    with manylora.branch_ids(model, -1):
        y = slots(model(torch.ones(TOKENS, WIDTH, dtype=torch.float64)))
    assert not y[1:].any()
    assert set(y[0].unique().tolist()) == {0.0, 1 / (1 - P)}


class InMemory:
    """What dropout_kernels.py offers, with the masks that masks.py would draw."""

    @staticmethod
    def _rows(A: Tensor, plain: tuple[int, int]) -> Tensor:
        own = torch.zeros(len(A), 1, dtype=torch.bool)
        own[slice(*plain)] = True
        return own

    def dropout_linear(
        self, x: Tensor, A: Tensor, p: float, seed: int, plain: tuple[int, int], out: Tensor
    ) -> None:
        dropped = x * masks._mask(x, p, seed)
        out.copy_(torch.where(self._rows(A, plain).T, x @ A.T, dropped @ A.T))

    def dropout_linear_backward_A(
        self, dz: Tensor, x: Tensor, p: float, seed: int, plain: tuple[int, int]
    ) -> Tensor:
        dropped = x * masks._mask(x, p, seed)
        return torch.where(self._rows(dz.T, plain), dz.T @ x, dz.T @ dropped)

    def dropout_linear_backward_x(
        self, dz: Tensor, A: Tensor, p: float, seed: int, plain: tuple[int, int], onto: Any
    ) -> Tensor:
        own = self._rows(A, plain)
        dx = dz @ (A * own) + (dz @ (A * ~own)) * masks._mask(dz @ A, p, seed)
        return dx if onto is None else onto.add_(dx)


@pytest.mark.parametrize("config", METHODS, ids=str)
@pytest.mark.parametrize("padding", [0, 3])
def test_layers_in_one_operation_reach_the_kernels_each_with_its_rows_and_seed(
    config: dict[str, Any], padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    branches = resolve(r=2, num_branches=COUNT, **config)
    layout = Layout.of(branches)
    torch.manual_seed(0)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    rows = 3 * layout.block
    down = torch.cat([torch.randn(rows, WIDTH), torch.zeros(padding, WIDTH)]).double()
    dz = torch.cat([torch.randn(5, rows), torch.zeros(5, padding)], 1).double()
    seed = torch.tensor([[11], [12], [13]])

    def products() -> list[Tensor]:
        z = masks.down_product(x, down, layout, P, seed)[:, :rows]
        dP = masks.down_backward(dz, x, layout, P, seed)[:rows]
        return [z, dP, masks.input_gradient(dz, down, layout, P, seed)]

    in_memory = products()
    monkeypatch.setattr(masks, "_kernels", lambda *given: InMemory())
    for mine, kernels in zip(in_memory, products(), strict=True):
        torch.testing.assert_close(kernels, mine, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", METHODS, ids=str)
@pytest.mark.parametrize("per_branch", [False, True], ids=["one mask", "own masks"])
def test_evaluation_has_no_dropout(config: dict[str, Any], per_branch: bool) -> None:
    x = torch.randn(20, WIDTH, dtype=torch.float64)
    with_dropout = show_masks(per_branch, **config).eval()
    without = show_masks(False, **config)
    without.peft_config["default"].lora_dropout = 0.0
    assert torch.equal(with_dropout(x), without.train()(x))
