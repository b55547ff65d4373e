"""Tensors out of a torch checkpoint that a stranger wrote, without running what is in it.

A torch file is a zip of a pickle and of raw storages. It is read with `weights_only`, which knows
tensors and containers and nothing else. What that does not bound is checked before (a zip whose
members unpack to far more than the file) and after (a view that repeats a small storage).
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class ImportFileError(ValueError):
    """A checkpoint that cannot be imported: which file, what is wrong, what to do."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> dense floating-point tensor on the CPU, each finite and no larger than its storage.

    Raises ImportFileError; nothing that the pickle asks for is imported or called but tensors.
    """
    _check_zip(path)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file can make the reader raise anything
        reason = str(error).partition("\n")[0]
        raise ImportFileError(
            f"{path}: is not a file of tensors alone, or is damaged ({type(error).__name__}: "
            f"{reason[:160]}). Nothing in it was executed. Get the file from its author again; if "
            "it holds more than tensors, save its state_dict with torch.save"
        ) from None
    if not isinstance(found, dict):
        raise ImportFileError(f"{path}: holds a {type(found).__name__}, not tensors by name")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ImportFileError(
                f"{path}: {str(name)[:120]!r} is a {type(tensor).__name__}, not a tensor by name"
            )
        _check_tensor(path, name, tensor)
    return {name: tensor.detach() for name, tensor in found.items()}


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError):
        raise ImportFileError(
            f"{path}: is no torch file (a zip; torch writes them since 1.6), or is truncated; get "
            "it again, or load it with the torch that wrote it and save it with torch.save"
        ) from None
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > path.stat().st_size:
        raise ImportFileError(
            f"{path}: its members unpack to more than the file holds, which torch never writes"
        )


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.is_floating_point():
        raise ImportFileError(
            f"{path}: {name[:120]!r} is {tensor.dtype}, {tensor.layout} on {tensor.device.type}; "
            "weights are dense floating-point tensors"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ImportFileError(
            f"{path}: {name[:120]!r} is {tuple(tensor.shape)}, more than the file holds for it"
        )
    if not torch.isfinite(tensor).all():
        raise ImportFileError(f"{path}: {name[:120]!r} holds numbers that are not finite")
