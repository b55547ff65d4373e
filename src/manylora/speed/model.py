"""The frozen model that all rows share, the batch, and a loss that never holds all logits.

A 7B model is 13.5 GB, so there is one: every row gets a model object of its own whose frozen
weights are the same tensors. The loss is the mean cross-entropy L = -1/T sum_t log p_t[y_t] through
a frozen head, so its backward needs dL/dh alone, which is found chunk by chunk in the forward pass
(the idea of Liger-Kernel 2410.10989; own code): the same work for every row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from manylora.speed.grid import Targets

CHUNK = 1024  # tokens whose logits exist at once: 131 MB at 32,000 words in float32
SEGMENTS = 8  # examples in a packed row, each with a branch id
NAMES: dict[Targets, tuple[str, ...]] = {
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "qv": ("q_proj", "v_proj"),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-shaped model; those of LLaMA-2-7B where nothing is given."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    vocab: int = 32000

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden={self.hidden} must divide by heads={self.heads}, and those by "
                f"kv_heads={self.kv_heads}"
            )

    def linears(self, targets: Targets = "all") -> list[tuple[int, int]]:
        """(in, out) of the adapted linear layers of one decoder layer."""
        narrow = self.hidden * self.kv_heads // self.heads
        attention = [(self.hidden, self.hidden), (self.hidden, narrow)]
        if targets == "qv":
            return attention
        wide = [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]
        return wide if targets == "mlp" else [*attention * 2, *wide]

    @property
    def parameters(self) -> int:
        """That multiply a token: linear layers and head, without the embedding and the norms."""
        layer = sum(n_in * n_out for n_in, n_out in self.linears())
        return self.layers * layer + self.vocab * self.hidden


def random_base(
    shape: Shape, device: torch.device, longest: int, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A frozen Llama of that shape with random weights, made on the device."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(longest, 16),
    )
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in every run of manylora (base/load.py)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return cast(PreTrainedModel, model.requires_grad_(False))


def share_weights(base: PreTrainedModel) -> PreTrainedModel:
    """A model of its own whose parameters and buffers are the very tensors of `base`."""
    kept: dict[int, Any] = {id(t): t for t in chain(base.parameters(), base.buffers())}
    return copy.deepcopy(base, kept)


def target_names(base: PreTrainedModel, targets: Targets) -> list[str]:
    """The last words of the names of the linear layers to adapt, the head never among them.

    Raises ValueError, naming the layers there are, when the model has none of these.
    """
    found = dict.fromkeys(
        name.rpartition(".")[2]
        for name, module in base.get_decoder().named_modules()
        if isinstance(module, nn.Linear)
    )
    names = [name for name in found if targets == "all" or name in NAMES[targets]]
    if not names:
        raise ValueError(
            f"targets={targets!r}: {type(base).__name__} has no such torch.nn.Linear, but "
            f"{', '.join(found) or 'none at all'}"
        )
    return names


@dataclass(frozen=True)
class Batch:
    """tokens, labels, ids: (rows, length), random; ids: the branch of each packed example."""

    tokens: Tensor
    labels: Tensor
    ids: Tensor


def random_batch(rows: int, length: int, vocab: int, branches: int, device: torch.device) -> Batch:
    """The same for the same sizes. Rows are cut into up to SEGMENTS examples, branches in turn."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (
        torch.randint(vocab, (rows, length), generator=generator).to(device) for _ in range(2)
    )
    segment = torch.arange(length) * SEGMENTS // length
    ids = (torch.arange(rows)[:, None] + segment) % max(branches, 1)
    return Batch(tokens, labels, ids.to(device))


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of a frozen head; h (tokens, hidden), weight (vocab, hidden)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        gradient = torch.empty_like(h)
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        for start in range(0, len(h), CHUNK):
            here = slice(start, start + CHUNK)
            logits = F.linear(h[here], weight).float()
            wanted = labels[here, None]
            logs = logits.log_softmax(-1)
            total -= logs.gather(1, wanted).sum()
            chances = logs.exp_()
            chances.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=chances.dtype))
            gradient[here] = (chances / len(h)).to(h.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total / len(h)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss of hidden states (rows, length, hidden) against labels (rows, length)."""
    return cast(Tensor, HeadLoss.apply(hidden.flatten(0, -2), weight, labels.flatten()))


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
