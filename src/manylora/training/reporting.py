"""Losses to TensorBoard, Weights & Biases or Trackio, when the recipe asks for it (`report_to`).

    tensorboard   files in RUN/logs
    wandb         its own server; WANDB_MODE=offline keeps the files in RUN/logs
    trackio       on this machine, unless TRACKIO_SPACE_ID says otherwise

The run goes by the name of its folder, in the project "manylora" (WANDB_PROJECT is another one).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import TrainerCallback

Reporter = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "manylora"
LOGS = "logs"


def check_reporters(names: Sequence[Reporter]) -> None:
    """Raise ModuleNotFoundError, with the line that installs it, for one that is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"train.report_to={list(names)}: {', '.join(missing)} is not installed; "
            f"pip install {' '.join(missing)}, or leave it out"
        )


def reporters(names: Sequence[Reporter], run: Path) -> list[TrainerCallback]:
    """The callbacks that report a run; give them to the trainer after the one for metrics.jsonl.

    The trainer's own `report_to` is to be "none", its `run_name` the folder's name and its
    `project` PROJECT.
    """
    check_reporters(names)
    return [_reporter(name, run) for name in dict.fromkeys(names)]


def _reporter(name: Reporter, run: Path) -> TrainerCallback:
    from transformers.integrations.integration_utils import (
        TensorBoardCallback,
        TrackioCallback,
        WandbCallback,
    )

    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        return TensorBoardCallback(SummaryWriter(str(run / LOGS)))
    if name == "trackio":
        return TrackioCallback()
    import wandb

    (run / LOGS).mkdir(parents=True, exist_ok=True)
    # transformers' callback goes on with a run that is there; its own would write to ./wandb.
    wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=run.name, dir=str(run / LOGS))
    return WandbCallback()
