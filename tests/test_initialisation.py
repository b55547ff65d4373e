"""What first values explain of the likeness of two runs' matrices, in known cases and in runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from manylora.base import load_model
from manylora.inspect.adapters import read
from manylora.inspect.initialisation import COLUMNS, initialisation, likeness, summary
from manylora.recipe import parse_recipe
from manylora.train import train

SHAPE = (4, 60)


def orthogonal(count: int, size: float = 1.0) -> list[Tensor]:
    """Matrices that are orthogonal to each other as vectors, each of that length."""
    draws = torch.randn(240, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [size * column.reshape(SHAPE) for column in torch.linalg.qr(draws).Q.T]


def pair(
    trained: list[Tensor], starts: list[Tensor | None], columns: bool = False
) -> dict[str, Any]:
    found = likeness(trained, starts, columns)
    return {name: float(getattr(found, name)[0, 1]) for name in found.__dataclass_fields__}


def test_matrices_that_did_not_move_owe_all_their_likeness_to_the_start() -> None:
    start, _ = orthogonal(2)
    found = pair([start, start], [start, start])
    assert found["similarity"] == pytest.approx(1)
    assert found["explained"] == pytest.approx(1)
    assert found["from_change"] == 0
    assert np.isnan(found["of_change"])  # no change has no direction


def test_orthogonal_changes_of_one_start_are_explained_by_it() -> None:
    start, one, other = orthogonal(3)
    found = pair([start + 0.5 * one, start + other], [start, start])
    assert found["similarity"] == pytest.approx(1 / (1.25**0.5 * 2**0.5))
    assert found["explained"] == pytest.approx(1)
    assert found["at_start"] == pytest.approx(1)
    assert found["of_change"] == pytest.approx(0, abs=1e-12)


def test_equal_changes_of_unrelated_starts_are_not_explained_by_them() -> None:
    first, second, change = orthogonal(3)
    found = pair([first + 2 * change, second + 2 * change], [first, second])
    assert found["similarity"] == pytest.approx(4 / 5)
    assert found["explained"] == pytest.approx(0, abs=1e-12)
    assert found["from_change"] == pytest.approx(4 / 5)
    assert found["of_change"] == pytest.approx(1)


def test_equal_changes_of_one_start_share_the_likeness_by_their_squares() -> None:
    start, change = orthogonal(2)
    found = pair([start + 3 * change] * 2, [start, start])
    assert found["similarity"] == pytest.approx(1)
    assert found["explained"] == pytest.approx(1 / 10)


def test_changes_that_point_apart_leave_more_than_all_of_it_to_the_start() -> None:
    start, change = orthogonal(2)
    found = pair([start + 0.5 * change, start - 0.5 * change], [start, start])
    assert found["similarity"] == pytest.approx(0.75 / 1.25)
    assert found["explained"] == pytest.approx(1 / 0.75)


def test_what_lies_between_a_start_and_the_others_change_belongs_to_neither() -> None:
    start, other = orthogonal(2)
    found = pair([start, 2 * start + other], [start, other])
    assert found["similarity"] == pytest.approx(2 / 5**0.5)
    assert [found["from_start"], found["from_change"]] == pytest.approx([0, 0], abs=1e-12)


def test_an_unknown_start_leaves_only_the_similarity() -> None:
    start, one = orthogonal(2)
    found = pair([start + one, start], [start, None])
    assert found["similarity"] == pytest.approx(0.5**0.5)
    assert found["subspace"] > 0
    for name in ("at_start", "of_change", "explained", "from_start", "subspace_at_start"):
        assert np.isnan(found[name])


def test_a_start_of_zero_explains_nothing() -> None:
    (change,) = orthogonal(1)
    zero = torch.zeros(SHAPE)
    found = pair([change, change], [zero, zero])
    assert found["explained"] == 0
    assert found["of_change"] == pytest.approx(1)
    assert np.isnan(found["at_start"]) and np.isnan(found["subspace_at_start"])


def test_likeness_within_chance_has_nothing_to_explain() -> None:
    start, other = orthogonal(2)
    alike = 3.9 / 240**0.5
    trained = [start, alike * start + (1 - alike**2) ** 0.5 * other]
    assert np.isnan(pair(trained, [start, other])["explained"])
    alike = 4.1 / 240**0.5
    trained = [start, alike * start + (1 - alike**2) ** 0.5 * other]
    assert np.isfinite(pair(trained, [start, other])["explained"])


def test_another_basis_of_the_same_space_is_alike_in_the_subspace_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(SHAPE, generator=generator)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    found = pair([A, turn @ A], [A, turn @ A])
    assert found["subspace"] == pytest.approx(1)
    assert found["subspace_at_start"] == pytest.approx(1)
    assert abs(found["similarity"]) < 0.5


@pytest.mark.parametrize("columns", [False, True])
def test_spaces_that_share_one_direction_of_two_are_half_alike(columns: bool) -> None:
    one, other = torch.zeros(2, 6), torch.zeros(2, 6)
    one[0, 0], one[1, 1] = 3.0, 0.5
    other[0, 1], other[1, 2] = 2.0, 7.0
    matrices = [one.T, other.T] if columns else [one, other]
    assert pair(matrices, [None, None], columns)["subspace"] == pytest.approx(0.5)


def test_a_direction_that_is_not_there_does_not_count() -> None:
    line, plane = torch.zeros(2, 6), torch.zeros(2, 6)
    line[0, 0] = 1.0
    plane[0, 0], plane[1, 1] = 1.0, 1.0
    assert pair([line, plane], [None, None])["subspace"] == pytest.approx(1)


def trained(tiny_folder: Path, data: Path, run: Path, seed: int) -> Path:
    steps = {"max_steps": 3, "warmup": 0, "precision": "fp32", "workers": 0}
    recipe = {"model": str(tiny_folder), "data": str(data), "holdout": 0.2, "seed": seed}
    recipe |= {"adapter": {"method": "hydralora", "r": 4}, "evaluate": {"rows_per_task": 4}}
    return train(parse_recipe({**recipe, "train": steps, "output": str(run)}))


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs on two tasks, and with another seed on the first."""
    root = tmp_path_factory.mktemp("runs")
    colour, copy = task_folder / "colour.jsonl", task_folder / "copy.jsonl"
    return [
        trained(tiny_folder, colour, root / "colour", 0),
        trained(tiny_folder, copy, root / "copy", 0),
        trained(tiny_folder, colour, root / "again", 1),
    ]


