"""The rows that manylora is timed against compute what they say, on weights that they share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from benching import base, row
from manylora.speed.contender import Contender
from manylora.speed.grid import METHODS
from manylora.speed.model import head_loss, share_weights, target_names
from manylora.speed.peers import AutogradLora, LoopHydraLora
from tiny import OneLayer, adapter_tensors, attach, tiny_llama


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_reaches_the_embeddings_and_every_trained_tensor(method: str) -> None:
    contender = Contender(base(), row(method))
    reached: list[Tensor] = []

    def watch(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        given[0].register_hook(reached.append)

    contender.model.get_decoder().layers[0].register_forward_pre_hook(watch)
    contender.forward_backward()
    assert len(reached) == 1 and bool(reached[0].any())
    assert all(p.grad is not None and bool(p.grad.any()) for p in contender.trained)
    assert bool(contender.trained) == (method != "frozen")


def test_checkpointing_changes_no_gradient() -> None:
    model = base(torch.float32)
    for method in ("hydralora", "cluster", "loop_hydralora"):
        fields = {"adapter_dtype": "float32"}
        plain, kept = (
            Contender(model, row(method, checkpointing=on, **fields)) for on in (False, True)
        )
        assert torch.equal(plain.forward_backward(), kept.forward_backward())
        for a, b in zip(plain.trained, kept.trained, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_the_chunked_loss_is_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.speed.model.CHUNK", 5)
    h = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(11, 6, dtype=torch.float64), torch.randint(11, (2, 9))
    loss = head_loss(h, weight, labels)
    expected = F.cross_entropy((h @ weight.T).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6, check_dtype=False)
    (wanted,) = torch.autograd.grad(expected, h)
    (found,) = torch.autograd.grad(3 * loss, h)
    torch.testing.assert_close(found, 3 * wanted, atol=1e-6, rtol=1e-6)


def gradients(model: nn.Module, x: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Output of a layer, and the gradients of x and tensors for one fixed outer gradient."""
    y = model(x)
    outer = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad(y, [x, *tensors], outer)]


def filled(*tensors: Tensor) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_()


def test_the_published_loop_equals_our_hydralora() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5).double()
    loop = LoopHydraLora(linear, 3, 4, 1.5, 0.0, torch.float64)
    filled(loop.A, loop.router, *loop.B)
    ours = attach(
        OneLayer(linear),
        method="hydralora",
        r=3,
        num_branches=4,
        lora_alpha=4.5,
        target_modules=["linear"],
    ).double()
    tensors = adapter_tensors(ours)
    with torch.no_grad():
        tensors["A"].copy_(loop.A)
        tensors["router"].copy_(loop.router)
        tensors["B"].copy_(torch.cat(list(loop.B), 1))
    x = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    expected = gradients(loop, x, [loop.A, loop.router, *loop.B])
    found = gradients(ours, x, [tensors["A"], tensors["router"], tensors["B"]])
    joined = [*expected[:4], torch.cat(expected[4:], 1)]
    torch.testing.assert_close(found, joined)


def test_the_published_loop_draws_a_mask_for_each_branch() -> None:
    loop = LoopHydraLora(nn.Linear(256, 2, bias=False), 256, 2, 1.0, 0.5, torch.float32)
    with torch.no_grad():
        loop.base_layer.weight.zero_()
        loop.A.copy_(torch.eye(256))
        loop.router.zero_()
        for output, B in enumerate(loop.B):
            B.zero_()[output] = 1.0
    torch.manual_seed(0)
    first, second = loop(torch.ones(1, 1, 256)).detach().flatten()
    # Each output is what one branch let through; two masks of 256 rarely keep as many.
    assert first != second
    assert float(first) == pytest.approx(128, rel=0.3)


@pytest.mark.parametrize("bias", [True, False])
def test_lora_by_hand_written_autograd_equals_pefts(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5, bias=bias).double()
    ours = AutogradLora(linear, 3, 2.0, torch.float64)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["linear"])
    peft = get_peft_model(OneLayer(linear), config).double()
    A, B = (
        dict(peft.named_parameters())[f"base_model.model.linear.lora_{k}.default.weight"]
        for k in "AB"
    )
    filled(A, B)
    with torch.no_grad():
        ours.A.copy_(A)
        ours.B.copy_(B)
    x = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    found = gradients(ours, x, [ours.A, ours.B])
    torch.testing.assert_close(found, gradients(peft, x, [A, B]))


@pytest.mark.parametrize("method", ["peft_lora", "lora", "autograd_lora"])
def test_every_lora_computes_the_same_step(method: str) -> None:
    """One seed fills A and B of each in the same order, so their losses are one number."""
    model = base(torch.float32)
    fields = {"adapter_dtype": "float32"}
    losses = [
        [Contender(model, row(name, **fields)).forward_backward()] for name in ("peft_lora", method)
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_a_model_without_such_layers_is_named(tmp_path: Path) -> None:
    model = tiny_llama()
    model.get_decoder().layers = model.get_decoder().layers[:0]
    with pytest.raises(ValueError, match="targets='qv': LlamaForCausalLM has no such"):
        target_names(model, "qv")


def test_sharing_weights_shares_tied_ones_too() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    shared = share_weights(model)
    assert shared is not model
    assert shared.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_merged_input_gradients_are_the_frozen_models(mode: str) -> None:
    model = base(torch.float32)
    found = []
    for merged in (False, True):
        contender = Contender(model, row("frozen", mode, merged=merged), "aot_eager")
        inputs: list[Tensor] = []
        contender.model.get_decoder().register_forward_pre_hook(
            lambda module, args, given, kept=inputs: kept.append(given["inputs_embeds"]),
            with_kwargs=True,
        )
        loss = contender.forward_backward()
        found.append((loss, inputs[0].grad))
    torch.testing.assert_close(found[0], found[1])
    kinds = {type(m).__name__ for m in contender.model.modules()}
    assert "Reader" in kinds and bool(found[0][1].any())


def test_a_row_whose_gradients_do_not_arrive_is_an_error() -> None:
    contender = Contender(base(), row("lora"))
    contender.first_step()
    contender.trained[3].register_hook(torch.zeros_like)
    with pytest.raises(RuntimeError, match=f"1 of {len(contender.trained)} trained tensors"):
        contender.first_step()


def test_steps_move_the_adapter_and_its_moments_are_counted() -> None:
    contender = Contender(base(), row("lora"))
    before = [p.detach().clone() for p in contender.trained]
    contender.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, contender.trained, strict=True))
    moments = 2 * sum(p.numel() * 2 for p in before)
    steps = 4 * len(before)  # AdamW counts them in a float32 of its own for each tensor
    assert contender.state_bytes() == 2 * moments + steps


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_an_adapter_that_was_moved_away_and_back_goes_on_as_before(mode: str) -> None:
    model = base()
    stayed, moved = (Contender(model, row("hydralora", mode), "aot_eager") for _ in range(2))
    for contender in (stayed, moved):
        contender.step()
    with torch.no_grad():
        for tensor in moved.trained:  # what `move` does, on one device
            tensor.data = tensor.data.clone()
    for contender in (stayed, moved):
        contender.step()
    assert all(torch.equal(a, b) for a, b in zip(stayed.trained, moved.trained, strict=True))
