"""Tiny in-memory models for the tests, and the one line that attaches an adapter to them."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import manylora

VOCAB = 64


def tiny_llama(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> LlamaForCausalLM:
    """A Llama of 2 layers with grouped queries, the same weights for the same seed.

    overrides: any field of LlamaConfig.
    """
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**fields | overrides)).to(dtype)


def attach(model: nn.Module, *, seed: int = 0, **config: Any) -> PeftModel:
    """`get_peft_model` with ManyLoraConfig(**config); the same adapter for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, manylora.ManyLoraConfig(**config))


class OneLayer(nn.Module):
    """A model that is one linear layer."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """W (out, in) and b (out,) of the frozen layer."""
        base = getattr(self.linear, "base_layer", self.linear)
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        return weight, weight.new_zeros(len(weight)) if base.bias is None else base.bias


def base_layer(kind: str, n_in: int, n_out: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """kind: "linear", "linear without bias" or "conv1d"; all parameters random."""
    if kind == "conv1d":
        layer: nn.Module = Conv1D(n_out, n_in)
        nn.init.normal_(layer.bias)
    else:
        layer = nn.Linear(n_in, n_out, bias=kind == "linear")
    return layer.to(dtype)


def adapter_tensors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Name without prefix (A, B, router, ...) to tensor, for a model of one adapted layer."""
    found = {}
    for name, tensor in model.named_parameters():
        part = re.search(rf"manylora_(\w+)\.{adapter}\.weight$", name)
        if part:
            found[part[1]] = tensor
    return found
