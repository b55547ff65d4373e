"""A trained weight update, read from its files alone: low-rank parts of each layer, no base model.

    dW = B A,   A (rank, in), B (out, rank), all scaling in B; in and out are the layer's x and y

What is read: adapter and run folders of manylora, plain LoRA folders of PEFT, and what a full
fine-tuning left of its update (full_update.py). One layer has one or more parts:

    whole                     the whole update, where the mixing weights are constant
    task NAME, cluster NAME   the update of that task's or cluster's examples: a one-hot or learned
                              gate exactly, a token router with its mean weights for the task
    mean routing              a token router with the mean of these over the tasks
    branch 0, branch 1, ...   s B'_i A_i of one branch alone, unweighted; B' has MultiLoRA's scale
                              in it, and a shared A (or B) is in every branch
    shared                    s0 B0 A0, the branch that is always on

The shared branch is in all but the branches' own parts. An update of a single branch has no parts
but the whole. A token router's means are measured by training and by `manylora eval`
(routing.json); without them it has only its branches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from manylora.adapter.checking import CONFIG_FILE, ROOT, WEIGHTS_FILE, is_finite
from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.layer import ManyLoraLayer, ManyLoraLinear
from manylora.adapter.ops import fold_scale
from manylora.adapter.saved_config import AdapterFileError
from manylora.adapter.state import BranchState
from manylora.composing.updates import AdapterError, adapter_folder, read_layers
from manylora.export.factors import lora_factors
from manylora.inspect import full_update
from manylora.inspect.places import place_of
from manylora.inspect.routing import ROUTING_FILE, Routing, read_routing
from manylora.methods import PREFIX
from manylora.recipe import RECIPE_FILE
from manylora.run import check_folder, recipe_of

_NAME = "default"


class Part(NamedTuple):
    """One low-rank matrix B A of a layer: A (rank, in), B (out, rank), float32 or float64, CPU.

    values: every singular value of the matrix, largest first, where the factors hold only its
    leading ones (full fine-tuning); None where the factors are all of it.
    """

    A: Tensor
    B: Tensor
    values: Tensor | None = None


class Layer(Protocol):
    """The update of one layer; its parts are made when they are asked for."""

    def parts(self) -> dict[str, Part]: ...


@dataclass(frozen=True)
class Whole:
    """An update that has no parts but itself."""

    whole: Part

    def parts(self) -> dict[str, Part]:
        return {"whole": self.whole}


@dataclass(frozen=True)
class Branched:
    """A layer of a manylora adapter; weights: mixing weights (N,) by the name of their part."""

    layer: ManyLoraLayer
    weights: Mapping[str, Tensor | None]

    def parts(self) -> dict[str, Part]:
        found = {
            name: Part(*lora_factors(self.layer, _NAME, weights))
            for name, weights in self.weights.items()
        }
        branches = self.layer.branches[_NAME]
        if branches.count > 1 or branches.shared_rank:
            found |= {f"branch {i}": part for i, part in enumerate(self._branches())}
        if branches.shared_rank:
            t = self._tensors()
            found["shared"] = _part(t["shared_A"], self.layer.shared_scaling[_NAME] * t["shared_B"])
        return found

    def _branches(self) -> list[Part]:
        branches, t = self.layer.branches[_NAME], self._tensors()
        A, B = t["A"], self.layer.scaling[_NAME] * fold_scale(t["B"], branches, t.get("scale"))
        own = [slice(*ends) for ends in pairwise([0, *accumulate(branches.ranks)])]
        return [
            _part(A if branches.share_A else A[rows], B if branches.share_B else B[:, rows])
            for rows in own
        ]

    def _tensors(self) -> dict[str, Tensor]:
        found = self.layer.tensors(_NAME)
        return {part: _exact(tensor.detach()) for part, tensor in found.items()}


@dataclass(frozen=True)
class Adapter:
    """An update that was read from a folder.

    name: of the folder, or as given. method: a row of `manylora.methods.METHODS`, or "full".
    config: as PEFT reads it; None of a full fine-tuning. layers: by their names in the model.
    """

    name: str
    folder: Path
    method: str
    config: PeftConfig | None
    layers: Mapping[str, Layer]

    def parts(self, layer: str) -> dict[str, Part]:
        """The parts of a layer by their names, all scaling in B. Raises KeyError."""
        return self.layers[layer].parts()


def read(folder: str | Path, name: str | None = None) -> Adapter:
    """The update in a folder, from its files alone.

    name: how tables call it; the folder's own name if None.

    Raises FileNotFoundError for a folder without an update or an unfinished run, AdapterFileError
    or AdapterError (both ValueErrors) for files that are damaged, do not belong together, or hold
    an update that is not B A: which file, what is wrong, what to do.
    """
    path = Path(folder)
    name = path.resolve().name if name is None else name
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give a run or an adapter folder")
    if (path / full_update.FULL_UPDATE_FILE).is_file():
        leading = full_update.read(path)
        layers = {layer: Whole(_part(*one)) for layer, one in leading.items()}
        return Adapter(name, path, "full", None, _in_order(layers))
    if (path / RECIPE_FILE).is_file():
        recipe_of(path)  # says how an unfinished run is finished
    if _is_lora(path):
        return _lora(path, name)
    return _branched(path, name)


def _is_lora(path: Path) -> bool:
    """Everything else is checked as an adapter of manylora, and refused when it is none."""
    try:
        found = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("peft_type") == "LORA"


def _lora(path: Path, name: str) -> Adapter:
    """PEFT puts the weights into a model of empty layers, and so reads them as it always does."""
    folder = adapter_folder(path)
    layers = read_layers(cast(PreTrainedModel, _empty_model(path / WEIGHTS_FILE)), folder)
    whole = {layer: Whole(Part(*factors)) for layer, factors in layers.items()}
    return Adapter(name, path, "lora", folder.config, _in_order(whole))


def _empty_model(weights: Path) -> nn.Module:
    """Linear layers under the names and in the sizes of a LoRA's, that hold no memory."""
    model = nn.Module()
    try:
        with safe_open(str(weights), framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{weights}: is damaged or no safetensors file ({error}); copy it again"
        ) from None
    for key, shape in shapes.items():
        above, found, _ = key.removeprefix(ROOT).partition(".lora_A.")
        up = shapes.get(f"{ROOT}{above}.lora_B.weight")
        if not found or up is None or len(shape) != 2 or len(up) != 2:
            continue
        layer = nn.Linear(shape[1], up[0], bias=False, device="meta")
        layer.weight = nn.Parameter(torch.zeros(1, 1).expand(up[0], shape[1]), requires_grad=False)
        _put(model, above.split("."), layer)
    return model


