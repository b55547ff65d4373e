"""Balance losses: their values by hand, on real tokens only, counted once."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import manylora
from manylora.adapter.layer import layers_of
from manylora.adapter.router import balance_loss
from tiny import OneLayer, attach, tiny_llama

WEIGHTS = torch.tensor([[[0.7, 0.3], [0.6, 0.4]], [[0.2, 0.8], [0.9, 0.1]]], dtype=torch.float64)


def test_cv_squared_by_hand() -> None:
    # z = (2.4, 1.6): mean 2, variance (0.4^2 + 0.4^2) / 2 = 0.16
    assert balance_loss(WEIGHTS, "cv_squared", None).item() == pytest.approx(0.16 / 4, rel=1e-9)


def test_switch_by_hand() -> None:
    # f = (3/4, 1/4), P = (2.4/4, 1.6/4): 2 (0.75 0.6 + 0.25 0.4)
    assert balance_loss(WEIGHTS, "switch", None).item() == pytest.approx(1.1, rel=1e-12)


def test_masked_tokens_do_not_count() -> None:
    mask = torch.tensor([[1, 0], [1, 1]])
    # without (0.6, 0.4): z = (1.8, 1.2), mean 1.5, variance 0.09; f = (2/3, 1/3), P = (0.6, 0.4)
    cv, switch = (balance_loss(WEIGHTS, kind, mask).item() for kind in ("cv_squared", "switch"))
    assert cv == pytest.approx(0.09 / 2.25, rel=1e-9)
    assert switch == pytest.approx(2 * (2 / 3 * 0.6 + 1 / 3 * 0.4), rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_even_router_has_cv_squared_zero_and_switch_one(count: int) -> None:
    even = torch.full((3, 4, count), 1 / count, dtype=torch.float64)
    assert balance_loss(even, "cv_squared", None).item() == pytest.approx(0, abs=1e-12)
    assert balance_loss(even, "switch", None).item() == pytest.approx(1, rel=1e-12)
    # each branch gets as many tokens, each token one branch
    hard = torch.eye(count, dtype=torch.float64).repeat(3, 1)
    assert balance_loss(hard, "cv_squared", None).item() == pytest.approx(0, abs=1e-12)
    assert balance_loss(hard, "switch", None).item() == pytest.approx(1, rel=1e-12)


def test_a_collapsed_router_has_the_largest_loss() -> None:
    one = torch.tensor([[1.0, 0, 0, 0]]).repeat(6, 1)
    assert balance_loss(one, "cv_squared", None).item() == pytest.approx(3)  # N - 1
    assert balance_loss(one, "switch", None).item() == pytest.approx(4)  # N


@pytest.mark.parametrize("kind", ["cv_squared", "switch"])
def test_no_token_at_all_gives_a_finite_loss(kind: str) -> None:
    assert balance_loss(WEIGHTS, kind, torch.zeros(2, 2)).isfinite()
    assert balance_loss(WEIGHTS[:0], kind, None).isfinite()


def routed_llama(kind: str, **config: Any) -> PeftModel:
    fields = {"method": "hydralora", "r": 4, "init_weights": False, "balance_weight": 0.5}
    model = attach(tiny_llama(), balance_loss=kind, **fields | config)
    return model.train()


def total(model: nn.Module) -> Tensor:
    return torch.stack([layer.routing_loss["default"] for layer in layers_of(model)]).sum()


IDS = torch.tensor([[5, 9, 33, 20], [7, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
kinds = pytest.mark.parametrize("kind", ["cv_squared", "switch"])


@kinds
def test_a_layer_holds_its_weighted_loss_after_a_training_forward(kind: str) -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 3, dtype=torch.float64)
    model = attach(
        OneLayer(base),
        target_modules=["linear"],
        method="lora_moe",
        r=2,
        balance_loss=kind,
        balance_weight=0.25,
    ).train()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    model(x)
    (layer,) = layers_of(model)
    weights = (x @ layer.manylora_router["default"].weight.T).softmax(-1)
    expected = 0.25 * balance_loss(weights, kind, None)
    torch.testing.assert_close(layer.routing_loss["default"], expected)
    layer.routing_loss["default"].backward()
    assert layer.manylora_router["default"].weight.grad.any()
    assert not layer.manylora_A["default"].weight.grad.any()


@kinds
def test_a_model_that_holds_a_loss_can_be_copied_and_pickled(kind: str) -> None:
    """The loss belongs to a forward pass of the original, which keeps it."""
    model = routed_llama(kind)
    model(IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert manylora.balance_loss(other) == 0.0
        assert torch.equal(other(IDS).logits, model(IDS).logits)
        other_loss, loss = manylora.balance_loss(other), total(model) / len(layers_of(model))
        assert torch.equal(other_loss, loss)


@kinds
def test_evaluation_records_no_loss(kind: str) -> None:
    model = routed_llama(kind).eval()
    model(input_ids=IDS)
    assert all(not layer.routing_loss for layer in layers_of(model))


@kinds
def test_padding_does_not_count(kind: str) -> None:
    model = routed_llama(kind)
    model(input_ids=IDS, attention_mask=MASK)
    padded = [layer.routing_loss["default"].item() for layer in layers_of(model)]
    longer = nn.functional.pad(IDS, (0, 3), value=11)
    model(input_ids=longer, attention_mask=nn.functional.pad(MASK, (0, 3)))
    more_padding = [layer.routing_loss["default"].item() for layer in layers_of(model)]
    assert padded == pytest.approx(more_padding, rel=1e-4)
    model(input_ids=longer)
    no_mask = [layer.routing_loss["default"].item() for layer in layers_of(model)]
    assert padded != pytest.approx(no_mask, rel=1e-4)
    assert model.base_model.branch_state.token_mask is None


def step(model: PeftModel, times: int = 1) -> dict[str, Tensor]:
    """Gradients of the answer's loss and the balance loss, of `times` forwards, then backwards."""
    model.zero_grad()
    losses = []
    for _ in range(times):
        out = model(input_ids=IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100))
        losses.append(out.loss + total(model))
    for loss in losses:
        before = [layer.routing_loss["default"] for layer in layers_of(model)]
        loss.backward()
        after = [layer.routing_loss["default"] for layer in layers_of(model)]
        assert all(a is b for a, b in zip(before, after, strict=True))
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@kinds
@pytest.mark.parametrize("config", [{}, {"method": "lora_moe"}, {"router_input": "Ax"}], ids=str)
@pytest.mark.parametrize("times", [1, 2])
def test_gradient_checkpointing_counts_it_once(
    kind: str, config: dict[str, Any], times: int
) -> None:
    model = routed_llama(kind, **config)
    plain = step(model, times)
    loss = total(model).item()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = step(model, times)
    assert total(model).item() == pytest.approx(loss, rel=1e-6)
    assert set(plain) == set(checkpointed)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


@kinds
def test_the_loss_moves_the_router_towards_balance(kind: str) -> None:
    model = routed_llama(kind, balance_weight=1.0)
    routers = [p for n, p in model.named_parameters() if "router" in n]
    for router in routers:
        router.data.mul_(3)
    optimizer = torch.optim.Adam(routers, lr=0.05)
    floor = len(routers) if kind == "switch" else 0
    values = []
    for _ in range(20):
        model(input_ids=IDS, attention_mask=MASK)
        loss = total(model)
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.5 * (values[0] - floor) + floor


def test_a_frozen_router_has_no_balance_loss_and_does_not_stop_the_others() -> None:
    """`train.rates: {router: 0}`: its loss has no gradient to give, and that is no mistake."""
    model = attach(tiny_llama(), method="hydralora", balance_loss="switch").train()
    for name, weight in model.named_parameters():
        if "manylora_router" in name:
            weight.requires_grad_(False)
    tokens = torch.randint(3, 60, (2, 5))
    loss = model(input_ids=tokens, labels=tokens).loss + manylora.balance_loss(model)
    loss.backward()
    assert manylora.balance_loss(model) == 0.0
