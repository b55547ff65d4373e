"""Mutated adapter folders, the same for the same seed: bytes, JSON fields, headers, links."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SELECTOR, PICKLE = "branch_selector.safetensors", "adapter_model.bin"

Fields = dict[str, Any]
BAD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 1.5, 10**6, 2**31, 2**63, 10**30, 1e300, -1e300,
    float("nan"), float("inf"), "", "x", "4", "lora", "multilora", "router", "one_hot", "task",
    "../../etc/passwd", "a\u0000b", "\ud83d\ude00", "(", "(a+)+$", ".*" * 12 + "x", "all-linear",
    [], [None], [1, 2], ["q_proj"], ["nothing"], [10**9], {}, {"q_proj": 2}, {"q_proj": 10**9},
    {"(": 1}, {"(.+)+x": 2}, {"q_proj": None}, [[[[]]]],
)  # fmt: skip
# What decides which tensors there are, and where.
OFTEN = (
    "target_modules", "exclude_modules", "rank_pattern", "layers_to_transform", "layers_pattern",
    "modules_to_save", "trainable_token_indices", "r", "num_branches", "branch_ranks", "method",
    "gate", "selector", "bias", "task_type", "auto_mapping", "lora_nums",
)  # fmt: skip


class Raises:
    """A pickle that leaves a trace when it is loaded as code."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


def mutate(source: Path, folder: Path, number: int, seed: int) -> str:
    """A mutated copy of an adapter folder or a checkpoint; what was done.

    Every 50th is not changed.
    """
    rng = random.Random(f"folder:{seed}:{number}")
    shutil.copytree(source, folder)
    if number % 50 == 0:
        return "nothing"
    names, changes = [], THEIR_CHANGES if (source / PICKLE).exists() else CHANGES
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        change = rng.choice(changes)
        change(rng, folder)
        names.append(change.__name__)
        if change is link:  # what it leads to is not ours to change
            break
    return " ".join(names)


def _file(rng: random.Random, folder: Path) -> Path:
    names = (CONFIG, WEIGHTS, WEIGHTS, SELECTOR, PICKLE, PICKLE)
    there = [folder / name for name in names]
    return rng.choice([path for path in there if path.is_file()] or [folder / CONFIG])


def flip_bytes(rng: random.Random, folder: Path) -> None:
    path = _file(rng, folder)
    data = bytearray(path.read_bytes() if path.is_file() else b"?")
    # Half of the time in the first bytes, where the header is.
    end = len(data) if rng.random() < 0.5 else min(len(data), 600)
    for _ in range(rng.choice((1, 1, 4, 40))):
        if end:
            data[rng.randrange(end)] = rng.randrange(256)
    path.write_bytes(bytes(data))


def cut_or_grow(rng: random.Random, folder: Path) -> None:
    path = _file(rng, folder)
    data = path.read_bytes() if path.is_file() else b""
    at = rng.randrange(len(data) + 1)
    middle = data[:at] + data[at + rng.randrange(1, 64) :]
    more = data[:at] + rng.randbytes(rng.randrange(1, 300)) + data[at:]
    path.write_bytes(rng.choice((data[:at], middle, more, b"")))


def field(rng: random.Random, folder: Path) -> None:
    """One value of the configuration is another, is gone, or has a name that nobody knows."""
    path = folder / CONFIG
    fields = _fields(path)
    known = [name for name in OFTEN if name in fields]
    name = rng.choice(known if known and rng.random() < 0.6 else sorted(fields) or ["r"])
    what = rng.random()
    if what < 0.1:
        fields.pop(name, None)
    else:
        fields[name if what < 0.9 else name[::-1]] = rng.choice(BAD_VALUES)
    path.write_text(json.dumps(fields), encoding="utf-8")


def _fields(path: Path) -> Fields:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def odd_json(rng: random.Random, folder: Path) -> None:
    texts = ("", "[]", "null", "1", "{", "[" * 100_000, '{"r": ' * 3000, '"\\ud800"', "NaN")
    (folder / CONFIG).write_text(rng.choice(texts), encoding="utf-8")


