"""How long the looks inside an adapter take at LLaMA-2-7B's shapes: 224 layers, r 16, 3 branches.

    python benchmarks/inspect_speed.py [--threads 2]

Random numbers in the shapes of MultiLoRA (own A and B of each branch, and its scale), written as an
adapter folder and read back from it; every measure is of all layers and all parts: the whole and
each branch. `subspaces` compares the three branches two by two. Prints JSON: seconds of each, once,
and the rows of its table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from here import about_here
from safetensors.torch import save_file

from manylora import MultiLoraConfig
from manylora.adapter.checking import ROOT, WEIGHTS_FILE
from manylora.inspect.adapters import read
from manylora.inspect.spectra import singular_values, spectra
from manylora.inspect.subspaces import subspaces
from manylora.methods import PREFIX

BLOCKS, HIDDEN, INNER = 32, 4096, 11008
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}


def write_adapter(folder: Path) -> int:
    """A random adapter; returns its number of parameters."""
    config = MultiLoraConfig(r=16, target_modules=[name.split(".")[1] for name in SHAPES])
    config.save_pretrained(str(folder))
    tensors = {
        f"{ROOT}model.layers.{block}.{name}.{PREFIX}{part}.weight": torch.randn(*shape)
        for block in range(BLOCKS)
        for name, (n_in, n_out) in SHAPES.items()
        for part, shape in config.branches_of().shapes(n_in, n_out).items()
    }
    save_file(tensors, str(folder / WEIGHTS_FILE))
    return sum(tensor.numel() for tensor in tensors.values())


def timed(measure: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = measure()
    return round(time.perf_counter() - started, 2), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_adapter(Path(folder))
        seconds, adapter = timed(lambda: read(folder, "7b"))
        result: dict[str, Any] = {
            **about_here(),
            "layers": len(adapter.layers),
            "parameters": parameters,
            "read": {"seconds": seconds},
        }
        for name, measure in (
            ("singular_values", lambda: singular_values(adapter)),
            ("spectra", lambda: spectra(adapter)),
            ("subspaces", lambda: subspaces(adapter, adapter)),
        ):
            seconds, table = timed(measure)
            result[name] = {"seconds": seconds, "rows": len(table)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
