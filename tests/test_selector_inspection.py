"""Where a selector sends held-out prompts, and how near they are, with answers that are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from branch_prompts import NAMES, RANGES, UNKNOWN, fitted, prompt
from manylora.adapter.selector import BranchSelector
from manylora.corpus import Encoded
from manylora.evaluate.held_out import evaluate_run
from manylora.inspect.frames import COLUMNS
from manylora.inspect.selector import (
    CHOICES_FILE,
    REFUSED,
    choices_of,
    confusion,
    distances,
    measure,
    write_choices,
)
from manylora.recipe import Recipe
from manylora.train import train

Make = Callable[..., Recipe]


def rows(*prompts: list[int]) -> list[Encoded]:
    """Held-out rows with an answer that the selector must not read: tokens of another branch."""
    answer = [RANGES[0][0]] * 30
    return [Encoded("", [*ids, *answer], [(len(ids), len(ids) + 30)]) for ids in prompts]


def test_the_confusion_table_counts_where_prompts_go(tmp_path: Path) -> None:
    law, medicine, code = ([prompt(*RANGES[k], 500 + i) for i in range(5)] for k in range(3))
    unknown = [prompt(*UNKNOWN, 7), prompt(*UNKNOWN, 8)]
    held_out = {
        "law": rows(*law, *unknown),
        "medicine": rows(*medicine[:2], *code[:3]),  # three are worded like code
        "code": rows(*code),
        "empty": [],
    }
    write_choices(tmp_path, choices_of(fitted(), held_out))
    found = confusion(tmp_path)
    assert tuple(found.columns) == COLUMNS["confusion"]
    table = found.pivot(index="task", columns="branch", values="rows")
    table = table.loc[["law", "medicine", "code"], [*NAMES, REFUSED]]
    assert table.to_numpy().tolist() == [[5, 0, 0, 2], [0, 2, 3, 0], [0, 0, 5, 0]]
    assert set(found["run"]) == {tmp_path.name} and len(found) == 12


def test_distances_are_those_that_decide(tmp_path: Path) -> None:
    selector = fitted()
    prompts = [prompt(*RANGES[k % 3], 900 + k) for k in range(12)] + [prompt(*UNKNOWN, 3)]
    write_choices(tmp_path, choices_of(selector, {"law": rows(*prompts)}))
    found = distances(tmp_path)
    assert tuple(found.columns) == COLUMNS["distances"]
    ids = torch.tensor(prompts)
    chosen = selector.select(ids, torch.ones_like(ids)).tolist()
    accepted = found["accepted"].tolist()
    assert [
        NAMES.index(branch) if ok else -1
        for branch, ok in zip(found["branch"], accepted, strict=True)
    ] == chosen
    assert chosen[-1] == -1 and set(chosen) == {0, 1, 2, -1}
    assert ((found["distance"] <= found["threshold"]) == found["accepted"]).all()
    places = [NAMES.index(branch) for branch in found["branch"]]
    assert found["threshold"].tolist() == pytest.approx((1 - selector.thresholds[places]).tolist())


def test_a_prompt_at_its_centroid_is_at_no_distance(tmp_path: Path) -> None:
    prompts = [[5, 6, 7], [8, 9, 10]] * 2
    selector = BranchSelector.fit(prompts, [0, 1, 0, 1], ["a", "b"], buckets=64)
    held_out = {"a": rows([5, 6, 7]), "b": rows([8, 9, 10])}
    write_choices(tmp_path, choices_of(selector, held_out))
    assert distances(tmp_path)["distance"].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert distances(tmp_path)["branch"].tolist() == ["a", "b"]


def test_a_scored_run_has_it_and_without_the_base_model_it_is_the_same(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(make_recipe(method="branch_per_cluster"))
    written = (run / CHOICES_FILE).read_text()
    table = confusion(run)
    assert table.groupby("task")["rows"].sum().to_dict() == {"colour": 6, "copy": 6, "parity": 6}
    own = table[table["task"] == table["branch"]]
    assert own["rows"].sum() >= 15  # the tasks are worded apart
    (run / CHOICES_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"no selector.json.*manylora eval"):
        distances(run)

    def never(*arguments: object) -> None:
        raise AssertionError("the base model was loaded")

    with monkeypatch.context() as patched:
        patched.setattr("manylora.base.load_model", never)
        patched.setattr("manylora.run.load_model", never)
        measure(run, Console(quiet=True))
    assert (run / CHOICES_FILE).read_text() == written
    (run / CHOICES_FILE).unlink()
    evaluate_run(run, Console(stderr=True))
    assert (run / CHOICES_FILE).read_text() == written


def test_a_run_without_a_selector_has_none(make_recipe: Make) -> None:
    run = train(make_recipe(method="multilora"))
    assert not (run / CHOICES_FILE).exists()
    assert confusion(run).empty and distances(run).empty
    assert tuple(confusion(run).columns) == COLUMNS["confusion"]
    with pytest.raises(ValueError, match="has no selector"):
        measure(run)


def test_the_file_holds_numbers_alone(tmp_path: Path) -> None:
    write_choices(tmp_path, choices_of(fitted(), {"law": rows(prompt(*RANGES[0], 1))}))
    found = json.loads((tmp_path / CHOICES_FILE).read_text())
    assert found["branches"] == NAMES and len(found["thresholds"]) == 3
    assert found["tasks"]["law"]["nearest"] == [0]
