"""Runs that are killed: a process that has imported everything forks one child for each run.

Importing takes seconds and a tiny run one, so a test of many kills asks the warm process:

    with Warm() as warm:
        ended = warm.run(changes, kill={"after": 0.7})    # SIGKILL after 0.7 s
        ended = warm.run(changes, kill={"at": "save 6"})  # in the middle of a file of checkpoint-6
        ended = warm.run(changes, resume=True)

Each run tells its phase through memory that it shares with the warm process.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHARED = 64
SLOW_WRITE = 0.02


@dataclass
class Ended:
    """code: negative for a signal; phase: what the run was doing then; error: its traceback."""

    code: int
    phase: str
    step: int
    seconds: float
    error: str


class Warm:
    """The warm process, from the side of a test."""

    def __enter__(self) -> Warm:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(
        self, changes: list[str], resume: bool = False, kill: dict[str, Any] | None = None
    ) -> Ended:
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"changes": changes, "resume": resume, "kill": kill or {}}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))


def changes_of(values: dict[str, Any], prefix: str = "") -> list[str]:
    """A recipe's values as `key.sub=value`."""
    changes = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            changes += changes_of(value, f"{prefix}{key}.")
        else:
            changes.append(f"{prefix}{key}={json.dumps(value)}")
    return changes


def assert_same_result(first: Path, second: Path) -> None:
    """The same weights, scores and log, bit for bit; only times may differ.

    On a GPU no two runs are equal to the bit, so only steps and tokens are compared there.
    """
    import torch
    from safetensors.torch import load_file

    logs = [timeless(run) for run in (first, second)]
    for key in ("step", "tokens"):
        assert [line.get(key) for line in logs[0]] == [line.get(key) for line in logs[1]]
    ours, theirs = (load_file(run / "adapter_model.safetensors") for run in (first, second))
    assert ours.keys() == theirs.keys()
    tokens = [
        json.loads((run / "summary.json").read_text())["train_tokens"] for run in (first, second)
    ]
    assert tokens[0] == tokens[1]
    for name in ("scores.json", "routing.json"):
        assert (first / name).is_file() == (second / name).is_file(), name
        if (first / name).is_file() and not torch.cuda.is_available():
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
    if not torch.cuda.is_available():
        assert [name for name in ours if not ours[name].equal(theirs[name])] == []
        assert logs[0] == logs[1]


def timeless(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock and the process's memory say."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "tokens_per_second", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


class Phase:
    """What the run is doing, and at which step, written where the parent can read it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, SHARED)

    def set(self, phase: str, step: int) -> None:
        self.memory[:] = json.dumps([phase, step]).ljust(SHARED).encode()

    def get(self) -> tuple[str, int]:
        phase, step = json.loads(bytes(self.memory))
        return phase, step


def watch(phase: Phase, kill_at: str) -> None:
    """In the child: tell the phase, write slowly, and die at the given point."""
    import torch

    import manylora.train as train
    import manylora.training.checkpoints as checkpoints
    from manylora.training.survival import SurvivalMixin

    def during(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, step = phase.get()
            phase.set(name, step)
            try:
                return function(*args, **kwargs)
            finally:
                phase.set(before, phase.get()[1])

        return call

    def die_at(point: str) -> None:
        if point == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    class Steps(train.ProgressBar):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            phase.set("training", state.global_step)
            die_at(f"step {state.global_step}")
            super().on_step_end(args, state, control, **kwargs)

    def slow_save(value: Any, path: Any) -> None:
        whole = io.BytesIO()
        plain_save(value, whole)
        half = len(whole.getvalue()) // 2
        with Path(path).open("wb") as file:
            file.write(whole.getvalue()[:half])
            file.flush()
            time.sleep(SLOW_WRITE)
            if Path(path).name == "optimizer.pt":
                die_at(f"save {phase.get()[1]}")
            file.write(whole.getvalue()[half:])

    def slow_replace(source: Any, target: Any, **kwargs: Any) -> None:
        time.sleep(SLOW_WRITE / 4)
        if ".finished.partial" in str(source):
            die_at(f"final {Path(target).name}")
        plain_replace(source, target, **kwargs)

    plain_save, plain_replace = torch.save, os.replace
    torch.save, os.replace = slow_save, slow_replace
    train.ProgressBar = Steps
    train.prepare = during("preparing", train.prepare)
    train.scores_before = during("scoring before", train.scores_before)
    SurvivalMixin._save_checkpoint = during("saving", SurvivalMixin._save_checkpoint)
    train.fit = during("training", train.fit)
    train.publish_files = during("final files", train.publish_files)
    checkpoints.prune = during("pruning", checkpoints.prune)
    train.Scorer.adapter = during("scoring after", train.Scorer.adapter)


def run_child(request: dict[str, Any], phase: Phase, error: int) -> None:
    """Never returns."""
    from rich.console import Console

    from manylora.recipe import load_recipe
    from manylora.train import train

    try:
        watch(phase, request["kill"].get("at", ""))
        recipe = load_recipe(None, request["changes"])
        train(recipe, Console(file=io.StringIO()), request["resume"])
    except BaseException:
        os.write(error, traceback.format_exc().encode()[-4000:])
        os._exit(1)
    os._exit(0)


def serve() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    import manylora.train  # noqa: F401  the imports that are worth keeping

    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    for line in sys.stdin:
        request = json.loads(line)
        phase = Phase()
        phase.set("starting", 0)
        read, write = os.pipe()
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            run_child(request, phase, write)
        os.close(write)
        if after := request["kill"].get("after"):
            ended = wait(child, after)
            if ended is None:
                os.kill(child, signal.SIGKILL)
        with open(read, encoding="utf-8", errors="replace") as errors:
            error = errors.read()
        if not after or ended is None:
            ended = os.waitpid(child, 0)[1]
        code = os.waitstatus_to_exitcode(ended)
        name, step = phase.get()
        reply = Ended(code, name, step, time.perf_counter() - started, error)
        os.write(replies, (json.dumps(asdict(reply)) + "\n").encode())


def wait(child: int, seconds: float) -> int | None:
    """The child's status when it ends within that time."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.001)
    return None


if __name__ == "__main__":
    serve()
