"""What an adapter folder must be before it is loaded.

Read are the configuration and the headers of the safetensors files, never the weights: every file
regular and inside the folder; every layer with just the tensors, in just the shapes, that the
configuration gives it. Whether that fits a model: `fitting`.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manylora.adapter.saved_config import (
    AdapterFileError,
    check_patterns,
    patterns_of,
    read_config,
)
from manylora.methods import PREFIX

if TYPE_CHECKING:
    from manylora.adapter.config import ManyLoraConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
Shape = tuple[int, ...]

ROOT = "base_model.model."
_TENSOR = re.compile(rf"(?P<layer>[\w\-]+(?:\.[\w\-]+)*)\.{PREFIX}(?P<part>\w+)\.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")
_SELECTOR = {"idf": 1, "mean": 1, "centroids": 2, "thresholds": 1}
# PEFT adds these of its own accord when the vocabulary was resized.
_EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class SavedAdapter:
    """What a checked folder holds.

    file: of the weights. layers: name -> part (A, B, router, ...) -> shape. patterns: the regular
    expressions in its configuration. others: names of the tensors that are no layer's.
    """

    file: Path
    layers: Mapping[str, Mapping[str, Shape]]
    patterns: tuple[str, ...]
    others: frozenset[str]


def file_inside(folder: Path, name: str) -> Path:
    """folder/name, when it is a regular file that lies in the folder.

    A link may lead to another file of the folder, or as in the hub's cache from
    snapshots/REVISION to blobs/. Raises AdapterFileError, FileNotFoundError.
    """
    path = folder / name
    try:
        real, root = path.resolve(strict=True), folder.resolve()
        regular = stat.S_ISREG(real.stat().st_mode)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; copy the whole adapter folder") from None
    except (OSError, RuntimeError) as error:
        raise AdapterFileError(f"{path}: cannot be read: {error}; copy the folder again") from None
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (real.is_relative_to(root) or real.is_relative_to(blobs)):
        raise AdapterFileError(
            f"{path}: leads out of its folder, to {real}; put the file itself into the folder"
        )
    if not regular:
        raise AdapterFileError(f"{path}: is no regular file; put the file itself into the folder")
    return path


def check_config(folder: Path) -> dict[str, Any]:
    """The fields of the folder's adapter_config.json. Raises as `file_inside`, `read_config`."""
    return read_config(file_inside(folder, CONFIG_FILE))


def check_weights(folder: Path, config: ManyLoraConfig) -> SavedAdapter:
    """The shapes in the folder's weights, when they are those that the configuration asks for.

    Raises AdapterFileError, which names the file, the layer and what to do; FileNotFoundError when
    there are no weights at all.
    """
    if not (folder / WEIGHTS_FILE).exists() and (folder / PICKLE_FILE).exists():
        raise AdapterFileError(
            f"{folder / PICKLE_FILE}: a pickle, which is not opened: manylora adapters are "
            f"{WEIGHTS_FILE}. A HydraLoRA checkpoint of the authors' code is brought in with "
            "`manylora import`"
        )
    file = file_inside(folder, WEIGHTS_FILE)
    layers: dict[str, dict[str, Shape]] = {}
    others: list[str] = []
    for name, (dtype, shape) in _header(file).items():
        found = _TENSOR.fullmatch(name.removeprefix(ROOT))
        if found is None:
            _check_other(file, name, config)
            others.append(name)
            continue
        if dtype not in _FLOATS:
            raise AdapterFileError(f"{file}: {name} is of type {dtype}; weights are {_FLOATS}")
        layers.setdefault(found["layer"], {})[found["part"]] = shape
    if not layers:
        raise AdapterFileError(f"{file}: holds no tensor of a manylora adapter; copy it again")
    patterns = tuple(pattern for _, pattern in patterns_of(config.to_dict()))
    check_patterns(folder / CONFIG_FILE, patterns, layers)
    for layer, parts in layers.items():
        _check_layer(file, layer, parts, config)
    _check_saved_modules(file, config, others)
    names = frozenset(name.removeprefix(ROOT) for name in others)
    return SavedAdapter(file, layers, patterns, names)


