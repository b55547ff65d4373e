"""How adapters start, and what the first gradients are (facts that follow from the equations)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from manylora.methods import GATES, METHODS
from tiny import OneLayer, adapter_tensors, attach, base_layer, ids_of, tiny_llama

IN, OUT, R, N = 13, 17, 3, 4
WIDE_IN, WIDE_OUT = 400, 300


def one_layer(n_in: int = IN, n_out: int = OUT, **config: Any) -> PeftModel:
    torch.manual_seed(0)
    fields = {"r": R, "lora_alpha": 6} | config
    if fields["method"] != "lora" and "branch_ranks" not in fields:
        fields.setdefault("num_branches", N)
    return attach(OneLayer(base_layer("linear", n_in, n_out)), target_modules=["linear"], **fields)


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, IN, dtype=torch.float64)


COMBINATIONS = [
    (method, gate) for method in METHODS for gate in GATES if method != "lora" or gate == "ones"
]


@pytest.mark.parametrize(("method", "gate"), COMBINATIONS)
@pytest.mark.parametrize("more", [{}, {"shared_rank": 2, "init_A": "normal"}], ids=str)
def test_identity_at_the_start(method: str, gate: str, more: dict[str, Any]) -> None:
    base = tiny_llama()
    tokens = torch.tensor([[5, 9, 33, 20], [7, 8, 11, 2]])
    expected = base(input_ids=tokens).logits
    tasks = 3 if gate == "task" else None
    model = attach(base, method=method, gate=gate, num_tasks=tasks, r=4, lora_dropout=0.3, **more)
    with ids_of(model, [2, 0]):
        assert torch.equal(model.train()(input_ids=tokens).logits, expected)
        assert torch.equal(model.eval()(input_ids=tokens).logits, expected)


def assert_uniform(t: Tensor, bound: float) -> None:
    """U(-bound, bound): never outside, filled to the edge, the variance of a uniform."""
    assert t.abs().max() <= bound * (1 + 1e-6)
    assert t.abs().max() > bound * (1 - 30 / t.numel())
    assert t.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)
    assert abs(t.mean().item()) < 5 * bound / math.sqrt(3 * t.numel())


@pytest.mark.parametrize("method", METHODS)
def test_a_is_kaiming_uniform_over_the_inputs(method: str) -> None:
    t = adapter_tensors(one_layer(WIDE_IN, WIDE_OUT, method=method, shared_rank=5))
    for name in ("A", "shared_A"):
        for rows in t[name].split(R):
            assert_uniform(rows, 1 / math.sqrt(WIDE_IN))
    assert not t["shared_B"].any()


@pytest.mark.parametrize("ranks", [[8, 8, 8], [4, 30, 11]], ids=str)
def test_multilora_b_has_the_fan_in_of_its_own_branch(ranks: list[int]) -> None:
    t = adapter_tensors(one_layer(WIDE_IN, WIDE_OUT, method="multilora", branch_ranks=ranks))
    for B, r in zip(t["B"].split(ranks, 1), ranks, strict=True):
        assert_uniform(B, 1 / math.sqrt(r))
    assert not t["scale"].any()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "multilora"])
def test_b_is_zero_elsewhere(method: str) -> None:
    assert not adapter_tensors(one_layer(method=method))["B"].any()


@pytest.mark.parametrize("method", ["hydralora", "lora_moe"])
def test_the_router_is_never_zero(method: str) -> None:
    for seen, width in (("x", WIDE_IN), ("Ax", R if method == "hydralora" else N * R)):
        t = adapter_tensors(one_layer(WIDE_IN, WIDE_OUT, method=method, router_input=seen))
        assert t["router"].shape == (N, width)
        assert t["router"].all()
        assert len(t["router"].unique(dim=0)) == N
        assert t["router"].abs().max() <= 1 / math.sqrt(width) * (1 + 1e-6)
    assert_uniform(
        adapter_tensors(one_layer(WIDE_IN, WIDE_OUT, method=method))["router"],
        1 / math.sqrt(WIDE_IN),
    )


def test_the_learned_gate_differs_between_branches() -> None:
    gate = adapter_tensors(one_layer(method="hydralora", gate="task", num_tasks=3))["gate"]
    assert gate.shape == (3, N)
    assert gate.all()
    assert gate.unique().numel() == 3 * N


def test_normal_option_is_molora_s() -> None:
    t = adapter_tensors(one_layer(WIDE_IN, WIDE_OUT, method="lora_moe", init_A="normal", r=8))
    for name in ("A", "router"):
        assert t[name].std().item() == pytest.approx(0.02, rel=0.06)
        assert t[name].abs().max() > 0.055  # beyond the Kaiming bound of 0.05
    assert not t["B"].any()


def first_gradients(model: PeftModel) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model(x_of(6)).square().sum().backward()
    return {name: tensor.grad for name, tensor in adapter_tensors(model).items()}


@pytest.mark.parametrize("method", ["hydralora", "lora_moe"])
def test_at_the_start_only_b_gets_a_gradient_when_routed(method: str) -> None:
    g = first_gradients(one_layer(method=method))
    assert not g["A"].any()
    assert not g["router"].any()
    blocks = g["B"].split(R, 1)
    assert all(block.any() for block in blocks)
    assert not torch.equal(blocks[0], blocks[1])


def test_at_the_start_only_c_gets_a_gradient_in_multilora() -> None:
    g = first_gradients(one_layer(method="multilora"))
    assert not g["A"].any()
    assert not g["B"].any()
    assert (g["scale"] != 0).all()


def test_a_uniform_gate_over_a_shared_a_never_tells_its_branches_apart() -> None:
    model = one_layer(method="hydralora", gate="uniform")
    optimizer = torch.optim.AdamW(adapter_tensors(model).values(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        blocks = first_gradients(model)["B"].split(R, 1)
        assert blocks[0].any()
        assert all(torch.equal(block, blocks[0]) for block in blocks)
        optimizer.step()
    routed = one_layer(method="hydralora")
    blocks = first_gradients(routed)["B"].split(R, 1)
    assert not any(torch.allclose(block, blocks[0]) for block in blocks[1:])


def plain_lora(model: PeftModel, A: Tensor, B: Tensor) -> PeftModel:
    """PEFT's own LoRA on a copy of the base layer, with the given factors."""
    base = base_layer("linear", IN, OUT)
    base.load_state_dict(model.get_base_model().linear.base_layer.state_dict())
    lora = get_peft_model(OneLayer(base), LoraConfig(r=R, lora_alpha=6, target_modules=["linear"]))
    layer = lora.get_base_model().linear
    layer.lora_A["default"].weight.data.copy_(A)
    layer.lora_B["default"].weight.data.copy_(B)
    return lora


