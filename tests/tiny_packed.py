"""Stand-ins for gptqmodel's GPTQ and AWQ layers, whose package needs a GPU.

They take the place of its layer class in PEFT's own search for the backend, so what is tested is
all but the package itself.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class PackedLinear(nn.Module):
    """Codes and a scale per output, computed with, not undone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = (
            linear.in_features,
            linear.out_features,
            None,
        )
        step = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (linear.weight.detach() / step).round().to(torch.int8))
        self.register_buffer("scales", step)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight * self.scales).to(x.dtype).T


class AwqLinear(PackedLinear):
    """gptqmodel's AWQ layers are of the class of its GPTQ layers, and say what they compute."""

    SUPPORTS_METHODS = (SimpleNamespace(value="awq"),)


def take_for_gptqmodel(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT takes the layers above for gptqmodel's."""
    module = ModuleType("gptqmodel.nn_modules.qlinear")
    module.BaseQuantLinear = PackedLinear  # type: ignore[attr-defined]
    for name in ("gptqmodel", "gptqmodel.nn_modules"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for place in ("peft.utils.quantization_utils", "peft.utils.other"):
        monkeypatch.setattr(f"{place}.is_gptqmodel_available", lambda: True)


def pack(model: Model, kind: str) -> Model:
    """The model with its linear layers packed, but for the head. kind: "gptq" or "awq"."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            parent, _, own = name.rpartition(".")
            layer = {"gptq": PackedLinear, "awq": AwqLinear}[kind](linear)
            setattr(model.get_submodule(parent), own, layer)
    return model
