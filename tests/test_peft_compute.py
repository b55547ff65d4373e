"""Precision, checkpointing, compilation, copies and training give the results they should."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import manylora
from tiny import VOCAB, attach, tiny_llama, train_steps

X = torch.randint(3, VOCAB, (4, 7), generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([2, 0, 1, -1])
METHODS: list[dict[str, Any]] = [
    {"method": "hydralora"},
    {"method": "multilora"},
    {"method": "branch_per_cluster", "shared_rank": 2},
]
methods = pytest.mark.parametrize("config", METHODS, ids=[str(c["method"]) for c in METHODS])


def adapted(config: dict[str, Any], base: nn.Module | None = None, **more: Any) -> PeftModel:
    fields = {"task_type": "CAUSAL_LM", "init_weights": False} | config | more
    return attach(tiny_llama() if base is None else base, **fields)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    with manylora.branch_ids(model, IDS):
        return model.eval()(input_ids=X).logits


def base_logits() -> Tensor:
    with torch.no_grad():
        return tiny_llama().eval()(X).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    with manylora.branch_ids(model, IDS):
        model(input_ids=X, labels=X).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@methods
@pytest.mark.parametrize("autocast", [True, False])
def test_a_half_precision_base_takes_adapters_of_either_precision(
    config: dict[str, Any], autocast: bool
) -> None:
    torch.manual_seed(0)
    fields = manylora.ManyLoraConfig(**config, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(
        tiny_llama(dtype=torch.bfloat16), fields, autocast_adapter_dtype=autocast
    )
    expected = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    full = adapted(config)
    full.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    found, exact, without = logits(model), logits(full), base_logits()
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.05 * (exact - without).norm()
    assert {gradient.dtype for gradient in gradients(model).values()} == {expected}


@methods
def test_parts_of_different_precision_work_together(config: dict[str, Any]) -> None:
    """TRL casts a quantised model's trainable tensors to bf16; users may restore some of them."""
    model = adapted(config)
    exact = logits(model)
    for name, parameter in model.named_parameters():
        if name.endswith(("A.default.weight", "B.default.weight")):
            parameter.data = parameter.data.bfloat16()
    mixed = logits(model)
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - exact).norm() < 0.05 * (exact - base_logits()).norm()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(model).values())


@methods
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(
    config: dict[str, Any], reentrant: bool
) -> None:
    if reentrant and config["method"] == "branch_per_cluster":
        pytest.skip("refused: test_ids.py")
    expected = gradients(adapted(config))
    model = adapted(config)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-7)
        assert gradient.abs().max() > 0, name


@methods
def test_it_compiles_to_one_graph_equal_to_eager(config: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = adapted(config, tiny_llama(num_hidden_layers=1))
    expected = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(
            gradient, expected[name.removeprefix("_orig_mod.")], rtol=0, atol=1e-6
        )


@methods
def test_copies_and_pickles_compute_the_same_and_share_nothing(config: dict[str, Any]) -> None:
    model = adapted(config)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    unpickled = torch.load(buffer, weights_only=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = gradients(model)  # leaves behind whatever checkpointing puts on the blocks
    expected = logits(model)
    for twin in (unpickled, copy.deepcopy(model)):
        assert torch.equal(logits(twin), expected)
        found = gradients(twin)
        assert all(torch.equal(found[name], before[name]) for name in before)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2)
        with manylora.branch_ids(twin, 1):
            assert torch.equal(logits(model), expected)
            with pytest.raises(AssertionError):
                torch.testing.assert_close(logits(twin), expected)


@methods
def test_three_steps_lower_the_loss_and_leave_the_base_alone(config: dict[str, Any]) -> None:
    model = adapted(config, init_weights=True).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = train_steps(model, X, IDS)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, frozen[name] if name in frozen else start[name]) == (
            name in frozen
        ), name
