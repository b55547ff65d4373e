"""What can end a run, in one message each: a signal, a full disk, lost numbers, a small memory."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import manylora.train
import manylora.training.prepare
from killing import assert_same_result, changes_of, timeless
from manylora.evaluate.held_out import Scorer
from manylora.recipe import Recipe, parse_recipe
from manylora.train import train
from manylora.training.checkpoints import last_checkpoint
from manylora.training.interrupts import Interrupted, Interrupts
from manylora.training.keeping import RunError
from manylora.training.out_of_memory import Batch
from manylora.training.trainer import AnswerTrainer, RunTrainer
from test_cli import command

Make = Callable[..., Recipe]
Inputs = dict[str, Any]


@pytest.fixture
def recipe(make_recipe: Make) -> Recipe:
    return ten_steps(make_recipe, "run")


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, task_folder: Path
) -> Path:
    """What the run would have come to."""
    values = TEN_STEPS | {"model": str(tiny_folder), "data": str(task_folder)}
    return train(parse_recipe(values | {"output": str(tmp_path_factory.mktemp("whole") / "run")}))


TEN_STEPS: dict[str, Any] = {
    "holdout": 0.2,
    "adapter": {"r": 4, "lora_dropout": 0.2},
    "train": {
        "max_steps": 10,
        "learning_rate": 0.02,
        "warmup": 0,
        "log_every": 2,
        "checkpoint_every": 3,
        "precision": "fp32",
        "workers": 0,
    },
    "evaluate": {"rows_per_task": 6},
}


def ten_steps(make: Make, output: str, **train: object) -> Recipe:
    plain = make(output)
    values = TEN_STEPS | {"model": plain.model, "data": plain.data, "output": plain.output}
    return parse_recipe(values | {"train": TEN_STEPS["train"] | train})


@contextmanager
def before_step(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Do something when that step's forward pass begins, once."""
    whole = RunTrainer.compute_loss
    done: list[int] = []

    def compute_loss(self: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1 and not done:
            done.append(step)
            act()
        return whole(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "compute_loss", compute_loss)
        yield
    assert done, f"step {step} never came"


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*args: object, **kwargs: object) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_finishes_the_step_saves_it_and_says_how_to_go_on(
    recipe: Recipe, undisturbed: Path, number: int, code: int
) -> None:
    with before_step(5, send(number)):
        done = command("train", *changes_of(recipe.model_dump(mode="json")))
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert f"{recipe.run}/checkpoints/checkpoint-5 is kept" in done.stderr
    assert f"go on from step 5 with `manylora train {recipe.run} --resume`" in done.stderr
    again = command("train", recipe.run, "--resume")
    assert again.returncode == 0, again.stderr
    assert_same_result(undisturbed, recipe.run)


def test_the_second_ctrl_c_stops_at_once(recipe: Recipe, undisturbed: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with before_step(5, twice), pytest.raises(Interrupted, match=r"Ctrl-C.*checkpoint-3 is kept"):
        train(recipe)
    assert_same_result(undisturbed, train(recipe, resume=True))


def test_ctrl_c_while_reading_or_scoring_stops_at_once(recipe: Recipe) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manylora.training.prepare, "read_corpus", lambda *args: send(signal.SIGINT)())
        with pytest.raises(Interrupted, match="holds nothing of the run"):
            train(recipe)
    assert not recipe.run.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "base", lambda *args: send(signal.SIGINT)())
        with pytest.raises(Interrupted, match="No checkpoint is written yet"):
            train(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "adapter", lambda *args: send(signal.SIGTERM)())
        with pytest.raises(Interrupted, match=r"SIGTERM.*checkpoint-10 is kept"):
            train(recipe, resume=True)


def test_a_signal_in_the_last_step_leaves_only_the_scoring(
    recipe: Recipe, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with before_step(10, send(signal.SIGTERM)), pytest.raises(Interrupted, match="step 10"):
        train(recipe)
    monkeypatch.setattr(RunTrainer, "training_step", raising(AssertionError("trained again")))
    assert_same_result(undisturbed, train(recipe, resume=True))


def test_handlers_are_given_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGTERM) is not before
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGHUP, ignored)


