"""What lets a run survive: checkpoints that resume to the same bits, and lost numbers refused.

`SurvivalMixin` goes left of the run's trainer. Beside what transformers saves, its checkpoints hold
what a resumed run needs to log and sum as if it had never stopped. A loss or gradient that is not
finite ends the run before the optimiser has touched the weights.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from manylora.training.checkpoints import (
    PROGRESS_FILE,
    new_partial,
    partial_of,
    prune,
    publish_folder,
)
from manylora.training.interrupts import Interrupts
from manylora.training.keeping import RunError

SECONDS_BETWEEN_CHECKPOINTS = 300
ROWS_NAMED = 16


class SurvivalMixin:
    """Left of a transformers trainer that counts `tokens` and keeps `unread` losses.

    `batch_sources`: where the rows of the batch at hand come from, as compute_loss finds them.
    """

    unread: list[Tensor]
    tokens: int
    kwh: dict[str, float]
    kwh_before: dict[str, float]
    batch_sources: list[str]
    args: Any
    state: TrainerState
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.dead: list[str] = []
        self.seconds = 0.0
        self.interrupted = False
        self._resumed: dict[str, Any] = {}
        self._staging: Path | None = None
        self._step: list[tuple[Tensor, list[str]]] = []
        self._before_step: dict[str, Any] = {}
        super().__init__(*args, **kwargs)

    @property
    def run(self) -> Path:
        return Path(self.args.output_dir).parent

    def go_on(self, checkpoint: Path | None) -> None:
        """Train from a checkpoint, or from the start; only load it when it is of the last step."""
        trainer: Any = self
        if checkpoint is None:
            trainer.train()
        else:
            self._resumed = read_progress(checkpoint)
            if self._resumed["complete"]:
                self._load_complete(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint))
        self.seconds = time.perf_counter() - self._started

    def _load_complete(self, checkpoint: Path) -> None:
        trainer: Any = self
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        trainer._load_from_checkpoint(str(checkpoint))
        self.restore_progress()
        trainer.callback_handler.on_train_end(self.args, self.state, trainer.control)

    def restore_progress(self) -> None:
        """Go on counting where the checkpoint stopped."""
        found = self._resumed
        if found:
            if self.state.is_world_process_zero:
                self.unread[:] = [sums.to(self.args.device) for sums in found["unread"]]
            self.tokens, self.seconds, self.dead = found["tokens"], found["seconds"], found["dead"]
            self.kwh_before = found.get("kwh", {})
            self._tr_loss = found["loss"].to(self.args.device)
            self._total_loss_scalar = found["logged_loss"]
            self._globalstep_last_logged = found["logged_step"]
        self._started = time.perf_counter() - self.seconds

    def _progress(self) -> dict[str, Any]:
        trainer: Any = self
        return {
            "unread": self.unread,
            "tokens": self.tokens,
            "kwh": self.kwh,
            "seconds": time.perf_counter() - self._started,
            "dead": self.dead,
            "loss": self._tr_loss,
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation": self.args.gradient_accumulation_steps,
            "complete": trainer.control.should_training_stop and not self.interrupted,
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer: Any = self
        first = self.state.is_world_process_zero
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            final.parent.mkdir(exist_ok=True)
            trainer.gather_sums()
            if first:
                new_partial(final)
            trainer.accelerator.wait_for_everyone()
            self._staging = partial_of(final)
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            trainer.accelerator.wait_for_everyone()
            if first:
                written = self._staging / final.name
                torch.save(self._progress(), written / PROGRESS_FILE)
                publish_folder(written, final)
                self._staging.rmdir()
        except torch.OutOfMemoryError:
            raise
        except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch.save's
            why = reason(error, final.parent)
            if self._staging is not None:
                shutil.rmtree(self._staging, ignore_errors=True)  # it may be what fills the disk
            raise OSError(f"{final} cannot be written: {why}") from error
        finally:
            self._staging = None
        if first:
            prune(self.run)
        trainer.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        if self._staging is not None:
            return str(self._staging)
        return super()._get_output_dir(trial)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run folder gets a card of its own."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self._step:
            self._before_step = {
                "random": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
                "loss": self._tr_loss.clone(),
                "unread": len(self.unread),
            }
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._step.append((loss, list(self.batch_sources)))
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        # fp16's gradient scaler leaves out steps with an infinite gradient, and lowers its scale.
        gradient = torch.zeros(()) if self.args.fp16 else torch.as_tensor(norm).detach()
        losses = torch.stack([loss for loss, _ in self._step])
        if not bool((losses.sum() + gradient.to(losses.device)).isfinite()):
            self._refuse(losses.tolist(), float(norm))
        self._step.clear()
        return norm

    def _refuse(self, losses: list[float], norm: float) -> None:
        """Keep the state before this step, and say which rows it had."""
        lost = [i for i, loss in enumerate(losses) if not torch.tensor(loss).isfinite()]
        rows = [row for i in lost or range(len(losses)) for row in self._step[i][1]]
        what = f"the loss is {losses[lost[0]]}" if lost else f"the gradient's norm is {norm}"
        self._undo_step()
        step = self.state.global_step
        kept = Path(self.args.output_dir) / f"checkpoint-{step}"
        if step and not kept.exists():
            self._save_checkpoint(self.model, None)
        more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
        named = f" in the batch of {', '.join(rows[:ROWS_NAMED])}{more}" if rows else ""
        rate = f"train.learning_rate={self.args.learning_rate / 4:.3g}"
        start = f"start_from={kept} " if step else ""
        state = f"{kept} is kept, the state before that step." if step else "Nothing was learned."
        raise RunError(
            f"step {step + 1}: {what}{named}; training stopped before it changed the weights. "
            f"{state} Look at these rows and leave a bad one out, or lower the learning rate: "
            f"manylora train {self.run} {start}output=NEW_FOLDER {rate}"
        )

    def _undo_step(self) -> None:
        before = self._before_step
        torch.set_rng_state(before["random"])
        if before["cuda"] is not None:
            torch.cuda.set_rng_state(before["cuda"])
        self._tr_loss = before["loss"]
        del self.unread[before["unread"] :]
        self.model.zero_grad()


class Saves(TrainerCallback):
    """When to save: every so many steps or every five minutes, at the end, and on a signal."""

    trainer: Any

    def __init__(self, every: int | None, interrupts: Interrupts) -> None:
        self.every, self.interrupts = every, interrupts
        self.saved_step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore_progress()
        self.saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every is None:
            due = time.monotonic() - self.saved_at >= SECONDS_BETWEEN_CHECKPOINTS
        else:
            due = state.global_step % self.every == 0
        stop = self.interrupts.received is not None
        due, stop = self._agreed(due, stop)
        if stop and not control.should_training_stop:
            self.trainer.interrupted = control.should_training_stop = True
        control.should_save |= due or control.should_training_stop

    def _agreed(self, due: bool, stop: bool) -> tuple[bool, bool]:
        """Processes that did not all save at one step would wait for each other for ever."""
        if self.trainer.accelerator.num_processes == 1:
            return due, stop
        wanted = torch.tensor([due, stop], device=self.trainer.args.device).float()
        return tuple((self.trainer.accelerator.reduce(wanted, "sum") > 0).tolist())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop:  # an evaluation after the step may have decided it
            control.should_save |= self.saved_step != state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_step, self.saved_at = state.global_step, time.monotonic()


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What `SurvivalMixin` wrote last into a checkpoint."""
    found: dict[str, Any] = torch.load(
        checkpoint / PROGRESS_FILE, map_location="cpu", weights_only=True
    )
    return found


def reason(error: BaseException, folder: Path) -> str:
    """Why a file could not be written, in the system's words where a library passes them on."""
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        number = int(found[1])
    if number is not None:
        return os.strerror(number)
    if "inline_container" in str(error) and folder.exists():  # torch.save, which keeps no number
        free = shutil.disk_usage(folder).free / 2**20
        return f"the system took only a part of a file; {free:,.0f} MiB are free there"
    return str(error).splitlines()[0]
