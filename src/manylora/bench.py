"""`manylora bench`: what a training step costs on your device, at your sizes, beside the others'.

The model is the recipe's, or another, with its own weights; the tokens are random. The rows take
turns as in benchmarks/speed.py, of which this is the small sister.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from manylora import __version__
from manylora.base import DEFAULT_MODEL, Dtype, load_model
from manylora.recipe import Recipe
from manylora.run import device_name
from manylora.speed import results
from manylora.speed.contender import OURS
from manylora.speed.grid import METHODS, AdapterDtype, Method, Mode, Row
from manylora.speed.measure import Plan, Say, measure

RECIPE_METHODS = {ours: row for row, ours in OURS.items()}


@dataclass(frozen=True)
class Sizes:
    """What the command line says; None is the device's or the recipe's own value.

    tokens: rows x length of a step, as "4x512".
    """

    methods: str | None = None
    tokens: str | None = None
    r: int | None = None
    n: int | None = None
    dropout: float | None = None
    steps: int | None = None
    mode: Mode = "eager"
    adapter_dtype: AdapterDtype | None = None
    checkpointing: bool = False


def bench(recipe: Recipe | None, model: str | None, sizes: Sizes, say: Say) -> list[results.Raw]:
    """Measure the methods and return their raw rows.

    Raises:
        ValueError: sizes that cannot be measured, naming what was given.
        RuntimeError: no row could be measured, with the first row's reason.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype: Dtype = "bfloat16" if device.type == "cuda" else "float32"
    if recipe is not None:
        dtype = recipe.dtype
        if recipe.quantize is not None:
            raise ValueError(
                f"quantize={recipe.quantize!r}: only models that are not quantised are measured; "
                "leave it out"
            )
    rows = rows_of(recipe, sizes, device, dtype)
    name = model or (recipe.model if recipe is not None else DEFAULT_MODEL)
    base = load_model(name, dtype).requires_grad_(False)
    cast(nn.Module, base).to(device)
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest is not None and rows[0].length > longest:
        raise ValueError(f"tokens={sizes.tokens}: {name} reads at most {longest} tokens in a row")
    say(f"{name} in {dtype}: {len(rows)} methods, {rows[0].rows}x{rows[0].length} tokens a step")
    steps, turn = (20, 5) if device.type == "cuda" else (10, 2)  # a CPU is shared: shorter turns
    measured = measure(base, rows, Plan(steps=sizes.steps or steps, turn=turn), say)
    if measured and all(one.error for one in measured):
        raise RuntimeError(f"no method could be measured; {measured[0].row}: {measured[0].error}")
    return results.raw_rows(measured, f"manylora {__version__}", device_name(device))


def rows_of(recipe: Recipe | None, sizes: Sizes, device: torch.device, dtype: Dtype) -> list[Row]:
    """The rows to measure; ValueError where they cannot be."""
    adapter = None if recipe is None else recipe.config()
    branches = None if adapter is None else adapter.branches_of()
    own = "hydralora" if adapter is None else adapter.method
    count, length = _tokens(sizes.tokens or ("4x512" if device.type == "cuda" else "1x64"))
    trained = sizes.adapter_dtype or ("float32" if dtype == "float32" else "bfloat16")
    r = sizes.r or (16 if adapter is None else adapter.r)
    n = sizes.n or (3 if branches is None or branches.count == 1 else branches.count)
    dropout = sizes.dropout
    if dropout is None:
        dropout = 0.0 if adapter is None else adapter.lora_dropout
    return [
        Row(
            mode=sizes.mode,
            method=method,
            r=r,
            n=n,
            rows=count,
            length=length,
            dropout=dropout,
            adapter_dtype=trained,
            checkpointing=sizes.checkpointing,
        )
        for method in _methods(sizes.methods, own)
    ]


def _methods(given: str | None, own: str) -> list[Method]:
    if given is None:
        if own not in RECIPE_METHODS:
            raise ValueError(
                f"the recipe's method={own!r} is not among the measured ones; say which with "
                f"--methods: {', '.join(METHODS)}"
            )
        names = ["frozen", "peft_lora", RECIPE_METHODS[own]]
    else:
        names = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ValueError(
            f"--methods: {', '.join(unknown) or 'nothing'} is not measured; known are "
            f"{', '.join(METHODS)}"
        )
    return cast(list[Method], list(dict.fromkeys(names)))


def _tokens(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ValueError(f"--tokens {text!r} is not ROWSxLENGTH, as in 4x512")
    return int(found[1]), int(found[2])


def shown(rows: Sequence[results.Raw]) -> str:
    """Where and of what, then the table, named by what differs between the rows."""
    first = next((row for row in rows if row["method"] != "frozen"), rows[0])
    dropout = f", dropout {first['dropout']:g}" if first["dropout"] else ""
    checkpointing = ", checkpointing" if first["checkpointing"] else ""
    return (
        f"{first['device']}, torch {first['torch']}, {first['mode']}: {first['tokens']} tokens a "
        f"step, adapters in {first['adapter_dtype']}{dropout}{checkpointing}\n\n"
        + results.table(rows, ("method", "r", "n"))
    )
