"""How long a training step must at least take: bytes over bandwidth, operations over peak.

Base, with P the weights that multiply a token (linear layers and head) and T tokens: forward and
the input's gradient are 4 P T operations. An adapter on a linear layer in -> out adds passes over
(T, in) and (T, out) tensors of 2 bytes an element, forward and backward together:

    method                          passes over out     over in
    PEFT's LoRA, without dropout    10                  6       (11 with)
    LoRA by hand-written autograd    5                  5
    published loop, N branches      18 N                6 N + 6 (11 N + 6 with dropout)
    the same, compiled               6 N + 3            12
    collapsed (manylora)             4                  4       (9 with)

Collapsed, each kernel takes the longer of its bytes and its operations: h = A x reads x; y += u B'
reads and writes y; du and dB read dy; dA reads x; dx += dh A reads and writes dx; and rank-sized
tensors 2 (6 a + 5 b) bytes, a rows of A and router, b columns of B. Of norms, attention, the loss
and launches it knows nothing, so that a whole step takes about 1.5 times the base.
"""

from __future__ import annotations

from dataclasses import dataclass

from manylora.speed.grid import Row
from manylora.speed.model import Shape


@dataclass(frozen=True)
class Chip:
    """flops: bf16 products a second; bandwidth: bytes a second, both as measured on one."""

    flops: float
    bandwidth: float


CHIPS = {"H100": Chip(800e12, 3.0e12), "H200": Chip(790e12, 4.3e12)}


@dataclass(frozen=True)
class Roofline:
    """Milliseconds of a step's base products and of what the adapter adds."""

    base_ms: float
    adapter_ms: float

    @property
    def ms(self) -> float:
        return self.base_ms + self.adapter_ms

    @property
    def ratio(self) -> float:
        return self.ms / self.base_ms


def chip_of(device: str) -> Chip | None:
    """The figures of a device as torch names it; None for one that has none here."""
    return next((chip for name, chip in CHIPS.items() if name in device), None)


def roofline(shape: Shape, row: Row, chip: Chip) -> Roofline:
    """The least time of a row's step without checkpointing."""
    adapter = sum(_seconds(row, n_in, n_out, chip) for n_in, n_out in shape.linears(row.targets))
    base = 4 * shape.parameters * row.tokens / chip.flops
    return Roofline(1000 * base, 1000 * shape.layers * row.tokens * adapter)


def _seconds(row: Row, n_in: int, n_out: int, chip: Chip) -> float:
    """Of one token in one adapted layer."""
    n, dropped = row.n, bool(row.dropout)
    if row.method == "frozen":
        return 0.0
    passes = {
        "peft_lora": (10, 11 if dropped else 6),
        "autograd_lora": (5, 5),
        "loop_hydralora": (18 * n, (11 if dropped else 6) * n + 6),
    }
    if row.method == "loop_hydralora" and row.mode == "compiled":
        passes["loop_hydralora"] = (6 * n + 3, 12)
    if row.method in passes:
        out, inner = passes[row.method]
        return 2 * (out * n_out + inner * n_in) / chip.bandwidth
    rows, columns = _ranks(row)

    def kernel(passes: int, width: int, rank: int) -> float:
        return max(2 * passes * width / chip.bandwidth, 2 * rank * width / chip.flops)

    read = kernel(1, n_in, rows) + kernel(1, n_out, columns)
    add = kernel(2, n_in, rows) + kernel(2, n_out, columns)
    small = 2 * (6 * rows + 5 * columns) / chip.bandwidth
    dropout = kernel(5, n_in, 0) if dropped else 0.0
    return 2 * read + add + small + dropout


def _ranks(row: Row) -> tuple[int, int]:
    """Rows of A and router, columns of B, of a collapsed method."""
    own = row.r * row.n
    return {
        "lora": (row.r, row.r),
        "multilora": (own, own),
        "hydralora": (row.r + row.n, own),
        "lora_moe": (own + row.n, own),
        "cluster": (own, own),
    }[row.method]
