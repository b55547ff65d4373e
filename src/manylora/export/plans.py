"""Which updates a run has: one, one for each branch or task, or none that is exact."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.layer import ManyLoraLayer, layers_of
from manylora.adapter.quantized import quantised_as
from manylora.adapter.router import not_mergeable
from manylora.adapter.selector import SELECTOR_FILE, BranchSelector
from manylora.base import load_model
from manylora.export.factors import Factors, lora_factors
from manylora.export.record import ExportError
from manylora.inspect.routing import ROUTING_FILE, Routing, read_routing
from manylora.run import recipe_of

Weights = dict[str, Tensor | None]
"""Layer name -> mixing weights (N,), or None where the method has constant ones."""

ALL = "all_tasks"
"""The name of an update for all tasks; a task of that name gets another folder (`named`)."""

MEAN_NOTE = "the router's weights fixed at their measured mean: an approximation"


@dataclass(frozen=True)
class Plan:
    """One update of the whole model: mixing weights by layer, or factors that were fitted.

    ids: what `branch_ids` gets for the live run that it must equal; None where it needs none.
    """

    name: str
    weights: Weights
    ids: int | None
    exact: bool
    note: str
    fitted: Factors | None = None

    def factors(self, model: PeftModel, adapter: str) -> Factors:
        """A and B of every adapted layer."""
        if self.fitted is not None:
            return self.fitted
        return {
            layer.name: lora_factors(layer, adapter, self.weights[layer.name])
            for layer in adapted(model, adapter)
        }

    def deltas(self, model: PeftModel, adapter: str) -> Iterator[tuple[ManyLoraLayer, Tensor]]:
        """The update of every adapted layer, shaped like its base weight."""
        for layer in adapted(model, adapter):
            if self.fitted is None:
                yield layer, layer.get_delta_weight(adapter, self.weights[layer.name])
                continue
            A, B = self.fitted[layer.name]
            delta = (B @ A).to(layer.get_base_weight().device)
            yield layer, delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta


def load_exact(run: Path, base: str | None = None) -> PeftModel:
    """The run's model in float32, whatever the run used: checks are sharp.

    A base that training quantised (the recipe's `quantize`) is not; one that is stored so is.
    base: another base model than the run's.
    """
    loaded = load_model(base or recipe_of(run).model, "float32")
    with warnings.catch_warnings():
        if base is not None:  # asked for
            warnings.filterwarnings("ignore", message="this adapter was trained on")
        return PeftModel.from_pretrained(loaded, str(run)).eval()


def require_unquantised(run: Path, model: PeftModel, adapter: str) -> None:
    """ExportError where the base is stored quantised: what is merged into it is rounded, or lost.

    (A base that the recipe's `quantize` quantised was loaded unquantised by `load_exact`.)
    """
    for layer in adapted(model, adapter):
        if (kind := quantised_as(layer)) is not None:
            raise ExportError(
                f"the base model of {run}, {recipe_of(run).model}, is stored quantised "
                f"({layer.name}: {kind}): an update merged into it would be rounded to its few "
                "levels, or cannot be merged at all. Better: export a LoRA (--to lora) and serve "
                "it on this base, which is exact; or merge into the unquantised model that the "
                "base was made from, with --base FOLDER_OR_NAME"
            )


def is_routed(run: Path) -> bool:
    """Whether the run's adapter mixes its branches anew for every token."""
    config = cast(ManyLoraConfig, PeftConfig.from_pretrained(str(run)))
    return config.branches_of().gate == "router"


def adapted(model: PeftModel, adapter: str) -> list[ManyLoraLayer]:
    return [layer for layer in layers_of(model) if adapter in layer.branches]


def plans_of(run: Path, model: PeftModel, adapter: str, static: bool = False) -> list[Plan]:
    """Every update that the run has, each under a name that can be a folder's.

    static: for a token router, its weights fixed at the means in routing.json.

    Raises ExportError for a token router without `static`, or without measured routing.
    """
    return named(_plans(run, model, adapter, static))


def chosen(plans: Sequence[Plan], task: str | None) -> Plan:
    """The plan to merge: the only one, or that of a task or branch by its name."""
    names = ", ".join(plan.name for plan in plans)
    if task is None and len(plans) > 1:
        raise ExportError(
            f"the run has {len(plans)} updates, and one model holds one: choose it with --task, "
            f"one of {names}"
        )
    found = [plan for plan in plans if task in (None, plan.name)]
    if not found:
        raise ExportError(f"no update is called task={task!r}; the run has {names}")
    return found[0]


def _plans(run: Path, model: PeftModel, adapter: str, static: bool) -> Iterator[Plan]:
    layers = adapted(model, adapter)
    branches = layers[0].branches[adapter]

    def fixed(choice: int) -> Weights:
        return {layer.name: layer.fixed_weights(adapter, choice) for layer in layers}

    if branches.gate == "router":
        if not static:
            raise ExportError(not_mergeable(adapter, branches))
        yield from _means(_routing_of(run))
    elif branches.needs_ids:
        what = "task" if branches.gate == "task" else "branch"
        for choice, name in enumerate(_choice_names(run, branches.choices)):
            yield Plan(name, fixed(choice), choice, True, f"{what} {choice}")
        if branches.shared_rank:
            yield Plan("shared", fixed(-1), -1, True, "the shared branch, for unknown prompts")
    else:
        constant: Weights = {layer.name: None for layer in layers}
        yield Plan("lora", constant, None, True, "the whole adapter")


def _means(routing: Routing) -> Iterator[Plan]:
    means = {
        task: torch.tensor(rows, dtype=torch.float64) for task, rows in routing["tasks"].items()
    }
    # First, so that it has its name whatever the tasks are called.
    for name, rows in [(ALL, torch.stack(list(means.values())).mean(0)), *means.items()]:
        weights: Weights = dict(zip(routing["layers"], rows, strict=True))
        yield Plan(name, weights, None, False, MEAN_NOTE)


def _routing_of(run: Path) -> Routing:
    if not (run / ROUTING_FILE).is_file():
        raise ExportError(
            f"{run} has no {ROUTING_FILE}, the measured routing that a static export "
            f"needs; make it with `manylora eval {run}`"
        )
    return read_routing(run)


def _choice_names(run: Path, count: int) -> list[str]:
    """Names of the branches or tasks: the selector's, which training fitted to the tasks."""
    if (run / SELECTOR_FILE).is_file():
        return BranchSelector.load(run / SELECTOR_FILE).names
    return [f"branch_{i}" for i in range(count)]


def named(plans: Iterable[Plan]) -> list[Plan]:
    """With names that stay inside a folder and differ: a task may be called anything."""
    found: dict[str, Plan] = {}
    for plan in plans:
        name = re.sub(r"[/\\\x00]|^\.+", "_", plan.name) or "_"
        while name in found:
            name += "_"
        found[name] = replace(plan, name=name)
    return list(found.values())
