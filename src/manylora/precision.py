"""Which precision to compute in: what the recipe says, or the fastest that the device does well."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """ "auto" is bf16 where the hardware multiplies it natively, else fp16 on a GPU, else fp32."""
    if wanted == "auto":
        if device.type == "cpu":
            return "bf16" if cpu_has_bf16() else "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if wanted == "fp16" and device.type == "cpu":
        raise ValueError("train.precision='fp16' needs a GPU; on a CPU use auto, bf16 or fp32")
    assert wanted in ("fp32", "bf16", "fp16")
    return wanted  # type: ignore[return-value]


def cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(wanted: str, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to the resolved precision; nothing for fp32."""
    precision = resolve_precision(wanted, device)
    if precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)
