"""A router's mean mixing weights and least-squares fits, from the moments of rows of each task.

`moments.py` sums what a layer's tokens show, `fit.py` solves for one layer; this goes through all
layers and tasks, within a bound of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel

from manylora.adapter.layer import ManyLoraLayer
from manylora.export.factors import Factors, with_shared
from manylora.export.fit import Seen, Space, fits_held_apart
from manylora.export.moments import MomentMeter, Moments, mean_rows, up_projections
from manylora.export.plans import Weights

MOST_BYTES = 2e9  # of moments at a time; more layers take more passes over the rows

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Name = str | None
"""What an update is for: a task, or None for all of them."""


@dataclass(frozen=True)
class Static:
    """Mixing weights and fitted factors, by what they are for."""

    means: dict[Name, Weights]
    fits: dict[Name, Factors]
    tokens: dict[Name, int]


def measure(
    model: PeftModel,
    layers: Sequence[ManyLoraLayer],
    adapter: str,
    batches: dict[str, list[Batch]],
    rank: int | None,
    names: Sequence[Name],
) -> Static:
    """Mean weights and fits of these names, a group of layers at a time.

    batches: by task, ids, mask and position ids; every fourth is held apart to choose the ridge.
    """
    static = Static({name: {} for name in names}, {name: {} for name in names}, {})
    for group in _groups(layers):
        meter, total = MomentMeter(group, adapter), (Moments(), Moments())
        for task, own in batches.items():
            parts = (Moments(), Moments())
            for i, batch in enumerate(own):
                _watched(model, meter, batch, parts[i % 4 == 3])
            tokens = parts[0].tokens + parts[1].tokens
            static.tokens[task] = int(tokens)
            for mine, theirs in zip(total, parts, strict=True):
                mine.add(theirs, 1 / tokens)
            if task in names:
                _settle(static, task, group, adapter, parts, rank)
        if None in names:
            _settle(static, None, group, adapter, total, rank)
    static.tokens[None] = sum(static.tokens[task] for task in batches)
    return static


def _settle(
    static: Static,
    name: Name,
    group: Sequence[ManyLoraLayer],
    adapter: str,
    parts: tuple[Moments, Moments],
    rank: int | None,
) -> None:
    """Turn the moments of a group's layers into mean weights and factors."""
    both = Moments()
    for part in parts:
        both.add(Moments(weights=part.weights))
    for readers in _by_input(group, parts[0]):
        means = [both.mean_weights(layer.name) for layer in readers]
        spaces = [
            Space(up_projections(layer, adapter), mean_rows(layer, adapter, mean))
            for layer, mean in zip(readers, means, strict=True)
        ]
        seen, apart = (_seen(part, readers, spaces) for part in parts)
        found = fits_held_apart(seen, apart, spaces, rank)
        for layer, mean, AB in zip(readers, means, found, strict=True):
            static.means[name][layer.name] = mean.cpu()
            A, B = (factor.cpu() for factor in with_shared(layer, adapter, *AB))
            static.fits[name][layer.name] = (A, B)


def _by_input(group: Sequence[ManyLoraLayer], moments: Moments) -> list[list[ManyLoraLayer]]:
    """The layers of a group by what they read."""
    readers: dict[str, list[ManyLoraLayer]] = {}
    for layer in group:
        readers.setdefault(moments.owner[layer.name], []).append(layer)
    return list(readers.values())


def _seen(moments: Moments, readers: Sequence[ManyLoraLayer], spaces: Sequence[Space]) -> Seen:
    first = readers[0].name
    if first not in moments.owner:  # too few rows to hold any apart
        zeros = [torch.zeros_like(space.mean) for space in spaces]
        return Seen(zeros[0].new_zeros(zeros[0].shape[1], zeros[0].shape[1]), tuple(zeros))
    second = moments.second[moments.owner[first]]
    return Seen(second, tuple(moments.cross[layer.name] for layer in readers))


@torch.inference_mode()
def _watched(model: PeftModel, meter: MomentMeter, batch: Batch, moments: Moments) -> None:
    ids, mask, positions = (part.to(model.device) for part in batch)
    with meter.watching(mask, moments):
        model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1)


def _groups(layers: Sequence[ManyLoraLayer]) -> Iterator[list[ManyLoraLayer]]:
    """Layers in order, as many at a time as `MOST_BYTES` of second moments allow."""
    group: list[ManyLoraLayer] = []
    size = 0.0
    for layer in layers:
        needed = 4 * 8 * layer.in_features**2  # a task's and the total's, each in two parts
        if group and size + needed > MOST_BYTES:
            yield group
            group, size = [], 0.0
        group.append(layer)
        size += needed
    yield group
