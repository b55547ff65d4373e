"""Llama models and LoRA adapters as GGUF files, laid out as llama.cpp's own converters write them.

A model: general.architecture=llama, its sizes, its tokenizer and its tensors; vectors stay float32.
An adapter: general.type=adapter, adapter.type=lora, adapter.lora.alpha, and for each adapted tensor
NAME.weight.lora_a (rank, in) and NAME.weight.lora_b (out, rank); llama.cpp scales by alpha / rank.
Source: llama.cpp `convert_hf_to_gguf.py`, `convert_lora_to_gguf.py`, `src/llama-adapter.cpp`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, dequantize, quantize
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from manylora.export.factors import Factors
from manylora.export.gguf_tensors import LlamaNames, check_llama
from manylora.export.gguf_tokenizer import add_tokenizer

Array = np.ndarray[Any, Any]

_KINDS = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


def write_model(model: PreTrainedModel, tokenizer: Path, path: Path, dtype: torch.dtype) -> None:
    """Write a Llama model; dtype: of its matrices. tokenizer: the folder that has it.

    Raises ExportError for another architecture or tokenizer than can be written.
    """
    config = model.config
    check_llama(config)
    names = LlamaNames(config)
    kind, file_type = _KINDS[dtype]
    writer = GGUFWriter(str(path), "llama")
    writer.add_type("model")
    writer.add_file_type(file_type)
    _add_sizes(writer, config)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    for full, tensor in model.state_dict().items():
        if full == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.name(full.removesuffix(".weight"))
        array = _array(names.rows(name, tensor))
        stored = kind if array.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(array, stored), raw_dtype=stored)
    _write(writer)


def write_adapter(factors: Factors, config: PretrainedConfig, path: Path) -> None:
    """Write the factors of a Llama model's layers as a LoRA adapter, alpha = rank, in float32."""
    check_llama(config)
    names = LlamaNames(config)
    rank = max(1, *(len(A) for A, _ in factors.values()))
    writer = GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for module, (A, B) in factors.items():
        name = names.name(module)
        short = rank - len(A)
        A = torch.nn.functional.pad(A, (0, 0, 0, short))
        B = torch.nn.functional.pad(names.rows(name, B), (0, short))
        writer.add_tensor(f"{name}.lora_a", _array(A))
        writer.add_tensor(f"{name}.lora_b", _array(B))
    _write(writer)


def read_adapter(path: Path) -> dict[str, Tensor]:
    """llama.cpp's tensor name -> the update that llama.cpp adds to it, (out, in), from a file."""
    reader = GGUFReader(str(path))
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    found = {}
    for name in [n.removesuffix(".lora_a") for n in tensors if n.endswith(".lora_a")]:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        found[name] = (alpha / len(A)) * (B @ A)
    return found


def add_adapter(model: Path, adapter: Path, output: Path) -> None:
    """A float32 GGUF model with an adapter's updates added to its tensors, as llama.cpp does."""
    reader, updates = GGUFReader(str(model)), read_adapter(adapter)
    writer = GGUFWriter(str(output), "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name in updates:
            array = array + updates.pop(tensor.name).numpy()
        writer.add_tensor(tensor.name, array)
    if updates:
        raise KeyError(f"the model has no tensor {next(iter(updates))}")
    _write(writer)


def _add_sizes(writer: GGUFWriter, config: PretrainedConfig) -> None:
    head = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array


def _write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
