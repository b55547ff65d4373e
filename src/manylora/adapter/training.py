"""What training a manylora adapter needs beyond a plain loop, for any transformers or TRL trainer.

    class Trainer(ManyLoraTrainerMixin, SFTTrainer): ...

The mixin gives a data set's `branch_ids` column to the adapter, for pairs of answers (DPO) too; it
adds a router's balance loss with the weight it should have under gradient accumulation, and keeps
routers, gates and scales in float32.
Without a trainer: `loss = model(**batch).loss + manylora.balance_loss(model)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from manylora.adapter.ids import branch_ids, set_ids
from manylora.adapter.layer import ManyLoraLayer, layers_of

COLUMN = "branch_ids"
_SMALL = ("manylora_router", "manylora_gate", "manylora_scale")


def balance_loss(model: nn.Module) -> Tensor | float:
    """The weighted balance losses of the last forward pass, averaged over layers; then forgotten.

    Those of the active adapters: the frozen copy that DPO compares with has none. 0.0 when no
    adapter has one that its router can learn from. Call once for each training forward pass.
    Raises RuntimeError when the losses cannot reach the router.
    """
    losses = []
    for layer in layers_of(model):
        for name, loss in layer.routing_loss.items():
            routers: Any = layer.manylora_router
            if name in layer.active_adapters and routers[name].weight.requires_grad:
                losses.append(loss)
        layer.routing_loss.clear()
    if not losses:
        return 0.0
    if torch.is_grad_enabled() and not losses[0].requires_grad:
        raise RuntimeError(
            "the balance loss has no gradient: reentrant gradient checkpointing runs the forward "
            'pass without one; use gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
    return torch.stack([loss.float() for loss in losses]).mean()


def keep_small_tensors_in_float32(model: nn.Module) -> None:
    """Undo a trainer's cast of routers, gates and scales to bf16, which rounds their steps away.

    TRL casts every trained tensor of an adapter on a quantised base (peft.md, obstacle 8).
    """
    for layer in layers_of(model):
        for attribute in _SMALL:
            for factor in getattr(layer, attribute).values():
                if factor.weight.dtype in (torch.bfloat16, torch.float16):
                    factor.weight.data = factor.weight.data.float()


class BranchIdsCollator:
    """Another data collator, whose batch also gets the `branch_ids` of its rows, one a row."""

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator(rows)
        if not isinstance(rows[0], Mapping) or COLUMN not in rows[0] or COLUMN in batch:
            return batch
        ids = [row[COLUMN] for row in rows]
        if not all(isinstance(value, Integral) for value in ids):
            raise ValueError(
                f"the column {COLUMN} must hold one integer a row, got {ids[:3]}; for an id a "
                f"token, let your data collator make `{COLUMN}` of shape (batch, tokens)"
            )
        batch[COLUMN] = torch.tensor(ids)
        return batch


class ManyLoraTrainerMixin:
    """Left of a transformers or TRL trainer class; see the module's text.

    A data set's column `branch_ids`, one integer a row, says which branch (or task, for a learned
    gate) each row belongs to. It needs no setting: it passes the trainer's data collator and its
    removal of unused columns. A data collator may also make `branch_ids` itself, (batch,) or
    (batch, tokens).

    In DPO a row is a pair, and a batch holds all chosen answers, then all rejected ones: both
    halves get the ids of the pairs, in the policy's pass and in the reference's, computed on the
    way or beforehand (`precompute_ref_log_probs`). What `branch_dropout` drops it drops of a whole
    pair, for the policy and the reference on the way; a reference computed beforehand drops none.
    """

    _signature_columns: Any
    _operations_per_token: int | None = None
    told_ids: Tensor | None = None  # that the layers went by, of the last micro-batch

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        keep_small_tensors_in_float32(self.model)  # type: ignore[attr-defined]

    # A property, because trainers choose their own collator in the middle of __init__, and DPO
    # uses it there for the reference's log-probabilities.
    @property
    def data_collator(self) -> Any:
        return self._collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        known = isinstance(collator, BranchIdsCollator)
        self._collator: BranchIdsCollator = collator if known else BranchIdsCollator(collator)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns = self._signature_columns
        if COLUMN not in columns:
            self._signature_columns = [*columns, COLUMN]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers counts them, in every step by looking at every module; here in one."""
        count = super().floating_point_ops  # type: ignore[misc]
        tokens = int(inputs["input_ids"].numel()) if "input_ids" in inputs else 0
        if not tokens:
            return int(count(inputs))
        if self._operations_per_token is None:
            self._operations_per_token = int(count(inputs)) // tokens
        return self._operations_per_token * tokens

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """DPO's reference, computed before training."""
        with self._ids_of(inputs, drops=False):
            return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Without labels, and in generation, no loss is computed that could tell the ids."""
        with self._ids_of(inputs, generating=True):
            return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _ids_of(
        self, inputs: dict[str, Any], generating: bool = False, drops: bool = True
    ) -> AbstractContextManager[Tensor | None]:
        """Take the ids out of the batch and tell the adapter; pairs of answers share theirs."""
        given = inputs.pop(COLUMN, None) if isinstance(inputs, MutableMapping) else None
        if given is None:
            return nullcontext()
        ids = torch.as_tensor(given)
        rows = inputs.get("input_ids")
        pairs = ids.dim() > 0 and rows is not None and len(rows) == 2 * len(ids)
        mine = self.model  # type: ignore[attr-defined]
        if generating and ids.dim() == 1:
            return _each_prompt(mine, torch.cat([ids, ids]) if pairs else ids)
        return set_ids(mine, ids, drops=drops, copies=2 if pairs else 1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        mine = self.model  # type: ignore[attr-defined]
        with self._ids_of(inputs) as self.told_ids:
            result = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        extra = balance_loss(mine)
        if not isinstance(extra, Tensor):
            return result
        extra = extra / self._accumulation_of_a_summed_loss(args, kwargs)
        if isinstance(result, tuple):
            return (result[0] + extra, *result[1:])
        return result + extra

    def _accumulation_of_a_summed_loss(self, args: Any, kwargs: Any) -> int:
        """Micro-batches per step where the trainer sums their losses; 1 where it averages them.

        The same condition as in `Trainer.training_step`: a loss divided by the tokens of the whole
        step is summed over its micro-batches, so a per-micro-batch mean has to be divided here.
        """
        given = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        trainer: Any = self
        summed = getattr(trainer, "loss_is_scaled_for_ga", None)  # not in transformers 5.17
        if summed is None:
            summed = (trainer.model_accepts_loss_kwargs and given is not None) or (
                trainer.compute_loss_func is not None
            )
        return int(trainer.current_gradient_accumulation_steps) if summed else 1


@contextmanager
def _each_prompt(model: nn.Module, ids: Tensor) -> Iterator[Tensor]:
    """`branch_ids`, repeated where generate repeats its prompts for beams."""
    with branch_ids(model, ids), set_ids(model, ids, selected=True):
        yield ids


def dead_gradients(model: nn.Module, adapter: str, ids: set[int] | None = None) -> list[str]:
    """Tensors and branches that got no gradient though they should have, by name.

    Call after the backward pass of a step, before the optimiser. A gradient that is zero by design
    is not reported: while a branch's B is zero nothing reaches its A, its router and its gate, and
    while its scale c is zero only c is reached; so a first call tells about B (or c), and one after
    the first update about the rest. ids: the branch or task ids that had an example in this step;
    other branches are not expected to have a gradient, nor is a frozen tensor.
    """
    dead = []
    for layer in layers_of(model):
        if adapter not in layer.branches:
            continue
        for part in layer.branches[adapter].shapes(layer.in_features, layer.out_features):
            weight = getattr(layer, f"manylora_{part}")[adapter].weight
            if not weight.requires_grad:
                continue
            gradient = weight.grad
            for branch in _reached(layer, adapter, part, ids):
                own = None if gradient is None else block_of(layer, adapter, part, gradient, branch)
                if own is None or not bool(own.any()):
                    name = f"{layer.name}.manylora_{part}"
                    dead.append(name if branch is None else f"{name}, branch {branch}")
    return dead


def _reached(
    layer: ManyLoraLayer, adapter: str, part: str, ids: set[int] | None
) -> list[int | None]:
    """The branches of a tensor that a gradient can reach now; [None] for a tensor they share."""
    branches = layer.branches[adapter]
    if part == "shared_B":
        return [None]
    if part == "shared_A":
        return [None] if _nonzero(layer, adapter, "shared_B") else []
    used = list(range(branches.count))
    if branches.gate == "one_hot" and ids is not None:
        used = [i for i in used if i in ids]
    if branches.scaled and part != "scale":
        used = [i for i in used if _nonzero(layer, adapter, "scale", i)]
    if part not in ("B", "scale"):
        used = [i for i in used if _nonzero(layer, adapter, "B", i)]
    shared = {"A": branches.share_A, "B": branches.share_B}.get(part, False)
    if part in ("router", "gate") and branches.count == 1:
        return []  # the softmax of one logit is 1 whatever it is
    if part in ("router", "gate") or shared:
        return [None] if used else []
    return list(used)


def _nonzero(layer: ManyLoraLayer, adapter: str, part: str, branch: int | None = None) -> bool:
    weight = getattr(layer, f"manylora_{part}")[adapter].weight
    return bool(block_of(layer, adapter, part, weight, branch).any())


def block_of(
    layer: ManyLoraLayer, adapter: str, part: str, tensor: Tensor, branch: int | None
) -> Tensor:
    """The part of a tensor that belongs to one branch; all of it where branches share it."""
    branches = layer.branches[adapter]
    shared = {"A": branches.share_A, "B": branches.share_B}.get(part, False)
    if branch is None or shared:
        return tensor
    if part == "scale":
        return tensor[branch]
    return torch.split(tensor, list(branches.ranks), 1 if part == "B" else 0)[branch]
