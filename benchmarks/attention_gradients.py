"""Which attention kernels of torch give finite gradients for padded batches, in bfloat16 on a GPU.

    python benchmarks/attention_gradients.py

A Llama of SmolLM2-135M's shape with random weights and PEFT's LoRA; 16 rows of random length,
padded on one side. Prints, for cuDNN's attention on and off, how many of its 420 gradients are not
finite.
"""

from __future__ import annotations

import json

import torch
from here import about_here
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def model() -> nn.Module:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(shape).to(torch.bfloat16), lora).cuda()


def batch(length: int, side: str) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(length)
    tokens = torch.randint(5, 49000, (16, length), generator=drawn)
    lengths = torch.randint(length // 4, length + 1, (16,), generator=drawn)
    lengths[0] = length
    place = torch.arange(length)
    real = place < lengths[:, None] if side == "right" else place >= (length - lengths)[:, None]
    mask = real.long()
    return tokens.cuda(), mask.cuda(), (mask.cumsum(1) - 1).clamp(min=0).cuda()


def not_finite(adapted: nn.Module, length: int, side: str) -> int:
    tokens, mask, positions = batch(length, side)
    adapted.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        logits = adapted(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    real = logits.float()[mask.bool()]
    nn.functional.cross_entropy(real[:-1], tokens[mask.bool()][1:]).backward()
    own = [p.grad for p in adapted.parameters() if p.grad is not None]
    return sum(not bool(torch.isfinite(grad).all()) for grad in own)


if __name__ == "__main__":
    adapted, rows = model(), []
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for side in ("left", "right"):
            for length in (320, 384, 300):
                found = not_finite(adapted, length, side)
                rows.append({"cudnn": cudnn, "side": side, "length": length, "not_finite": found})
    print(json.dumps({**about_here(), "rows": rows}, indent=1))
