"""Plain PEFT LoRA folders: what every serving engine loads.

One uniform rank (zero-padded) for all layers, alpha = rank, everything baked into B and no
patterns, because engines disagree on those; `engines.py` has their rules. One-hot and learned gates
give one folder for each branch or task, and the selector beside them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, cat, nn
from transformers.pytorch_utils import Conv1D

from manylora.adapter.layer import ManyLoraLayer
from manylora.adapter.selector import SELECTOR_FILE
from manylora.base import resolve
from manylora.export.engines import config_problems
from manylora.export.factors import Factors
from manylora.export.live import live_logits, probe
from manylora.export.plans import Plan, adapted, load_exact, plans_of
from manylora.export.record import Export, ExportError, record, require_close, written_whole
from manylora.plain_peft import PlainPeftError, plain_logits
from manylora.run import config_of, recipe_of


def export_lora(
    run: Path, output: Path, static: bool = False, adapter: str = "default"
) -> list[Export]:
    """Write plain PEFT LoRA folders under `output` and check them in a fresh process.

    The base model is loaded in float32, whatever the run used, so that the check is sharp.
    static: for a token router, its weights fixed at their measured mean for each task and over all.

    Raises:
        ExportError: a token-routed run without `static`; a check outside tolerance (nothing is
            left behind); an output folder that is not empty.
    """
    base = recipe_of(run).model
    with written_whole(output) as partial:
        model = load_exact(run)
        plans = plans_of(run, model, adapter, static)
        differences = write_checked(model, adapter, base, plans, partial)
        if (run / SELECTOR_FILE).is_file():
            shutil.copy(run / SELECTOR_FILE, partial / SELECTOR_FILE)
    folders = folders_of(plans, output)
    exports = [
        Export(str(folder), "lora", plan.exact, difference, plan.note)
        for plan, folder, difference in zip(plans, folders, differences, strict=True)
    ]
    return record(run, exports)


def folders_of(plans: Sequence[Plan], output: Path) -> list[Path]:
    """Where each goes: `output` itself for a single one."""
    return [output / plan.name if len(plans) > 1 else output for plan in plans]


def write_checked(
    model: PeftModel, adapter: str, base: str, plans: Sequence[Plan], output: Path
) -> list[float]:
    """Write every plan as a plain LoRA; the largest logit difference of each to the live run.

    Raises ExportError when one is outside tolerance, or breaks a rule of the serving engines.
    """
    folders = folders_of(plans, output)
    for plan, folder in zip(plans, folders, strict=True):
        write_lora(model, adapter, plan.factors(model, adapter), folder)
        problems = config_problems(folder)
        if problems:
            raise ExportError(f"{plan.name}: serving engines would refuse it: {problems[0]}")
    tokens = probe(model)
    try:
        plain = plain_logits(resolve(base), folders, tokens)
    except PlainPeftError as error:
        raise ExportError(f"plain PEFT could not load the export: {error}") from None
    return [
        require_close(
            f"{plan.name}, in plain PEFT",
            float((logits - live_logits(model, adapter, plan, tokens)).abs().max()),
        )
        for plan, logits in zip(plans, plain, strict=True)
    ]


def write_lora(model: PeftModel, adapter: str, factors: Factors, folder: Path) -> None:
    """Write one plain LoRA: adapter_config.json and adapter_model.safetensors."""
    config = config_of(model, adapter)
    if config.modules_to_save or config.bias != "none":
        raise ExportError(
            "the run also trained whole modules or biases (modules_to_save, bias), which a plain "
            "LoRA for serving cannot hold; export it with --to merged, or load the run itself"
        )
    layers = adapted(model, adapter)
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
        target_modules=_targets(model, list(factors)),
        bias="none",
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers),
    ).save_pretrained(str(folder))


def _padded(tensor: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = rank - shape[dim]
    return cat([tensor.cpu(), tensor.new_zeros(shape, device="cpu")], dim).contiguous()


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