@pytest.mark.parametrize(
    "config",
    [
        {"method": "lora"},
        {"method": "hydralora", "num_branches": 1},
        {"method": "lora_split", "num_branches": 1},
        {"method": "lora_moe", "num_branches": 1},
        {"method": "hydralora", "num_branches": 1, "router_input": "Ax"},
    ],
    ids=str,
)
def test_one_branch_is_plain_lora_exactly(config: dict[str, Any]) -> None:
    model = one_layer(init_weights=False, **config)
    t = adapter_tensors(model)
    lora = plain_lora(model, t["A"], t["B"])
    g = first_gradients(model)
    torch.manual_seed(1)
    x = x_of(6)
    lora(x).square().sum().backward()
    theirs = lora.get_base_model().linear
    exact = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(model(x), lora(x), **exact)
    torch.testing.assert_close(g["A"], theirs.lora_A["default"].weight.grad, **exact)
    torch.testing.assert_close(g["B"], theirs.lora_B["default"].weight.grad, **exact)
    assert "router" not in g or not g["router"].any()


@pytest.mark.parametrize("method", ["hydralora", "lora_moe"])
@pytest.mark.parametrize("k", range(N))
def test_a_one_hot_router_is_plain_lora_with_that_branch(method: str, k: int) -> None:
    model = one_layer(method=method, init_weights=False)
    t = adapter_tensors(model)
    with torch.no_grad():
        t["router"].zero_()[k] = 1e6
    A = t["A"] if method == "hydralora" else t["A"].split(R)[k]
    lora = plain_lora(model, A, t["B"].split(R, 1)[k])
    x = x_of(6).abs()  # so that R_k x is large and positive
    torch.testing.assert_close(model(x), lora(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("method", "rank"),
    [("hydralora", R), ("lora_moe", N * R), ("multilora", N * R), ("lora_split", N * R)],
)
def test_the_rank_of_the_update(method: str, rank: int) -> None:
    model = one_layer(method=method, init_weights=False)
    layer, t = model.get_base_model().linear, adapter_tensors(model)
    for x in x_of(3):
        weights = (t["router"] @ x).softmax(0) if "router" in t else None
        delta = layer.get_delta_weight("default", weights)
        assert torch.linalg.matrix_rank(delta) == rank
        torch.testing.assert_close(
            delta @ x, (model(x[None]) - layer.base_layer(x[None]))[0], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    "config",
    [{"num_branches": N}, {"branch_ranks": [1, 4, 2]}, {"num_branches": N, "use_rslora": True}],
    ids=str,
)
def test_multilora_merges_into_the_sum_of_its_scaled_branches(config: dict[str, Any]) -> None:
    model = one_layer(method="multilora", init_weights=False, **config)
    t, layer = adapter_tensors(model), model.get_base_model().linear
    ranks = config.get("branch_ranks", [R] * N)
    s = 6 / (math.sqrt(R) if config.get("use_rslora") else R)
    expected = torch.zeros(OUT, IN, dtype=torch.float64)
    for c, B, A in zip(t["scale"], t["B"].split(ranks, 1), t["A"].split(ranks), strict=True):
        expected += s * torch.diag(c) @ B @ A
    torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=0, atol=1e-13)
    before = layer.base_layer.weight.detach().clone()
    x = x_of(5)
    unmerged = model(x)
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight - before, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(model(x), unmerged, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize(("method", "gate"), COMBINATIONS)
def test_only_the_adapter_trains_and_every_branch_gets_a_gradient(method: str, gate: str) -> None:
    tasks = 3 if gate == "task" else None
    more = {"r": 4, "shared_rank": 2, "init_weights": False}
    model = attach(tiny_llama(), method=method, gate=gate, num_tasks=tasks, **more)
    tokens = torch.randint(3, 60, (3, 8))
    with ids_of(model, [0, 1, 2]):
        model(input_ids=tokens, labels=tokens).loss.backward()
    count = model.peft_config["default"].branches_of().count
    for name, p in model.named_parameters():
        assert p.requires_grad == (".manylora_" in name), name
        assert (p.grad is not None) == p.requires_grad, name
        if ".manylora_B." in name:
            assert all(block.any() for block in p.grad.split(4, 1)), name
            assert p.shape[1] == 4 * count
        elif p.requires_grad:
            assert p.grad.any(), name