@pytest.fixture(scope="module")
def frame(runs: list[Path]) -> pd.DataFrame:
    return initialisation([read(run) for run in runs])


def test_runs_are_compared_by_seed_and_data(frame: pd.DataFrame) -> None:
    assert list(frame.columns) == list(COLUMNS)
    A = frame[frame["matrix"] == "A"].groupby("pair")
    assert set(A.groups) == {
        "same seed, other data",
        "other seed, same data",
        "other seed, other data",
    }
    assert A["at_start"].min()["same seed, other data"] == pytest.approx(1)
    assert A["similarity"].min()["same seed, other data"] > 0.9
    assert abs(A["similarity"].mean()["other seed, same data"]) < 0.1


def test_A_of_unlike_tasks_is_alike_because_its_start_was(frame: pd.DataFrame) -> None:
    found = summary(frame).set_index(["matrix", "pair", "measure"])
    A = found.xs("A").xs("same seed, other data")
    assert 0.9 < A.loc["similarity", "mean"] <= 1
    assert A.loc["explained", "mean"] == pytest.approx(1, abs=0.05)
    assert A.loc["explained", "low"] <= A.loc["explained", "mean"] <= A.loc["explained", "high"]
    assert A.loc["similarity", "layers"] == 14
    B = frame[(frame["matrix"] == "B") & frame["explained"].notna()]
    assert len(B) and (B["explained"] == 0).all()


def test_branches_are_compared_one_by_one_also_within_a_run(frame: pd.DataFrame) -> None:
    B = frame[(frame["matrix"] == "B") & (frame["layer"] == frame["layer"][0])]
    assert len(B) == 9 * 8 // 2  # three branches in three runs
    assert (B["pair"] == "one run").sum() == 3 * 3
    assert {"colour: branch 0", "copy: branch 2"} <= {*B["left"], *B["right"]}
    A = frame[(frame["matrix"] == "A") & (frame["layer"] == frame["layer"][0])]
    assert {*A["left"], *A["right"]} == {f"{n}: all branches" for n in ("colour", "copy", "again")}


def test_an_adapter_without_a_recipe_has_no_known_start(tiny_folder: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(load_model(str(tiny_folder)), config)
        model.save_pretrained(str(tmp_path / f"lora{seed}"))
    found = initialisation([read(tmp_path / f"lora{seed}") for seed in (0, 1)])
    A = found[found["matrix"] == "A"]
    assert len(A) == 4
    assert set(A["pair"]) == {"unknown"}
    assert A["similarity"].notna().all()
    assert A[["at_start", "of_change", "explained"]].isna().all(axis=None)


def test_intervals_are_over_layers_and_a_ratio_of_nothing_is_none() -> None:
    values = {name: [0.0, 0.0] for name in COLUMNS[7:]}
    values |= {"similarity": [0.4, 0.8], "from_start": [0.2, 0.1], "of_change": [0.3, 0.3]}
    known = {"layer": ["a", "b"], "module": "m", "depth": [0, 1], "matrix": "A"}
    table = pd.DataFrame({**known, "left": "l", "right": "r", "pair": "p", **values})
    found = summary(table).set_index("measure")
    assert found.loc["similarity", "mean"] == pytest.approx(0.6)
    assert (found.loc["similarity", "low"], found.loc["similarity", "high"]) == (0.4, 0.8)
    assert found.loc["explained", "mean"] == pytest.approx(0.3 / 1.2)
    assert found.loc["explained", "low"] == pytest.approx(0.1 / 0.8)
    assert found.loc["explained", "high"] == pytest.approx(0.2 / 0.4)
    assert found.loc["of_change", "low"] == found.loc["of_change", "high"] == 0.3
    table["similarity"] = [-0.1, 0.1]
    assert np.isnan(summary(table).set_index("measure").loc["explained", "mean"])
