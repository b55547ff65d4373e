"""Tiny in-memory models for the tests, and the one line that attaches an adapter to them."""

from __future__ import annotations

import json
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
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


def train_steps(model: nn.Module, tokens: Tensor, ids: Any, steps: int = 4) -> list[float]:
    """The losses of a few AdamW steps on one batch, each before its step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        with manylora.branch_ids(model, ids):
            loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


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


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tiny_model(folder: Path, **overrides: Any) -> Path:
    """A model folder that loads offline: a tiny Llama and a tokenizer with a token a byte."""
    specials = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=specials[1:],
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    size = {"vocab_size": len(vocab), "max_position_embeddings": 512, "eos_token_id": 0}
    fields = {"pad_token_id": 0, "bos_token_id": None, "attn_implementation": "sdpa"}
    tiny_llama(**size | fields | overrides).save_pretrained(folder)
    return folder


def write_tasks(folder: Path, rows: int = 12) -> Path:
    """Three tasks that a tiny model learns: a closed set, another one, and free text."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {
        "colour": lambda i: (f"sky {i}" if i % 2 else f"grass {i}", "blue" if i % 2 else "green"),
        "copy": lambda i: (f"word{i}", f"word{i}"),
        "parity": lambda i: (str(i), "odd" if i % 2 else "even"),
    }
    for name, make in tasks.items():
        lines = []
        for i in range(rows):
            question, answer = make(i)
            row = {"instruction": f"{name}?", "input": question, "output": answer}
            lines.append(json.dumps(row) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def ids_of(model: PeftModel, ids: int | list[int]) -> AbstractContextManager[None]:
    """branch_ids where the adapter's method needs them, else nothing."""
    needed = model.peft_config["default"].branches_of().needs_ids
    return manylora.branch_ids(model, ids) if needed else nullcontext()
