"""Dropout on the input of A, two ways: masks drawn inside Triton kernels, or written to memory.

    python benchmarks/dropout_paths.py

The three products of a layer's step (forward, dP, dx) under dropout 0.05 in bfloat16, 16 rows of A
and 3 of a router. Prints and appends to benchmarks/results/dropout_paths.jsonl {commit, device,
torch, path, tokens, width, issue_us, gpu_us}: the host's time to issue the three, and the GPU's to
do them when nothing makes it wait. COMMIT in the environment says the commit where the tree has no
history.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from here import commit, device

from manylora.adapter import dropout_kernels, masks
from manylora.adapter.layout import Layout

RESULTS = Path(__file__).parent / "results" / "dropout_paths.jsonl"
TOKENS, WIDTHS = (512, 1024, 2048, 4096, 8192, 16384), (4096, 11008)
REPEATS = 40


def three_products(tokens: int, width: int) -> Callable[[], None]:
    layout = Layout((16, 16, 16), share_A=True, share_B=False, gate="x", shared_rank=0)
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    down = torch.randn(layout.block, width, device="cuda", dtype=torch.bfloat16)
    dz = torch.randn(tokens, layout.block, device="cuda", dtype=torch.bfloat16)
    seed = torch.tensor([[12345]])

    def run() -> None:
        masks.down_product(x, down, layout, 0.05, seed)
        masks.down_backward(dz, x, layout, 0.05, seed)
        masks.input_gradient(dz, down, layout, 0.05, seed)

    return run


def microseconds(run: Callable[[], None]) -> tuple[float, float]:
    """(to issue, of the GPU) of one call."""
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # the GPU is busy until all is issued
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    start = time.perf_counter()
    for _ in range(REPEATS):
        run()
    issued = time.perf_counter() - start
    last.record()
    torch.cuda.synchronize()
    return 1e6 * issued / REPEATS, 1e3 * first.elapsed_time(last) / REPEATS


def main() -> None:
    facts = {"commit": commit(), "device": device(), "torch": torch.__version__}
    for width in WIDTHS:
        for tokens in TOKENS:
            run = three_products(tokens, width)
            for path, kernels in (("kernels", dropout_kernels), ("masks", None)):
                with patch.object(masks, "_kernels", lambda *_, kernels=kernels: kernels):
                    issue, gpu = microseconds(run)
                row = facts | {"path": path, "tokens": tokens, "width": width}
                row |= {"issue_us": round(issue, 1), "gpu_us": round(gpu, 1)}
                print(json.dumps(row))
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
