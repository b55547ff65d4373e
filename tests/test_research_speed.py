"""benchmarks/research_speed.py: what it times on a tiny model, and the tables of what it kept."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from manylora.corpus import Collator
from tiny_multitask import write_multitask

ROOT = Path(__file__).resolve().parent.parent
SHARED = "branch_per_cluster_shared"


class Here(Executor):
    """In this process, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("research_speed")


@pytest.fixture
def multitask(tmp_path: Path) -> Path:
    return write_multitask(tmp_path / "multitask", train=60, test=3)


@pytest.fixture
def tiny_part(speed: ModuleType, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The part on a CPU: two clusters, a small budget, all in this process."""
    part = importlib.import_module("research_parts").Part(
        ("lora",), "lora:r=4", 1, clusters=2, choice="selector"
    )
    monkeypatch.setitem(speed.PARTS, speed.PART, part)
    monkeypatch.setattr(speed, "measure", partial(speed.measure, place=Here))
    monkeypatch.setattr(speed, "UNTIMED", 1)
    return speed


def test_every_step_and_answer_of_every_round_is_kept_and_shown(
    tiny_part: ModuleType,
    tiny_folder: Path,
    multitask: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    methods, output = ["lora", SHARED], tmp_path / "speed.json"
    told = ["speed", str(multitask), "--model", str(tiny_folder), "--folder", str(tmp_path)]
    told += ["--steps", "2", "--rounds", "2", "--tokens", "4", "--mode", "eager"]
    told += ["--output", str(output), "--methods", *methods]
    monkeypatch.setattr(sys, "argv", told)
    tiny_part.main()
    printed = capsys.readouterr().out
    found = json.loads(output.read_text(encoding="utf-8"))
    assert list(found["methods"]) == methods
    assert found["device"] and found["commit"] and found["versions"]["torch"]
    for own in found["methods"].values():
        assert own["clusters"] == 2
        assert [len(took) for took in own["step_ms"]["eager"]] == [2, 2]
        assert {count: len(took) for count, took in own["token_ms"].items()} == {"1": 2, "16": 2}
        assert all(min(took) > 0 for took in own["step_ms"]["eager"])
    assert f"| eager | {SHARED} |" in printed and f"| 16 | {SHARED} |" in printed
    monkeypatch.setattr(sys, "argv", ["speed", "--show", "--output", str(output)])
    tiny_part.main()
    assert capsys.readouterr().out == printed


def test_methods_train_on_the_same_batches_and_the_selector_is_for_those_that_need_it(
    tiny_part: ModuleType,
    tiny_folder: Path,
    multitask: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[tuple[str, int], list[tuple[Any, bool]]] = {}
    part, data = tiny_part.PARTS[tiny_part.PART], tmp_path / "data"
    tiny_part.write_data(multitask, data, part)
    recipe = tiny_part.recipe_of(part, data, str(tiny_folder)).resolved()
    train = recipe.train.model_copy(update={"workers": 0, "precision": "bf16"})
    recipe = recipe.model_copy(update={"train": train})
    plan = tiny_part.Plan(recipe, part.choice, part.budget, steps=2, tokens=4)
    collate = Collator.__call__
    turn: list[tuple[str, int]] = []

    def kept(self: Collator, rows: Any) -> Any:
        batch = collate(self, rows)
        seen.setdefault(turn[-1], []).append((batch["input_ids"].tolist(), "branch_ids" in batch))
        return batch

    sides = {method: tiny_part.Side(plan, method) for method in ("lora", SHARED)}
    forwards = {method: side.model.forward for method, side in sides.items()}
    monkeypatch.setattr(Collator, "__call__", kept)
    for number in range(2):
        for method, side in sides.items():
            turn.append((method, number))
            side.train("eager")
            assert side.model.forward == forwards[method]  # wrapped once, however many turns
    batches = [[ids for ids, _ in own] for own in seen.values()]
    assert len(batches[0]) >= 4 and all(own == batches[0] for own in batches)
    asked = {method: {chosen for _, chosen in seen[method, 0]} for method in sides}
    assert asked == {"lora": {False}, SHARED: {True}}


def test_what_a_method_takes_is_held_to_the_first_round_by_round(speed: ModuleType) -> None:
    def one(steps: list[list[float]], tokens: list[float]) -> dict[str, Any]:
        return {"step_ms": {"eager": steps}, "token_ms": {"16": tokens}}

    found = {
        "rounds": 3,
        "methods": {
            "lora": one([[10.0, 20.0], [20.0, 40.0], [10.0, 20.0]], [10.0, 20.0, 10.0]),
            "B": one([[12.0, 21.0], [22.0, 44.0], [10.0, 26.0]], [10.0, 24.0, 11.0]),
        },
    }
    lines = speed.shown(found).splitlines()
    assert lines[2] == "| eager | lora | 20.0 (12.5 to 20.0) | 1.000 (1.000 to 1.000) |"
    assert lines[3] == "| eager | B | 21.5 (14.2 to 25.0) | 1.100 (1.100 to 1.200) |"
    assert lines[-1] == "| 16 | B | 11.00 | 1455 | 1.100 (1.000 to 1.200) |"


def test_a_prompt_is_of_each_task_before_a_second_one_of_any(
    tiny_part: ModuleType, tiny_folder: Path, multitask: Path, tmp_path: Path
) -> None:
    part, data = tiny_part.PARTS[tiny_part.PART], tmp_path / "data"
    tiny_part.write_data(multitask, data, part)
    recipe = tiny_part.recipe_of(part, data, str(tiny_folder)).resolved()
    ground = tiny_part.prepare_ground(recipe, tiny_part.Console(quiet=True), part.choice)
    prompts = tiny_part.prompts_of(ground, 8)
    assert len({tuple(own) for own in prompts[:6]}) == 6
    assert prompts[6:] == prompts[:2]  # there are three of each
    first, second = (ground.tokenizer.decode(prompts[i]) for i in (0, 1))
    assert ("names" in first) != ("names" in second)


def test_the_times_on_the_page_are_the_kept_ones(speed: ModuleType) -> None:
    page = (ROOT / "docs" / "research.md").read_text(encoding="utf-8")
    assert speed.shown(json.loads(speed.RESULT.read_text(encoding="utf-8"))) in page
