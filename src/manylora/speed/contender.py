"""A row made real: the shared frozen model, an adapter of its own, and one training step.

Every trained tensor starts as normal noise of standard deviation 0.02, B and scales too: a product
with zeros takes a GPU less power, and so less time, than one in the middle of a training run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import manylora
from manylora.speed.grid import Row
from manylora.speed.model import (
    Batch,
    bytes_of,
    head_loss,
    random_batch,
    share_weights,
    target_names,
)
from manylora.speed.peers import AutogradLora, LoopHydraLora, merge_reads

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
OURS = {
    "lora": "lora",
    "multilora": "multilora",
    "hydralora": "hydralora",
    "lora_moe": "lora_moe",
    "cluster": "branch_per_cluster",
}
ALPHA = 16
LEARNING_RATE = 1e-4


class Contender:
    """One row, ready to step.

    Args:
        base: the frozen model; its weights are shared, never copied, never changed.
        row: what to measure.
        backend: torch.compile's, for compiled rows.

    Raises: ValueError when the model has none of the row's layers.
    """

    def __init__(self, base: PreTrainedModel, row: Row, backend: str = "inductor") -> None:
        self.row = row
        self.device = base.device
        self.model = share_weights(base).train()
        self.holder = attach(self.model, row)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        torch.manual_seed(0)
        for tensor in self.trained:
            nn.init.normal_(tensor, std=0.02)
        self.optimizer = (
            torch.optim.AdamW(self.trained, LEARNING_RATE, fused=self.device.type == "cuda")
            if self.trained
            else None
        )
        for layer in self.model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = _wrapped(layer.forward, row, backend)
        vocab = self.model.get_output_embeddings().weight.shape[0]
        self.batch: Batch = random_batch(row.rows, row.length, vocab, row.n, self.device)

    def forward_backward(self) -> Tensor:
        """The loss, after its gradients; they flow to the embeddings in every row."""
        head = self.model.get_output_embeddings().weight
        inputs = self.model.get_input_embeddings()(self.batch.tokens).requires_grad_()
        with self._ids():
            decoder = self.model.get_decoder()
            hidden = decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state
            loss = head_loss(hidden, head, self.batch.labels)
            loss.backward()
        if inputs.grad is None:
            raise RuntimeError("no gradient came down to the embeddings")
        return loss.detach()

    def first_step(self) -> None:
        """A step that fails where the gradients are not those of the whole model."""
        self.forward_backward()
        empty = sum(p.grad is None or not bool(p.grad.any()) for p in self.trained)
        if empty:
            raise RuntimeError(f"{empty} of {len(self.trained)} trained tensors got no gradient")
        self.update()

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.forward_backward()
        self.update()

    def state_bytes(self) -> int:
        """Of the adapter's weights, gradients and AdamW's moments; gradients are as the weights."""
        state = self.optimizer.state.values() if self.optimizer else []
        moments = [t for kept in state for t in kept.values() if isinstance(t, Tensor)]
        return 2 * bytes_of(self.trained) + bytes_of(moments)

    @torch.no_grad()
    def move(self, device: torch.device | str) -> None:
        """Weights and moments of the adapter, so that rows not being timed leave the GPU free."""
        for tensor in self.trained:
            tensor.data = tensor.data.to(device)
        for kept in self.optimizer.state.values() if self.optimizer else []:
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    kept[name] = value.to(device)

    def _ids(self) -> AbstractContextManager[Any]:
        if self.row.method != "cluster":
            return nullcontext()
        return manylora.branch_ids(self.holder, self.batch.ids)


def _wrapped(forward: Callable[..., Any], row: Row, backend: str) -> Callable[..., Any]:
    """A decoder layer's forward, compiled inside and checkpointed outside, as the row says.

    Not by transformers' own checkpointing: some of its versions put it inside of what is compiled.
    """
    if row.mode == "compiled":
        forward = torch.compile(forward, backend=backend, dynamic=False)
    if row.checkpointing:
        forward = partial(checkpoint, forward, use_reentrant=False)
    return forward


def attach(model: PreTrainedModel, row: Row) -> nn.Module:
    """Put the row's adapter on the model, in place; returns what `branch_ids` is told about."""
    if row.method == "frozen":
        if row.merged:
            merge_reads(model)
        return model
    names = target_names(model, row.targets)
    if row.method in ("autograd_lora", "loop_hydralora"):
        _replace(model, names, row)
        return model
    fields: dict[str, Any] = {
        "r": row.r,
        "lora_alpha": ALPHA,
        "lora_dropout": row.dropout,
        "target_modules": names,
    }
    config = (
        LoraConfig(**fields)
        if row.method == "peft_lora"
        else manylora.ManyLoraConfig(method=OURS[row.method], num_branches=row.n, **fields)
    )
    float32 = row.adapter_dtype == "float32"
    holder = get_peft_model(model, config, autocast_adapter_dtype=float32)
    wrong = {p.dtype for p in model.parameters() if p.requires_grad} - {DTYPES[row.adapter_dtype]}
    if wrong:
        raise ValueError(
            f"{row}: the adapter came out as {', '.join(map(str, wrong))}; on a base model in "
            f"{model.dtype} PEFT can give adapters of that type or of float32"
        )
    return holder


def _replace(model: PreTrainedModel, names: list[str], row: Row) -> None:
    decoder, dtype, scaling = model.get_decoder(), DTYPES[row.adapter_dtype], ALPHA / row.r
    for name, module in list(decoder.named_modules()):
        parent, _, last = name.rpartition(".")
        if last not in names or not isinstance(module, nn.Linear):
            continue
        layer: nn.Module = (
            AutogradLora(module, row.r, scaling, dtype)
            if row.method == "autograd_lora"
            else LoopHydraLora(module, row.r, row.n, scaling, row.dropout, dtype)
        )
        setattr(decoder.get_submodule(parent), last, layer)
