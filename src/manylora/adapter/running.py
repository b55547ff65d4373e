"""From adapted layers to `ops.linear`: dtypes, stacked tensors, mixing weights, dropout's seeds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from manylora.adapter import autograd, ops
from manylora.adapter.layout import Layout, by_layer
from manylora.adapter.mixing import by_column, gates
from manylora.adapter.recompute import factors_of
from manylora.adapter.router import (
    balance_loss,
    constant_weights,
    id_weights,
    in_range,
    itself,
    router_weights,
)
from manylora.adapter.sharing import in_backward
from manylora.methods import Branches

if TYPE_CHECKING:
    from manylora.adapter.layer import ManyLoraLayer
    from manylora.adapter.prompt_mixing import Pair


def run(
    layers: Sequence[ManyLoraLayer],
    adapter: str,
    x: Tensor,
    ids: Tensor | None,
    outputs: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Outputs (..., out) of layers that read x (..., in), each with its adapter of that name.

    The products are in x's dtype, or autocast's, whatever that of the adapter's own tensors.

    Args:
        layers: several only where `ManyLoraLayer.reads_as` holds between them.
        ids: of branches or tasks, where the adapter needs them.
        outputs: of the base layers; without, these are plain and are computed too.
    """
    first = layers[0]
    branches, config = first.branches[adapter], first.configs[adapter]
    pair = _pair(layers, adapter, x)
    if pair is not None:
        return _with_pair(layers, pair, x, outputs)
    dropout = config.lora_dropout if first.training else 0.0
    own_masks = config.dropout_per_branch and dropout > 0
    dtype = _dtype(x)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    tensors = [layer.tensors(adapter) for layer in layers]
    weights = _weights(layers, tensors, adapter, x, ids, dropout)
    layout, tensors, weights = _as_computed(first, adapter, tensors, weights, x, ids, own_masks)
    *ys, z = autograd.apply(
        flat,
        *_bases(layers, outputs, dtype),
        outputs is None,
        [row for t in tensors for row in _rows(t, layout)],
        [_columns(t, branches) for t in tensors],
        weights,
        torch.stack([t["router"].to(dtype) for t in tensors]) if layout.gate == "Ax" else None,
        _seeds(len(layers), layout.branches + 1 if own_masks else 1) if dropout else None,
        layout.encode(),
        first.scaling[adapter],
        first.shared_scaling[adapter],
        dropout,
        factors=_factors(x, first),
    )
    if branches.gate == "router":
        _note(layers, adapter, layout, z, weights, tensors, x)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]


def _pair(layers: Sequence[ManyLoraLayer], adapter: str, x: Tensor) -> Pair | None:
    """What a prompt left for the tokens after it, where that is one low-rank pair a layer."""
    prompt = layers[0].state.prompt
    if prompt is None or layers[0].branches[adapter].gate != "router":
        return None
    return prompt.pair(layers, adapter, x)


def _with_pair(
    layers: Sequence[ManyLoraLayer], pair: Pair, x: Tensor, outputs: Sequence[Tensor] | None
) -> list[Tensor]:
    """`run` where each layer's branches are already one low-rank pair."""
    flat = x.reshape(-1, x.shape[-1]).to(_dtype(x))
    bases, biases = _bases(layers, outputs, flat.dtype)
    if outputs is None:
        own: list[Tensor | None] = [*biases] or [None] * len(bases)
        ys = [F.linear(flat, base, bias) for base, bias in zip(bases, own, strict=True)]
    else:
        ys = [y.clone() for y in bases]
    for y, hidden, up in zip(ys, pair.hidden(flat), pair.ups, strict=True):
        y.addmm_(hidden, up.to(flat.dtype).t())
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]


def _as_computed(
    first: ManyLoraLayer,
    adapter: str,
    tensors: list[dict[str, Tensor]],
    weights: Tensor | None,
    x: Tensor,
    ids: Tensor | None,
    own_masks: bool,
) -> tuple[Layout, list[dict[str, Tensor]], Tensor | None]:
    """The layout, and the layers' tensors and weights in it, of what this call has to compute."""
    layout, branches, state = first.layouts[adapter], first.branches[adapter], first.state
    if own_masks and branches.share_A:  # each branch then has an A x of its own
        layout = layout._replace(share_A=False)
        tensors = [{**t, "A": t["A"].repeat(branches.count, 1)} for t in tensors]
    if weights is None:
        return layout, tensors, None
    layout = layout._replace(gate="given")
    if ids is None or branches.gate != "one_hot":
        return layout, tensors, weights
    used = state.once(ids, branches, lambda: _used(branches, ids))
    if used is not None:
        layout = layout._replace(ranks=(branches.ranks[0],) * len(used))
        tensors = [_only(t, branches, used) for t in tensors]
        weights = weights[..., used.to(weights.device)]
    if layout.columns_are_branches:
        scalings = first.scaling[adapter], first.shared_scaling[adapter]
        key = (branches, layout, *scalings, x.shape[:-1], x.dtype, x.device)
        weights = state.once(ids, key, partial(by_column, weights, layout, *scalings))
        layout = layout._replace(gate="columns")
    return layout, tensors, weights


def _used(branches: Branches, ids: Tensor) -> Tensor | None:
    """The branches that a batch uses, where they are few and known without asking a GPU."""
    if ids.is_cuda or torch.compiler.is_compiling():
        return None
    if branches.share_A or branches.share_B or not branches.equal_ranks:
        return None
    used = ids.unique()
    used = used[used >= 0]
    return used if 0 < 2 * len(used) <= branches.count else None