def test_a_run_in_another_thread_leaves_the_signals_alone(recipe: Recipe) -> None:
    thread = threading.Thread(target=train, args=(recipe, Console(file=io.StringIO())))
    thread.start()
    thread.join()
    assert (recipe.run / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("size", "why"),
    [
        (3_000, "File too large"),
        (12_000, "File too large"),
        (50_000, "the system took only a part of a file; .* MiB are free there"),
    ],
)
def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_one(
    recipe: Recipe, undisturbed: Path, size: int, why: str
) -> None:
    """The system refuses larger files: the configuration, the adapter's, or the optimiser's."""
    lifted = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (size, lifted[1])
    with before_step(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)):
        try:
            with pytest.raises(RunError) as error:
                train(recipe)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, lifted)
    message = str(error.value)
    assert re.search(f"checkpoint-6 cannot be written: {why}", message)
    assert "checkpoint-3 is kept; go on from step 3 with `manylora train" in message
    assert set(os.listdir(recipe.run / "checkpoints")) == {"checkpoint-3", "before.json"}
    assert_same_result(undisturbed, train(recipe, resume=True))


def test_last_files_that_do_not_fit_leave_the_run_unfinished(
    recipe: Recipe, undisturbed: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(manylora.train, "write_card", raising(full))
        with pytest.raises(RunError, match=r"No space left.*checkpoint-10 is kept; go on"):
            train(recipe)
    assert not (recipe.run / "adapter_config.json").exists()
    assert_same_result(undisturbed, train(recipe, resume=True))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(manylora.train, "prepare", raising(AssertionError("loaded")))
    refused = OSError(number, os.strerror(number))
    monkeypatch.setattr(tempfile, "TemporaryFile", raising(refused))
    with pytest.raises(OSError, match=f"cannot be written: {os.strerror(number)}.*output=FOLDER"):
        train(recipe)


def test_a_file_in_the_place_of_the_run_folder_is_refused(recipe: Recipe) -> None:
    recipe.run.write_text("mine")
    with pytest.raises(OSError, match=r"cannot be written: File exists.*output=FOLDER"):
        train(recipe)
    assert recipe.run.read_text() == "mine"


def test_removed_checkpoints_are_written_anew(recipe: Recipe, undisturbed: Path) -> None:
    with before_step(5, lambda: shutil.rmtree(recipe.run / "checkpoints")):
        train(recipe)
    assert_same_result(undisturbed, recipe.run)


def test_a_removed_run_folder_ends_the_run(recipe: Recipe) -> None:
    with (
        before_step(5, lambda: shutil.rmtree(recipe.run)),
        pytest.raises(RunError, match=r"No such file.*holds nothing of the run; start it again"),
    ):
        train(recipe)


def test_removed_data_is_said_with_what_is_kept(recipe: Recipe, tmp_path: Path) -> None:
    data = shutil.copytree(recipe.data, tmp_path / "data")
    recipe.data = str(data)
    with before_step(5, send(signal.SIGTERM)), pytest.raises(Interrupted):
        train(recipe)
    shutil.rmtree(data)
    with pytest.raises(RunError, match=r"data.*checkpoint-5 is kept; go on from step 5"):
        train(recipe, resume=True)


def poisoned(
    poison: Callable[[Tensor, Any], Tensor], call: int, rows: list[str]
) -> Callable[..., Any]:
    """RunTrainer.compute_loss with a loss that is spoilt at one call; notes the rows of that."""
    whole, calls = RunTrainer.compute_loss, [0]

    def compute_loss(self: RunTrainer, model: Any, inputs: Inputs, *args: Any, **kw: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            rows.extend(inputs["sources"])
        loss = whole(self, model, inputs, *args, **kw)
        return poison(loss, model) if calls[0] == call else loss

    return compute_loss


def infinite_slope(loss: Tensor, model: Any) -> Tensor:
    weight = next(p for p in model.parameters() if p.requires_grad)
    return loss + (weight.sum() * 0).abs().sqrt()


@pytest.mark.parametrize(
    ("poison", "named"),
    [
        (lambda loss, model: loss * float("nan"), "the loss is nan"),
        (lambda loss, model: loss * float("inf"), "the loss is inf"),
        (infinite_slope, "the gradient's norm is nan"),
    ],
    ids=["nan", "inf", "gradient"],
)
def test_lost_numbers_stop_the_run_before_they_reach_the_weights(
    recipe: Recipe, undisturbed: Path, poison: Callable[[Tensor, Any], Tensor], named: str
) -> None:
    """What is kept is the state before that step, to the bit: resumed, it equals undisturbed."""
    rows: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "compute_loss", poisoned(poison, 6, rows))
        with pytest.raises(RunError) as error:
            train(recipe)
    message = str(error.value)
    assert len(rows) == 8
    assert f"step 6: {named} in the batch of {', '.join(rows)};" in message
    assert "checkpoint-5 is kept, the state before that step" in message
    assert "start_from=" in message and "train.learning_rate=0.005" in message
    assert last_checkpoint(recipe.run) == recipe.run / "checkpoints" / "checkpoint-5"
    assert_same_result(undisturbed, train(recipe, resume=True))


def test_lost_numbers_in_one_part_of_a_step_name_that_part(make_recipe: Make) -> None:
    recipe = ten_steps(make_recipe, "run", batch_size=4, gradient_accumulation=2)
    rows: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        spoilt = poisoned(lambda loss, _: loss * float("nan"), 9, rows)
        patch.setattr(RunTrainer, "compute_loss", spoilt)
        with pytest.raises(RunError, match="step 5: the loss is nan") as error:
            train(recipe)
    assert len(rows) == 4
    assert f"in the batch of {', '.join(rows)};" in str(error.value)


def test_lost_numbers_in_the_first_step_keep_nothing(recipe: Recipe) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "compute_loss", poisoned(lambda loss, _: loss / 0, 1, []))
        with pytest.raises(RunError, match=r"step 1: the loss is inf.*Nothing was learned"):
            train(recipe)
    assert last_checkpoint(recipe.run) is None


