"""Layers that compute for each other: whatever calls them, each gives what it gives alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import manylora
from manylora.adapter.layer import layers_of
from tiny import VOCAB, attach, tiny_llama


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down_proj = nn.Linear(16, 8)


class Experts(nn.Module):
    """All gates are computed before all ups, from the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gates = [torch.relu(one.gate_proj(x)) for one in self.experts]
        ups = [one.up_proj(x) for one in self.experts]
        parts = zip(self.experts, gates, ups, strict=True)
        return sum((one.down_proj(g * u) for one, g, u in parts), torch.zeros_like(x))


class Attention(nn.Module):
    def __init__(self, keys: int = 8) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(keys, 8)
        self.v_proj = nn.Linear(keys, 8)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = x if other is None else other
        return self.q_proj(x) + 2 * self.k_proj(y) + 3 * self.v_proj(y)


def alone(model: nn.Module, *inputs: Any) -> Tensor:
    """What the model gives when no layer computes for another."""
    siblings = {layer: layer.siblings for layer in layers_of(model)}
    for layer in siblings:
        layer.siblings = []
    try:
        return model(*inputs)
    finally:
        for layer, own in siblings.items():
            layer.siblings = own


def test_a_fresh_adapter_changes_nothing_where_modules_read_one_tensor_in_turns() -> None:
    model, x = Experts(), torch.randn(2, 5, 8)
    wanted = model(x)
    adapted = get_peft_model(model, manylora.ManyLoraConfig(target_modules="all-linear"))
    torch.testing.assert_close(adapted(x), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [{}, {"q_proj": 3}, {"k_proj": 3}, {"v_proj": 3}], ids=str)
def test_the_same_input_again_is_computed_again(rank: dict[str, int]) -> None:
    torch.manual_seed(0)
    config = manylora.ManyLoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern=rank
    )
    model, x = get_peft_model(Attention(), config), torch.randn(2, 5, 8)
    with torch.no_grad():
        model(x)
    for _ in range(2):  # a graph that was freed is not taken again
        model(x).square().sum().backward()
    ups = [p for name, p in model.named_parameters() if "manylora_B" in name]
    assert all(p.grad is not None and p.grad.any() for p in ups)
    with torch.no_grad():
        model(x)
        for p in ups:
            p.fill_(1.0)
        assert torch.equal(model(x), model(x.clone()))


@pytest.mark.parametrize("rank", [{}, {"k_proj": 3}], ids=str)
def test_siblings_of_other_ranks_train_under_a_checkpoint(rank: dict[str, int]) -> None:
    config = manylora.ManyLoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern=rank, init_weights=False
    )
    model = get_peft_model(Attention(), config)
    found = []
    for again in (False, True):
        x = torch.ones(2, 5, 8, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=False) if again else model(x)
        y.square().sum().backward()
        found.append(x.grad)
    assert torch.equal(found[0], found[1])


def test_a_layer_called_alone_goes_by_the_ids_of_its_own_call() -> None:
    model = attach(tiny_llama(), method="branch_per_cluster", init_weights=False).eval()
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(2, 3, attention.q_proj.in_features)
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    found = []
    for read in (lambda: x, lambda: x.clone()):
        for layer in layers:
            for branch in range(3):
                with torch.no_grad(), manylora.branch_ids(model, branch):
                    found.append(layer(read()))
    for one, other in zip(found[:9], found[9:], strict=True):
        assert torch.equal(one, other)


def test_a_layer_called_alone_goes_by_the_adapter_of_its_own_call() -> None:
    config = manylora.ManyLoraConfig(target_modules=["q_proj", "k_proj", "v_proj"])
    config.init_weights = False
    model = get_peft_model(Attention(), config, adapter_name="first")
    model.add_adapter("second", config)
    x = torch.randn(2, 5, 8)
    inner, found = model.base_model.model, []
    for read in (lambda: x, lambda: x.clone()):
        for layer in (inner.q_proj, inner.k_proj, inner.v_proj):
            for name in ("first", "second"):
                model.set_adapter(name)
                with torch.no_grad():
                    found.append(layer(read()))
    for one, other in zip(found[:6], found[6:], strict=True):
        assert torch.equal(one, other)


def test_keys_of_another_width_are_adapted_as_pefts_lora_does() -> None:
    x, other = torch.randn(2, 5, 8), torch.randn(2, 5, 6)
    for config in (
        LoraConfig(target_modules="all-linear"),
        manylora.ManyLoraConfig(target_modules="all-linear"),
    ):
        model = Attention(keys=6)
        wanted = model(x, other)
        adapted = get_peft_model(model, config)
        torch.testing.assert_close(adapted(x, other), wanted, rtol=0, atol=1e-6)


def test_a_wrong_guess_costs_time_and_nothing_else() -> None:
    config = manylora.ManyLoraConfig(target_modules="all-linear", init_weights=False)
    model = get_peft_model(Attention(), config)
    x, other = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(model(x, other), alone(model, x, other))
    torch.testing.assert_close(model(x), alone(model, x))


def test_threads_do_not_get_each_others_outputs() -> None:
    model = attach(tiny_llama(), init_weights=False).eval()
    inputs = [torch.randint(3, VOCAB, (1, 2)) for _ in range(4)]
    with torch.inference_mode():
        wanted = [model(input_ids=one).logits for one in inputs]
    wrong: list[float] = []

    def work(place: int) -> None:
        with torch.inference_mode():
            for _ in range(40):
                found = model(input_ids=inputs[place]).logits
                apart = float((found - wanted[place]).abs().max())
                if apart > 1e-4:
                    wrong.append(apart)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_model_that_was_cast_while_merged_comes_back_in_its_new_dtype() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8)),
        manylora.ManyLoraConfig(method="multilora", target_modules=["0"]),
    )
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert model(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
