"""Losses reach TensorBoard, Weights & Biases (offline) and Trackio (local), only when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import manylora.training.reporting
from manylora.training.reporting import LOGS, PROJECT, Reporter, check_reporters, reporters
from tiny import attach, tiny_llama

ROWS = [{"input_ids": [5, 9, 3, 7], "labels": [-100, -100, 3, 7]}] * 8


class TaskLosses(TrainerCallback):
    """Adds the losses of tasks to what is logged, as the callback for metrics.jsonl does."""

    def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["tasks/colour"] = 2.5


def train(run: Path, names: list[Reporter]) -> list[dict[str, float]]:
    trainer = Trainer(
        model=attach(tiny_llama(), method="lora"),
        args=TrainingArguments(
            output_dir=str(run / "checkpoints"),
            max_steps=3,
            logging_steps=1,
            report_to="none",
            run_name=run.name,
            project=PROJECT,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(ROWS),
        callbacks=[TaskLosses(), *reporters(names, run)],
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def test_tensorboard_files_are_in_the_run_folder(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged = train(tmp_path / "mine", ["tensorboard"])
    events = accumulator.EventAccumulator(str(tmp_path / "mine" / LOGS))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert [event.value for event in losses] == pytest.approx([line["loss"] for line in logged])
    assert [event.value for event in events.Scalars("train/tasks/colour")] == [2.5] * 3


def test_wandb_offline_writes_into_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "mine", ["wandb"])
    try:
        assert (wandb.run.name, wandb.run.project) == ("mine", PROJECT)
        assert wandb.run.summary["train/tasks/colour"] == 2.5
    finally:
        wandb.finish()
    (folder,) = (tmp_path / "mine" / LOGS / "wandb").glob("offline-run-*")
    assert any(file.suffix == ".wandb" for file in folder.iterdir())
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_trackio_stays_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    logged = train(tmp_path / "mine", ["trackio"])
    told = trackio.SQLiteStorage.get_logs(PROJECT, "mine")
    losses = [line["train/loss"] for line in told if "train/loss" in line]
    assert losses == pytest.approx([line["loss"] for line in logged])
    assert [line["train/tasks/colour"] for line in told if "train/loss" in line] == [2.5] * 3
    assert list((tmp_path / "trackio").glob(f"*{PROJECT}*"))


def test_nothing_is_reported_unasked(tmp_path: Path) -> None:
    assert reporters([], tmp_path / "mine") == []
    assert not (tmp_path / "mine").exists()


def test_missing_package_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(manylora.training.reporting, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="wandb, trackio is not installed; pip install"):
        check_reporters(["wandb", "trackio"])
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        reporters(["tensorboard"], tmp_path)
