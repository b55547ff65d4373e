"""Llama's tensors under llama.cpp's names and in its order of rows.

llama.cpp rotates neighbouring pairs of a query or key, Transformers its two halves, so the rows of
W_q and W_k (and of their updates' B; A stays) are interleaved head by head:

    row 2 j + i of a head  <-  row i * (head_dim / 2) + j,   i in {0, 1}

Sources: llama.cpp `convert_hf_to_gguf.py` (LlamaModel.permute), `convert_lora_to_gguf.py`.
"""

from __future__ import annotations

from typing import Any

from gguf import MODEL_ARCH, get_tensor_name_map
from torch import Tensor
from transformers import PretrainedConfig

from manylora.export.record import ExportError

_ELSEWHERE = (
    "export the merged folder (--to merged) and convert that with llama.cpp's convert_hf_to_gguf.py"
)


def check_llama(config: PretrainedConfig) -> None:
    """Refuse a model that is not a plain Llama, by name, with what to do instead."""
    if config.model_type != "llama":
        raise ExportError(
            f"GGUF is written here for Llama models alone, this is {config.model_type!r}; "
            f"{_ELSEWHERE}"
        )
    rope: dict[str, Any] = config.rope_parameters or {}
    for what, wrong in (
        (f"rope_type={rope.get('rope_type')!r}", rope.get("rope_type", "default") != "default"),
        ("attention_bias=True", config.attention_bias),
        ("mlp_bias=True", config.mlp_bias),
        (f"hidden_act={config.hidden_act!r}", config.hidden_act != "silu"),
    ):
        if wrong:
            raise ExportError(f"this Llama has {what}, which is not written here; {_ELSEWHERE}")


class LlamaNames:
    """Transformers' module names -> llama.cpp's tensor names and order of rows."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)

    def name(self, module: str) -> str:
        """`model.layers.0.self_attn.q_proj` -> `blk.0.attn_q.weight`; ExportError for others."""
        found = self.names.get_name(module)
        if found is None:
            raise ExportError(f"llama.cpp has no tensor for {module}; {_ELSEWHERE}")
        return f"{found}.weight"

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor (out, ...) with its rows in llama.cpp's order."""
        heads = {
            "attn_q": self.config.num_attention_heads,
            "attn_k": self.config.num_key_value_heads,
        }
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part not in heads:
            return tensor
        halves = tensor.unflatten(0, (heads[part], 2, -1))
        return halves.transpose(1, 2).reshape(tensor.shape).contiguous()
