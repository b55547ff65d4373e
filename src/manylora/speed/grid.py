"""A row of the benchmark, one method at one size, and the rows that are measured by default.

The sizes are those of the reference workload: all seven linear layers, r = 16, 4 packed rows of
2048 tokens. The sweeps stand at 2 x 2048, where the published loop still fits a GPU of 80 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Mode = Literal["eager", "compiled"]
Method = Literal[
    "frozen",
    "peft_lora",
    "autograd_lora",
    "loop_hydralora",
    "lora",
    "multilora",
    "hydralora",
    "lora_moe",
    "cluster",
]
Targets = Literal["all", "mlp", "qv"]
AdapterDtype = Literal["bfloat16", "float32"]

METHODS: tuple[Method, ...] = get_args(Method)
ONE_BRANCH = ("peft_lora", "autograd_lora", "lora")
SWEEP = (2, 2048)


@dataclass(frozen=True)
class Row:
    """One method at one size.

    r: rank of a branch; n: branches. A frozen row has no adapter: r, n and dropout are 0, and
    adapter_dtype means nothing. rows x length: packed rows of tokens in a
    step. dropout: on the input of A. adapter_dtype: of the trained tensors, their gradients and
    AdamW's moments. merged: the frozen model with layers of one input computed together
    (peers.merge_reads), which is no row of the raw results but kept beside them.
    """

    mode: Mode
    method: Method
    targets: Targets = "all"
    r: int = 16
    n: int = 3
    rows: int = 4
    length: int = 2048
    dropout: float = 0.0
    adapter_dtype: AdapterDtype = "bfloat16"
    checkpointing: bool = False
    merged: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method={self.method!r}; known: {', '.join(METHODS)}")
        if self.merged and self.method != "frozen":
            raise ValueError(f"merged=True is for frozen rows, got method={self.method!r}")
        if self.method == "frozen":
            object.__setattr__(self, "r", 0)
            object.__setattr__(self, "n", 0)
            object.__setattr__(self, "dropout", 0.0)
            object.__setattr__(self, "adapter_dtype", "bfloat16")
        elif self.method in ONE_BRANCH:
            object.__setattr__(self, "n", 1)
        if self.method == "autograd_lora" and self.dropout:
            raise ValueError(
                f"autograd_lora has no dropout, as the fast path it stands for; got {self.dropout}"
            )

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def as_json(self) -> dict[str, Any]:
        """The fields that name a row in the raw results."""
        return {
            "mode": self.mode,
            "method": self.method,
            "targets": self.targets,
            "r": self.r,
            "n": self.n,
            "tokens": self.tokens,
            "dropout": self.dropout,
            "adapter_dtype": self.adapter_dtype,
            "checkpointing": self.checkpointing,
        }

    def __str__(self) -> str:
        words = [self.mode, self.method, self.targets, f"r{self.r}", f"N{self.n}"]
        words.append(f"{self.rows}x{self.length}")
        words += [f"dropout {self.dropout:g}"] if self.dropout else []
        words += [self.adapter_dtype] if self.adapter_dtype != "bfloat16" else []
        words += ["checkpointed"] if self.checkpointing else []
        return " ".join([*words, "merged"] if self.merged else words)


def main_rows(mode: Mode) -> Iterator[Row]:
    """Every method at the reference workload; the loop does not fit it."""
    for method in METHODS:
        if method != "loop_hydralora":
            yield Row(mode, method)
    yield Row(mode, "hydralora", n=8)
    yield Row(mode, "frozen", merged=True)


def checkpointed_rows(mode: Mode) -> Iterator[Row]:
    """With checkpointing, so that the published loop fits."""
    for method in ("frozen", "peft_lora", "loop_hydralora", "hydralora"):
        yield Row(mode, method, checkpointing=True)


def placement_rows(mode: Mode) -> Iterator[Row]:
    """Fewer layers adapted."""
    for targets in ("mlp", "qv"):
        for method in ("frozen", "peft_lora", "hydralora"):
            yield Row(mode, method, targets=targets)


def dtype_rows(mode: Mode) -> Iterator[Row]:
    """Adapters in float32, PEFT's default."""
    for method in ("frozen", "peft_lora", "hydralora"):
        yield _small(mode, method, adapter_dtype="float32")


def dropout_rows(mode: Mode) -> Iterator[Row]:
    """Dropout 0.05 on the input of A; with it the loop fits a single row of 2048 tokens."""
    for rows, methods in ((1, ("peft_lora", "loop_hydralora")), (2, ("peft_lora", "lora"))):
        for method in (*methods, "hydralora"):
            yield replace(_small(mode, method, dropout=0.05), rows=rows)


def sweep_rows(mode: Mode) -> Iterator[Row]:
    """Against branches, rank and tokens, each from r = 16, N = 3, 2 x 2048 tokens.

    From two branches on: the router of one branch has nothing to learn.
    """
    for method in ("frozen", "autograd_lora"):
        yield _small(mode, method)
    for n in (2, 3, 8, 16):
        yield _small(mode, "hydralora", n=n)
    for n in (2, 3, 8):
        yield _small(mode, "loop_hydralora", n=n)
        yield _small(mode, "lora_moe", n=n)
    for r in (4, 16, 64):
        for method in ("peft_lora", "lora", "hydralora"):
            if (method, r) != ("hydralora", 16):
                yield _small(mode, method, r=r)
    for method in ("frozen", "peft_lora", "autograd_lora", "lora", "lora_moe", "hydralora"):
        yield replace(_small(mode, method), rows=1)
    yield replace(_small(mode, "loop_hydralora"), rows=1)


def table4_rows(mode: Mode) -> Iterator[Row]:
    """HydraLoRA's table 4 at these shapes: LoRA of three ranks, four branches of their own A and B
    (its LoRA-Split; MultiLoRA adds a scale), HydraLoRA as published and as here.
    """
    yield _small(mode, "frozen")
    for r in (8, 16, 32):
        yield _small(mode, "peft_lora", r=r)
    yield _small(mode, "multilora", r=8, n=4)
    for method in ("loop_hydralora", "hydralora"):
        yield _small(mode, method, r=8)


def _small(mode: Mode, method: str, **fields: Any) -> Row:
    return Row(mode, method, rows=SWEEP[0], length=SWEEP[1], **fields)  # type: ignore[arg-type]


PARTS = {
    "main": main_rows,
    "checkpointed": checkpointed_rows,
    "placement": placement_rows,
    "dtype": dtype_rows,
    "dropout": dropout_rows,
    "sweep": sweep_rows,
    "table4": table4_rows,
}


def grid(parts: list[str], modes: list[Mode]) -> list[Row]:
    """The rows of these parts in these modes, each once."""
    rows = [row for mode in modes for part in parts for row in PARTS[part](mode)]
    return list(dict.fromkeys(rows))