def _put(model: nn.Module, names: list[str], layer: nn.Module) -> None:
    for part in names[:-1]:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    model.add_module(names[-1], layer)


def _branched(path: Path, name: str) -> Adapter:
    config = check_folder(path)
    assert config.saved is not None
    tensors: dict[str, dict[str, Tensor]] = {layer: {} for layer in config.saved.layers}
    for key, tensor in load_file(str(path / WEIGHTS_FILE)).items():
        layer, found, part = key.removeprefix(ROOT).rpartition(f".{PREFIX}")
        if not found:
            continue  # a whole module or a bias that was trained besides
        if not is_finite(tensor):
            raise AdapterFileError(
                f"{path / WEIGHTS_FILE}: {key} holds numbers that are not finite; copy the file "
                "again, or train again with a lower learning rate"
            )
        tensors[layer][part.removesuffix(".weight")] = tensor
    layers = {layer: _layer(layer, held, config) for layer, held in tensors.items()}
    weights = _weights(path, config, layers)
    branched = {name: Branched(layer, weights[name]) for name, layer in layers.items()}
    return Adapter(name, path, config.method, config, _in_order(branched))


def _layer(name: str, tensors: Mapping[str, Tensor], config: ManyLoraConfig) -> ManyLoraLayer:
    """The layer as it is in a model, except that what it adapts has a size and no numbers."""
    base = nn.Linear(tensors["A"].shape[1], len(tensors["B"]), bias=False, device="meta")
    layer = ManyLoraLinear(base, name, BranchState())
    with torch.device("meta"):
        layer.update_layer(_NAME, config, inference_mode=True)
    for part, tensor in tensors.items():
        factor = layer.get_submodule(f"{PREFIX}{part}.{_NAME}")
        factor.weight = nn.Parameter(tensor, requires_grad=False)
    return layer


def _weights(
    path: Path, config: ManyLoraConfig, layers: Mapping[str, ManyLoraLayer]
) -> dict[str, dict[str, Tensor | None]]:
    """For each layer the mixing weights of its parts, by their names."""
    branches = config.branches_of()
    word = "task"
    if (path / RECIPE_FILE).is_file() and recipe_of(path).tasks != "named":
        word = "cluster"
    if branches.gate == "router":
        return _means(path, word, branches.count, layers)
    if not branches.needs_ids:
        return {name: {"whole": None} for name in layers}
    selector = config.branch_selector
    if selector is None and branches.gate == "one_hot":
        word = "cluster"
    names = selector.names if selector is not None else map(str, range(branches.choices))
    choices = [(f"{word} {name}", choice) for choice, name in enumerate(names)]
    return {
        name: {text: layer.fixed_weights(_NAME, choice) for text, choice in choices}
        for name, layer in layers.items()
    }


def _means(
    path: Path, word: str, count: int, layers: Mapping[str, ManyLoraLayer]
) -> dict[str, dict[str, Tensor | None]]:
    """Mean mixing weights of a token router; none for a folder where they were not measured."""
    if not (path / ROUTING_FILE).is_file():
        return {name: {} for name in layers}
    routing = read_routing(path)
    if routing["branches"] != count or set(routing["layers"]) != set(layers):
        raise AdapterFileError(
            f"{path / ROUTING_FILE}: was measured with another adapter than {CONFIG_FILE} and "
            f"{WEIGHTS_FILE} beside it ({len(routing['layers'])} layers of {routing['branches']} "
            f"branches, here {len(layers)} of {count}); measure again with `manylora eval {path}`"
        )
    return {name: _of_layer(routing, name, word) for name in layers}


def _of_layer(routing: Routing, layer: str, word: str) -> dict[str, Tensor | None]:
    place = routing["layers"].index(layer)
    means = {
        f"{word} {task}": torch.tensor(rows[place], dtype=torch.float64)
        for task, rows in routing["tasks"].items()
    }
    return {"mean routing": torch.stack(list(means.values())).mean(0), **means}


def _in_order(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Block after block: a file has block 10 before block 2."""
    return dict(sorted(layers.items(), key=lambda item: (place_of(item[0])[1], item[0])))


def _part(A: Tensor, B: Tensor, values: Tensor | None = None) -> Part:
    return Part(_exact(A), _exact(B), values)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32))
