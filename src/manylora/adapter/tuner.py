"""The PEFT method: finds the layers to adapt and registers itself with PEFT without patching it.

PEFT fills four dictionaries when a method registers; a method from outside fills them itself, with
a type of its own (`ManyLoraPeftType`), because PEFT's enum of types is closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import NoMatchingPeftModuleError
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from manylora.adapter.calls import by_name, inputs_of
from manylora.adapter.config import ManyLoraConfig, ManyLoraPeftType
from manylora.adapter.fitting import check_loaded, check_model, check_size
from manylora.adapter.ids import set_ids
from manylora.adapter.layer import ManyLoraLayer, ManyLoraLinear, layers_of
from manylora.adapter.mixed import hook_adapter_names
from manylora.adapter.quantized import refuse_forward_only
from manylora.adapter.router import not_mergeable
from manylora.adapter.selector import BranchSelector, missing_selector
from manylora.adapter.sharing import find_siblings
from manylora.adapter.state import BranchState


class ManyLoraModel(BaseTuner):
    """Attaches manylora adapters to a model; used through `peft.get_peft_model`."""

    prefix = "manylora_"
    tuner_layer_cls = ManyLoraLayer
    peft_config: dict[str, ManyLoraConfig]  # type: ignore[assignment]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    _row_adapters: list[str] | None = None

    def _pre_injection_hook(  # type: ignore[override]
        self, model: nn.Module, config: ManyLoraConfig, adapter_name: str
    ) -> None:
        if not hasattr(self, "branch_state"):
            self.branch_state = BranchState()
        check_model(model, config)

    def _check_new_adapter_config(  # type: ignore[override]
        self, config: ManyLoraConfig
    ) -> None:
        super()._check_new_adapter_config(config)
        if config.selector and config.branch_selector is None:
            raise missing_selector(config.base_model_name_or_path or "")

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adapt the layers that the adapter's config names; says which there are if none match."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            find_siblings(layers_of(model))
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(
                _no_match(model, self.peft_config[adapter_name])
            ) from error

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls,
        model: nn.Module,
        config: ManyLoraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """PEFT goes on with what it finds; a missing tensor would stay as it was initialised."""
        found = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        check_loaded(model, config, adapter_name, found)
        return found

    def _create_and_replace(  # type: ignore[override]
        self,
        config: ManyLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if config.saved is not None:
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            check_size(config, current_key, _get_in_out_features(base))
        if isinstance(target, ManyLoraLayer):
            target.update_layer(adapter_name, config, inference_mode=config.inference_mode)
            return
        supported = isinstance(target, nn.Linear | Conv1D)
        backend = (
            None
            if supported
            else resolve_quantization_backend(target, **get_quantization_kwargs(self))
        )
        if not supported and (backend is None or backend.layer_type != "linear"):
            raise ValueError(
                f"{current_key} is a {type(target).__name__}, which manylora cannot adapt: it "
                "adapts torch.nn.Linear, transformers' Conv1D and quantised linear layers; leave "
                "it out with exclude_modules or narrow target_modules"
            )
        layer = ManyLoraLinear(
            target, current_key, self.branch_state, **get_quantization_kwargs(self)
        )
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, config, inference_mode=config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own goes on to copy the wrapper's weight, a plain tensor for trainable tokens.
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge, refusing before any layer is touched when an adapter has no single update."""
        self._refuse_unmergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Merge and return the plain base model; refuses as `merge_adapter` does."""
        self._refuse_unmergeable(adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _refuse_unmergeable(self, adapter_names: list[str] | None) -> None:
        ids = self.branch_state.ids
        names = self.active_adapters if adapter_names is None else adapter_names
        for name in (name for name in names if name in self.peft_config):
            branches = self.peft_config[name].branches_of()
            one_branch = branches.needs_ids and ids is not None and ids.numel() == 1
            if branches.gate == "router" or (branches.needs_ids and not one_branch):
                raise ValueError(not_mergeable(name, branches))
        refuse_forward_only(layers_of(self.model))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        branches = self.peft_config[adapter_name].branches_of()
        tuned = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
        only_ours = all(isinstance(module, ManyLoraLayer) for module in tuned)
        return only_ours and branches.gate != "router" and not branches.needs_ids

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._about_batch(args, kwargs):
            return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around forward and generate, with their arguments.

        Except that PeftModelForCausalLM.forward leaves out input_ids; `forward` above sees those.
        """
        names, inputs = kwargs.get("adapter_names"), inputs_of(args, kwargs)
        handles = (
            []
            if names is None
            else hook_adapter_names(
                self.model, names, inputs, self.peft_config, self.active_adapters
            )
        )
        before, self._row_adapters = self._row_adapters, names
        try:
            with nullcontext() if inputs is None else self._about_batch(args, kwargs):
                yield
        finally:
            self._row_adapters = before
            for handle in handles:
                handle.remove()

    @contextmanager
    def _about_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Tell the layers which tokens are padding, and the ids that a saved selector chooses."""
        kwargs = by_name(self.model, args, kwargs)
        chosen = self._select(args, kwargs)
        mask, before = kwargs.get("attention_mask"), self.branch_state.token_mask
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.branch_state.token_mask = mask
        try:
            with nullcontext() if chosen is None else set_ids(self.model, chosen, selected=True):
                yield
        finally:
            self.branch_state.token_mask = before

    def _select(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Ids from the saved selector, when nobody else has said which branch it is."""
        selectors = {
            name: config.branch_selector
            for name, config in self.peft_config.items()
            if config.branch_selector is not None
            and name in (self.active_adapters if self._row_adapters is None else self._row_adapters)
        }
        if not selectors or self.branch_state.ids is not None or self._is_inert():
            return None
        input_ids, cache = inputs_of(args, kwargs), kwargs.get("past_key_values")
        cached = cache is not None and cache.get_seq_length() > 0
        if input_ids is None or input_ids.is_floating_point() or cached:
            raise ValueError(
                "the branch is chosen from the prompt's token ids, which this call does not have; "
                "wrap your decoding loop in `with manylora.branch_ids(model, ids):`"
            )
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else input_ids >= 0
        seq2seq = self.get_model_config(self.model).get("is_encoder_decoder", False)
        if isinstance(labels, Tensor) and labels.shape == mask.shape and not seq2seq:
            mask = mask & (labels == -100)
        if self._row_adapters is not None:
            return _select_by_row(selectors, self._row_adapters, input_ids, mask)
        if len(selectors) > 1:
            raise ValueError(
                f"the active adapters {', '.join(selectors)} each choose their own branch; say "
                "which with `manylora.branch_ids(model, ids)`, or activate one of them"
            )
        return next(iter(selectors.values())).select(input_ids, mask)

    def _is_inert(self) -> bool:
        """Whether no layer would use ids: the adapters are disabled or merged."""
        layers = layers_of(self.model)
        return all(layer.disable_adapters or layer.merged for layer in layers)


