"""Several adapters as one LoRA, for any weights.

    products   dW = SUM_i w_i B_i A_i                     A = [A_1; ...], B = [w_1 B_1 ...]
    factors    dW = (SUM_i w_i B_i) (SUM_i w_i A_i)       A = SUM_i w_i A_i, B = SUM_i w_i B_i

A_i (r_i x in), B_i (out x r_i), all scaling in B_i. "products" takes any ranks and is exact as one
LoRA of rank SUM_i r_i. "factors" is LoraHub's code (arXiv 2307.13269, sail-sg/lorahub), which adds
the tensors one by one: it needs equal ranks, has cross terms between the adapters, and gives the
same for w and -w.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from manylora.composing.updates import AdapterError, Layers

Way = Literal["products", "factors"]
Pair = tuple[Tensor, Tensor]


def combine(pairs: Sequence[Pair], weights: Sequence[float], way: Way) -> Pair:
    """A and B of one layer's combination. pairs: A_i and B_i of each adapter."""
    weighted = [(A, w * B) for w, (A, B) in zip(weights, pairs, strict=True)]
    if way == "products":
        return torch.cat([A for A, _ in weighted]), torch.cat([B for _, B in weighted], 1)
    A = torch.stack([w * A for w, (A, _) in zip(weights, pairs, strict=True)]).sum(0)
    return A, torch.stack([B for _, B in weighted]).sum(0)


class Combined:
    """A base model with one LoRA, whose tensors are rewritten in place for each vector of weights.

    adapters: the factors of each; a layer that one of them lacks is 0 there. The weights are all 0
    at first.
    """

    def __init__(
        self, base: PreTrainedModel, adapters: Sequence[Layers], way: Way, revision: str | None
    ) -> None:
        names = sorted({name for layers in adapters for name in layers})
        rank = max(_rank([a[name] for a in adapters if name in a], way) for name in names)
        modules = dict(base.named_modules())
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=names,
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in names),
        )
        self.model: PeftModel = get_peft_model(base, config, revision=revision)
        self.model.eval()
        # A set until here, which would be written in another order each time.
        config.target_modules = sorted(config.target_modules or names)
        self.way: Way = way
        self.layers: list[tuple[Tensor, Tensor, dict[int, Pair]]] = []
        for name, layer in self.model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                assert isinstance(A, Tensor) and isinstance(B, Tensor)
                own = {i: a[name] for i, a in enumerate(adapters) if name in a}
                pairs = {i: (A_i.to(A), B_i.to(B)) for i, (A_i, B_i) in own.items()}
                self.layers.append((A.detach().zero_(), B.detach().zero_(), pairs))

    def set_weights(self, weights: Sequence[float]) -> None:
        """Make the LoRA the adapters' combination with these weights, one for each."""
        for A, B, pairs in self.layers:
            own_A, own_B = combine(list(pairs.values()), [weights[i] for i in pairs], self.way)
            A[: len(own_A)], B[:, : len(own_A)] = own_A, own_B


def check_ranks(folders: Sequence[Path], adapters: Sequence[Layers]) -> None:
    """AdapterError where two adapters have different ranks in a layer, for "factors"."""
    first: dict[str, tuple[Path, int]] = {}
    for folder, layers in zip(folders, adapters, strict=True):
        for name, (A, _) in layers.items():
            other, rank = first.setdefault(name, (folder, len(A)))
            if rank != len(A):
                raise AdapterError(
                    f"the way 'factors' adds the adapters' A and B, which needs equal ranks, but "
                    f"in {name} {other} has rank {rank} and {folder} rank {len(A)}; combine them "
                    "the way 'products'"
                )


def _rank(pairs: Sequence[Pair], way: Way) -> int:
    ranks = [len(A) for A, _ in pairs]
    return sum(ranks) if way == "products" else max(ranks)
