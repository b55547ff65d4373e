"""Which tasks pull the trained parameters apart: cosines of their gradients, layer by layer.

    g_t      = d/dtheta  of task t's loss (nats per answer token, on its held-out rows)
    cosine   = <g_t, g_u> / (|g_t| |g_u|)     over the parameters of one layer, or of one part of it

Two tasks conflict where the cosine is below 0: a small step that helps one hurts the other (PCGrad,
Yu et al. 2001.06782, definition 1). Parts are those of `training/gradients.py` ("A", "branch 0",
"router", ...) and, first, "all": every trained parameter of the layer. Where branches share A or B
there is also "branches as one": the sum of the branches' gradients, what a single branch in their
place would get, since their weights sum to 1.

A task that does not reach a branch has a zero gradient there, and a cosine with zero is NaN: under
a one-hot gate all pairs are NaN in every branch. That is how branches keep tasks apart. A number
that compares methods is that of "all" over the whole adapter (conflicts.py):

    cosine = agreement - conflict
    conflict = sum over layers l of max(0, -<g_t,l, g_u,l>) / (|g_t| |g_u|)

conflict is the harm that the tasks' steps do each other, to first order, as a share of the most
there could be: 0 where no layer conflicts, 1 for opposite gradients. Measure and name are ours.

The gradients are those of the answers' loss alone, without dropout and a router's balance loss,
trained (or, if asked for, at the start), in the run's precision (float32 where that is fp16),
summed in float32. What is trained outside the branches (`modules_to_save`, biases) is left out.
Memory: 4 bytes x trained parameters x tasks on the CPU, in groups of layers of at most
`MOST_BYTES`; each group takes another pass over the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from manylora.adapter.ids import branch_ids
from manylora.adapter.layer import ManyLoraLayer, layers_of
from manylora.comparison.reading import read
from manylora.comparison.trainer import prepared
from manylora.corpus import Collator, Encoder
from manylora.corpus.batches import Row
from manylora.evaluate.scores import HeldOut, held_out
from manylora.inspect.frames import COLUMNS
from manylora.inspect.places import place_of
from manylora.precision import autocast, resolve_precision
from manylora.recipe import Recipe
from manylora.run import config_of, load, recipe_of
from manylora.training.clusters import KEPT, settle
from manylora.training.gradients import gradients_of
from manylora.training.prepare import prepare

ROWS = 16
MOST_BYTES = 4e9
ALL, AS_ONE = "all", "branches as one"

State = Literal["trained", "start"]
Losses = Mapping[str, Callable[[], Iterator[Tensor]]]
"""Task -> its loss in pieces: scalars whose gradients are summed."""
Gram = npt.NDArray[np.float64]
"""Inner products <g_t, g_u> of all tasks, (tasks, tasks)."""


def interference(
    run: str | Path,
    rows: int = ROWS,
    console: Console | None = None,
    adapter: str = "default",
    state: State = "trained",
) -> pd.DataFrame:
    """Cosines between the gradients of every two tasks of a finished run, for each layer and part.

    rows: held-out rows of each task, from the top, at least 2. state: as trained, or as it was
    before the first step ("start", made again from recipe and seed), where B may be zero and only
    it then has a gradient.

    Returns columns run, layer, module, depth, part, task, other, cosine, and norm and other_norm,
    the lengths of the two gradients (nats per token and unit of the parameters); both orders of a
    pair, no pair of a task with itself.

    Raises FileNotFoundError for a folder that is no finished run, ValueError where fewer than two
    tasks have held-out rows.
    """
    folder = Path(run)
    console = console or Console(stderr=True)
    recipe = recipe_of(folder)
    corpus = settle(recipe, recipe.load_corpus(), console, folder / KEPT).corpus
    model, tokenizer = load(folder) if state == "trained" else _at_start(folder, recipe)
    held, notes = held_out(corpus, Encoder(tokenizer, recipe.max_length), rows)
    for note in notes:
        console.print(note, style="yellow", markup=False)
    if len(held) < 2:
        raise ValueError(
            f"{folder}: interference is between tasks, and {len(held)} of its tasks have two "
            "held-out rows or more; train on several tasks, with holdout=0.1"
        )
    selector = config_of(model, adapter).branch_selector
    tasks = corpus.tasks if selector is None else selector.names
    losses = losses_of(model, held, tasks, recipe, int(tokenizer.pad_token_id), adapter)
    return cosines(model, losses, folder.resolve().name, frozen_parts(recipe), adapter)


def _at_start(folder: Path, recipe: Recipe) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """As `load`, but the adapter as training began with it."""
    found = prepare(recipe, Console(quiet=True), folder / KEPT)
    return found.model.eval(), found.tokenizer


def frozen_parts(recipe: Recipe) -> set[str]:
    """What the recipe does not train: a rate of 0."""
    return {part for part, rate in recipe.train.rates.items() if rate == 0}


def losses_of(
    model: PeftModel,
    held: Sequence[HeldOut],
    tasks: Sequence[str],
    recipe: Recipe,
    pad_token_id: int,
    adapter: str = "default",
) -> Losses:
    """The loss of each task on its rows, in nats per answer token, in batches as in training.

    tasks: names in the order of their ids.
    """
    collate, size = Collator(pad_token_id), recipe.train.batch_size
    use_ids = config_of(model, adapter).branches_of().needs_ids
    device = model.device
    exact = resolve_precision(recipe.train.precision, device) == "fp16"  # small gradients vanish
    precision = "fp32" if exact else recipe.train.precision

    def of(task: HeldOut) -> Iterator[Tensor]:
        ids = list(tasks).index(task.name)
        items = sum(item.answer_tokens for item in task.encoded)
        for start in range(0, len(task.encoded), size):
            rows: list[Row] = [
                {
                    "input_ids": item.input_ids,
                    "learned": item.learned,
                    "task_id": ids,
                    "source": item.source,
                }
                for item in task.encoded[start : start + size]
            ]
            batch = collate(rows)
            on_device = {k: v.to(device) for k, v in batch.items() if k != "sources"}
            inputs, _ = prepared(on_device, False, False)
            with branch_ids(model, ids) if use_ids else nullcontext():
                with autocast(precision, device):
                    loss = read(model, inputs, items).loss
                yield loss  # its backward pass may compute layers again, by the same branch

    return {task.name: lambda task=task: of(task) for task in held}  # type: ignore[misc]


def cosines(
    model: nn.Module,
    losses: Losses,
    run: str = "",
    frozen: set[str] | None = None,
    adapter: str = "default",
) -> pd.DataFrame:
    """`interference` of a model at hand, in eval mode; frozen: parts to leave out.

    The model is left as it was.
    """
    layers = [layer for layer in layers_of(model) if adapter in layer.branches]
    rows: list[dict[str, Any]] = []
    for group in _groups(layers, adapter, len(losses)):
        with _training_only(model, group, adapter, frozen or set()):
            gradients = {task: _gradients(group, adapter, own) for task, own in losses.items()}
        for layer in group:
            module, depth = place_of(layer.name)
            place = {"run": run, "layer": layer.name, "module": module, "depth": depth}
            found = _grams(layer, adapter, [own[layer.name] for own in gradients.values()])
            for part, gram in found.items():
                rows += [place | {"part": part} | pair for pair in _pairs(gram, list(losses))]
    return pd.DataFrame(rows, columns=[*COLUMNS["interference"], "norm", "other_norm"])


def _groups(
    layers: Sequence[ManyLoraLayer], adapter: str, tasks: int
) -> Iterator[list[ManyLoraLayer]]:
    """Layers in order, as many at a time as `MOST_BYTES` of gradients allow."""
    group: list[ManyLoraLayer] = []
    size = 0.0
    for layer in layers:
        branches = layer.branches[adapter]
        needed = 4.0 * tasks * branches.parameters(layer.in_features, layer.out_features)
        if group and size + needed > MOST_BYTES:
            yield group
            group, size = [], 0.0
        group.append(layer)
        size += needed
    yield group


@contextmanager
def _training_only(
    model: nn.Module, layers: Sequence[ManyLoraLayer], adapter: str, frozen: set[str]
) -> Iterator[None]:
    """Only these layers' tensors take a gradient; afterwards all is as before."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for layer in layers:
            for name in layer.branches[adapter].shapes(1, 1):
                part = "shared" if name.startswith("shared_") else name
                if part not in frozen:
                    getattr(layer, f"manylora_{name}")[adapter].weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