def check_selector(file: Path, choices: int) -> None:
    """The branch selector beside the weights: its tensors, and one branch for each choice."""
    header = _header(file)
    shapes = {name: shape for name, (_, shape) in header.items()}
    buckets, count = shapes.get("idf", ()), shapes.get("thresholds", ())
    wanted = {"idf": buckets, "mean": buckets, "centroids": (*count, *buckets), "thresholds": count}
    if shapes != wanted or len(buckets) != 1 or count != (choices,) or 0 in buckets:
        raise AdapterFileError(
            f"{file}: holds {_listed(shapes)}, but a selector of {choices} branches is "
            f"{', '.join(_SELECTOR)}; copy the adapter folder again, or train again"
        )
    with _safetensors(file), safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata() or {}
        finite = all(is_finite(opened.get_tensor(name)) for name in _SELECTOR)
    named = all(f"name_{i}" in metadata for i in range(choices))
    if not (finite and named and {dtype for dtype, _ in header.values()} == {"F32"}):
        raise AdapterFileError(
            f"{file}: its numbers are not finite float32, or its branches have no names; copy the "
            "adapter folder again, or train again"
        )


def _header(file: Path) -> dict[str, tuple[str, Shape]]:
    """Name to (type, shape) of each tensor; the library checks that they fill the file."""
    with _safetensors(file), safe_open(str(file), framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


@contextmanager
def _safetensors(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{file}: is damaged or no safetensors file ({str(error)[:200]}); copy it again"
        ) from None


def _check_layer(
    file: Path, layer: str, parts: Mapping[str, Shape], config: ManyLoraConfig
) -> None:
    a, b = parts.get("A", ()), parts.get("B", ())
    if len(a) != 2 or len(b) != 2 or 0 in a or 0 in b:
        raise AdapterFileError(
            f"{file}: {layer} has {_listed(parts)}, but needs matrices A and B; copy it again"
        )
    wanted = config.branches_of(layer).shapes(a[1], b[0])
    if dict(parts) != wanted:
        raise AdapterFileError(
            f"{file}: {layer} has {_listed(parts)}, but by {CONFIG_FILE} it has {_listed(wanted)}; "
            "the two files are not of one adapter, or were changed: copy both again"
        )


def _check_other(file: Path, name: str, config: ManyLoraConfig) -> None:
    asked = config.modules_to_save or config.trainable_token_indices or config.bias != "none"
    own = PREFIX in name or not all(name.split(".")) or re.search(r"[^\w.\-]", name)
    if own or not (asked or any(part in name for part in _EMBEDDINGS)):
        raise AdapterFileError(
            f"{file}: {name[:120]!r} is no tensor of this adapter; copy the file again"
        )


def _check_saved_modules(file: Path, config: ManyLoraConfig, others: list[str]) -> None:
    """What is trained besides the layers is among the tensors that are no layer's.

    Of modules_to_save one will do: for a classifier PEFT names those that any model could have.
    """
    wanted: list[tuple[str, Sequence[str]]] = []
    if modules := config.modules_to_save:
        wanted.append((f"modules_to_save={few(map(repr, modules))}", modules))
    if config.trainable_token_indices not in (None, {}):
        wanted.append(("trainable_token_indices", ["trainable_tokens_delta"]))
    for field, parts in wanted:
        if not any(f".{part}." in f".{name}." for part in parts for name in others):
            raise AdapterFileError(
                f"{file}: holds nothing for {field} of {CONFIG_FILE}; copy both files again"
            )


def is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _listed(shapes: Mapping[str, Shape]) -> str:
    return few(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items()) or "none"


def few(names: Iterable[str]) -> str:
    found = sorted(name[:120] for name in names)
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