def small_memory(rows: int, from_call: int = 0) -> Callable[..., Any]:
    """A training loss for which more rows than that are too many."""
    whole, calls = AnswerTrainer.compute_loss, [0]

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if len(inputs["input_ids"]) > rows and calls[0] > from_call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, model, inputs, *args, **kwargs)

    return compute_loss


def test_too_little_memory_halves_the_batch_and_keeps_the_step(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = train(ten_steps(make_recipe, "small", batch_size=2, gradient_accumulation=4))
    monkeypatch.setattr(AnswerTrainer, "compute_loss", small_memory(rows=3))
    console = Console(file=io.StringIO(), width=1000)
    halved = train(ten_steps(make_recipe, "halved"), console)
    assert_same_result(small, halved)
    assert "train.batch_size=8; going on with 4" in console.file.getvalue()
    assert "train.batch_size=4; going on with 2" in console.file.getvalue()
    summary = json.loads((halved / "summary.json").read_text())
    assert (summary["batch_size"], summary["gradient_accumulation"]) == (2, 4)


def test_too_little_memory_later_goes_on_from_the_last_checkpoint(
    make_recipe: Make, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AnswerTrainer, "compute_loss", small_memory(rows=4, from_call=7))
    recipe = ten_steps(make_recipe, "halved")
    with before_step(9, send(signal.SIGTERM)), pytest.raises(Interrupted):
        train(recipe)
    run = train(recipe, resume=True)
    monkeypatch.undo()
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["batch_size"], summary["gradient_accumulation"]) == (4, 2)
    lines = [timeless(folder) for folder in (undisturbed, run)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    assert lines[0][:3] == lines[1][:3], "the steps before the checkpoint are the same ones"
    assert lines[0][-1]["tokens"] == lines[1][-1]["tokens"]
    assert lines[0][-1]["learning_rate"] == lines[1][-1]["learning_rate"]


def test_too_little_memory_for_one_row_is_an_error_with_advice(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AnswerTrainer, "compute_loss", small_memory(rows=0))
    with pytest.raises(RunError, match=r"gradient_checkpointing=true.*quantize=4bit.*max_length"):
        train(recipe)


@pytest.mark.parametrize(
    ("batch", "smaller"),
    [(Batch(8, 1), Batch(4, 2)), (Batch(9, 2), Batch(3, 6)), (Batch(7, 1), Batch(1, 7))],
)
def test_smaller_batches_divide_the_step_without_a_rest(batch: Batch, smaller: Batch) -> None:
    assert batch.smaller() == smaller
    assert smaller.size * smaller.accumulation == batch.size * batch.accumulation


def test_one_row_is_the_smallest_batch() -> None:
    assert Batch(1, 8).smaller() is None


def test_the_weights_of_a_stopped_run_are_a_loadable_adapter(recipe: Recipe) -> None:
    with before_step(5, send(signal.SIGTERM)), pytest.raises(Interrupted):
        train(recipe)
    kept = load_file(str(recipe.run / "checkpoints/checkpoint-5/adapter_model.safetensors"))
    assert kept and all(tensor.isfinite().all() for tensor in kept.values())
