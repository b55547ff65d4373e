"""Which task or cluster each example belongs to, told to every layer of a model at once.

    with manylora.branch_ids(model, ids):      # ids: (batch,), (batch, tokens) or one int
        loss = model(**batch).loss
        loss.backward()

A forward keyword would be swallowed by PEFT and refused by `generate`, hence a context. It sets the
ids on a `BranchState` that all manylora layers of a model share. Under gradient checkpointing the
backward pass runs each block again, perhaps under other ids; the context therefore gives each
checkpointed block a `context_fn` that puts back the ids of its own forward pass. Reentrant
checkpointing has no such hook and is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from manylora.adapter.layer import ManyLoraLayer, layers_of, modules_around
from manylora.adapter.router import in_range
from manylora.adapter.state import BranchState, states_of
from manylora.methods import Branches

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


@contextmanager
def branch_ids(
    model: nn.Module, ids: int | Sequence[int] | Sequence[Sequence[int]] | Tensor
) -> Iterator[Tensor]:
    """Say which branch (or task, for a learned gate) each example or token belongs to.

    ids: one int for all, (batch,), or (batch, tokens) for packed rows; -1 is the shared branch
    alone. With beam search or several returned sequences, repeat each id as often.

    Yields the ids that the layers go by: those, but for what an adapter's `branch_dropout` sends to
    the shared branch alone while the model is trained (not of one int for all).

    Raises:
        ValueError: no manylora layer in the model, ids out of range or of the wrong shape, or
            reentrant gradient checkpointing is on.
    """
    with set_ids(model, torch.as_tensor(ids)) as told:
        yield told


def without_some(ids: Tensor, share: float) -> Tensor:
    """-1 in the place of a share of the ids, drawn for each row; where a row has several (batch,
    tokens), for each stretch of it that has the same one. Without a share nothing is drawn."""
    if not share:
        return ids
    place = torch.arange(ids.numel(), device=ids.device).reshape(ids.shape)
    if ids.dim() == 2:
        begins = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
        place = (begins.flatten().cumsum(0) - 1).reshape(ids.shape)
    dropped = (torch.rand(ids.numel()) < share).to(ids.device)
    return torch.where(dropped[place], -1, ids)


@contextmanager
def token_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Say which tokens are no padding, where the model gets no attention mask: (batch, tokens).

    A router's balance loss counts those alone.
    """
    states = states_of(layers_of(model))
    before = [state.token_mask for state in states]
    for state in states:
        state.token_mask = mask
    try:
        yield
    finally:
        for state, old in zip(states, before, strict=True):
            state.token_mask = old


@contextmanager
def set_ids(
    model: nn.Module, ids: Tensor, selected: bool = False, drops: bool = True, copies: int = 1
) -> Iterator[Tensor]:
    """`branch_ids`, also for ids that a selector chose (then one for each prompt).

    drops: whether branch_dropout may drop some. copies: how often the batch holds these rows, all
    of them one after the other; what is dropped is dropped in each.
    """
    around = list(modules_around(model))
    layers = [module for module in around if isinstance(module, ManyLoraLayer)]
    if not layers:
        raise ValueError("branch_ids: the model has no manylora layer; attach an adapter first")
    wanted = any(branches.needs_ids for layer in layers for branches in layer.branches.values())
    # Each active adapter, at a layer that has it: it need not be on the first.
    active = {
        name: layer for layer in layers for name in layer.active_adapters if name in layer.branches
    }
    # What selectors chose, perhaps one for each row's adapter, is in range as they were loaded.
    ruled = {name: layer.branches[name] for name, layer in active.items()}
    checked, highest = _check(ids, ruled if wanted and not selected else None)
    if drops and not selected and model.training and ids.dim():
        shares = (layer.configs[name].branch_dropout for name, layer in active.items())
        checked = without_some(checked, max(shares, default=0.0))
    if copies > 1:
        checked = torch.cat([checked] * copies)
    states = states_of(layers)
    if wanted:
        keep_ids_through_checkpointing(model, around, states)
    with _restored([(state, checked, selected, highest) for state in states]):
        yield checked


def _check(ids: Tensor, adapters: Mapping[str, Branches] | None) -> tuple[Tensor, int]:
    """The ids, and the highest; -1 where no adapters are given, which want them in range."""
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() > 2 or not ids.numel():
        raise ValueError(
            f"branch_ids: ids must be integers of shape (), (batch,) or (batch, tokens), "
            f"got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    if adapters is None:
        return ids.long(), -1
    low, high = _ends(ids)
    for name, branches in adapters.items():
        in_range(name, branches, low, high)
    return ids.long(), high


def check_range(adapter: str, branches: Branches, ids: Tensor) -> None:
    """ValueError where an id is none of the adapter's branches (or tasks, for a learned gate).

    ids: of any shape, of the rows that use this adapter.
    """
    if branches.needs_ids and ids.numel():
        in_range(adapter, branches, *_ends(ids))


def _ends(ids: Tensor) -> tuple[int, int]:
    """The lowest and the highest; waits for a GPU once."""
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    return low, high


@contextmanager
def _restored(values: Sequence[tuple[BranchState, Tensor | None, bool, int]]) -> Iterator[None]:
    before = _held([state for state, *_ in values])
    for state, ids, selected, highest in values:
        state.hold(ids, selected, highest)
    try:
        yield
    finally:
        for state, ids, selected, highest in before:
            state.hold(ids, selected, highest)


def _held(states: Sequence[BranchState]) -> list[tuple[BranchState, Tensor | None, bool, int]]:
    return [(state, state.ids, state.selected, state.highest) for state in states]


class _KeepIds:
    """A `context_fn` for torch's non-reentrant checkpointing that replays the forward's ids."""

    def __init__(self, states: Sequence[BranchState], inner: Callable[[], Contexts] | None) -> None:
        self.states = states
        self.inner = inner

    def __call__(self) -> Contexts:
        replay = _restored(_held(self.states))
        forward, recompute = self.inner() if self.inner else (nullcontext(), nullcontext())
        return forward, _both(recompute, replay)


@contextmanager
def _both(
    first: AbstractContextManager[Any], second: AbstractContextManager[Any]
) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(first)
        stack.enter_context(second)
        yield


def keep_ids_through_checkpointing(
    model: nn.Module, around: Sequence[nn.Module], states: Sequence[BranchState]
) -> None:
    """Give every checkpointed block of a transformers model the context_fn above (idempotent).

    around: the model's modules that are in no adapted layer.
    """
    for module in around:
        if getattr(module, "gradient_checkpointing", False) is not True:
            continue
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if not isinstance(checkpoint, functools.partial):
            continue
        if checkpoint.keywords.get("use_reentrant", False):
            name = next(name for name, one in model.named_modules() if one is module)
            raise ValueError(
                f"branch ids and reentrant gradient checkpointing (on {name or 'the model'}) give "
                "wrong gradients, because its recomputation cannot know the ids; enable it with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        context_fn = checkpoint.keywords.get("context_fn")
        if isinstance(context_fn, _KeepIds):
            context_fn.states = states
            continue
        keywords = {**checkpoint.keywords, "context_fn": _KeepIds(states, context_fn)}
        block: Any = module
        block._gradient_checkpointing_func = functools.partial(
            checkpoint.func, *checkpoint.args, **keywords
        )
