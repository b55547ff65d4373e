"""Is it safe to pack several examples into a row of this model?

transformers keeps packed examples apart by their positions, for the attention that it masks itself.
A model with attention or state of its own may not: this asks the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_LENGTH = 8


class PackingError(ValueError):
    """Packed examples would see each other in this model."""


def check_packing(model: nn.Module) -> None:
    """Compare the answer to an example in a packed row with that to the same example alone.

    The token before it changes, which must not be seen; raises PackingError if it is.
    """
    was_training = model.training
    model.eval()
    try:
        first, second = _answers(model, 3), _answers(model, 4)
    finally:
        model.train(was_training)
    size = max(1.0, float(first.abs().max()))
    if float((first - second).abs().max()) > 1e-3 * size:
        raise PackingError(
            f"packing=true: in {type(model).__name__} an example sees the others of its row (its "
            "attention or state does not start anew where positions do). Use packing=false."
        )


@torch.inference_mode()
def _answers(model: Any, token: int) -> Tensor:
    """The logits (tokens, words) of an example behind another that consists of `token`."""
    device = next(model.parameters()).device
    ids = torch.tensor([[token] * _LENGTH + list(range(5, 5 + _LENGTH))], device=device)
    positions = torch.arange(_LENGTH, device=device).repeat(1, 2)
    logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits[0, _LENGTH:].float()
