"""From a run to adapters that PEFT alone loads, each checked against the live run.

Where the mixing weights are constant, or fixed by task, the update of every layer is one product

    dW = [s g_1 B'_1 ... s g_N B'_N | s0 B0] [A_1; ...; A_N; A0]

so it is a plain LoRA exactly: rank = columns, everything baked into B, alpha = r, one uniform rank
(zero-padded) for all layers and no patterns, because serving engines disagree on those (peft.md,
section 4). One-hot and learned gates give one plain LoRA for each branch or task. A token router
has no exact form: `static=True` fixes its weights at their measured mean for each task, or over all
tasks, and says that this is an approximation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from manylora.adapter.ids import branch_ids
from manylora.adapter.layer import ManyLoraLayer, layers_of
from manylora.adapter.ops import fold_scale
from manylora.adapter.router import not_mergeable
from manylora.adapter.selector import SELECTOR_FILE, BranchSelector
from manylora.base import load_model, resolve
from manylora.inspect.routing import ROUTING_FILE, Routing, read_routing
from manylora.plain_peft import PlainPeftError, plain_logits
from manylora.run import config_of, recipe_of

EXPORTS_FILE = "exports.json"
TOLERANCE = 1e-3  # of a logit, in float32


class ExportError(RuntimeError):
    """An export that is impossible, or that did not reproduce the run it was made from."""


@dataclass(frozen=True)
class Export:
    """One exported folder. max_logit_difference: to the live run, in plain PEFT without manylora;
    for a static export to the run with its mixing weights fixed."""

    path: str
    kind: str
    exact: bool
    max_logit_difference: float
    note: str


@dataclass(frozen=True)
class _Plan:
    """One plain LoRA to write: mixing weights by layer (None: constant), and the live ids."""

    name: str
    weights: dict[str, Tensor | None]
    ids: int | None
    exact: bool
    note: str


def export_lora(
    run: Path, output: Path, static: bool = False, adapter: str = "default"
) -> list[Export]:
    """Write plain PEFT LoRA folders under `output` and check them in a fresh process.

    The base model is loaded in float32, whatever the run used, so that the check is sharp.

    Raises:
        ExportError: a token-routed run without `static`; a check outside tolerance (nothing is
            left behind); an output folder that is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise ExportError(f"{output} is not empty; choose another folder with --output")
    recipe = recipe_of(run)
    model = PeftModel.from_pretrained(load_model(recipe.model, "float32"), str(run)).eval()
    plans = list(_plans(run, model, adapter, static))
    folders = [output / plan.name if len(plans) > 1 else output for plan in plans]
    try:
        for plan, folder in zip(plans, folders, strict=True):
            write_lora(model, adapter, plan.weights, folder)
        differences = _check(model, adapter, recipe.model, plans, folders)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    if (run / SELECTOR_FILE).is_file():
        shutil.copy(run / SELECTOR_FILE, output / SELECTOR_FILE)
    exports = [
        Export(str(folder), "lora", plan.exact, difference, plan.note)
        for plan, folder, difference in zip(plans, folders, differences, strict=True)
    ]
    _record(run, exports)
    return exports


def _plans(run: Path, model: PeftModel, adapter: str, static: bool) -> Iterator[_Plan]:
    layers = [layer for layer in layers_of(model) if adapter in layer.branches]
    branches = layers[0].branches[adapter]

    def fixed(choice: int) -> dict[str, Tensor | None]:
        return {layer.name: layer.fixed_weights(adapter, choice) for layer in layers}

    if branches.gate == "router":
        if not static:
            raise ExportError(not_mergeable(adapter, branches))
        yield from _static_plans(read_routing(_routing_of(run)))
    elif branches.needs_ids:
        what = "task" if branches.gate == "task" else "branch"
        for choice, name in enumerate(_choice_names(run, branches.choices)):
            yield _Plan(name, fixed(choice), choice, True, f"{what} {choice}")
        if branches.shared_rank:
            yield _Plan("shared", fixed(-1), -1, True, "the shared branch, for unknown prompts")
    else:
        constant: dict[str, Tensor | None] = {layer.name: None for layer in layers}
        yield _Plan("lora", constant, None, True, "the whole adapter")


def _static_plans(routing: Routing) -> Iterator[_Plan]:
    means = {
        task: torch.tensor(rows, dtype=torch.float64) for task, rows in routing["tasks"].items()
    }
    means = {"all_tasks": torch.stack(list(means.values())).mean(0), **means}
    for name, rows in means.items():
        weights: dict[str, Tensor | None] = dict(zip(routing["layers"], rows, strict=True))
        yield _Plan(
            name,
            weights,
            None,
            False,
            "the router's weights fixed at their measured mean: an approximation",
        )


def _routing_of(run: Path) -> Path:
    if not (run / ROUTING_FILE).is_file():
        raise ExportError(
            f"{run} has no {ROUTING_FILE}, the measured routing that a static export "
            f"needs; make it with `manylora eval {run}`"
        )
    return run


def _choice_names(run: Path, count: int) -> list[str]:
    """Names of the branches or tasks: the selector's, which training fitted to the tasks."""
    if (run / SELECTOR_FILE).is_file():
        return BranchSelector.load(run / SELECTOR_FILE).names
    return [f"branch_{i}" for i in range(count)]


