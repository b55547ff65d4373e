"""What the layers of one model know about the batch at hand, and how it fits a layer's input."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from manylora.adapter.sharing import SharedReads

if TYPE_CHECKING:
    from manylora.adapter.layer import ManyLoraLayer
    from manylora.adapter.prompt_mixing import PromptMixing

Made = TypeVar("Made")


@dataclass
class BranchState:
    """What the layers of one model know about the batch.

    ids: of the branches or tasks. selected: whether a selector chose them, one for each prompt.
    token_mask: (batch, tokens), true where a token is not padding. shared: what siblings computed.
    recompute: whether layers compute their input again rather than keep it; None: on a GPU.
    prompt: where a router's weights of the prompt are kept; None: it mixes every token anew.
    made: what was made of the ids, for the layers that need the same. highest: of the ids, where
    the caller said them. runs_once: no block runs again in a backward pass, so
    that no layer has to ask, which a graph cannot.
    """

    ids: Tensor | None = None
    selected: bool = False
    token_mask: Tensor | None = None
    recompute: bool | None = None
    shared: SharedReads = field(default_factory=SharedReads)
    prompt: PromptMixing | None = None
    made: dict[Hashable, tuple[Tensor, int, Any]] = field(default_factory=dict)
    highest: int = -1
    runs_once: bool = False

    def hold(self, ids: Tensor | None, selected: bool, highest: int = -1) -> None:
        self.ids, self.selected, self.highest = ids, selected, highest
        self.made.clear()
        self.shared.kept = None

    def ids_for(self, x: Tensor) -> Tensor | None:
        """The ids for a layer input x (batch, ..., in)."""
        ids = self.ids
        if ids is None or not self.selected or x.dim() < 3:
            return ids
        # generate repeats each prompt for its beams and returned sequences.
        repeats = max(1, len(x) // len(ids))
        return self.once(ids, repeats, lambda: ids.repeat_interleave(repeats))

    def once(self, ids: Tensor, key: Hashable, make: Callable[[], Made]) -> Made:
        """What make gives, which takes no part in a backward pass; made once of these ids."""
        if torch.compiler.is_compiling():
            return make()
        key = (key, torch.is_inference_mode_enabled())
        version = 0 if ids.is_inference() else ids._version
        kept = self.made.get(key)
        if kept is None or kept[0] is not ids or kept[1] != version:
            kept = self.made[key] = (ids, version, make())
        return cast(Made, kept[2])


def states_of(layers: Iterable[ManyLoraLayer]) -> list[BranchState]:
    """The states that the layers share, each once."""
    return list({id(layer.state): layer.state for layer in layers}.values())


def spread(ids: Tensor, lead: torch.Size) -> Tensor:
    """Bring ids to a shape that broadcasts over the leading dimensions of a layer's input.

    lead: x.shape[:-1]. (batch,) becomes (batch, 1, ...); (batch, tokens) matches, or is flattened
    for models that flatten their tokens.
    """
    if ids.numel() == 1:
        return ids.reshape([1] * len(lead))
    if ids.dim() == 2:
        if ids.shape == lead[:2]:
            return ids.reshape(list(ids.shape) + [1] * (len(lead) - 2))
        if len(lead) == 1 and ids.numel() == lead[0]:
            return ids.reshape(-1)
    elif ids.shape[0] == lead[0]:
        return ids.reshape([-1] + [1] * (len(lead) - 1))
    hint = "; pass ids of shape (batch, tokens), because this layer sees flattened tokens"
    if len(lead) > 1:
        repeats, rest = divmod(lead[0], ids.shape[0])
        hint = (
            f"; beam search and several returned sequences repeat each prompt: pass "
            f"ids.repeat_interleave({repeats})"
            if rest == 0 and repeats > 1
            else ""
        )
    raise ValueError(
        f"branch_ids: ids of shape {tuple(ids.shape)} do not fit a layer input whose leading "
        f"dimensions are {tuple(lead)}{hint}"
    )
