"""A token router's best plain LoRAs: measured on training rows, compared on held-out rows.

Four kinds, each exported and checked: mixing weights at their mean, or fitted by least squares
(`fit.py`), for each task (or cluster, where those are the run's tasks) or one for all tasks, to
which every task counts the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console

from manylora.adapter.layer import ManyLoraLayer
from manylora.base import load_tokenizer
from manylora.corpus import Corpus, Encoder
from manylora.evaluate.answers import left_padded
from manylora.evaluate.scores import held_out
from manylora.export.factors import Factors, with_shared
from manylora.export.fit import Seen, Space, fits_held_apart
from manylora.export.lora import folders_of, write_checked
from manylora.export.moments import MomentMeter, Moments, mean_rows, up_projections
from manylora.export.plans import MEAN_NOTE, Plan, Weights, adapted, load_exact, named
from manylora.export.record import Export, ExportError, record, written_whole
from manylora.export.static_gap import gaps_of
from manylora.export.static_table import ALL
from manylora.recipe import Recipe
from manylora.run import recipe_of
from manylora.training.clusters import KEPT, settle

ROWS = 128
KINDS = ("mean", "fit")
MOST_BYTES = 2e9  # of moments at a time; more layers take more passes over the rows

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Static:
    """Mixing weights and fitted factors, by what they are for: a task, or `ALL`."""

    means: dict[str, Weights]
    fits: dict[str, Factors]
    tokens: dict[str, int]


def export_static(
    run: Path,
    output: Path,
    rank: int | None = None,
    rows: int | None = None,
    console: Console | None = None,
    adapter: str = "default",
) -> list[Export]:
    """Write mean_TASK, fit_TASK, mean_all_tasks and fit_all_tasks, each with its `gap`.

    rank: of the fitted LoRAs; default: all that the branches have together, which loses nothing.
    rows: of each task, training rows to fit on and held-out rows to compare on; default 128, and
    the recipe's rows_per_task.

    Raises ExportError for a run without a router or without held-out rows, and as `export_lora`.
    """
    console = console or Console(stderr=True)
    with written_whole(output) as partial:
        model = load_exact(run)
        layers = adapted(model, adapter)
        if layers[0].branches[adapter].gate != "router":
            raise ExportError(f"{run} has no token router; it exports exactly, without --static")
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        plans, gaps = _compared(run, model, layers, adapter, rank, rows, console)
        differences = write_checked(model.cpu(), adapter, recipe_of(run).model, plans, partial)
    exports = [
        Export(str(folder), "lora", False, difference, plan.note, gap)
        for plan, folder, difference, gap in zip(
            plans, folders_of(plans, output), differences, gaps, strict=True
        )
    ]
    return record(run, exports)


def _compared(
    run: Path,
    model: PeftModel,
    layers: Sequence[ManyLoraLayer],
    adapter: str,
    rank: int | None,
    rows: int | None,
    console: Console,
) -> tuple[list[Plan], list[dict[str, list[float]]]]:
    """The static LoRAs, measured on training rows, and their gaps on held-out rows."""
    recipe = recipe_of(run)
    corpus = settle(recipe, recipe.load_corpus(), console, run / KEPT).corpus
    tokenizer = load_tokenizer(recipe.model)
    encoder = Encoder(tokenizer, recipe.max_length)
    held, notes = held_out(corpus, encoder, rows or recipe.evaluate.rows_per_task)
    for note in notes:
        console.print(note, style="yellow", markup=False)
    if not held:
        raise ExportError(f"{run} holds out no rows to compare on; train with holdout=0.1")
    batches = _training_batches(corpus, encoder, recipe, rows or ROWS)
    console.print(f"measuring {len(layers)} routed layers on rows of {len(batches)} tasks")
    static = measure(model, layers, adapter, batches, rank)
    plans = plans_from(static)
    tasks = [None if name == ALL else name for name in static.means for _ in KINDS]
    console.print(f"comparing {len(plans)} static LoRAs on the held-out rows")
    pairs = list(zip(plans, tasks, strict=True))
    size = recipe.evaluate.batch_size
    return plans, gaps_of(model, adapter, pairs, held, tokenizer, size)


def plans_from(static: Static) -> list[Plan]:
    """mean_NAME and fit_NAME for every name, in its order."""
    plans = []
    for name, weights in static.means.items():
        factors = static.fits[name]
        rank = max(len(A) for A, _ in factors.values())
        fitted = f"least squares of rank {rank} on {static.tokens[name]:,} tokens: an approximation"
        plans.append(Plan(f"mean_{name}", weights, None, False, MEAN_NOTE))
        plans.append(Plan(f"fit_{name}", {}, None, False, fitted, factors))
    return named(plans)


def measure(
    model: PeftModel,
    layers: Sequence[ManyLoraLayer],
    adapter: str,
    batches: dict[str, list[Batch]],
    rank: int | None,
) -> Static:
    """Mean weights and fits of every task and of all, a group of layers at a time.

    batches: by task, ids, mask and position ids; every fourth is held apart to choose the ridge.
    """
    static = Static({}, {}, {})
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
            _settle(static, task, group, adapter, parts, rank)
        _settle(static, ALL, group, adapter, total, rank)
    static.tokens[ALL] = sum(static.tokens[task] for task in batches)
    return static


def _settle(
    static: Static,
    name: str,
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
            static.means.setdefault(name, {})[layer.name] = mean.cpu()
            A, B = (factor.cpu() for factor in with_shared(layer, adapter, *AB))
            static.fits.setdefault(name, {})[layer.name] = (A, B)


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


def _training_batches(
    corpus: Corpus, encoder: Encoder, recipe: Recipe, rows: int
) -> dict[str, list[Batch]]:
    """Training rows of every task, prompts and answers, as padded batches."""
    size, batches = min(recipe.evaluate.batch_size, max(1, rows // 4)), {}
    for task in corpus.tasks:
        encoded, _ = encoder.split_too_long(islice(corpus.train[task], rows))
        ids = [list(item.input_ids) for item in encoded]
        if ids:
            batches[task] = [left_padded(ids[i : i + size], 0) for i in range(0, len(ids), size)]
    return batches
