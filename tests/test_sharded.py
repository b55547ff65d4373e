"""Two processes that share the weights between them train what one process would."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sharded import METHODS, losses, made

PROGRAM = Path(__file__).with_name("sharded.py")


def of_two(kind: str, method: str, file: Path) -> list[float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    both = [
        subprocess.Popen(
            [sys.executable, PROGRAM, kind, method, rank, port, file],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [one.communicate(timeout=240)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said[0][-2000:] + said[1][-2000:]
    found: list[float] = json.loads(file.read_text())
    return found


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is built from source: pip install --no-build-isolation deepspeed",
)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *zip(["fsdp1", "fsdp2", "fsdp2 by products"], METHODS, strict=True),
        *(pytest.param("zero2", method, marks=needs_deepspeed) for method in METHODS),
        *(pytest.param("zero3", method, marks=needs_deepspeed) for method in METHODS),
    ],
)
def test_sharded_training_is_training(kind: str, method: str, tmp_path: Path) -> None:
    model = made(method)
    alone = losses(model, model, slice(0, 4))
    assert of_two(kind, method, tmp_path / "losses") == pytest.approx(alone, abs=2e-5)
    assert alone[-1] < alone[0] - 0.01
