"""Attention that is told where packed examples begin: the same as under the mask, with less work.

On a CPU torch's kernel is replaced by a loop over the examples; with a GPU it is the kernel itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from manylora.corpus import Collator
from manylora.training import packed_attention as module
from manylora.training.compiled import compiled_blocks
from manylora.training.packed_attention import ATTENTION, packed_attention, told_boundaries
from tiny import attach, tiny_llama

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float64
CLOSE = 2e-2 if GPU else 1e-10
PADDED = {"attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2], device=DEVICE)}


class Kernel:
    """Each example by itself; `calls` counts, `ends` are the boundaries of the last call."""

    def __init__(self) -> None:
        self.calls, self.ends = 0, None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *given: Any, **more: Any
    ) -> Tensor:
        self.calls, self.ends = self.calls + 1, ends.tolist()
        assert more["window_size"] == (-1, 0)
        assert given[1:] == (query.shape[0] // 2, query.shape[0] // 2)
        if GPU:
            return Kernel.real(query, key, value, ends, *given, **more)
        parts = []
        for start, stop in zip(self.ends, self.ends[1:], strict=False):
            own = [one[start:stop].transpose(0, 1) for one in (query, key, value)]
            out = scaled_dot_product_attention(*own, is_causal=True, scale=more["scale"])
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)

    real = staticmethod(module.varlen_attn)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    found = Kernel()
    monkeypatch.setattr(module, "varlen_attn", found)
    if not GPU:
        monkeypatch.setattr(module, "_HALVES", (DTYPE,))
        monkeypatch.setattr(module, "_runs_on", lambda device: True)
    return found


def model_of(**overrides: Any) -> Any:
    wide = {"hidden_size": 64, "num_attention_heads": 4, "attn_implementation": "sdpa"}
    model = attach(tiny_llama(dtype=DTYPE, **wide | overrides), method="multilora", seed=1)
    return model.to(DEVICE, DTYPE)


def packed() -> dict[str, Any]:
    """Two rows of 8 tokens: an example of 8; examples of 4 and 3, and a token of padding."""
    rows: list[Any] = [
        {"input_ids": list(range(n, 2 * n)), "learned": [(1, n)], "task_id": 0, "source": "s"}
        for n in (3, 8, 4)
    ]
    batch = Collator(0, packing=True)(rows)
    wanted = ("input_ids", "position_ids", "cu_seq_lens", "token_mask")
    return {name: batch[name].to(DEVICE) for name in wanted}


def step(model: Any, told: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits of the tokens that are no padding, and the gradients of the adapter."""
    batch = packed()
    mask = batch.pop("token_mask").bool()
    model.zero_grad()
    with packed_attention(model, packing=told):
        more = told_boundaries(model, batch)
        assert bool(more) == told and "cu_seq_lens" not in batch
        logits = model(**batch, **more, use_cache=False).logits[mask]
        logits.float().square().mean().backward()
    return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def agree(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= CLOSE * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_the_same_as_under_the_mask(kernel: Kernel, kv_heads: int) -> None:
    model = model_of(num_key_value_heads=kv_heads)
    logits, gradients = step(model, told=False)
    assert kernel.calls == 0
    found, own = step(model, told=True)
    assert kernel.calls == 2  # layers
    assert kernel.ends == [0, 8, 12, 15, 16]
    assert agree(found, logits)
    assert len(own) == len(gradients) > 0
    assert all(agree(one, other) for one, other in zip(own, gradients, strict=True))


def test_checkpointing_reads_the_same_boundaries_again(kernel: Kernel) -> None:
    model = model_of().train()
    plain = step(model, told=True)[1]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = step(model, told=True)[1]
    assert kernel.calls == 2 + 4
    assert all(agree(one, other) for one, other in zip(again, plain, strict=True))


def test_the_model_is_left_as_it_was_and_padded_rows_go_by_their_mask(kernel: Kernel) -> None:
    model = model_of()
    ids = torch.arange(12, device=DEVICE).reshape(2, 6)
    before = model(ids, **PADDED).logits
    with packed_attention(model, packing=True):
        assert model.config._attn_implementation == ATTENTION
        assert torch.equal(model(ids, **PADDED).logits, before)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="stop"), packed_attention(model, packing=True):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"
    assert kernel.calls == 0


def test_packed_rows_without_boundaries_go_by_their_mask(kernel: Kernel) -> None:
    model = model_of()
    batch = packed()
    wanted = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    with packed_attention(model, packing=True):
        found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    assert kernel.calls == 0 and torch.equal(found, wanted)


@pytest.mark.parametrize("reason", ["eager", "not packed"])
def test_other_attention_is_left_alone(kernel: Kernel, reason: str) -> None:
    model = model_of(attn_implementation="eager" if reason == "eager" else "sdpa")
    with packed_attention(model, packing=reason == "eager"):
        assert model.config._attn_implementation != ATTENTION
        assert told_boundaries(model, packed()) == {}


@pytest.mark.skipif(GPU, reason="of a CPU")
def test_a_cpu_keeps_its_own() -> None:
    model = model_of()
    with packed_attention(model, packing=True):
        assert told_boundaries(model, packed()) == {}


def test_attention_dropout_keeps_the_mask(kernel: Kernel) -> None:
    step(model_of(attention_dropout=0.5).train(), told=True)
    assert kernel.calls == 0


@pytest.mark.skipif(not GPU, reason="compiles torch's own kernel")
def test_compiled_it_is_the_same() -> None:
    model = model_of(num_key_value_heads=2)
    logits, gradients = step(model, told=False)
    with compiled_blocks(model):
        found, own = step(model, told=True)
    assert agree(found, logits)
    assert all(agree(one, other) for one, other in zip(own, gradients, strict=True))
