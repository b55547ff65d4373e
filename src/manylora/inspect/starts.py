"""An adapter as it was before its first step, made again from its run folder alone.

    A_0 ~ U(-1/sqrt(in), 1/sqrt(in)) (r x in), B_0 = 0, or U for MultiLoRA     (adapter/init.py)

A run seeds torch, loads the base model, which draws nothing, and fills its layers one after the
other: the seed and the order of the layers fix every number. That order is the base model's, and no
file of a run holds it, so it is found from the weights. What comes next off the generator is laid
beside A of each layer that is left, and belongs to the one that it resembles:

    cos(A_0, A_T) > 6 / sqrt(r in)     six standard deviations of unrelated matrices' cosine

So a start is never taken on trust. Where the numbers are not found (another version of torch that
draws others, A trained to more than about sqrt(r in) / 6 times its first size), it is unknown, and
why is said. A run that began from another (`start_from`) starts as that one ended.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.init import initialize
from manylora.inspect.adapters import Adapter, Branched, read
from manylora.methods import Branches
from manylora.recipe import RECIPE_FILE, Recipe, load_recipe

DEVIATIONS = 6.0

Parts = dict[str, Tensor]
"""A, B, router, ... of a layer, as `Branches.shapes` has them."""
Layers = dict[str, Parts]


@dataclass(frozen=True)
class Start:
    """layers: name -> what it held before the first step; unknown: why some or all are missing."""

    layers: Layers = field(default_factory=dict)
    unknown: str | None = None


def start_of(adapter: Adapter) -> Start:
    """The start of the run that an adapter was read from; unknown for a folder without a recipe.

    Raises RecipeError for a recipe that cannot be read.
    """
    if not (adapter.folder / RECIPE_FILE).is_file():
        return Start(unknown=f"{adapter.folder} has no {RECIPE_FILE}, so its seed is not known")
    recipe = load_recipe(adapter.folder)
    trained = _trained(adapter)
    if not trained or not isinstance(adapter.config, ManyLoraConfig):
        return Start(unknown=f"{adapter.folder} holds no adapter of manylora's own")
    if recipe.start_from is not None:
        return _end_of(Path(recipe.start_from), trained)
    return remake(trained, adapter.config, recipe.seed, drawn_in(recipe))


def stored(layer: Branched) -> tuple[Branches, Parts]:
    """The branches of a layer and its tensors as they were trained, with nothing folded in."""
    (name,) = layer.layer.branches
    tensors = layer.layer.tensors(name)
    return layer.layer.branches[name], {part: t.detach() for part, t in tensors.items()}


def remake(
    trained: Mapping[str, Parts],
    config: ManyLoraConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Start:
    """What `initialize` gave the layers of a trained adapter, found in their own order.

    dtype: of the base model's layers, through which PEFT takes the first values.
    """
    left = sorted(trained, key=_by_number)
    found: Layers = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while left and (match := _next(left, trained, config)) is not None:
            name, parts = match
            found[name] = {part: t.to(dtype).float() for part, t in parts.items()}
            left.remove(name)
    if not left:
        return Start(found)
    return Start(
        found,
        f"after {len(found)} of {len(trained)} layers no A resembles what seed {seed} draws next: "
        "another version of torch or manylora made them, or they were trained far from their start",
    )


def drawn_in(recipe: Recipe) -> torch.dtype:
    """The dtype through which a run's first values go on their way to float32."""
    if recipe.quantize is not None:  # 4bit layers compute in bfloat16; those of 8bit are integers
        return torch.bfloat16 if recipe.quantize == "4bit" else torch.float32
    dtype: torch.dtype = getattr(torch, recipe.dtype)
    return dtype


def resembles(A: Tensor, other: Tensor) -> bool:
    """Whether two matrices of a shape are more alike than unrelated ones ever are."""
    a, b = A.flatten().double(), other.flatten().double()
    return float(a @ b) > DEVIATIONS / a.numel() ** 0.5 * float(a.norm() * b.norm())


def _next(
    left: list[str], trained: Mapping[str, Parts], config: ManyLoraConfig
) -> tuple[str, Parts] | None:
    """The layer that the generator fills next, and with what; it is left behind that layer."""
    state = torch.get_rng_state()
    drawn: dict[object, tuple[Parts, Tensor]] = {}
    for name in left:
        branches = config.branches_of(name)
        n_in, n_out = trained[name]["A"].shape[1], trained[name]["B"].shape[0]
        kind = branches, n_in, n_out
        if kind not in drawn:
            torch.set_rng_state(state)
            parts = {
                part: torch.empty(shape) for part, shape in branches.shapes(n_in, n_out).items()
            }
            initialize(parts, branches, config)
            drawn[kind] = parts, torch.get_rng_state()
        parts, after = drawn[kind]
        if resembles(trained[name]["A"], parts["A"]):
            torch.set_rng_state(after)
            return name, parts
    return None


def _end_of(before: Path, trained: Mapping[str, Parts]) -> Start:
    """The start of a run that went on from the adapter in `before`."""
    try:
        ended = _trained(read(before))
    except (FileNotFoundError, ValueError) as error:
        return Start(unknown=f"it began from {before}, which cannot be read: {error}")
    layers = {
        name: {
            part: tensor.float()
            for part, tensor in ended[name].items()
            if tensor.shape == trained[name][part].shape
        }
        for name in trained
        if name in ended and _same(ended[name]["A"], trained[name]["A"])
    }
    if all(set(layers.get(name, {})) == set(parts) for name, parts in trained.items()):
        return Start(layers)
    return Start(
        layers,
        f"it began from {before}, which has fewer branches or has changed since: what has another "
        "shape there, or no likeness, has no known start",
    )


def _trained(adapter: Adapter) -> Layers:
    held = adapter.layers.items()
    return {name: stored(layer)[1] for name, layer in held if isinstance(layer, Branched)}


def _same(was: Tensor, now: Tensor) -> bool:
    return was.shape != now.shape or resembles(was, now)


def _by_number(name: str) -> list[tuple[int, str]]:
    """layers.2 before layers.10: most base models have their blocks in this order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]
