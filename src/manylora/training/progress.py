"""What a training run tells while it runs: the time left, metrics.jsonl, dead gradients."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from manylora.adapter.training import dead_gradients
from manylora.run import peak_memory
from manylora.training.checkpoints import sync, write_atomically


class MetricsFile(TrainerCallback):
    """One JSON line for each logged step; losses are those since the line before.

    grad_norm, grad_norms (of each part): of that step, before clipping. peak_memory_bytes: since
    the process began (GPU where there is one, else resident). kwh: of cpu, gpu and ram since the
    training began, where the recipe has it measured.
    """

    trainer: Any

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = self.last = time.perf_counter()
        self.last_tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()
        self.started = self.last - self.trainer.seconds
        if self.path.exists():
            kept = lines_until(self.path, state.global_step)
            write_atomically(self.path, "".join(kept))
            counted = [json.loads(line).get("tokens", 0) for line in kept]  # validation has none
            self.last_tokens = max(counted, default=0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.trainer.gather_sums()
        losses = self.trainer.read_task_losses()
        if not state.is_world_process_zero:
            return
        now, tokens = time.perf_counter(), self.trainer.tokens
        line = {
            "step": state.global_step,
            "seconds": round(now - self.started, 3),
            "loss": finite(logs["loss"]),
            "learning_rate": logs["learning_rate"],
            "grad_norm": finite(logs.get("grad_norm", 0.0)),
            "grad_norms": {
                part: finite(float(f"{norm:.6g}"))
                for part, norm in self.trainer.gradient_norms.items()
            },
            "tokens": tokens,
            "tokens_per_second": round((tokens - self.last_tokens) / (now - self.last), 1),
            "tasks": {
                task: {"loss": finite(loss / count), "tokens": count}
                for task, (loss, count) in losses.items()
            },
            "peak_memory_bytes": peak_memory(args.device),
        }
        if self.trainer.kwh:
            line["kwh"] = self.trainer.kwh
        self.last, self.last_tokens = now, tokens
        for task, (loss, count) in losses.items():
            logs[f"tasks/{task}"] = loss / count
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.path.exists():
            sync(self.path)


def lines_until(path: Path, step: int) -> list[str]:
    """The lines of the steps so far: later ones are done again, and a kill may have cut one off."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            logged = json.loads(line)["step"]
        except ValueError:
            break
        if logged > step or not line.endswith("\n"):
            break
        kept.append(line)
    return kept


class GradientCheck(TrainerCallback):
    """Has every branch and router got a gradient? Names those without, in the first steps.

    Warm-up may leave the weights where they are at the first step, so the third is the first in
    which every tensor can be reached. Branches chosen by task are checked in the steps that have
    an example of theirs.
    """

    STEPS = 3
    trainer: Any

    def __init__(self, adapter: str, console: Console) -> None:
        self.adapter, self.console = adapter, console

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_ids.clear()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step >= self.STEPS:
            return
        found = dead_gradients(model, self.adapter, self.trainer.step_ids)
        known = self.trainer.dead
        known += [name for name in found if name not in known]
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            self.console.print(
                f"[bold yellow]step {state.global_step + 1}: no gradient in "
                f"{', '.join(found[:5])}{more}; these do not learn. Is the layer used by the "
                "model, and is the loss finite?"
            )


class ProgressBar(TrainerCallback):
    """Steps done, the last loss, and the time left."""

    def __init__(self, console: Console) -> None:
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.bar.add_task("training", total=state.max_steps, loss="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.update(self.task, loss=f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back; an error may have left the bar running."""
        self.bar.stop()


def finite(value: Any) -> float | None:
    """JSON has no NaN; a lost loss is null, and the report says so."""
    number = float(value)
    return number if math.isfinite(number) else None
