"""Training on a GPU: packing, half precision with rates by part, and a memory that is too small.

    python benchmarks/cuda_training.py [OUTPUT.json]

A small random model and three tasks made here, so that nothing is downloaded. Prints, as JSON: the
losses of a padded and a packed run and how far their weights are apart; the losses of a run in
fp16 with validation; the batch that a run with capped memory ended with, asked for 64 rows.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from here import about_here  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from manylora.recipe import parse_recipe  # noqa: E402
from manylora.train import train  # noqa: E402
from tiny import save_tiny_model, write_tasks  # noqa: E402


def run(folder: Path, name: str, train_keys: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Losses by step, summary and weights of one run."""
    values = {
        "model": str(folder / "model"),
        "data": str(folder / "tasks"),
        "holdout": 0.2,
        "adapter": {"r": 4, "method": "hydralora", "balance_loss": "switch"},
        "train": {"max_steps": 12, "precision": "fp32", "learning_rate": 0.01, "log_every": 3},
        "evaluate": {"rows_per_task": 6},
        "output": str(folder / name),
    }
    done = train(parse_recipe(values | changes | {"train": values["train"] | train_keys}))
    lines = [json.loads(line) for line in (done / "metrics.jsonl").open(encoding="utf-8")]
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "validation": [line["mean"] for line in lines if "validation" in line],
        "summary": json.loads((done / "summary.json").read_text(encoding="utf-8")),
        "weights": load_file(str(done / "adapter_model.safetensors")),
    }


def packing(folder: Path) -> dict[str, Any]:
    padded, packed = run(folder, "padded", {}), run(folder, "packed", {}, packing=True)
    apart = [
        float((padded["weights"][name] - packed["weights"][name]).abs().max())
        for name in padded["weights"]
    ]
    losses = {"padded": padded["losses"], "packed": packed["losses"]}
    return {**losses, "largest_weight_difference": max(apart)}


def half_precision(folder: Path) -> dict[str, Any]:
    keys = {"precision": "fp16", "rates": {"B": 4, "router": 0}, "evaluate_every": 4}
    done = run(folder, "fp16", keys, validation=0.1)
    return {"losses": done["losses"], "validation": done["validation"]}


def too_little_memory(folder: Path) -> dict[str, Any]:
    """Cap the memory at 45 % of what 64 rows need above the model's own, and ask for 64 rows."""
    keys = {"batch_size": 64, "max_steps": 4, "checkpoint_every": 2}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    whole = run(folder, "whole", keys)
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 0.45 * (peak - held)) / total)
    small = run(folder, "small", keys)
    torch.cuda.set_per_process_memory_fraction(1.0)
    shown = ("batch_size", "gradient_accumulation", "steps", "train_tokens")
    return {
        "peak_bytes": peak,
        "whole": {key: whole["summary"][key] for key in shown},
        "capped": {key: small["summary"][key] for key in shown},
        "losses": {"whole": whole["losses"], "capped": small["losses"]},
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_model(folder / "model", hidden_size=512, intermediate_size=2048)
        write_tasks(folder / "tasks", rows=200)
        result = {
            **about_here(),
            "packing": packing(folder),
            "fp16_with_rates_and_validation": half_precision(folder),
            "too_little_memory": too_little_memory(folder),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
