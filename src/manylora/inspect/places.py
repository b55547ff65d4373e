"""Where a layer is in its model, by its name: what kind of module, and in which block."""

from __future__ import annotations


def place_of(layer: str) -> tuple[str, int]:
    """(module, depth): the last part of the name, and the number of the block, -1 outside of any.

    "model.layers.12.self_attn.q_proj" is ("q_proj", 12). The first number is the block's: an expert
    inside a block has a number as well.
    """
    *above, module = layer.split(".")
    return module, next((int(part) for part in above if part.isdecimal()), -1)
