"""A run that stopped goes on to the result that it would have had, from whole checkpoints alone."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import manylora.training.survival
from killing import Warm, assert_same_result, changes_of, timeless
from manylora.evaluate.held_out import Scorer
from manylora.recipe import Recipe, load_recipe, parse_recipe
from manylora.run import recipe_of
from manylora.train import train
from manylora.training.checkpoints import (
    PROGRESS_FILE,
    checkpoints_of,
    last_checkpoint,
    prune,
    publish_files,
    remove_folder,
    write_atomically,
)
from manylora.training.keeping import RunError
from manylora.training.run_folder import run_folder
from manylora.training.trainer import RunTrainer

Make = Callable[..., Recipe]


def with_dropout(make: Make, output: str, **changes: object) -> Recipe:
    """20 steps over one and two thirds of an epoch, logged and saved out of step."""
    values = make(output, method="hydralora", lora_dropout=0.2).model_dump()
    values["train"] |= {
        "max_steps": 20,
        "checkpoint_every": 3,
        "log_every": 4,
        "workers": 1,
        **changes,
    }
    return parse_recipe(values)


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """An error in the middle of that step; the state is then that of a kill."""
    whole = RunTrainer.compute_loss

    def compute_loss(self: RunTrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == step - 1:
            raise RuntimeError("stopped here")
        return whole(self, *args, **kwargs)

    patch.setattr(RunTrainer, "compute_loss", compute_loss)


def stopped_at(recipe: Recipe, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(RunError, match="stopped here"):
            train(recipe)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_killed_again_and_again_equals_undisturbed(make_recipe: Make, tmp_path: Path) -> None:
    """Before the first checkpoint, in the middle of writing one, and among the last files."""
    changes = changes_of(with_dropout(make_recipe, "run").model_dump(mode="json"))
    elsewhere = [*changes, f"output={tmp_path / 'whole'}"]
    run = tmp_path / "run"
    with Warm() as warm:
        whole = warm.run(elsewhere)
        assert whole.code == 0, whole.error
        for resume, point, phase in (
            (False, "step 2", "training"),
            (True, "save 9", "saving"),
            (True, "step 19", "training"),
            (True, "final summary.json", "final files"),
        ):
            ended = warm.run(changes, resume, {"at": point})
            assert (ended.code, ended.phase) == (-9, phase), ended.error
            with pytest.raises(FileNotFoundError, match="--resume"):
                recipe_of(run)
            if point == "save 9":
                assert (run / "checkpoints" / ".checkpoint-9.partial").is_dir()
                assert last_checkpoint(run) == run / "checkpoints" / "checkpoint-6"
        ended = warm.run(changes, resume=True)
    assert ended.code == 0, ended.error
    assert_same_result(tmp_path / "whole", run)
    assert not [path for path in run.rglob("*") if path.name.endswith(".partial")]


@pytest.mark.parametrize("mixture", ["proportional", "balanced"])
def test_stopped_in_the_second_epoch_equals_undisturbed(make_recipe: Make, mixture: str) -> None:
    runs = []
    for output in ("whole", "stopped"):
        values = make_recipe(output, method="branch_per_cluster", lora_dropout=0.2).model_dump()
        values["train"] |= {"max_steps": 26, "checkpoint_every": 7, "log_every": 4}
        runs.append(parse_recipe({**values, "mixture": mixture}))
    stopped_at(runs[1], 18)
    train(runs[1], resume=True)
    assert_same_result(train(runs[0]), runs[1].run)


def test_checkpoints_change_nothing_and_are_written_by_default(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None saves by the clock, here at every step; the plain one only at its end."""
    saved: list[int] = []
    save = RunTrainer._save_checkpoint

    def _save_checkpoint(self: RunTrainer, *args: object) -> None:
        saved.append(self.state.global_step)
        save(self, *args)

    monkeypatch.setattr(RunTrainer, "_save_checkpoint", _save_checkpoint)
    plain = train(with_dropout(make_recipe, "plain", checkpoint_every=None))
    assert saved == [20]
    every = train(with_dropout(make_recipe, "every", checkpoint_every=6))
    assert saved[1:] == [6, 12, 18, 20]
    monkeypatch.setattr(manylora.training.survival, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    clocked = train(with_dropout(make_recipe, "clocked", checkpoint_every=None))
    assert saved[5:] == list(range(1, 21))
    assert_same_result(plain, every)
    assert_same_result(plain, clocked)
    kept = [path.name for path in (clocked / "checkpoints").iterdir()]
    assert kept == ["checkpoint-20"]


def test_resuming_an_unstarted_run_starts_it(make_recipe: Make) -> None:
    console = quiet()
    resumed = train(make_recipe("resumed"), console, resume=True)
    assert "nothing to resume yet; starting from step 0" in said(console)
    assert_same_result(resumed, train(make_recipe("plain")))


def test_resuming_before_the_first_checkpoint_starts_again(make_recipe: Make) -> None:
    recipe = make_recipe("stopped")
    stopped_at(recipe, 5)
    assert timeless(recipe.run)
    console = quiet()
    train(recipe, console, resume=True)
    assert "no checkpoint yet; starting from step 0" in said(console)
    assert_same_result(recipe.run, train(make_recipe("plain")))


def test_stopped_while_scoring_does_not_train_again(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, recipe = train(make_recipe("whole")), make_recipe("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "adapter", lambda *args: (_ for _ in ()).throw(OSError("lost")))
        with pytest.raises(RunError, match=r"step 6.*--resume"):
            train(recipe)
    monkeypatch.setattr(RunTrainer, "training_step", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(Scorer, "base", lambda *args: pytest.fail("scored the base again"))
    assert_same_result(whole, train(recipe, resume=True))


def test_a_finished_run_says_how_to_train_it_further(make_recipe: Make) -> None:
    recipe = make_recipe()
    train(recipe)
    with pytest.raises(FileExistsError, match=r"is finished.*start_from=.*output=NEW"):
        train(recipe, resume=True)


def test_resuming_another_recipe_is_refused(make_recipe: Make) -> None:
    recipe = with_dropout(make_recipe, "run")
    stopped_at(recipe, 8)
    recipe.train.learning_rate = 0.5
    with pytest.raises(ValueError, match="not the one"):
        train(recipe, resume=True)
    recipe.train.learning_rate = 0.02
    recipe.train.checkpoint_every = 1  # what changes no result may change
    train(recipe, resume=True)


def test_a_stopped_run_is_not_overwritten(make_recipe: Make) -> None:
    recipe = with_dropout(make_recipe, "run")
    stopped_at(recipe, 8)
    with pytest.raises(FileExistsError, match="--resume"):
        train(recipe)


def test_a_moved_run_resumes_where_it_is(make_recipe: Make, tmp_path: Path) -> None:
    recipe = with_dropout(make_recipe, "run")
    stopped_at(recipe, 8)
    moved = tmp_path / "moved"
    recipe.run.rename(moved)
    train(load_recipe(moved, [f"output={moved}"]), resume=True)
    assert not recipe.run.exists()
    assert_same_result(moved, train(with_dropout(make_recipe, "whole")))


def test_a_cut_off_line_of_metrics_is_repaired(make_recipe: Make) -> None:
    recipe = with_dropout(make_recipe, "run")
    stopped_at(recipe, 8)
    with (recipe.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    train(recipe, resume=True)
    assert_same_result(recipe.run, train(with_dropout(make_recipe, "whole")))


def test_one_process_at_a_time(make_recipe: Make) -> None:
    recipe = make_recipe()
    with run_folder(recipe.run), pytest.raises(RuntimeError, match="another process"):
        train(recipe)
    train(recipe)


def test_leftovers_of_a_killed_start_do_not_count(make_recipe: Make) -> None:
    recipe = make_recipe()
    (recipe.run / ".recipe.yaml.partial").mkdir(parents=True)
    (recipe.run / ".recipe.yaml.partial" / "recipe.yaml").write_text("model: half")
    run = train(recipe)
    assert not (run / ".recipe.yaml.partial").exists()


def checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / PROGRESS_FILE).write_text("whole")
    return folder


def test_half_written_checkpoints_are_never_the_last_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    whole = checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10).joinpath(PROGRESS_FILE).unlink()
    (tmp_path / "checkpoints" / ".checkpoint-11.partial").mkdir()
    assert last_checkpoint(tmp_path) == whole


def test_the_two_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        checkpoint(tmp_path, step)
    prune(tmp_path)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-10", "checkpoint-12"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_checkpoint_loses_its_name_before_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path, 2)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    remove_folder(folder)
    assert last_checkpoint(tmp_path) is None


def test_a_full_disk_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    write_atomically(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_the_file_that_tells_of_the_others_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    (tmp_path / "new").mkdir()
    for name in ("adapter_config.json", "scores.json", "README.md"):
        (tmp_path / "new" / name).write_text(json.dumps(name))
    publish_files(tmp_path / "new", tmp_path, last="adapter_config.json")
    assert moved == ["README.md", "scores.json", "adapter_config.json"]
    assert not (tmp_path / "new").exists()
