"""Whole runs on clusters of prompts: branches, scores, resuming, what the run folder keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import manylora
from clustered import TASKS, Make, quiet, rows_of, said, write
from killing import assert_same_result
from manylora.discovery.result import read_discovery
from manylora.evaluate.held_out import evaluate_run
from manylora.export import export_lora
from manylora.predict import predict_file
from manylora.recipe import Recipe, load_recipe
from manylora.run import config_of
from manylora.train import train
from manylora.training import clusters
from manylora.training.keeping import RunError
from manylora.training.trainer import RunTrainer
from test_cli import command
from test_ranks import both

pytest_plugins = ("clustered",)


@pytest.fixture
def one_hot(make: Make) -> Path:
    return train(make(adapter={"method": "branch_per_cluster", "shared_rank": 2}))


def test_each_cluster_has_a_branch_scores_and_the_prompts_that_are_like_it(
    one_hot: Path, tmp_path: Path
) -> None:
    found = read_discovery(one_hot / "discovery")
    scores = json.loads((one_hot / "scores.json").read_text())["tasks"]
    assert list(scores) == found.names
    for score in scores.values():
        assert score["after"]["nll"][0] < score["before"]["nll"][0]
    model, _ = manylora.load(one_hot)
    config = config_of(model)
    assert config.num_branches == len(TASKS)
    assert config.branch_selector.names == found.names
    new = [row for task, (count, _, _) in TASKS.items() for row in rows_of(task, count + 4)[-4:]]
    answers = predict_file(one_hot, write(tmp_path / "ask.jsonl", new), max_new_tokens=1)
    # Cluster 1 is the largest, and TASKS are in the order of their sizes.
    right = [name for name in found.names for _ in range(4)]
    sent = [answer["branch"] for answer in answers]
    assert set(zip(sent, right, strict=True)) <= {(n, r) for r in right for n in (r, None)}
    assert sent.count(None) <= 1
    exports = export_lora(one_hot, tmp_path / "export")
    assert sorted(Path(done.path).name for done in exports) == sorted([*found.names, "shared"])


def test_a_run_is_scored_again_with_its_own_clusters(
    one_hot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (one_hot / "scores.json").read_bytes()
    moved = tmp_path / "moved"
    one_hot.rename(moved)
    monkeypatch.setattr(clusters, "_discovered", lambda *args: pytest.fail("looked again"))
    evaluate_run(moved, quiet())
    assert (moved / "scores.json").read_bytes() == before
    shutil.rmtree(moved / "discovery")
    with pytest.raises(ValueError, match="not there any more"):
        evaluate_run(moved, quiet())


def test_data_of_a_run_shows_its_own_clusters(
    one_hot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = one_hot / "discovery" / "discovery.json"
    found = json.loads(kept.read_text())
    for cluster in found["clusters"]:
        cluster["name"] += "_of_this_run"
    kept.write_text(json.dumps(found))
    monkeypatch.setattr(clusters, "_discovered", lambda *args: pytest.fail("looked again"))
    done = command("data", one_hot, "mixture=balanced")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("33.3%") == len(TASKS)
    for name in read_discovery(one_hot / "discovery").names:
        assert name.endswith("_of_this_run")
        assert f"{name}, all.jsonl:" in done.stdout
    assert f"{one_hot / 'discovery'}: 3 clusters in" in " ".join(done.stderr.split())
    shutil.rmtree(one_hot / "discovery")
    done = command("data", one_hot)
    assert done.returncode == 1 and "not there any more" in " ".join(done.stderr.split())


def test_data_of_a_run_with_other_rows_looks_for_their_clusters(
    one_hot: Path, tmp_path: Path
) -> None:
    other = write(tmp_path / "other.jsonl", [*rows_of("sum", 40), *rows_of("city", 40)])
    done = command("data", one_hot, f"data={other}", "discovery.clusters=2")
    assert done.returncode == 0, done.stderr
    assert "2 clusters in" in done.stderr and str(one_hot / "discovery") not in done.stderr
    assert "all.jsonl" not in done.stdout
    named = command("data", one_hot, "tasks=named")
    assert named.returncode == 0 and "all, all.jsonl:" in named.stdout


def test_auto_becomes_the_number_of_clusters_in_the_saved_recipe(make: Make) -> None:
    console = quiet()
    run = train(make(tasks="named", adapter={"num_branches": "auto"}), console)
    assert load_recipe(run).num_branches == len(TASKS)
    model, _ = manylora.load(run)
    assert config_of(model).num_branches == len(TASKS)
    assert list(json.loads((run / "scores.json").read_text())["tasks"]) == ["all"]
    found = read_discovery(run / "discovery")
    text = said(console)
    assert f"3 clusters in {found.documents} documents ({found.chosen_by})" in text
    assert "num_branches: 3." in text
    assert not found.disagreement or " ".join(found.disagreement.split()) in text


@pytest.mark.parametrize("method", ["hydralora", "multilora", "lora_split", "lora_moe"])
def test_a_corpus_in_one_piece_gets_one_branch_and_trains(
    make: Make, method: str, tmp_path: Path
) -> None:
    write(tmp_path / "one.jsonl", rows_of("sum"))
    console = quiet()
    recipe = make(
        data=str(tmp_path / "one.jsonl"),
        adapter={"method": method, "num_branches": "auto"},
        discovery={"clusters": 1},
    )
    run = train(recipe, console)
    assert load_recipe(run).num_branches == 1
    assert "one branch is likely enough" in said(console) and "num_branches: 1." in said(console)
    assert json.loads((run / "summary.json").read_text())["dead_gradients"] == []


def stopped(recipe: Recipe, step: int) -> None:
    whole = RunTrainer.compute_loss

    def compute_loss(self: RunTrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == step - 1:
            raise RuntimeError("stopped here")
        return whole(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "compute_loss", compute_loss)
        with pytest.raises(RunError, match="stopped here"):
            train(recipe)


@pytest.mark.parametrize(
    "adapter", [{"method": "branch_per_cluster"}, {"num_branches": "auto"}], ids=str
)
def test_a_resumed_run_keeps_its_clusters_and_equals_undisturbed(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    changes = {"adapter": adapter, "mixture": "balanced", "train": {"checkpoint_every": 2}}
    whole = train(make("whole", **changes))
    recipe = make("stopped", **changes)
    stopped(recipe, 5)
    kept = (recipe.run / "discovery" / "discovery.json").read_bytes()
    monkeypatch.setattr(clusters, "_discovered", lambda *args: pytest.fail("looked again"))
    moved = tmp_path / "moved"
    recipe.run.rename(moved)
    train(load_recipe(moved, [f"output={moved}"]), resume=True)
    assert_same_result(whole, moved)
    assert (moved / "discovery" / "discovery.json").read_bytes() == kept


def test_the_recipe_as_it_was_written_resumes_too(make: Make) -> None:
    """With the word `auto` in it, where the run's own recipe has the number."""
    recipe = make(adapter={"num_branches": "auto"}, train={"checkpoint_every": 2})
    stopped(recipe, 5)
    train(recipe, resume=True)
    assert load_recipe(recipe.run).num_branches == len(TASKS)


