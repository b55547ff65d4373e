"""What a mutated adapter folder must lead to: what the file holds, or one error that names a file.

`check` loads it as `manylora.load` does and as PEFT does, or imports it when it is a checkpoint of
the HydraLoRA authors' code; returns "loaded" or "refused", and raises `ViolationError` for anything
else.
"""

from __future__ import annotations

import copy
import json
import shutil
import stat
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

import manylora
from folder_fuzzing import CONFIG, PICKLE, WEIGHTS
from fuzz_check import Hang, ViolationError, peak_memory, time_limit
from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.layer import layers_of
from manylora.adapter.selector import BranchSelector
from manylora.importing.hydralora import import_hydralora
from manylora.recipe import parse_recipe
from tiny import VOCAB, attach, ids_of, tiny_llama

SECONDS = 10.0
SECONDS_FOR_PATTERNS = 1.0
BYTES = 64 * 2**20
ADAPTERS: dict[str, dict[str, Any]] = {
    "hydralora": {"method": "hydralora", "rank_pattern": {"q_proj": 2}},
    "multilora": {"method": "multilora", "modules_to_save": ["lm_head"]},
    "branch_per_cluster": {"method": "branch_per_cluster", "shared_rank": 2},
}
CHECKPOINT = "checkpoint"
KINDS = (*ADAPTERS, CHECKPOINT)
X = torch.arange(3, 12)[None] % VOCAB


def base_model() -> PreTrainedModel:
    return tiny_llama(hidden_size=16, intermediate_size=24, num_hidden_layers=1)


def make_adapter(kind: str, folder: Path) -> Path:
    """A small run folder: adapter, selector where it needs one, recipe; or a checkpoint."""
    if kind == CHECKPOINT:
        return _make_checkpoint(folder)
    model = attach(base_model(), task_type="CAUSAL_LM", r=3, init_weights=False, **ADAPTERS[kind])
    config = model.peft_config["default"]
    if config.branches_of().needs_ids:
        prompts = [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
        config.branch_selector = BranchSelector.fit(prompts, [0, 1, 2], ["a", "b", "c"], 64)
    model.save_pretrained(folder)
    parse_recipe({"model": "tiny", "data": "x", "output": str(folder)}).save(folder)
    return folder


def _make_checkpoint(folder: Path) -> Path:
    """What the HydraLoRA authors' code saves, for the projections of the MLPs."""
    folder.mkdir(parents=True)
    draw, tensors = torch.Generator().manual_seed(1), {}
    for name, module in base_model().named_modules():
        if name.endswith(("up_proj", "down_proj")) and isinstance(module, nn.Linear):
            n_out, n_in = module.weight.shape
            shapes = {"lora_A": (2, n_in), "lora_route": (3, n_in)}
            shapes |= {f"lora_B{i}": (n_out, 2) for i in range(3)}
            for part, shape in shapes.items():
                key = f"base_model.model.{name}.{part}.weight"
                tensors[key] = torch.randn(shape, generator=draw)
    torch.save(tensors, folder / PICKLE)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_nums": 3, "lora_dropout": 0.1}
    fields |= {"target_modules": ["up_proj", "down_proj"], "bias": "none", "modules_to_save": None}
    (folder / CONFIG).write_text(json.dumps(fields), encoding="utf-8")
    return folder


def check(folder: Path, base: PreTrainedModel, checkpoint: bool = False) -> str:
    """Load the folder in both ways, or import the checkpoint, and judge what comes out."""
    before, files = peak_memory(reset=True), _files(folder)
    with (
        warnings.catch_warnings(),
        patch("manylora.run.load_model", lambda *_: copy.deepcopy(base)),
        patch("manylora.run.load_tokenizer", lambda *_: None),
        patch("manylora.adapter.saved_config.SECONDS_FOR_PATTERNS", SECONDS_FOR_PATTERNS),
    ):
        warnings.simplefilter("ignore")
        if checkpoint:
            outcome = _import(folder, base)
        else:
            outcome = _try(folder, lambda: manylora.load(folder)[0])
        if not checkpoint and _peft_knows_it(folder):
            by_peft = _try(
                folder, lambda: PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
            )
            if by_peft != outcome:
                raise ViolationError(f"{outcome} by manylora.load, {by_peft} by PEFT")
    if (grown := peak_memory() - before) > BYTES:
        raise ViolationError(f"{grown / 2**20:.0f} MiB")
    if (folder.parent / "executed").exists():
        (folder.parent / "executed").rmdir()
        raise ViolationError("code in a pickle was executed")
    if _files(folder) != files:
        raise ViolationError("files were written into the folder")
    return outcome


def _import(folder: Path, base: PreTrainedModel) -> str:
    """What is written is a whole adapter, or nothing is."""
    output = folder.parent / "imported"
    others = {path for path in folder.parent.iterdir() if path != output}
    outcome = _try(folder, lambda: import_hydralora(folder, output) and None)
    if outcome == "loaded":
        try:
            ManyLoraConfig.from_pretrained(str(output))  # raises for a folder that is not whole
            _try(output, lambda: PeftModel.from_pretrained(copy.deepcopy(base), str(output)))
        finally:
            shutil.rmtree(output)
    if set(folder.parent.iterdir()) - {folder.parent / "executed"} != others:
        raise ViolationError(f"something was left in {folder.parent}")
    return outcome


def _try(folder: Path, load: Callable[[], PeftModel | None]) -> str:
    try:
        with time_limit(SECONDS):
            model = load()
            if model is not None:
                _check_model(model, folder)
    except Hang:
        raise ViolationError(f"no end within {SECONDS} s") from None
    except ViolationError:
        raise
    except (ValueError, OSError) as error:
        message = str(error)
        if str(folder) not in message or len(message) > 1500 or "\0" in message:
            raise ViolationError(
                f"names no file: {type(error).__name__}: {message[:300]}"
            ) from error
        return "refused"
    except Exception as error:
        raise ViolationError(f"{type(error).__name__}: {str(error)[:300]}") from error
    return "loaded"


@torch.no_grad()
def _check_model(model: PeftModel, folder: Path) -> None:
    """It computes with the tensors of the file."""
    config = model.peft_config["default"]
    with nullcontext() if config.branch_selector is not None else ids_of(model, 0):
        model.eval()(input_ids=X)
    held = load_file(folder / WEIGHTS)
    for layer in layers_of(model):
        for part, tensor in layer.tensors("default").items():
            name = f"base_model.model.{layer.name}.manylora_{part}.weight"
            if not torch.equal(tensor, held[name].to(tensor.dtype)):
                raise ViolationError(f"{name} is not what the file holds")


def _peft_knows_it(folder: Path) -> bool:
    """Before PEFT has read the type of the adapter, its errors are its own."""
    path = folder / CONFIG
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    weights = (folder / WEIGHTS).exists() or (folder / PICKLE).exists()
    return isinstance(found, dict) and found.get("peft_type") == "MANYLORA" and weights


def _files(folder: Path) -> list[tuple[str, int]]:
    return sorted((path.name, path.lstat().st_size) for path in folder.iterdir())
