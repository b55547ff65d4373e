"""Tiny rows of the speed benchmark, for its tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from manylora.speed import results
from manylora.speed.grid import Row
from manylora.speed.measure import Measured, Plan
from manylora.speed.model import Shape, random_base

TINY = Shape(hidden=16, intermediate=24, layers=2, heads=2, kv_heads=2, vocab=40)
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"r": 4, "rows": 2, "length": 8}
PLAN = Plan(steps=3, turn=2, backend="aot_eager")


def nothing(line: str) -> None:
    pass


def base(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return random_base(TINY, CPU, 8, dtype)


def row(method: str, mode: str = "eager", **fields: Any) -> Row:
    return Row(mode, method, **{**SMALL, **fields})  # type: ignore[arg-type]


def made(method: str, ms: list[float], gib: float, **fields: Any) -> dict[str, Any]:
    one = Measured(Row("eager", method, **fields), ms, gib, 0.25)  # type: ignore[arg-type]
    return results.raw_rows([one], "abc", "NVIDIA H100 80GB HBM3")[0]
