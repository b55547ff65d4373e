"""What the columns of z and u mean, the numbers between the two products of `ops.linear`.

Those that belong to a layer (block of them), and of its u (m):

    z_j = [ h (rows of A) | router's logits (N, where it reads x) | h0 (shared rank) ]
    u_j = [ s g (x) h (columns of B) | s0 h0 ]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from manylora.methods import Branches

Gate = Literal["ones", "given", "x", "Ax", "columns"]
_GATES: tuple[Gate, ...] = ("ones", "given", "x", "Ax", "columns")


class Layout(NamedTuple):
    """What the columns of z and u mean; gate says where g comes from."""

    ranks: tuple[int, ...]
    share_A: bool
    share_B: bool
    gate: Gate
    shared_rank: int

    @staticmethod
    def of(branches: Branches) -> Layout:
        gate: Gate = "ones" if branches.gate == "ones" else "given"
        if branches.gate == "router":
            gate = branches.router_input
        return Layout(
            branches.ranks, branches.share_A, branches.share_B, gate, branches.shared_rank
        )

    @property
    def branches(self) -> int:
        return len(self.ranks)

    @property
    def even(self) -> bool:
        return len(set(self.ranks)) == 1

    @property
    def only_scales(self) -> bool:
        """Whether u is s h and nothing else: h is then taken for u, and s a factor of Q u."""
        apart = not (self.share_A or self.share_B) or len(self.ranks) == 1
        return self.gate == "ones" and apart and not self.shared_rank

    @property
    def columns_are_branches(self) -> bool:
        """Whether a column of z becomes the same column of u, times something."""
        return not (self.share_A or self.share_B or self.logits) and self.gate != "Ax"

    @property
    def rows_A(self) -> int:
        return self.ranks[0] if self.share_A else sum(self.ranks)

    @property
    def logits(self) -> int:
        return self.branches if self.gate == "x" else 0

    @property
    def block(self) -> int:
        """Columns of z for a layer."""
        return self.rows_A + self.logits + self.shared_rank

    def split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(h, logits, h0), views of z (..., block)."""
        sizes = [self.rows_A, self.logits, self.shared_rank]
        h, logits, h0 = torch.split_with_sizes(z, sizes, -1)
        return h, logits, h0

    def encode(self) -> list[int]:
        """As an operation of torch takes it, for which each number takes time: one rank if even."""
        flags = [int(self.share_A), int(self.share_B), _GATES.index(self.gate), self.shared_rank]
        return [*flags, self.branches, *(self.ranks[:1] if self.even else self.ranks)]

    @staticmethod
    def decode(code: Sequence[int]) -> Layout:
        return _decoded(tuple(code))


@cache
def _decoded(code: tuple[int, ...]) -> Layout:
    share_A, share_B, gate, shared_rank, count, *own = code
    ranks = tuple(own) if len(own) == count else (own[0],) * count
    return Layout(ranks, bool(share_A), bool(share_B), _GATES[gate], shared_rank)


def by_layer(z: Tensor, layout: Layout, n: int) -> Tensor:
    """z (T, n, block) without the columns that pad it."""
    return z[:, : n * layout.block].view(z.shape[0], n, layout.block)
