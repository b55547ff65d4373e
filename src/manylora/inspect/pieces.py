"""The matrices that were trained, one by one: each A and each B of an adapter, and how it started.

A matrix that branches share is one piece ("all branches"), else each branch has its own rows of A
and columns of B ("branch 0", ...); "whole" is that of an adapter without branches, "shared" that of
the branch that is always on. B is as it was trained, without MultiLoRA's scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from manylora.inspect.adapters import Adapter, Branched
from manylora.inspect.places import place_of
from manylora.inspect.starts import Start, start_of, stored
from manylora.methods import Branches

Matrix = Literal["A", "B"]


@dataclass(frozen=True, eq=False)
class Piece:
    """trained: A (rank, in) or B (out, rank); start: the same before the first step, if known."""

    run: str
    layer: str
    module: str
    depth: int
    part: str
    matrix: Matrix
    trained: Tensor
    start: Tensor | None


def pieces_of(adapter: Adapter, start: Start | None = None) -> Iterator[Piece]:
    """Every A and B of an adapter, layer by layer; none of a full fine-tuning, which has neither.

    start: as `start_of(adapter)` gives it, which is asked if None.
    """
    if adapter.method == "full":
        return
    start = start_of(adapter) if start is None else start
    for name, layer in adapter.layers.items():
        module, depth = place_of(name)
        if isinstance(layer, Branched):
            branches, tensors = stored(layer)
            now = split(tensors, branches)
            began = split(start.layers.get(name, {}), branches)
        else:
            whole = layer.parts()["whole"]
            now, began = {("A", "whole"): whole.A, ("B", "whole"): whole.B}, {}
        for (matrix, part), tensor in now.items():
            first = began.get((matrix, part))
            yield Piece(adapter.name, name, module, depth, part, matrix, tensor, first)


def split(tensors: Mapping[str, Tensor], branches: Branches) -> dict[tuple[Matrix, str], Tensor]:
    """(matrix, part) -> A (rank, in) or B (out, rank), for the tensors that are there."""
    found: dict[tuple[Matrix, str], Tensor] = {}
    if "A" in tensors:
        found |= _branches("A", tensors["A"], branches, branches.share_A)
    if "B" in tensors:
        found |= _branches("B", tensors["B"], branches, branches.share_B)
    if "shared_A" in tensors:
        found["A", "shared"] = tensors["shared_A"]
    if "shared_B" in tensors:
        found["B", "shared"] = tensors["shared_B"]
    return found


def _branches(
    matrix: Matrix, tensor: Tensor, branches: Branches, shared: bool
) -> dict[tuple[Matrix, str], Tensor]:
    if branches.count == 1:
        return {(matrix, "whole" if not branches.shared_rank else "branch 0"): tensor}
    if shared:
        return {(matrix, "all branches"): tensor}
    own = tensor.split(list(branches.ranks), 0 if matrix == "A" else 1)
    return {(matrix, f"branch {i}"): part for i, part in enumerate(own)}