def _no_match(model: nn.Module, config: ManyLoraConfig) -> str:
    linear = [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | ManyLoraLayer)
        and not name.endswith("base_layer")
    ]
    given = [
        f"{name}={sorted(value) if isinstance(value, set) else value!r}"
        for name in (
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "modules_to_save",
        )
        if (value := getattr(config, name)) is not None
    ]
    where = "" if config.saved is None else f"{config.saved.file.parent}: "
    return (
        f"{where}no linear layer matches {', '.join(given)}; "
        f"this model has {', '.join(dict.fromkeys(linear)) or 'no linear layer at all'}"
    )


def _select_by_row(
    selectors: dict[str, BranchSelector], names: list[str], input_ids: Tensor, mask: Tensor
) -> Tensor:
    ids = torch.full((len(names),), -1)
    for name, selector in selectors.items():
        rows = torch.tensor([i for i, row_name in enumerate(names) if row_name == name])
        ids[rows] = selector.select(input_ids[rows], mask[rows])
    return ids


def register() -> None:
    """Make PEFT know the type MANYLORA; called once by `import manylora`."""
    kind = ManyLoraPeftType.MANYLORA
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)  # type: ignore[call-overload]
    if known is not None and known is not ManyLoraModel:
        raise RuntimeError(f"PEFT already has a method named {kind.value}: {known}")
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = ManyLoraConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = ManyLoraModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = ManyLoraModel.prefix  # type: ignore[index]
