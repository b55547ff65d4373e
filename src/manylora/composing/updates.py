"""Adapter folders whose update is a fixed matrix, read as two factors for each layer.

    dW = B A,   A (rank x in), B (out x rank), all scaling in B

Plain LoRA folders of PEFT and manylora's own (run folders and exports) where the mixing weights are
constant. PEFT itself puts each into the base model and takes it out again, so rank and alpha
patterns, rsLoRA and the names of the layers are read as PEFT reads them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.layer import layers_of
from manylora.base import BaseModelError, name_and_revision, resolve
from manylora.export import lora_factors
from manylora.recipe import RECIPE_FILE
from manylora.run import recipe_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"
# The others (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base weights as well.
_INITS_THAT_LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
# What an adapter may hold besides the two factors of its layers.
_MORE_THAN_FACTORS = (
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
)

Layers = dict[str, tuple[Tensor, Tensor]]
"""A and B by the name of the layer, float32 on the CPU."""


class AdapterError(ValueError):
    """An adapter folder that cannot be used here, and what to do instead."""


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter that can be read as a fixed update; model: its base, in a recipe's words."""

    path: Path
    config: PeftConfig
    model: str


def adapter_folder(path: Path) -> AdapterFolder:
    """Look at a folder without loading weights. Raises AdapterError, FileNotFoundError."""
    if not path.is_dir():
        raise AdapterError(f"{path}: no such folder; give adapter or run folders")
    recipe = recipe_of(path) if (path / RECIPE_FILE).is_file() else None
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise AdapterError(f"{path}: {name} is missing, so this is no adapter{_inside(path)}")
    config = _config(path)
    if reason := _not_fixed(path, config):
        raise AdapterError(f"{path}: {reason}")
    if recipe is not None:
        return AdapterFolder(path, config, recipe.model)
    if not config.base_model_name_or_path:
        raise AdapterError(
            f"{path}: {CONFIG_FILE} does not name the base model; write it there as "
            '"base_model_name_or_path"'
        )
    revision = f"@{config.revision}" if config.revision else ""
    return AdapterFolder(path, config, config.base_model_name_or_path + revision)


def shared_base(folders: list[AdapterFolder]) -> str:
    """The one base model of all of them; AdapterError when they have several."""
    found = []
    for folder in folders:
        try:
            name, revision = name_and_revision(folder.model)
            found.append((folder, resolve(name), revision))
        except BaseModelError as error:
            raise AdapterError(f"{folder.path}: its base model: {error}") from None
    first, name, _ = found[0]
    for folder, other, _ in found:
        if other != name:
            raise AdapterError(
                f"the adapters are for different base models: {first.path} for {first.model!r}, "
                f"{folder.path} for {folder.model!r}. Give adapters of one base model; if these "
                f"are the same under two names, make them one in {CONFIG_FILE}"
            )
    pinned = {revision: folder for folder, _, revision in found if revision is not None}
    if len(pinned) > 1:
        listed = ", ".join(f"{folder.path} at {revision}" for revision, folder in pinned.items())
        raise AdapterError(f"the adapters are for different revisions of {name}: {listed}")
    return next(iter(pinned.values()), first).model


def read_layers(base: PreTrainedModel, folder: AdapterFolder) -> Layers:
    """The factors of every adapted layer; the base model is left as it was.

    Raises AdapterError when the weights do not fit the base model, or are more than two factors.
    """
    try:
        model = PeftModel(base, folder.config, _NAME)
    except ValueError as error:
        raise AdapterError(f"{folder.path}: does not fit {folder.model}: {error}") from None
    try:
        loaded = model.load_adapter(str(folder.path), _NAME)
        wrong = [*loaded.missing_keys, *loaded.unexpected_keys]
        if wrong:
            raise AdapterError(
                f"{folder.path}: {WEIGHTS_FILE} and {CONFIG_FILE} disagree, or it is for another "
                f"model than {folder.model}: {len(wrong)} tensors without a counterpart, such as "
                f"{wrong[0]}"
            )
        return _factors(model, folder)
    except (RuntimeError, SafetensorError) as error:  # sizes that differ, a file that is not whole
        raise AdapterError(f"{folder.path}: does not fit {folder.model}: {error}") from None
    finally:
        cast(BaseTuner, model.base_model).unload()


def _factors(model: PeftModel, folder: AdapterFolder) -> Layers:
    if isinstance(folder.config, ManyLoraConfig):
        return {
            layer.name: _cpu(*lora_factors(layer, _NAME, None))
            for layer in layers_of(model)
            if _NAME in layer.branches
        }
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        factors = [f[_NAME] for f in (layer.lora_A, layer.lora_B) if _NAME in f]
        linear = [factor.weight for factor in factors if isinstance(factor, nn.Linear)]
        if len(linear) != 2:
            raise AdapterError(
                f"{folder.path}: {name} is no linear layer; only adapters of linear layers can be "
                "combined"
            )
        if layer.lora_variant:
            variant = type(layer.lora_variant[_NAME]).__name__
            raise AdapterError(
                f"{folder.path}: a variant of LoRA ({variant}) whose update is not B A alone; give "
                "plain LoRA adapters"
            )
        found[name] = _cpu(linear[0], layer.scaling[_NAME] * linear[1])
    return found


def _cpu(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return A.detach().to("cpu", torch.float32).clone(), B.detach().to("cpu", torch.float32).clone()


def _config(path: Path) -> PeftConfig:
    try:
        values: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = values["peft_type"]
    except (ValueError, KeyError, TypeError):
        raise AdapterError(f"{path / CONFIG_FILE}: not a PEFT configuration") from None
    if kind not in ("LORA", "MANYLORA"):
        raise AdapterError(
            f"{path}: a {kind} adapter; only LoRA and manylora adapters can be combined"
        )
    config: PeftConfig = PeftConfig.from_pretrained(str(path))
    return config


def _not_fixed(path: Path, config: PeftConfig) -> str | None:
    """Why the update is not one product of two factors for each layer; None when it is."""
    if isinstance(config, ManyLoraConfig):
        branches = config.branches_of()
        if branches.gate == "router":
            return (
                f"the router of {config.method} mixes the branches anew for every token, so there "
                f"is no one update to combine; run `manylora export {path} --static` and give one "
                "of the folders that it writes"
            )
        if branches.needs_ids:
            return (
                "it has an update for each task or branch; run "
                f"`manylora export {path}` and give those of its folders that you want"
            )
        more = bool(config.modules_to_save) or config.bias != "none"
        return "it trained whole modules or biases as well" if more else None
    assert isinstance(config, LoraConfig)
    if config.init_lora_weights not in _INITS_THAT_LEAVE_THE_BASE:
        return (
            f"init_lora_weights={config.init_lora_weights!r} also changed the base model; convert "
            "it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    more_fields = [name for name in _MORE_THAN_FACTORS if getattr(config, name)]
    if config.bias != "none":
        more_fields.append("bias")
    if more_fields:
        return f"it holds more than the two factors of its layers ({', '.join(more_fields)})"
    return None


def _inside(path: Path) -> str:
    """What an export of several branches needs to be told."""
    found = sorted(folder.parent.name for folder in path.glob(f"*/{CONFIG_FILE}"))
    return f"; give one of the adapters in it: {', '.join(found)}" if found else ""
