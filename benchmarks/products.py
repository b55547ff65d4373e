"""The up-projection by itself, or inside the base product (K-extension), at LLaMA-2-7B's shapes.

    python benchmarks/products.py

    addmm     y = x W';  y += u Q'                     as manylora computes it
    extended  y = [x | u] [W | Q]'                     if both lay side by side in memory
    copied    the same, with x and W, Q copied there   what a layer between other layers would pay

x (8192, in), W (out, in), Q (out, 48), u (8192, 48 padded to 64), bfloat16. Prints a table, and
appends microseconds of each of 40 runs, in turns, to benchmarks/results/products.jsonl.
COMMIT in the environment says the commit where the tree has no history.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from here import commit, device

TOKENS, COLUMNS, PADDED, RUNS = 8192, 48, 64, 40
SHAPES = {"q, k, v, o": (4096, 4096), "gate, up": (4096, 11008), "down": (11008, 4096)}


def variants(n_in: int, n_out: int) -> dict[str, Callable[[], torch.Tensor]]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, W, Q, u = draw(TOKENS, n_in), draw(n_out, n_in), draw(n_out, COLUMNS), draw(TOKENS, COLUMNS)
    wide = torch.zeros(TOKENS, n_in + PADDED, device="cuda", dtype=torch.bfloat16)
    both = torch.zeros(n_out, n_in + PADDED, device="cuda", dtype=torch.bfloat16)
    held = slice(n_in, n_in + COLUMNS)

    def addmm() -> torch.Tensor:
        return (x @ W.t()).addmm_(u, Q.t())

    def extended() -> torch.Tensor:
        return wide @ both.t()

    def copied() -> torch.Tensor:
        wide[:, :n_in], wide[:, held] = x, u
        both[:, :n_in], both[:, held] = W, Q
        return wide @ both.t()

    difference = (addmm() - copied()).float().norm() / addmm().float().norm()
    if not difference < 0.01:
        raise AssertionError(f"the variants differ by {difference:.2g} of y")
    return {"addmm": addmm, "extended": extended, "copied": copied}


def microseconds(run: Callable[[], torch.Tensor]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def main() -> None:
    facts = {"commit": commit(), "device": device(), "torch": torch.__version__}
    folder = Path(__file__).parent / "results"
    with (folder / "products.jsonl").open("a", encoding="utf-8") as file:
        for name, (n_in, n_out) in SHAPES.items():
            runs = variants(n_in, n_out)
            found: dict[str, list[float]] = {variant: [] for variant in runs}
            for _ in range(RUNS):
                for variant, run in runs.items():
                    found[variant].append(round(microseconds(run), 2))
            for variant, us in found.items():
                sizes = {"layers": name, "tokens": TOKENS, "in": n_in, "out": n_out, "n_r": COLUMNS}
                file.write(json.dumps({**facts, **sizes, "variant": variant, "us": us}) + "\n")
                print(f"{name:12} {variant:9} {median(us):8.1f} us")


if __name__ == "__main__":
    main()