def header(rng: random.Random, folder: Path) -> None:
    """The JSON in front of the weights, written anew; sizes that cannot be, offsets that overlap"""
    path = _file(rng, folder)
    data = path.read_bytes() if path.is_file() else b""
    if len(data) < 9:
        return
    size = struct.unpack("<Q", data[:8])[0]
    try:
        found = json.loads(data[8 : 8 + size])
        name = rng.choice([key for key in found if key != "__metadata__"])
    except (ValueError, IndexError, TypeError, RecursionError):
        return
    entry = found[name]
    shapes = [[2**40, 2**40], [0, 4], [-1, 4], [4], [], [2**63, 2], "x", [1.5, 2], [1] * 70]
    what = rng.randrange(6)
    if what == 0:
        entry["shape"] = rng.choice(shapes)
    elif what == 1:
        offsets = [[0, 2**60], [8, 4], [0, 0], [-4, 4], ["a", 1]]
        entry["data_offsets"] = rng.choice(offsets)
    elif what == 2:
        entry["dtype"] = rng.choice(("I64", "BOOL", "F8_E4M3", "F64", "BF16", "X", None, 3))
    elif what == 3:
        found["../../x.manylora_A.weight"] = found.pop(name)
    elif what == 4:
        entry["shape"] = entry.get("shape", [])[::-1]
    else:
        found["__metadata__"] = rng.choice(({}, {"a": 1}, [], "x", {"format": "np"}))
    text = json.dumps(found).encode()
    length = rng.choice((len(text),) * 8 + (2**62, 0, len(text) - 1, 10**8 + 1))
    path.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])


def tensors(rng: random.Random, folder: Path) -> None:
    """A well-formed file of other tensors: missing, more, other shapes, types and numbers."""
    path = _file(rng, folder)
    try:
        held = load_file(path)
    except Exception:  # damaged by an earlier change
        return
    name = rng.choice(sorted(held) or ["x"])
    tensor = held.pop(name, torch.ones(2, 2))
    what = rng.randrange(8)
    if what == 1:
        held[name.replace("layers.0", "layers.7")] = tensor
    elif what == 2:
        held[name] = torch.ones(rng.choice(((1, 1), (4096, 1), (1, 4096), (3,), (2, 2, 2))))
    elif what == 3:
        held[name] = torch.full_like(tensor, rng.choice((float("nan"), float("inf"))))
    elif what == 4:
        held[name] = tensor.to(rng.choice((torch.int32, torch.float16, torch.float64, torch.bool)))
    elif what == 5:
        held[name] = tensor
        held[rng.choice(("x", "../x", "base_model.model.lm_head.weight"))] = torch.ones(2)
    elif what == 6:
        held = {}
    elif what == 7:
        held = {key: torch.ones(2**12, 1) if "_A." in key else t for key, t in held.items()}
    save_file(held, path, metadata={"format": "pt"})


def their_tensors(rng: random.Random, folder: Path) -> None:
    """A well-formed checkpoint of other tensors, or of no tensors."""
    try:
        held: Any = torch.load(folder / PICKLE, weights_only=True)
        name = rng.choice(sorted(held))
        tensor = held[name]
    except Exception:  # damaged by an earlier change
        return
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.dim() != 2:
        return
    if tensor.numel() > 10**6 or tensor.is_meta:
        return
    others: list[Any] = [
        None, 1, "x", [tensor], tensor[:1], tensor.T, tensor.int(), tensor.to_sparse(),
        tensor.half(), tensor * float("nan"), torch.ones(1).expand(2**18, 2**18), tensor.to("meta"),
    ]  # fmt: skip
    what = rng.randrange(5)
    if what == 0:
        held.pop(name)
    elif what == 1:
        held[rng.choice(("x", "../x.lora_A.weight", 3, name.replace("layers.0", "layers.5")))] = (
            tensor
        )
    elif what == 2:
        held = rng.choice(([], {}, tensor, [held], {"model": held}))
    else:
        held[name] = rng.choice(others)
    torch.save(held, folder / PICKLE)


def link(rng: random.Random, folder: Path) -> None:
    """A file that leads elsewhere, to what is no file, or to nothing."""
    path = _file(rng, folder)
    path.unlink(missing_ok=True)
    target = rng.choice(("/dev/zero", "/etc/passwd", "../elsewhere", path.name, "/", "FIFO", ""))
    if target == "FIFO":
        os.mkfifo(path)
    elif target:
        path.symlink_to(target)


def pickled(rng: random.Random, folder: Path) -> None:
    """Code in a pickle, beside the weights or in their place."""
    if rng.random() < 0.7:
        (folder / WEIGHTS).unlink(missing_ok=True)
    target = folder / rng.choice((PICKLE, PICKLE, WEIGHTS, SELECTOR))
    if not target.is_symlink():
        torch.save({"x": Raises(folder.parent / "executed")}, target)


CHANGES: tuple[Callable[[random.Random, Path], None], ...] = (
    flip_bytes, flip_bytes, cut_or_grow, field, field, field, odd_json, header, header, tensors,
    tensors, link, pickled,
)  # fmt: skip
THEIR_CHANGES = (
    flip_bytes, flip_bytes, cut_or_grow, field, field, odd_json, their_tensors, their_tensors, link,
    pickled,
)  # fmt: skip
