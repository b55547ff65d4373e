"""Attention over packed rows by flash attention, which needs no mask.

transformers keeps the examples of a row apart with a mask of its tokens by its tokens, which the
fast kernels do not take. Where each example begins is all that torch's `varlen_attn` needs. While a
model trains on packed rows, its attention is `ATTENTION`: that kernel for a call that is told the
boundaries, and transformers' own otherwise (rows that are padded, layers with a sliding window).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "manylora_packed"
BOUNDARIES = "cu_seq_lens"  # of a batch: where each example begins, and the end; (examples + 1,)
_HALVES = (torch.bfloat16, torch.float16)
_MOST_WIDE = 256  # numbers of a head, of flash attention


@contextmanager
def packed_attention(model: nn.Module, packing: bool) -> Iterator[None]:
    """The model's attention told of boundaries inside, where its device and its kind allow it."""
    base = _base_of(model)
    if not packing or base is None or not _can(base):
        yield
        return
    base.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        base.config._attn_implementation = "sdpa"


def told_boundaries(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Take a batch's boundaries out of it; what the model is to be given of them, by the names
    that transformers has for flash attention. Nothing where the model has no use for them."""
    ends = inputs.pop(BOUNDARIES, None)
    base = _base_of(model)
    if ends is None or base is None or base.config._attn_implementation != ATTENTION:
        return {}
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}


def _base_of(model: nn.Module) -> PreTrainedModel | None:
    return next((one for one in model.modules() if isinstance(one, PreTrainedModel)), None)


def _can(base: PreTrainedModel) -> bool:
    return (
        base._supports_attention_backend
        and base.config._attn_implementation == "sdpa"
        and not base.config.sub_configs  # whose attention may be another
        and _runs_on(base.device)
    )


def _runs_on(device: torch.device) -> bool:
    """Whether torch has the kernel for it."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query, key, value: (rows, heads, tokens, numbers) -> (rows, tokens, heads, numbers)."""
    ends = kwargs.get("cu_seq_lens_q")
    if (
        ends is None
        or dropout
        or kwargs.get("sliding_window") is not None
        or kwargs.get("position_bias") is not None
        or value.dtype not in _HALVES
        or not value.shape[-1] == query.shape[-1] <= _MOST_WIDE
    ):
        given = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    groups = query.shape[1] // key.shape[1]
    rows, heads, tokens, numbers = query.shape

    def flat(states: Tensor) -> Tensor:
        # Under autocast, positions are rotated in float32.
        return states.to(value.dtype).transpose(1, 2).reshape(rows * tokens, heads, numbers)

    query, key, value = flat(query), flat(repeat_kv(key, groups)), flat(repeat_kv(value, groups))
    output: Any = varlen_attn(
        *(query, key, value, ends, ends, tokens, tokens), scale=scaling, window_size=(-1, 0)
    )
    return output.reshape(rows, tokens, heads, numbers), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
