"""One adapted linear layer: the frozen layer plus any number of named multi-branch adapters.

    y = W x + s * B [ g(x) (x) A x ] + s0 * B0 A0 x      (computed by `running.run`)

Each tensor is the `.weight` of a leaf module of its own, `manylora_A.NAME.weight` and so on
(shapes: `Branches.shapes`); what a method does not have is absent. `get_delta_weight` is the one
source of an adapter's weight update: merge, export and inspection call it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.init import Factor, initialize
from manylora.adapter.layout import Layout
from manylora.adapter.ops import computable, fold_scale
from manylora.adapter.router import RoutingLosses, constant_weights, not_mergeable, softmax
from manylora.adapter.running import run
from manylora.adapter.sharing import Group, is_plain
from manylora.adapter.state import BranchState, spread
from manylora.methods import Branches


class ManyLoraLayer(nn.Module, BaseTunerLayer):
    """A frozen `nn.Linear`, `Conv1D` or quantised linear layer with manylora adapters."""

    adapter_layer_names = (
        "manylora_A",
        "manylora_B",
        "manylora_router",
        "manylora_scale",
        "manylora_gate",
        "manylora_shared_A",
        "manylora_shared_B",
    )
    manylora_A: nn.ModuleDict
    other_param_names = (
        "branches",
        "layouts",
        "parts",
        "configs",
        "scaling",
        "shared_scaling",
        "routing_loss",
    )

    def __init__(self, base_layer: nn.Module, name: str, state: BranchState, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.own_name = name.rpartition(".")[2]  # the same in all blocks: one graph for them
        self.state = state
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ModuleDict())
        self.branches: dict[str, Branches] = {}
        self.layouts: dict[str, Layout] = {}
        self.parts: dict[str, tuple[tuple[str, str], ...]] = {}  # and the attributes that hold them
        self.configs: dict[str, ManyLoraConfig] = {}
        self.scaling: dict[str, float] = {}
        self.shared_scaling: dict[str, float] = {}
        self.routing_loss: dict[str, Tensor] = RoutingLosses()
        self.siblings: list[ManyLoraLayer] = []
        self.group = Group()
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self._unmerged: Any = None
        self.cast_input_dtype_enabled = True
        sizes = _get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = cast(tuple[int, int], sizes)

    def update_layer(
        self, adapter: str, config: ManyLoraConfig, inference_mode: bool = False
    ) -> None:
        """Create the tensors of a new adapter, initialised as its method says."""
        branches = config.branches_of(self.name)
        self.branches[adapter], self.configs[adapter] = branches, config
        self.scaling[adapter], self.shared_scaling[adapter] = config.scalings_of(self.name)
        shapes = branches.shapes(self.in_features, self.out_features)
        self.layouts[adapter] = Layout.of(branches)
        self.parts[adapter] = tuple((part, f"manylora_{part}") for part in shapes)
        for part, shape in shapes.items():
            getattr(self, f"manylora_{part}")[adapter] = Factor(*shape)
        initialize(self.tensors(adapter), branches, config)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def tensors(self, adapter: str) -> dict[str, Tensor]:
        held: Any = self._modules  # what a module looks up as an attribute takes longer
        return {part: held[name]._modules[adapter]() for part, name in self.parts[adapter]}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self._own_active()
        if adapter_names is None and (self.disable_adapters or self.merged or not adapters):
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        alone = adapter_names is None and len(adapters) == 1 and not args and not kwargs
        if alone and self.quantization_backend is None and is_plain(self.base_layer, x):
            return self._in_one(x, adapters[0])
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        if adapter_names is not None:
            return self._mixed_batch(y, x, adapter_names)
        dtype = y.dtype
        for adapter in adapters:
            (y,) = run([self], adapter, x, self.state.ids_for(x), [y])
        return y.to(dtype)

    def _in_one(self, x: Tensor, adapter: str) -> Tensor:
        """Base layer and adapter in one operation, with the layers that read x too."""
        shared = self.state.shared
        aside = shared.aside(self, adapter, x)
        taken = shared.taken(self, adapter, aside)
        if taken is not None:
            return taken
        left = (one for one in self.siblings if one.own_name not in aside)
        readers = [self, *(one for one in left if self.reads_as(one, adapter, x))]
        ys = run(readers, adapter, x, self.state.ids_for(x))
        shared.lay_aside(x, adapter, readers, ys, aside)
        return ys[0]

    def reads_as(self, other: ManyLoraLayer, adapter: str, x: Tensor) -> bool:
        """Whether other can be computed with this layer in one operation, both reading x."""
        return (
            other._own_active() == [adapter]
            and not (other.disable_adapters or other.merged or other.quantization_backend)
            and self.training == other.training
            and self.in_features == other.in_features
            and self.branches[adapter] == other.branches[adapter]
            and self.scaling[adapter] == other.scaling[adapter]
            and self.shared_scaling[adapter] == other.shared_scaling[adapter]
            and is_plain(other.base_layer, x)
            and (self.base_layer.bias is None) == (other.base_layer.bias is None)
        )

    def _own_active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.manylora_A]

    def _mixed_batch(self, y: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please "
                "call `unmerge_adapter` first."
            )
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of "
                f"inputs, but got {len(adapter_names)} and {len(x)} ({self.name})"
            )
        ids, y = self.state.ids_for(x), y.clone()
        if ids is not None:
            spread(ids, x.shape[:-1])  # raises where they do not fit
        for adapter in sorted(set(adapter_names) & set(self.manylora_A.keys())):
            rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter])
            rows = rows.to(x.device)
            mine = ids if ids is None or ids.numel() == 1 else ids.to(x.device)[rows]
            (added,) = run([self], adapter, x[rows], mine, [y[rows]])
            y[rows] = added.to(y.dtype)
        return y

    def get_delta_weight(self, adapter: str, weights: Tensor | None = None) -> Tensor:
        """The weight update of an adapter, shaped like the base layer's weight.

        Args:
            adapter: its name.
            weights: mixing weights (N,). Needed where they depend on the token (an approximation)
                or the example (exact for that example's branch: `fixed_weights`).

        Raises: ValueError when the weights depend on the input and none are given.
        """
        branches, t = self.branches[adapter], self.tensors(adapter)
        t = {part: computable(tensor) for part, tensor in t.items()}
        if weights is None:
            weights = self._merge_weights(adapter, t["A"])
        A, B = t["A"], fold_scale(t["B"], branches, t.get("scale"))
        if branches.share_A:
            A = A.repeat(branches.count, 1)
        if branches.share_B:
            B = B.repeat(1, branches.count)
        if weights is not None:
            column = torch.tensor(branches.ranks, device=A.device)
            B = B * weights.to(B).repeat_interleave(column)
        delta = self.scaling[adapter] * (B @ A)
        if branches.shared_rank:
            delta = delta + self.shared_scaling[adapter] * (t["shared_B"] @ t["shared_A"])
        delta = delta.to(self.tensors(adapter)["A"].dtype)
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def fixed_weights(self, adapter: str, choice: int) -> Tensor:
        """Mixing weights (N,) of the branch or, for a learned gate, of the task of that id."""
        branches, t = self.branches[adapter], self.tensors(adapter)
        zeros = torch.zeros(branches.count, device=t["A"].device)
        if choice == -1:
            return zeros
        if branches.gate == "task":
            return softmax(t["gate"][choice])
        zeros[choice] = 1.0
        return zeros

    def _merge_weights(self, adapter: str, like: Tensor) -> Tensor | None:
        branches = self.branches[adapter]
        if branches.gate == "router":
            raise ValueError(not_mergeable(adapter, branches))
        if not branches.needs_ids:
            return constant_weights(branches, like)
        if self.state.ids is None or self.state.ids.numel() != 1:
            raise ValueError(not_mergeable(adapter, branches))
        return self.fixed_weights(adapter, int(self.state.ids))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the weight updates of the adapters to the base weight; undone exactly by unmerge."""
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.manylora_A]
        if not names:
            return
        deltas = [self.get_delta_weight(name) for name in names]
        weight = self.get_base_weight()
        if self._unmerged is None:
            self._unmerged = self._keep_base(weight)
        # Summed before rounding to the base's dtype, which matters for bf16 bases.
        merged = weight + sum(deltas[1:], deltas[0]).to(weight.device)
        if safe_merge and not torch.isfinite(merged).all():
            self._unmerged = self._unmerged if self.merged else None
            raise ValueError(
                f"{self.name}: NaNs detected in the merged weights. The adapter "
                f"{', '.join(names)} seems to be broken"
            )
        if self.quantization_backend is not None:
            warnings.warn(
                f"merging into a {self.quantization_backend.backend_name} layer rounds the result "
                "to its few levels again; merge into the unquantised base model instead",
                stacklevel=2,
            )
        self.set_base_weight(merged.to(weight.dtype))
        self.merged_adapters.extend(names)

    def _keep_base(self, weight: Tensor) -> Any:
        if self.quantization_backend is not None:
            return (copy.deepcopy(self.base_layer),)  # in a tuple, lest it become a submodule
        return weight.detach().to("cpu", copy=True)

    def unmerge(self) -> None:
        """Put back the base weight as it was before merging, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self.quantization_backend is not None:
            (self.base_layer,) = self._unmerged
        else:
            self.set_base_weight(self._unmerged.to(self.get_base_weight()))
        self._unmerged = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.branches[adapter_name].gate in ("ones", "uniform")

    def __repr__(self) -> str:
        return "manylora." + super().__repr__()


class ManyLoraLinear(ManyLoraLayer):
    """PEFT's "all-linear" finds layers that already have an adapter by "Linear" in this name."""


def layers_of(model: nn.Module) -> list[ManyLoraLayer]:
    """Every adapted layer of a model, in the order of its modules."""
    return [module for module in modules_around(model) if isinstance(module, ManyLoraLayer)]


def modules_around(model: nn.Module) -> Iterator[nn.Module]:
    """`modules` without what is inside of adapted layers: a tenth of it, in less time."""
    seen, waiting = set(), [model]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield module
        if not isinstance(module, ManyLoraLayer):
            own = [one for one in module._modules.values() if one is not None]
            waiting += reversed(own)
