"""Recipes: what is accepted, what is refused and how, and that a saved one is the same again."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from manylora.adapter.config import ManyLoraConfig
from manylora.quickstart import quickstart
from manylora.recipe import AdapterRecipe, Recipe, RecipeError, load_recipe, parse_recipe


def test_data_alone_is_a_recipe() -> None:
    recipe = parse_recipe({"data": "my/tasks"})
    assert recipe.adapter.method == "hydralora"
    assert recipe.config().method == "hydralora"


def test_changes_are_applied_and_typed() -> None:
    recipe = load_recipe(None, ["data=d", "adapter.r=4", "train.learning_rate=2e-3", "seed=7"])
    assert (recipe.adapter.r, recipe.train.learning_rate, recipe.seed) == (4, 0.002, 7)
    assert load_recipe(
        None, ["data=d", "adapter.target_modules=[q_proj]"]
    ).config().target_modules == {"q_proj"}


def test_epochs_given_with_the_command_go_before_the_files_steps(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("data: d\ntrain: {max_steps: 45}\n", encoding="utf-8")
    assert load_recipe(file).train.max_steps == 45
    changed = load_recipe(file, ["train.epochs=2"]).train
    assert (changed.epochs, changed.max_steps) == (2, None)
    both = load_recipe(file, ["train.epochs=2", "train.max_steps=7"]).train
    assert both.max_steps == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("adaptor.r=8", "unknown key 'adaptor'; did you mean 'adapter'?"),
        ("adapter.lora_alpa=8", "unknown key 'adapter.lora_alpa'; did you mean 'lora_alpha'?"),
        ("train.learningrate=1", "did you mean 'learning_rate'?"),
        ("train.zzz=1", "known keys: epochs"),
        ("adapter.r=eight", "adapter.r: .*got 'eight'"),
        ("adapter.r=0", "ranks must be at least 1"),
        ("adapter.method=hydra", "unknown method='hydra'; known methods: lora"),
        ("adapter.lora_dropout=1.5", r"lora_dropout=1.5 must be in \[0, 1\)"),
        ("train.epochs=0", "train.epochs: .*greater than 0"),
        ("dtype=int8", "dtype"),
        ("seed", "'seed' is not key=value"),
        ("train=5", "train"),
        ("train.epochs=.inf", "train.epochs: .*finite number"),
        ("train.learning_rate=.nan", "train.learning_rate: .*finite number"),
        ("train.weight_decay=.inf", "train.weight_decay: .*finite number"),
        ("train.max_grad_norm=inf", "train.max_grad_norm: .*finite number"),
        ("train.max_grad_norm=-1", "train.max_grad_norm: .*greater than 0"),
        ("seed=4294967296", "seed: .*less than 4294967296"),
        ("seed=99999999999999999999", "'seed=9+': .*more than 63 bits"),
        ("seed=true", "seed: true is no number"),
        ("adapter.r=true", "adapter.r: true is no number"),
        ("adapter.num_branches=false", "adapter.num_branches: false is no number"),
        ("adapter.lora_alpha=.inf", "adapter.lora_alpha=inf must be a finite number above 0"),
        ("adapter.lora_alpha=0", "adapter.lora_alpha=0 must be a finite number above 0"),
        ("adapter.alpha_pattern={q: .nan}", "adapter.alpha_pattern.q=nan must be a finite number"),
        ("adapter.balance_weight=-1", "adapter.balance_weight=-1.0 must be a finite number"),
        ("adapter.balance_weight=.nan", "adapter.balance_weight=nan must be a finite number"),
        ("adapter.balance_weight=0.5", "add adapter.balance_loss=cv_squared or switch"),
        ("adapter.dropout_per_branch=true", "set adapter.lora_dropout=0.1, or leave it out"),
        ("data=", "data is empty"),
        ("data=' '", "data is empty"),
        ("data=[]", "data is empty"),
        ("data={}", "data is empty"),
        ("data=[a, '']", "data has an empty entry"),
        ("data={a: b, c: ''}", "data has an empty entry"),
        ("train={epochs: 1, epochs: 2}", "the key 'epochs' is there twice"),
    ],
)
def test_wrong_changes_say_what_and_what_instead(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, ["data=d", change])


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, ["train.epochs=0", "seed=-1", "modle=x"])
    text = str(caught.value)
    for part in ("'data' is missing", "train.epochs", "seed", "did you mean 'model'?"):
        assert part in text


def test_saved_recipe_loads_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(None, ["data=d", "adapter.method=multilora", "train.max_steps=5"])
    recipe.save(tmp_path)
    assert load_recipe(tmp_path) == recipe
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    for name, text in (
        ("list.yaml", b"- a\n"),
        ("broken.yaml", b"a: [1\n"),
        ("bytes", b"\xff\xfe"),
    ):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(RecipeError, match=name):
            load_recipe(tmp_path / name)


def test_a_key_that_is_there_twice_is_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("data: d\ntrain: {epochs: 5}\nseed: 1\ntrain: {batch_size: 2}\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml.* line 4: the key 'train' is there twice"):
        load_recipe(file)
    file.write_text("data: d\ntrain:\n  epochs: 5\n  'epochs': 6\n")
    with pytest.raises(RecipeError, match=r"line 4: the key 'epochs' is there twice"):
        load_recipe(file)


def test_values_that_do_something_are_accepted_and_load_as_saved(tmp_path: Path) -> None:
    balanced = ["adapter.balance_loss=switch", "adapter.balance_weight=0"]
    dropped = ["adapter.dropout_per_branch=true", "adapter.lora_dropout=0.1"]
    recipe = load_recipe(None, ["data=d", "seed=4294967295", *balanced, *dropped])
    recipe.save(tmp_path)
    assert load_recipe(tmp_path) == recipe


def test_adapter_takes_the_fields_of_the_configuration() -> None:
    own = {field.name for field in fields(ManyLoraConfig)}
    assert set(AdapterRecipe.model_fields) <= own
    assert {"method", "r", "num_branches", "gate", "shared_rank"} <= set(AdapterRecipe.model_fields)


@pytest.mark.parametrize(
    ("output", "changes", "expected"),
    [
        (None, [], "runs/quickstart"),
        (None, ["output=mine"], "mine"),
        ("mine: 2", [], "mine: 2"),
        ("mine", ["output=./mine"], "mine"),
    ],
)
def test_quickstart_has_one_folder(
    monkeypatch: pytest.MonkeyPatch, output: str | None, changes: list[str], expected: str
) -> None:
    class ReachedError(ValueError):
        pass

    def reached(recipe: Recipe, console: object) -> Path:
        raise ReachedError(recipe.run)

    monkeypatch.setattr("manylora.quickstart.train", reached)
    with pytest.raises(ReachedError) as caught:
        quickstart(None if output is None else Path(output), changes, Console(quiet=True))
    assert caught.value.args == (Path(expected),)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=4))
def test_any_change_is_a_recipe_or_a_clear_error(changes: list[str]) -> None:
    try:
        assert isinstance(load_recipe(None, ["data=d", *changes]), Recipe)
    except RecipeError as error:
        assert str(error)
