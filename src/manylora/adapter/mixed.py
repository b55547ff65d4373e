"""Mixed batches: `adapter_names=[...]` sends each row of a batch through an adapter of its own.

As PEFT offers for LoRA, "__base__" being no adapter. For the time of one forward or generate call a
hook hands every adapted layer the names. PEFT's own wrappers of trained modules (modules_to_save,
trainable_token_indices) take them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.ids import check_range
from manylora.adapter.layer import ManyLoraLayer, layers_of


def hook_adapter_names(
    model: nn.Module,
    names: list[str],
    inputs: Tensor | None,
    known: Mapping[str, ManyLoraConfig],
    active: Iterable[str],
) -> list[RemovableHandle]:
    """Hand the names to every layer; the caller removes the hooks.

    Args:
        names: an adapter, or "__base__", for each row.
        inputs: what the model was called with, where that is known (then rows may be repeated).
        known: the model's adapters. active: those that are active.

    Raises:
        ValueError: the model is training, or a name, the number of names or an id does not fit.
    """
    if model.training:
        raise ValueError(
            "Cannot pass `adapter_names` when the model is in training mode. "
            "Call model.eval() first"
        )
    if unknown := sorted(set(names) - set(known) - {"__base__"}):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; "
            f"this model has {', '.join(sorted(known))} and __base__"
        )
    if inputs is not None and len(inputs) != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of "
            f"inputs, but got {len(names)} and {len(inputs)}"
        )
    _check_ids(names, layers_of(model)[0].state.ids, known)
    _check_trained_copies(model, {*names, *active} - {"__base__"})
    hook = partial(_pass_names, names, inputs is not None)
    return [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, ManyLoraLayer | AuxiliaryTrainingWrapper)
    ]


def _check_ids(names: list[str], ids: Tensor | None, known: Mapping[str, ManyLoraConfig]) -> None:
    """Each row's id is one of its own adapter's; `branch_ids` knows the active ones alone."""
    if ids is None:
        return
    repeats = len(ids) // len(names) if ids.dim() else 1  # of each prompt, for its beams
    rows = [name for name in names for _ in range(repeats)]
    for name in set(names) - {"__base__"}:
        own = ids
        if ids.dim() and len(ids) == len(rows):  # else the layers refuse its shape
            own = ids[[i for i, row in enumerate(rows) if row == name]]
        check_range(name, known[name].branches_of(), own)


def _check_trained_copies(model: nn.Module, used: set[str]) -> None:
    """PEFT would take the base's module for some of the rows, without a word."""
    for name, module in model.named_modules():
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        lacking = sorted(used - module._adapters)
        if lacking and used & module._adapters:
            raise ValueError(
                f"adapter_names: {name} has trained copies (modules_to_save or "
                f"trainable_token_indices), but none for {', '.join(lacking)}, which is in this "
                "batch or active; run those adapters apart"
            )


def _pass_names(
    names: list[str], repeat: bool, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    rows, rest = divmod(len(args[0]), len(names))
    # generate repeats each prompt for its beams and returned sequences.
    if repeat and not rest and (args[0].dim() > 2 or not args[0].is_floating_point()):
        names = [name for name in names for _ in range(rows)]
    return args, {**kwargs, "adapter_names": names}
