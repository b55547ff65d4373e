"""A tiny Llama with a byte-level tokenizer, as a GGUF file laid out as llama.cpp does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from tokenizers import pre_tokenizers
from torch import Tensor

from tiny import tiny_llama

MERGES = ["h e", "l l", "ll o"]
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
VOCABULARY = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "llo"]
FIELDS: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "eos_token_id": 0,
    "bos_token_id": 0,
    "hidden_size": 64,
    "intermediate_size": 96,
    "tie_word_embeddings": False,
    "attn_implementation": "sdpa",
}


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    tokenizer: bool = True,
    leave_out: str = "none",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    extra: dict[str, int] | None = None,
    seed: int = 0,
) -> Path:
    """leave_out: the tensors that hold this in their name. extra: integer keys."""
    model = tiny_llama(seed=seed, **FIELDS)
    config = model.config
    writer = GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    for name, value in (extra or {}).items():
        writer.add_uint32(name, value)
    if tokenizer:
        _add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        renamed = _renamed(name)
        if leave_out in renamed:
            continue
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        count = next((n for part, n in heads.items() if part in renamed), None)
        array = (tensor if count is None else _interleaved(tensor, count)).numpy()
        stored = kind if array.ndim == 2 else GGMLQuantizationType.F32
        if stored == GGMLQuantizationType.F32:
            writer.add_tensor(renamed, array)
        else:
            writer.add_tensor(renamed, quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] + [1] * (len(VOCABULARY) - 1))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


def _renamed(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.layers", "blk"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ):
        name = name.replace(ours, theirs)
    return name


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbouring pairs, transformers the two halves of a head."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape).contiguous()


def after_storing(array: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """What is left of a weight after it was stored as `kind`."""
    return dequantize(quantize(array, kind), kind)
