"""`manylora init` and `manylora data`: a recipe from a person's files, and what it trains on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from contending import named
from manylora.recipe import load_recipe
from test_cli import command


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """One CSV file whose column `category` names the task, with a column that nobody reads."""
    file = tmp_path / "talks.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["question", "answer", "category", "id"])
        for i in range(40):
            writer.writerow([f"what is {i}?", "odd" if i % 2 else "even", ("a", "b")[i % 4 > 0], i])
    return file


def plain(text: str) -> str:
    return " ".join(text.split())


def test_init_writes_a_recipe_that_data_and_train_take(
    talks: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    done = command("init", talks, "--output", file, "--model", tiny_folder)
    assert done.returncode == 0, done.stderr
    text = file.read_text()
    assert "task: category" in text  # the column that names the tasks was found
    assert "# 2 tasks to train on: a (9 rows), b (27 rows)" in text
    recipe = load_recipe(file)
    assert (recipe.data, recipe.fields.task) == (str(talks), "category")
    assert 64 <= recipe.max_length <= 256
    small = ["max_length=200"]
    seen = command("data", file, *small)
    assert seen.returncode == 0, seen.stderr
    said = plain(seen.stdout)
    assert "2 tasks │ 36 │" in said
    assert "column not read: id (in 1 file)" in said
    more = ["train.max_steps=2", "evaluate.rows_per_task=2", f"output={tmp_path / 'run'}"]
    done = command("train", file, *small, *more)
    assert done.returncode == 0, done.stderr


def test_a_recipe_from_init_leaves_each_method_its_own_shape(
    talks: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    done = command("init", talks, "--output", file, "--model", tiny_folder)
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(file)
    methods = ["lora", "multilora", "hydralora", "rslora"]
    said = recipe.adapter.model_dump(exclude_unset=True)
    alphas = {each.name: each.config.lora_alpha for each in named(*methods, **said)}
    ours = {each.name: each.config.lora_alpha for each in named(*methods)}
    assert alphas == ours
    assert len(set(alphas.values())) > 1  # of different ranks, so one alpha would favour some
    trained = recipe.config(tasks=2)
    assert (trained.lora_alpha, trained.r, trained.branches_of().count) == (16, 8, 3)
    lora = load_recipe(file, ["adapter.method=lora"]).config(tasks=2)
    assert (lora.lora_alpha, lora.branches_of().count) == (16, 1)


def test_init_does_not_overwrite(talks: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("keep")
    done = command("init", talks, "--output", tmp_path / "mine.yaml")
    assert done.returncode == 1
    assert "exists; give another name with --output" in plain(done.stderr)
    assert (tmp_path / "mine.yaml").read_text() == "keep"


def test_init_of_uneven_tasks_proposes_balance(tiny_folder: Path, tmp_path: Path) -> None:
    for name, rows in (("few", 3), ("many", 90)):
        lines = [json.dumps({"prompt": f"{i}?", "completion": "yes"}) for i in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    done = command("init", tmp_path, "--output", tmp_path / "r.yaml", "--model", tiny_folder)
    assert done.returncode == 0, done.stderr
    assert load_recipe(tmp_path / "r.yaml").mixture.strategy == "balanced"


def test_data_marks_what_is_learned_of_every_turn(tiny_folder: Path, tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "uno"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "dos"},
        ]
    }
    other = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = tmp_path / "talk.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in [row, other, row]))
    (tmp_path / "test").mkdir()
    (tmp_path / "train").mkdir()
    file.rename(tmp_path / "train" / "talk.jsonl")
    (tmp_path / "test" / "talk.jsonl").write_text(json.dumps(row))
    done = command("data", f"data={tmp_path}", f"model={tiny_folder}", "--task", "talk")
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "talk.jsonl:1" in said
    assert "learned (4): u│n│o│<|end|>" in said
    assert "learned (4): d│o│s│<|end|>" in said
    assert "read (" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "nothing"], "no task 'nothing' in the data; it has"),
        (["--task", "colour", "--row", "999"], "there is no row 999"),
    ],
)
def test_data_refuses_what_is_not_there(
    tiny_folder: Path, task_folder: Path, options: list[str], message: str
) -> None:
    done = command("data", f"data={task_folder}", f"model={tiny_folder}", *options)
    assert done.returncode == 1
    assert message in plain(done.stderr)
