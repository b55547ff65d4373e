"""Base layers that are quantised: which of them can take a merge.

PEFT's backends compute with all of them. GPTQ, AWQ, EETQ and AQLM layers have no way back from a
weight to their codes (`ForwardOnlyQuantizationBackend`), so nothing can be merged into them.
"""

from __future__ import annotations

from collections.abc import Iterable

from peft.utils.other import is_gptqmodel_awq_layer

from manylora.adapter.layer import ManyLoraLayer


def quantised_as(layer: ManyLoraLayer) -> str | None:
    """What the base layer is quantised as, in PEFT's words; None: it is not."""
    if layer.quantization_backend is None:
        return None
    # gptqmodel's AWQ layers are of its GPTQ class, too, which PEFT asks for first.
    if is_gptqmodel_awq_layer(layer.get_base_layer()):
        return "awq"
    return str(layer.quantization_backend.backend_name)


def refuse_forward_only(layers: Iterable[ManyLoraLayer]) -> None:
    """Raises ValueError, before any layer is touched, when one of them cannot be merged into."""
    for layer in layers:
        backend = layer.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"{layer.name}: a {quantised_as(layer)} layer cannot take a merge: its weights "
                "are not quantised again. Load the adapter on the unquantised base model and merge "
                "it there, or export it as a LoRA and leave the base as it is"
            )
