"""Where and of what a benchmark's figures are: device, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from typing import Any

import torch


def about_here() -> dict[str, Any]:
    """Goes in front of every result that is kept."""
    return {
        "commit": commit(),
        "device": device(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }


def commit() -> str:
    """Of this tree; COMMIT says it where the tree was copied without its history."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor()).strip()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