def test_a_resumed_run_whose_data_changed_says_so(make: Make, data: Path) -> None:
    recipe = make(train={"checkpoint_every": 2})
    stopped(recipe, 5)
    write(data, [*rows_of("sum"), {"instruction": "New?", "input": "a new row", "output": "no"}])
    with pytest.raises(RunError, match=r"the data are not what they were"):
        train(recipe, resume=True)


def test_a_start_killed_between_its_discovery_and_its_recipe_starts_again(make: Make) -> None:
    recipe = make()
    (recipe.run / "discovery").mkdir(parents=True)
    (recipe.run / ".recipe.yaml.partial").mkdir()
    (recipe.run / ".recipe.yaml.partial" / "recipe.yaml").write_text("model: half")
    train(recipe, resume=True)
    assert read_discovery(recipe.run / "discovery").k == len(TASKS)
    assert not [path for path in recipe.run.iterdir() if path.name.startswith(".")]


def test_a_stopped_run_keeps_its_clusters_when_it_is_refused(make: Make) -> None:
    recipe = make()
    stopped(recipe, 5)
    (recipe.run / ".recipe.yaml.partial").mkdir()  # of a resumed start that was killed
    with pytest.raises(FileExistsError, match="--resume"):
        train(recipe)
    assert read_discovery(recipe.run / "discovery").k == len(TASKS)


def test_a_discovery_alone_in_the_run_folder_is_not_removed(make: Make) -> None:
    recipe = make()
    (recipe.run / "discovery").mkdir(parents=True)
    (recipe.run / "discovery" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        train(recipe)
    assert (recipe.run / "discovery" / "mine.txt").read_text() == "keep"


def test_a_folder_gives_the_clusters_it_has(make: Make, folder: Path) -> None:
    names = read_discovery(folder).names
    run = train(make(tasks=str(folder), adapter={"num_branches": "auto"}))
    assert list(json.loads((run / "scores.json").read_text())["tasks"]) == names
    assert load_recipe(run).num_branches == len(TASKS)
    shutil.rmtree(folder)  # the run has what it needs of it
    evaluate_run(run, quiet())


def test_two_processes_train_on_the_same_clusters(make: Make, tmp_path: Path) -> None:
    adapter = {"method": "branch_per_cluster", "shared_rank": 2}
    alone = train(make("alone", adapter=adapter, train={"batch_size": 8}))
    found = sorted((tmp_path / "cache" / "discoveries").glob("*/"))
    shutil.rmtree(tmp_path / "cache" / "discoveries")
    recipe = make("both", adapter=adapter, train={"batch_size": 4})
    both(recipe, tmp_path / "seen")
    again = sorted((tmp_path / "cache" / "discoveries").glob("*/"))
    assert again == found and len(again) == 1
    first = load_file(str(alone / "adapter_model.safetensors"))
    second = load_file(str(recipe.run / "adapter_model.safetensors"))
    assert all(torch.allclose(first[key], second[key], atol=5e-3) for key in first)