def _only(t: dict[str, Tensor], branches: Branches, used: Tensor) -> dict[str, Tensor]:
    """The tensors of those branches alone."""
    r = branches.ranks[0]
    blocks = used.to(t["A"].device)
    A = t["A"].unflatten(0, (-1, r)).index_select(0, blocks).flatten(0, 1)
    own = {"A": A, "B": t["B"].unflatten(1, (-1, r)).index_select(1, blocks).flatten(1)}
    if "scale" in t:
        own["scale"] = t["scale"].index_select(0, blocks)
    return {**t, **own}


def _factors(x: Tensor, layer: ManyLoraLayer) -> tuple[Tensor, ...]:
    """What to keep instead of x: on a GPU, whose memory is short, or where that was asked for."""
    wanted = layer.state.recompute
    if torch.compiler.is_compiling() or not (x.is_cuda if wanted is None else wanted):
        return ()
    return factors_of(x) or ()


def _dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _bases(
    layers: Sequence[ManyLoraLayer], outputs: Sequence[Tensor] | None, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """What `ops.linear` takes as bases and biases."""
    if outputs is not None:
        return [y.reshape(-1, y.shape[-1]).to(dtype) for y in outputs], []
    plain = [cast(nn.Linear, layer.base_layer) for layer in layers]
    biases = [base.bias.to(dtype) for base in plain if base.bias is not None]
    return [base.weight.to(dtype) for base in plain], biases


def _rows(t: dict[str, Tensor], layout: Layout) -> list[Tensor]:
    rows = [t["A"]]
    if layout.gate == "x":
        rows.append(t["router"])
    if layout.shared_rank:
        rows.append(t["shared_A"])
    return rows


def _columns(t: dict[str, Tensor], branches: Branches) -> list[Tensor]:
    up = ops.fold_scale(t["B"], branches, t.get("scale"))
    return [up, t["shared_B"]] if branches.shared_rank else [up]


def _seeds(layers: int, masks: int) -> Tensor:
    """In the order in which the layers would draw them one by one."""
    return torch.randint(2**62, (layers, masks))


def _weights(
    layers: Sequence[ManyLoraLayer],
    tensors: Sequence[dict[str, Tensor]],
    adapter: str,
    x: Tensor,
    ids: Tensor | None,
    dropout: float,
) -> Tensor | None:
    """Mixing weights (T or 1, n or 1, N); None where they are ones, or come from z."""
    first, branches = layers[0], layers[0].branches[adapter]
    prompt = first.state.prompt
    if branches.gate == "router" and prompt is not None and not prompt.reads(first, x):
        return prompt.weights(layers, adapter)
    if branches.gate == "one_hot" and ids is not None:  # the same for all layers of the model
        # The adapter may have become active since they were checked; a graph is not made per id.
        if ids is first.state.ids and not torch.compiler.is_compiling():
            in_range(adapter, branches, -1, first.state.highest)
        key = (branches.count, x.shape[:-1], x.dtype, x.device)
        return first.state.once(
            ids, key, lambda: _by_token([id_weights(branches, ids, None, x, first.name)], x)
        )
    if branches.gate == "uniform":  # the same for these
        layers = layers[:1]
    found: list[Tensor] = []
    for layer, t in zip(layers, tensors, strict=False):
        g = constant_weights(branches, x)
        if branches.needs_ids:
            g = id_weights(branches, ids, t.get("gate"), x, layer.name)
        elif branches.gate == "router" and branches.router_input == "Ax" and dropout:
            # The router never sees dropout, and z has no A x without it.
            g = router_weights(F.linear(x.to(t["A"].dtype), t["A"]), t["router"])
        if g is None:
            return None
        found.append(g)
    return _by_token(found, x)


def _by_token(weights: list[Tensor], x: Tensor) -> Tensor:
    """Weights of each layer (..., N) as (T or 1, layers, N)."""
    every = [g if g[..., 0].numel() == 1 else g.expand(*x.shape[:-1], g.shape[-1]) for g in weights]
    return torch.stack([g.reshape(-1, g.shape[-1]) for g in every], 1)


def _note(
    layers: Sequence[ManyLoraLayer],
    adapter: str,
    layout: Layout,
    z: Tensor,
    weights: Tensor | None,
    tensors: Sequence[dict[str, Tensor]],
    x: Tensor,
) -> None:
    """Leave with each layer its router's balance loss, and what it mixed a prompt with."""
    config, state = layers[0].configs[adapter], layers[0].state
    balanced = config.balance_loss is not None and layers[0].training
    balanced = balanced and (state.runs_once or not in_backward())
    reads_prompt = state.prompt is not None and state.prompt.reads(layers[0], x)
    if not balanced and not reads_prompt:
        return
    # A checkpoint must not count what the loss saves: its recomputation skips the loss.
    hooks = nullcontext() if state.runs_once else saved_tensors_hooks(itself, itself)
    with hooks:
        if weights is None:
            own = by_layer(z, layout, len(layers))
            routers = [t["router"] for t in tensors]
            weights = gates(own, layout, None, _or_none(routers, layout, z))
        assert weights is not None
        for j, layer in enumerate(layers if balanced else ()):
            layer.routing_loss[adapter] = config.balance_weight * balance_loss(
                weights[:, j].reshape(*x.shape[:-1], -1),
                str(config.balance_loss),
                state.token_mask,
            )
    if state.prompt is not None and reads_prompt:
        state.prompt.note(layers, adapter, weights, z.dtype)


def _or_none(routers: list[Tensor], layout: Layout, z: Tensor) -> Tensor | None:
    return torch.stack(routers).to(z.dtype) if layout.gate == "Ax" else None
