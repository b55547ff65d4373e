"""Inside compiled blocks of a small model the compiler sees the parts of adapters' operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import manylora
from manylora.adapter import autograd
from manylora.training import opened
from manylora.training.compiled import compiled_blocks
from tiny import attach, tiny_llama

KINDS: dict[str, dict[str, Any]] = {
    "router": {"method": "hydralora"},
    "columns": {"method": "branch_per_cluster", "shared_rank": 3},
}


@pytest.fixture(autouse=True)
def own_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(model: Any, wanted: bool) -> tuple[list[torch.Tensor], set[str]]:
    """Loss and gradients of two steps of other sizes; the names of what the second one ran."""
    found, ran = [], set()
    parameters = [p for p in model.parameters() if p.requires_grad]
    needs_ids = model.peft_config["default"].branches_of().needs_ids
    torch.manual_seed(0)
    with compiled_blocks(model, wanted):
        for step in range(2):
            tokens = torch.randint(3, 60, (3 + step, 9 + 4 * step))
            ids = torch.arange(len(tokens)) % 3
            last = profile(activities=[ProfilerActivity.CPU]) if step else nullcontext()
            with manylora.branch_ids(model, ids) if needs_ids else nullcontext(), last:
                loss = model(input_ids=tokens, labels=tokens).loss
                found += [loss.detach(), *torch.autograd.grad(loss, parameters)]
            if step:
                ran = {event.key for event in last.key_averages()}
    return found, ran


@pytest.mark.parametrize(("kind", "multiple"), [("router", 1), ("columns", 16)])
def test_opened_it_gives_the_same(
    kind: str, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, "multiple", lambda x: multiple)  # of rows of P, as on a GPU

    def made() -> Any:
        return attach(tiny_llama(), r=4, target_modules=["q_proj", "k_proj"], **KINDS[kind])

    eager, _ = steps(made(), False)
    compiled, ran = steps(made(), True)
    for one, other in zip(compiled, eager, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert not any(name.startswith("manylora::") for name in ran)
    assert not {"aten::slice_copy", "aten::select_copy"} & ran  # views, which cost nothing, made so


@pytest.mark.parametrize("reason", ["large", "masks"])
def test_what_stays_one_operation(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "large":
        monkeypatch.setattr(opened, "_SMALL", 100)
    dropout = 0.2 if reason == "masks" else 0.0
    model = attach(
        tiny_llama(num_hidden_layers=1), r=4, target_modules=["q_proj"], lora_dropout=dropout
    )
    _, ran = steps(model, True)
    assert {"manylora::linear", "manylora::linear_gradients"} <= ran
