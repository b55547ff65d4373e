"""Raw rows on disk, the table that is made of them, and the targets.

Every ratio is between medians of rows of the same mode, targets, tokens and checkpointing. Ratios
to PEFT's LoRA compare the same r, dropout and adapter dtype too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from manylora.speed.measure import Measured

Raw = dict[str, Any]
FACTS = ("commit", "device", "torch")
KEY = (
    "mode",
    "method",
    "targets",
    "r",
    "n",
    "tokens",
    "dropout",
    "adapter_dtype",
    "checkpointing",
)
SETTING = ("mode", "targets", "tokens", "checkpointing")
LEAST_STEPS = 20


def raw_rows(measured: Sequence[Measured], commit: str, device: str) -> list[Raw]:
    """One for each row that has a time or an error; those that were not reached are left out."""
    rows = []
    for one in measured:
        if not one.step_ms and one.error is None:
            continue
        row: Raw = {"commit": commit, "device": device, "torch": torch.__version__}
        row |= one.row.as_json()
        row["step_ms"] = [round(ms, 3) for ms in one.step_ms]
        row["activation_gib"] = _rounded(one.activation_gib)
        row["adapter_state_gib"] = _rounded(one.adapter_state_gib)
        rows.append(row if one.error is None else {**row, "error": one.error})
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def append(path: Path, rows: Sequence[Raw]) -> None:
    """A line for each row at the end of the file, which is not made for none."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: Path, commit: str | None = None) -> list[Raw]:
    """The rows of the last line's commit, device and torch; of each the last that was measured.

    commit: the last line of that commit instead. Raises ValueError when there is no row.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    rows = [row for row in rows if commit is None or row["commit"] == commit]
    if not rows:
        of = f" of commit {commit}" if commit else ""
        raise ValueError(f"{path} holds no measured rows{of}; run benchmarks/speed.py first")
    newest = [rows[-1][fact] for fact in FACTS]
    mine = [row for row in rows if [row[fact] for fact in FACTS] == newest]
    return list({tuple(row[k] for k in KEY): row for row in mine}.values())


def find(rows: Sequence[Raw], **fields: Any) -> Raw | None:
    """The first measured row with these fields; None when there is none, or it failed."""
    return next(
        (r for r in rows if r["step_ms"] and all(r[k] == v for k, v in fields.items())), None
    )


def frozen_of(rows: Sequence[Raw], row: Raw) -> Raw | None:
    return find(rows, method="frozen", **{k: row[k] for k in SETTING})


def peft_of(rows: Sequence[Raw], row: Raw) -> Raw | None:
    same = {k: row[k] for k in (*SETTING, "r", "dropout", "adapter_dtype")}
    return find(rows, method="peft_lora", **same)


def times(row: Raw | None, other: Raw | None) -> float | None:
    """The ratio of two rows' median steps; None where one of them has none."""
    if row is None or other is None or not row["step_ms"]:
        return None
    return median(row["step_ms"]) / median(other["step_ms"])


def memory(row: Raw | None, other: Raw | None) -> float | None:
    """The ratio of two rows' activations."""
    if row is None or other is None or not row["activation_gib"] or not other["activation_gib"]:
        return None
    return float(row["activation_gib"] / other["activation_gib"])


NAMED = dict(zip(KEY, (*KEY[:4], "N", *KEY[5:7], "adapter", "checkpointing"), strict=True))
FOUND = ("steps", "ms", "/ frozen", "/ PEFT LoRA", "activations GiB", "/ frozen", "adapter GiB")


def table(rows: Sequence[Raw], keys: Sequence[str] = KEY) -> str:
    """A Markdown table: median milliseconds of a step, memory, and both beside frozen and PEFT.

    keys: the fields of KEY that the rows are named by, all of them where they differ.
    """
    lines = [[*(NAMED[key] for key in keys), *FOUND]]
    for row in rows:
        steps, frozen = row["step_ms"], frozen_of(rows, row)
        lines.append(
            [
                *(_word(row[key]) for key in keys),
                str(len(steps)),
                f"{median(steps):.1f}" if steps else row["error"].partition("\n")[0][:60],
                _number(times(row, frozen), ".3f"),
                _number(times(row, peft_of(rows, row)), ".3f"),
                _number(row["activation_gib"], ".2f"),
                _number(memory(row, frozen), ".3f"),
                _number(row["adapter_state_gib"], ".2g"),
            ]
        )
    return _markdown(lines)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[w.ljust(n) for w, n in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * n for n in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


@dataclass(frozen=True)
class Target:
    """A ratio and what it must be: at most the limit, or at least."""

    what: str
    value: float | None
    limit: float
    at_least: bool = False

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        if self.value is None:
            return f"{self.what} {sign} {self.limit:.2f}: not measured"
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        return (
            f"{self.what} {sign} {self.limit:.2f}: {self.value:.3f}, {'met' if met else 'missed'}"
        )


WORKLOAD = {"targets": "all", "r": 16, "tokens": 8192, "dropout": 0.0, "adapter_dtype": "bfloat16"}


def targets(rows: Sequence[Raw]) -> list[Target]:
    """All seven linears, r = 16, 4 x 2048 tokens, dropout 0, adapters in bf16."""
    found = []
    for mode in ("eager", "compiled"):
        at = {**WORKLOAD, "mode": mode, "checkpointing": False}
        for n, limit in ((3, 1.20), (8, 1.22)):
            hydra = find(rows, method="hydralora", n=n, **at)
            frozen = None if hydra is None else frozen_of(rows, hydra)
            peft = None if hydra is None else peft_of(rows, hydra)
            name = f"{mode}, HydraLoRA N={n}"
            found += [
                Target(f"{name} / frozen", times(hydra, frozen), limit),
                Target(f"{name} / frozen, activations", memory(hydra, frozen), 1.10),
                Target(f"{name} / PEFT LoRA of the same r", times(hydra, peft), 0.97),
            ]
    at = {**WORKLOAD, "mode": "eager", "checkpointing": True, "n": 3}
    ours, loop = (find(rows, method=m, **at) for m in ("hydralora", "loop_hydralora"))
    what = "eager, published loop / HydraLoRA N=3, checkpointing"
    return [*found, Target(what, times(loop, ours), 2.0, at_least=True)]