def lora_factors(
    layer: ManyLoraLayer, adapter: str, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with B A the layer's whole update, scaling baked into B.

    weights: mixing weights (N,); None where the method has constant ones. At least float32.
    """
    branches = layer.branches[adapter]
    t = {part: tensor.detach().double().cpu() for part, tensor in layer.tensors(adapter).items()}
    A, B = t["A"], fold_scale(t["B"], branches, t.get("scale"))
    if weights is None:
        weights = layer.constant_weights(branches, t["A"])
    if weights is None:
        weights = torch.ones(branches.count)
    weights = weights.double().cpu()
    if branches.share_A:
        # One A: the branches add up to a single B, so the rank stays r.
        B = (B.unflatten(1, (branches.count, -1)) * weights[:, None]).sum(1)
    elif branches.share_B:
        A = (A.unflatten(0, (branches.count, -1)) * weights[:, None, None]).sum(0)
    else:
        B = B * weights.repeat_interleave(torch.tensor(branches.ranks))
        used = weights.repeat_interleave(torch.tensor(branches.ranks)) != 0
        A, B = (A[used], B[:, used]) if branches.gate == "one_hot" else (A, B)
    B = layer.scaling[adapter] * B
    if branches.shared_rank:
        A = torch.cat([A, t["shared_A"]])
        B = torch.cat([B, layer.shared_scaling[adapter] * t["shared_B"]], 1)
    dtype = torch.promote_types(layer.tensors(adapter)["A"].dtype, torch.float32)
    return A.to(dtype), B.to(dtype)


def write_lora(
    model: PeftModel, adapter: str, weights: dict[str, Tensor | None], folder: Path
) -> None:
    """Write one plain LoRA: adapter_config.json and adapter_model.safetensors."""
    config = config_of(model, adapter)
    if config.modules_to_save or config.bias != "none":
        raise ExportError(
            "the run also trained whole modules or biases (modules_to_save, bias), "
            "which a plain LoRA for serving cannot hold; load the run itself instead"
        )
    layers = {layer.name: layer for layer in layers_of(model) if adapter in layer.branches}
    factors = {name: lora_factors(layer, adapter, weights[name]) for name, layer in layers.items()}
    rank = max(1, *(len(A) for A, _ in factors.values()))
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = _padded(A, rank, 0)
        tensors[f"base_model.model.{name}.lora_B.weight"] = _padded(B, rank, 1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(model, list(layers)),
        bias="none",
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        fan_in_fan_out=any(isinstance(x.get_base_layer(), Conv1D) for x in layers.values()),
    ).save_pretrained(str(folder))


def _padded(tensor: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim).contiguous()


def _targets(model: PeftModel, names: list[str]) -> list[str]:
    """Short module names, as serving engines want them, unless those would match more layers."""
    suffixes = {name.rpartition(".")[2] for name in names}
    base = model.get_base_model()
    matched = {
        name
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in suffixes
        and isinstance(module, nn.Linear | Conv1D | ManyLoraLayer)
    }
    return sorted(suffixes) if matched == set(names) else sorted(names)


def _check(
    model: PeftModel, adapter: str, base: str, plans: list[_Plan], folders: list[Path]
) -> list[float]:
    """Largest logit difference of each folder, in plain PEFT in a new process, to the live run."""
    tokens = torch.randint(
        0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0)
    )
    try:
        plain = plain_logits(resolve(base), folders, tokens)
    except PlainPeftError as error:
        raise ExportError(f"plain PEFT could not load the export: {error}") from None
    differences = [
        float((logits - _live_logits(model, adapter, plan, tokens)).abs().max())
        for plan, logits in zip(plans, plain, strict=True)
    ]
    for folder, difference in zip(folders, differences, strict=True):
        if not difference <= TOLERANCE:
            raise ExportError(
                f"{folder.name}: logits in plain PEFT differ from the live run by {difference:.2e},"
                f" more than {TOLERANCE:.0e}; nothing was kept. Please report it with the recipe"
            )
    return differences


@torch.inference_mode()
def _live_logits(model: PeftModel, adapter: str, plan: _Plan, tokens: Tensor) -> Tensor:
    """Logits of the run itself; for a static plan, of the run with its mixing weights fixed."""
    if plan.exact and plan.ids is None:
        return model(input_ids=tokens).logits
    if plan.exact:
        with branch_ids(model, plan.ids or 0):
            return model(input_ids=tokens).logits
    layers = [layer for layer in layers_of(model) if adapter in layer.branches]
    kept = [layer.get_base_weight().clone() for layer in layers]
    for layer, weight in zip(layers, kept, strict=True):
        layer.set_base_weight(weight + layer.get_delta_weight(adapter, plan.weights[layer.name]))
    with model.disable_adapter():
        logits = model(input_ids=tokens).logits
    for layer, weight in zip(layers, kept, strict=True):
        layer.set_base_weight(weight)
    return logits


def _record(run: Path, exports: list[Export]) -> None:
    """Add to the run's exports.json, which the report shows; a folder written anew replaces."""
    path = run / EXPORTS_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    new = [asdict(export) for export in exports]
    kept = [entry for entry in known if entry["path"] not in {entry["path"] for entry in new}]
    path.write_text(json.dumps(kept + new, indent=2), encoding="utf-8")
