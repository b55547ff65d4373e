"""Fixtures that several test files share.

The files run side by side, each process with one thread: more threads than cores, spinning for each
other, are many times slower.
"""

from __future__ import annotations

import os

# Before torch is imported, which reads them once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from manylora.recipe import Recipe, parse_recipe
from tiny import save_tiny_model, write_tasks

# A background job ignores Ctrl-C, one under nohup a hang-up, and runs leave what is ignored so; the
# tests that send these signals are about a foreground job.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that loads offline."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small tasks, one file each."""
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks", rows=40)


@pytest.fixture
def make_recipe(tiny_folder: Path, task_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe that trains the tiny model on the small tasks in a second or two."""

    def make(output: str = "run", **adapter: object) -> Recipe:
        return parse_recipe(
            {
                "model": str(tiny_folder),
                "data": str(task_folder),
                "holdout": 0.2,
                "adapter": {"r": 4, **adapter},
                "train": {
                    "max_steps": 6,
                    "learning_rate": 0.02,
                    "warmup": 0,
                    "log_every": 2,
                    "precision": "fp32",
                    "workers": 0,
                },
                "evaluate": {"rows_per_task": 6},
                "output": str(tmp_path / output),
            }
        )

    return make
