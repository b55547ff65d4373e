"""What a full fine-tuning changed, kept without its weights: the leading part of W1 - W0.

    W1 - W0 = U diag(sigma) V'     U (out, m), V (in, m), m = min(out, in), sigma falling

Of every linear layer are kept all of sigma, so that its spectrum and its Frobenius norm
(the root of the sum of sigma^2) are whole, and the first `rank` columns of U and V, to compare
subspaces with (Hu et al., 2106.09685, section 7; MultiLoRA, 2311.11501, compares its update's with
full fine-tuning's). full_update.safetensors holds for each layer

    LAYER.values   (m,) float32      LAYER.left  (out, k) float16      LAYER.right  (k, in) float16

with k = min(rank, m): for a 7B model and rank 64 a fortieth of its weights in half precision.
sigma^2 and the vectors of the smaller side are eigenvalues and eigenvectors of the Gram matrix of
W1 - W0 in float64, which is quicker than its SVD. What is below sigma_1 sqrt(m eps), a millionth of
the largest, cannot be told from rounding so, and is zero in the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from manylora.adapter.checking import is_finite
from manylora.adapter.saved_config import AdapterFileError
from manylora.base import load_model
from manylora.base.load import Dtype
from manylora.training.checkpoints import partial_of

FULL_UPDATE_FILE = "full_update.safetensors"
RANK = 64
_KINDS = ("values", "left", "right")


class DivergedError(ValueError):
    """Weights after training that are not finite, so that there is no update."""


class Leading(NamedTuple):
    """The leading part B A of an update, A (k, in) and B (out, k); values: all of sigma (m,)."""

    A: Tensor
    B: Tensor
    values: Tensor


def save(
    folder: str | Path, before: Mapping[str, Tensor] | str, after: nn.Module, rank: int = RANK
) -> Path:
    """Keep what training changed in the linear layers of `after`; returns the file in `folder`.

    The output layer is left out, as adapters leave it out.

    Args:
        folder: made where it is not there; a file from before is replaced.
        before: the weights that training began with, as `state_dict` names them; or the base model
            that they came from, in a recipe's words, which is loaded again on the CPU.
        after: the trained model; it is computed where the model is.
        rank: leading vectors to keep of each layer.

    Raises DivergedError (a ValueError) when trained weights are not finite, ValueError when
    `before` is of another model.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: keep at least 1 leading vector of each layer")
    if isinstance(before, str):
        name = str(next(after.parameters()).dtype).removeprefix("torch.")
        before = load_model(before, cast(Dtype, name)).state_dict()
    tensors: dict[str, Tensor] = {}
    for layer, module in _linear_layers(after):
        values, left, right = leading(_change(layer, before, module), rank)
        tensors[f"{layer}.values"] = values.float().cpu()
        tensors[f"{layer}.left"] = left.half().cpu().contiguous()
        tensors[f"{layer}.right"] = right.half().cpu().contiguous()
    if not tensors:
        raise ValueError(f"{type(after).__name__} has no linear layer, so no update to keep")
    path = Path(folder) / FULL_UPDATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    save_file(tensors, str(partial), metadata={"format_version": "1"})
    os.replace(partial, path)
    return path


def read(folder: Path) -> dict[str, Leading]:
    """What `save` kept in a folder, by the names of the layers; float32 on the CPU.

    Raises AdapterFileError for a file that is damaged or holds something else.
    """
    path = folder / FULL_UPDATE_FILE
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{path}: is damaged or no safetensors file ({error}); copy it again"
        ) from None
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.rpartition(".")
        layers.setdefault(layer, {})[kind] = tensor
    return {layer: _checked(path, layer, parts) for layer, parts in layers.items()}


def leading(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """sigma (m,), U (out, k), V' (k, in) of a change (out, in) in float64; k = min(rank, m).

    Vectors of values that are zero are zero.
    """
    wide = change if len(change) <= change.shape[1] else change.T
    m = len(wide)
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    squares, vectors = squares.flip(0), vectors.flip(1)[:, :rank]
    squares = squares.where(squares > m * torch.finfo(squares.dtype).eps * squares[0], 0.0)
    values = squares.sqrt()
    kept = values[:rank]
    left = vectors.where(kept > 0, 0.0)
    right = (left.T @ wide) / kept.where(kept > 0, 1.0)[:, None]
    return (values, left, right) if wide is change else (values, right.T, left.T)


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    out = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not out:
            yield name, module


def _change(layer: str, before: Mapping[str, Tensor], module: nn.Linear | Conv1D) -> Tensor:
    """W1 - W0 (out, in) in float64."""
    name, new = f"{layer}.weight", module.weight.detach()
    if new.device.type != "cuda":  # others have no float64
        new = new.cpu()
    old = before.get(name)
    if old is None or old.shape != new.shape:
        given = "no such tensor" if old is None else f"{tuple(old.shape)}"
        raise ValueError(
            f"{name} is {tuple(new.shape)} after training, and {given} before: give the weights "
            "of the model that was trained, as its state_dict has them"
        )
    change = new.double() - old.to(new.device).double()
    if not is_finite(change):
        raise DivergedError(
            f"{name} holds numbers that are not finite: the training diverged; train again with a "
            "lower learning rate"
        )
    return change.T if isinstance(module, Conv1D) else change


def _checked(path: Path, layer: str, parts: Mapping[str, Tensor]) -> Leading:
    shapes = [tuple(parts[kind].shape) if kind in parts else () for kind in _KINDS]
    values, left, right = shapes
    whole = len(values) == 1 and len(left) == len(right) == 2
    if not (whole and left[1] == right[0] <= values[0] == min(left[0], right[1])):
        raise AdapterFileError(
            f"{path}: {layer or 'it'} holds {shapes} as {_KINDS}, so this is no update that "
            "manylora kept; copy the file again, or save it again"
        )
    if not all(is_finite(tensor) for tensor in parts.values()):
        raise AdapterFileError(f"{path}: {layer} holds numbers that are not finite; save it again")
    sigma = parts["values"].float()
    return Leading(parts["right"].float(), parts["left"].float() * sigma[: left[1]], sigma)
