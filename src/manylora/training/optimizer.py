"""Learning rate and weight decay for each part of an adapter.

    lr(part)    = rates[part] * learning_rate, over the whole schedule; 0 freezes the part
    decay(part) = weight_decays[part], else weight_decay

The parts are A, B, router, scale, gate, shared (the always-on branch, A0 and B0) and other (what is
trained outside the branches: modules_to_save, biases). LoRA+ (2402.12354) is `rates: {B: 16}`;
PEFT's own finds B by "lora_B" in a name, here a part is the layer's attribute that holds it.

Without weight_decays every part decays alike, routers, gates and scales included, as under
transformers' Trainer, which the authors of HydraLoRA use and which leaves out biases and norms
alone; so do we, for vectors in "other".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import nn

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.layer import layers_of

if TYPE_CHECKING:
    from manylora.train_recipe import TrainRecipe

Part = Literal["A", "B", "router", "scale", "gate", "shared", "other"]
PARTS: tuple[Part, ...] = get_args(Part)


def parts_of(config: ManyLoraConfig) -> list[Part]:
    """The parts that an adapter of this configuration trains, in a fixed order."""
    there = {_part(name) for name in config.branches_of().shapes(1, 1)}
    if config.bias != "none" or config.modules_to_save or config.trainable_token_indices:
        there.add("other")
    return [part for part in PARTS if part in there]


def check_parts(train: TrainRecipe, config: ManyLoraConfig) -> None:
    """Raise ValueError when a rate or weight decay is for a part that the adapter has not."""
    there = parts_of(config)
    for key, given in (("rates", train.rates), ("weight_decays", train.weight_decays)):
        for part in given:
            if part not in there:
                raise ValueError(
                    f"train.{key}.{part}={given[part]}, but an adapter with "
                    f"method={config.method!r} and gate={config.branches_of().gate!r} has no "
                    f"{part}; its parts are {', '.join(there)}"
                )
    if all(train.rates.get(part) == 0 for part in there):
        raise ValueError(
            f"train.rates freezes every part of the adapter ({', '.join(there)}), so nothing is "
            "left to train; give one of them a rate above 0"
        )


def parameter_groups(
    model: nn.Module, train: TrainRecipe, adapter: str = "default"
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, each trained tensor in exactly one, in a fixed order.

    A part whose rate is 0 is frozen here (`requires_grad=False`) and has no group. Each group also
    has its "part" and "rate". Call it last before the optimizer is made: PEFT makes an adapter
    trainable again whenever it is switched on.

    Raises ValueError as `check_parts`.
    """
    check_parts(train, cast(Any, model).peft_config[adapter])
    tensors = _tensors_by_part(model, adapter)
    groups = []
    for part in PARTS:
        rate = train.rates.get(part, 1.0)
        if rate == 0:
            for tensor in tensors[part]:
                tensor.requires_grad_(False)
            continue
        decay = train.weight_decays.get(part, train.weight_decay)
        vectors = [tensor for tensor in tensors[part] if tensor.dim() < 2]
        matrices = [tensor for tensor in tensors[part] if tensor.dim() >= 2]
        for some, weight_decay in ((matrices, decay), (vectors, 0.0)):
            if some:
                groups.append(
                    {
                        "params": some,
                        "lr": rate * train.learning_rate,
                        "weight_decay": weight_decay,
                        "part": part,
                        "rate": rate,
                    }
                )
    return groups


def _tensors_by_part(model: nn.Module, adapter: str) -> dict[Part, list[nn.Parameter]]:
    tensors: dict[Part, list[nn.Parameter]] = {part: [] for part in PARTS}
    seen: set[int] = set()
    for layer in layers_of(model):
        for attribute in layer.adapter_layer_names:
            factors = getattr(layer, attribute)
            if adapter in factors and factors[adapter].weight.requires_grad:
                tensors[_part(attribute.removeprefix("manylora_"))].append(factors[adapter].weight)
                seen.add(id(factors[adapter].weight))
    tensors["other"] = [
        tensor for tensor in model.parameters() if tensor.requires_grad and id(tensor) not in seen
    ]
    return tensors


def _part(tensor: str) -> Part:
    return "shared" if tensor.startswith("shared_") else cast(Part, tensor)


class PartRatesMixin:
    """Left of a transformers trainer class: its optimizer gets the groups of `train_recipe`."""

    train_recipe: TrainRecipe

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        trainer = cast(Any, self)
        if trainer.optimizer is None:
            kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
            groups = parameter_groups(trainer.model, self.train_recipe)
            trainer.optimizer = kind(groups, **options)
        return cast(torch.optim.Optimizer, trainer.optimizer)

    def _get_learning_rate(self) -> float:
        """What is logged: the recipe's rate on its schedule, whatever the first group's factor."""
        group = cast(Any, self).optimizer.param_groups[0]
        return float(group["lr"]) / float(group["rate"])
