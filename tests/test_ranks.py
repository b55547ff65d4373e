"""A run of two processes: each row once an epoch between them, one run folder, the same adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from killing import changes_of
from manylora.recipe import Recipe, parse_recipe
from manylora.train import train

# One import for both processes, which are forked before torch has started a thread.
PROGRAM = """
import json, os, socket, sys, torch
from manylora.recipe import load_recipe
from manylora.train import train
from manylora.training.trainer import RunTrainer
changes, resume, seen = json.loads(sys.argv[1]), sys.argv[2] == "resume", sys.argv[3]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
children = []
for rank in range(2):
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        os.environ.update({name: str(value) for name, value in here.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        whole = RunTrainer.compute_loss
        def compute_loss(self, model, inputs, *args, **kwargs):
            with open(f"{seen}.{rank}", "a") as file:
                trained = inputs["sources"] if self.model.training else []
                file.write("".join(source + chr(10) for source in trained))
            return whole(self, model, inputs, *args, **kwargs)
        RunTrainer.compute_loss = compute_loss
        code = 1
        try:
            train(load_recipe(None, changes), resume=resume)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def both(recipe: Recipe, seen: Path) -> None:
    changes = changes_of(recipe.model_dump(mode="json"))
    command = [sys.executable, "-c", PROGRAM, json.dumps(changes), "no", str(seen)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def recipes(make_recipe: Callable[..., Recipe]) -> tuple[Recipe, Recipe]:
    """One epoch of 96 rows in steps of 8: alone, and as 4 for each of two processes."""

    def one(output: str, batch: int) -> Recipe:
        values: dict[str, Any] = make_recipe(output, method="branch_per_cluster").model_dump()
        values["train"] |= {"max_steps": 12, "batch_size": batch, "checkpoint_every": 5}
        values["train"] |= {"evaluate_every": 6}
        return parse_recipe(values | {"validation": 0.25, "packing": batch == 4})

    return one("alone", 8), one("both", 4)


def test_two_processes_train_what_one_would(recipes: tuple[Recipe, Recipe], tmp_path: Path) -> None:
    alone = train(recipes[0])
    both(recipes[1], tmp_path / "seen")
    shares = [(tmp_path / f"seen.{rank}").read_text().split() for rank in range(2)]
    rows = 72  # of 96, a quarter is kept apart for validation
    first_epoch = [source for share in shares for source in share[: rows // 2]]
    assert len(first_epoch) == len(set(first_epoch)) == rows
    run = recipes[1].run
    first = load_file(str(alone / "adapter_model.safetensors"))
    second = load_file(str(run / "adapter_model.safetensors"))
    # Adam divides by the gradient's size, so rounding moves a weight by a share of the rate.
    assert all(torch.allclose(first[key], second[key], atol=5e-3) for key in first)
    logs = [[json.loads(line) for line in (r / "metrics.jsonl").open()] for r in (alone, run)]
    assert len(logs[0]) == len(logs[1])
    for one, other in zip(*logs, strict=True):
        assert one["step"] == other["step"]
        if "validation" in one:
            assert other["mean"] == pytest.approx(one["mean"], rel=1e-3)
        else:
            assert one["tokens"] == other["tokens"]
            for task, said in one["tasks"].items():
                assert other["tasks"][task]["tokens"] == said["tokens"]
                assert other["tasks"][task]["loss"] == pytest.approx(said["loss"], rel=1e-3)
    assert not list(run.glob(".*"))
