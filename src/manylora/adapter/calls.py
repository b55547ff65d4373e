"""What a call of the model was given, by name or by place."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with names, where more than the first have come without."""
    if len(args) < 2:
        return kwargs
    return dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What forward or generate was given: token ids, or else embeddings."""
    given = [kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1], kwargs.get("inputs_embeds")]
    return next((value for value in given if isinstance(value, Tensor)), None)