def _gradients(
    layers: Sequence[ManyLoraLayer], adapter: str, pieces: Callable[[], Iterator[Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Layer -> part -> one task's gradient, a float32 vector on the CPU."""
    found: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in layers}
    for loss in pieces():
        loss.backward()
        for layer in layers:
            mine = found[layer.name]
            for part, gradients in gradients_of(layer, adapter).items():
                flat = torch.cat([gradient.flatten().float() for gradient in gradients]).cpu()
                mine[part] = mine[part].add_(flat) if part in mine else flat
            for parameter in layer.parameters():
                parameter.grad = None
    return found


def _grams(
    layer: ManyLoraLayer, adapter: str, tasks: Sequence[dict[str, Tensor]]
) -> dict[str, Gram]:
    """The inner products of each part, "all" first; tasks: part -> gradient, of each task."""
    branches = layer.branches[adapter]
    sizes = {part: flat.shape for task in tasks for part, flat in task.items()}
    parts = {
        # A task none of whose tokens reach the layer (an expert) has no gradient there.
        part: torch.stack([own.get(part, torch.zeros(size)) for own in tasks]).double().numpy()
        for part, size in sizes.items()
    }
    grams = {part: rows @ rows.T for part, rows in parts.items()}
    whole: Gram = sum(grams.values(), np.zeros((len(tasks), len(tasks))))
    alike = [rows for part, rows in parts.items() if part.startswith("branch ")]
    if len(alike) > 1 and (branches.share_A or branches.share_B) and not branches.scaled:
        total = np.sum(alike, axis=0)
        grams[AS_ONE] = total @ total.T
    return {ALL: whole, **grams}


def _pairs(gram: Gram, tasks: Sequence[str]) -> Iterator[dict[str, Any]]:
    norms = np.sqrt(np.diag(gram))
    for i, j in permutations(range(len(tasks)), 2):
        length = norms[i] * norms[j]
        yield {
            "task": tasks[i],
            "other": tasks[j],
            "cosine": float(np.clip(gram[i, j] / length, -1, 1)) if length else np.nan,
            "norm": float(norms[i]),
            "other_norm": float(norms[j]),
        }
