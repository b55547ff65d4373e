"""Whether a checked adapter fits the model that it is loaded into.

Before its tensors are made (`check_model`, `check_size`): nothing is allocated that neither the
file nor the layer has the size of. When they arrive (`check_loaded`): PEFT itself goes on with what
it finds, so that a missing tensor would stay as it was initialised.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import cast

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from manylora.adapter.checking import CONFIG_FILE, ROOT, SavedAdapter, few, is_finite
from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.saved_config import AdapterFileError, check_patterns
from manylora.methods import PREFIX

ROOM, TIMES_THE_LAYER = 2**20, 8


def check_model(model: nn.Module, config: ManyLoraConfig) -> None:
    """Before the model is adapted by a loaded configuration, which can hold anything.

    Its patterns end, its trained tokens are in the vocabulary, its modules are in the file: all of
    a module for an adapter that may still be a new one, which the file then says nothing about.
    """
    saved = config.saved
    if saved is None:
        return
    file = saved.file.with_name(CONFIG_FILE)
    check_patterns(file, saved.patterns, [name for name, _ in model.named_modules()])
    given = config.trainable_token_indices or []
    lists = given.values() if isinstance(given, dict) else [given]
    tokens = [token for places in lists for token in places]
    if tokens and isinstance(model, PreTrainedModel):
        size = len(cast(Tensor, model.get_input_embeddings().weight))
        if max(tokens) >= size:
            raise AdapterFileError(
                f"{file}: trainable_token_indices names token {max(tokens)}, but the model has "
                f"{size}; it is for another base model"
            )
    for wanted in config.modules_to_save or []:
        for name, module in model.named_modules():
            if name.endswith(wanted):
                own = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
                parts = {f"{name}.{part}" for part, _ in own.named_parameters()}
                missing = parts - saved.others
                if missing and (config.inference_mode or missing != parts):
                    compiled = set(map(plain, missing)) & set(map(plain, saved.others))
                    advice = "load before torch.compile" if compiled else "copy both files again"
                    raise AdapterFileError(
                        f"{saved.file}: no tensor for {few(missing)}, which {CONFIG_FILE} has in "
                        f"modules_to_save; {advice}"
                    )


def check_size(
    config: ManyLoraConfig, layer: str, sizes: tuple[int, int] | tuple[None, None]
) -> None:
    """Before a layer's tensors are made: not far more of them than the file or the layer has.

    sizes: the layer's (in_features, out_features); of no linear layer, None.
    """
    n_in, n_out = sizes
    if config.saved is None or n_in is None or n_out is None:
        return
    held = config.saved.layers.get(layer) or config.saved.layers.get(plain(layer))
    if held is not None and (held["A"][1], held["B"][0]) == sizes:
        return
    parameters = config.branches_of(layer).parameters(n_in, n_out)
    room = max(ROOM, TIMES_THE_LAYER * n_in * n_out)
    if parameters > room and not _changed(config, config.saved):
        raise AdapterFileError(
            f"{config.saved.file}: its ranks would take {parameters:,} parameters for {layer} of "
            f"{n_in} x {n_out}, which it does not hold; it is for another base model"
        )


def _changed(config: ManyLoraConfig, saved: SavedAdapter) -> bool:
    """Whether its branches were changed since it was read, which is for a new adapter."""
    return any(
        dict(parts) != config.branches_of(layer).shapes(parts["A"][1], parts["B"][0])
        for layer, parts in saved.layers.items()
    )


def plain(name: str) -> str:
    """A name without what torch.compile puts into those of its model."""
    return name.replace("_orig_mod.", "")


def check_loaded(
    model: nn.Module, config: ManyLoraConfig, adapter: str, tensors: Mapping[str, Tensor]
) -> None:
    """Tensors under the names of the model: none missing, none left over, of its shapes, finite.

    Raises AdapterFileError, which names the tensor and the base model that it is not for; an
    adapter that came to others is taken off again.
    """
    try:
        _compare(model, config, adapter, tensors)
    except AdapterFileError:
        if isinstance(model, PeftModel) and len(model.peft_config) > 1:
            model.delete_adapter(adapter)
        raise


def _compare(
    model: nn.Module, config: ManyLoraConfig, adapter: str, tensors: Mapping[str, Tensor]
) -> None:
    where = config.saved.file if config.saved is not None else f"adapter {adapter!r}"
    held = {name.removeprefix(ROOT): tensor for name, tensor in model.state_dict().items()}
    given = {name.removeprefix(ROOT): tensor for name, tensor in tensors.items()}
    leaf = re.compile(rf"\.{PREFIX}\w+\.{re.escape(adapter)}\.weight$")
    wanted = {name for name in held if leaf.search(name)}
    base = config.base_model_name_or_path
    another = f"it is for another base model than this one (it names {base!r}), or is damaged"
    for what, names in (
        ("no tensor for", wanted - given.keys()),
        ("a tensor too many:", given.keys() - held.keys()),
    ):
        if names:
            raise AdapterFileError(f"{where}: {what} {few(names)}; {another}")
    for name in sorted(given):
        mine, its = tuple(held[name].shape), tuple(given[name].shape)
        if mine != its and 0 not in mine:  # ZeRO-3 holds no part of it here
            raise AdapterFileError(f"{where}: {name} is {its}, in the model {mine}; {another}")
        if not is_finite(given[name]):
            raise AdapterFileError(
                f"{where}: {name} holds numbers that are not finite; copy the file again, or train "
                "again with a lower learning rate"
            )
    _warn_of_another_name(base, getattr(getattr(model, "config", None), "_name_or_path", None))


def _warn_of_another_name(saved: str | None, given: str | None) -> None:
    """The shapes fit, so it may be the same model under another name."""
    if saved and given and _last(saved) != _last(given):
        warnings.warn(
            f"this adapter was trained on {saved}, and is loaded on {given}: the shapes fit, but "
            "on other weights than it was trained on its answers are worth nothing",
            stacklevel=2,
        )


def _last(name: str) -> str:
    """The model's own name in a path, in a hub name, or in the hub's cache."""
    parts = [part for part in re.split(r"[/\\]", name) if part]
    if "snapshots" in parts[1:]:
        return parts[parts.index("snapshots") - 1].rpartition("--")[2].lower()
    return parts[-1].lower() if parts else ""
