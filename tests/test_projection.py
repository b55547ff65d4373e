"""t-SNE and UMAP of A's and B's: which points there are, and what is kept of their distances."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from scipy.spatial.distance import cdist
from sklearn.metrics import silhouette_score
from torch import Tensor

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.layer import layers_of
from manylora.base import load_model
from manylora.inspect import projection as module
from manylora.inspect.adapters import read
from manylora.inspect.projection import COLUMNS, components, embed, projection
from manylora.recipe import parse_recipe

METHODS = ["tsne", "umap"]


def clusters(each: int = 20, apart: float = 3.0, seed: int = 0) -> tuple[list[Tensor], list[int]]:
    """Matrices around two others that are `apart` times the spread away from each other."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(2, 4, 30, generator=generator)
    centres[1] = centres[0] + apart * (centres[1] - centres[0])
    owners = [i for i in range(2) for _ in range(each)]
    return [centres[i] + torch.randn(4, 30, generator=generator) for i in owners], owners


def within_reach(method: str) -> None:
    if method == "umap":
        pytest.importorskip("umap")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_two_clusters_of_matrices_are_two_in_the_plane(method: Any) -> None:
    within_reach(method)
    matrices, owners = clusters()
    assert silhouette_score(embed(matrices, method), owners) > 0.6


def test_one_cloud_of_matrices_is_not_taken_apart() -> None:
    matrices, owners = clusters(apart=0.0)
    assert silhouette_score(embed(matrices), owners) < 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_the_same_matrices_and_seed_give_the_same_plane(method: Any) -> None:
    within_reach(method)
    matrices, _ = clusters()
    first = embed(matrices, method, seed=1)
    torch.rand(5)
    assert np.array_equal(first, embed([m.clone() for m in matrices], method, seed=1))


@pytest.mark.filterwarnings("ignore")
def test_the_seed_decides_the_plane() -> None:
    pytest.importorskip("umap")
    matrices, _ = clusters()
    assert not np.array_equal(embed(matrices, "umap", seed=1), embed(matrices, "umap", seed=2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [4, 5, 31])
@pytest.mark.filterwarnings("ignore")
def test_fewer_points_than_the_perplexity_are_drawn(method: Any, count: int) -> None:
    within_reach(method)
    plane = embed(clusters()[0][:count], method)
    assert plane.shape == (count, 2)
    assert np.isfinite(plane).all()
    assert len(np.unique(plane.round(3), axis=0)) == count


def test_too_few_points_for_a_plane_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 3 here, and it takes 4"):
        embed(clusters()[0][:3])


def test_components_keep_every_distance() -> None:
    matrices, _ = clusters(each=6)
    flat = torch.stack([m.flatten() for m in matrices]).double().numpy()
    points = components(matrices)
    assert points.shape[1] < len(matrices)
    assert np.allclose(cdist(points, points), cdist(flat, flat))


def test_matrices_of_two_shapes_are_orthogonal_to_each_other() -> None:
    matrices, _ = clusters(each=3)
    wider = [2 * torch.cat([m, m], 1) for m in matrices]
    points = components([*matrices, *wider])
    near = np.zeros((6, 240 + 120))
    near[:, :120] = torch.stack([m.flatten() for m in matrices]).numpy()
    far = np.zeros((6, 240 + 120))
    far[:, 120:] = torch.stack([m.flatten() for m in wider]).numpy()
    flat = np.concatenate([near, far])
    assert np.allclose(cdist(points, points), cdist(flat, flat))


def test_columns_taken_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, _ = clusters(each=4)
    at_once = components(matrices)
    monkeypatch.setattr(module, "CHUNK", 50)
    assert np.allclose(components(matrices), at_once)


def test_components_are_largest_first_and_point_one_way() -> None:
    points = components(clusters(each=5)[0])
    assert (np.diff((points**2).sum(0)) <= 0).all()
    assert (points[np.abs(points).argmax(0), np.arange(points.shape[1])] > 0).all()


def test_equal_matrices_are_in_one_place() -> None:
    assert np.array_equal(embed([torch.ones(3, 5)] * 6), np.zeros((6, 2)))


def test_matrices_on_a_line_are_drawn() -> None:
    line = [torch.full((2, 3), float(i)) for i in range(6)]
    assert np.isfinite(embed(line)).all()


def test_without_umap_its_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'manylora\[umap\]'"):
        embed(clusters()[0], "umap")


def make_run(tiny_folder: Path, run: Path, seed: int, noise: int, **adapter: Any) -> Path:
    """A run folder whose A's moved by random numbers of their own."""
    run.mkdir()
    values = {"model": str(tiny_folder), "data": "d", "output": str(run), "seed": seed}
    recipe = parse_recipe({**values, "adapter": {"r": 4, **adapter}}).resolved()
    torch.manual_seed(seed)
    model = get_peft_model(load_model(recipe.model), recipe.config())
    generator = torch.Generator().manual_seed(noise)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "manylora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(run))
    recipe.save(run)
    return run


def test_each_A_and_each_branchs_B_is_a_point(tiny_folder: Path, tmp_path: Path) -> None:
    runs = [read(make_run(tiny_folder, tmp_path / name, 0, i)) for i, name in enumerate("ab")]
    A, B = projection(runs, "A"), projection(runs, "B")
    assert list(A.columns) == list(COLUMNS)
    assert len(A) == 2 * 14 and set(A["part"]) == {"all branches"} and set(A["matrix"]) == {"A"}
    assert len(B) == 2 * 14 * 3 and set(B["part"]) == {f"branch {i}" for i in range(3)}
    assert set(A["run"]) == {"a", "b"}
    at = A[A["layer"] == "model.layers.1.mlp.up_proj"]
    assert set(at["module"]) == {"up_proj"} and set(at["depth"]) == {1}


def test_the_shared_branch_has_points_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    more = {"method": "lora_split", "shared_rank": 2}
    found = projection([read(make_run(tiny_folder, tmp_path / "run", 0, 0, **more))])
    assert set(found["part"]) == {"branch 0", "branch 1", "branch 2", "shared"}


def test_runs_of_one_seed_lie_together_by_their_start_and_not_by_their_change(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Runs 0 and 1 moved alike from other starts; 0 and 2 moved apart from the same."""
    plan = [(0, 5), (1, 5), (0, 6)]
    runs = [read(make_run(tiny_folder, tmp_path / f"{i}", *p)) for i, p in enumerate(plan)]

    def apart(of: Any, other: str) -> float:
        """Mean distance in the plane of run 0's layers from the same layers of another run."""
        found = projection(runs, "A", of=of).set_index(["run", "layer"])[["x", "y"]]
        away = found.loc["0"] - found.loc[other]
        return float(np.hypot(away["x"], away["y"]).mean())

    assert apart("start", "2") < 0.5 * apart("start", "1")
    assert apart("change", "1") < 0.5 * apart("change", "2")


def test_what_is_drawn_is_the_trained_matrix_its_start_or_its_change(
    tiny_folder: Path, tmp_path: Path
) -> None:
    adapter = read(make_run(tiny_folder, tmp_path / "run", 3, 8))
    torch.manual_seed(3)
    fresh = get_peft_model(load_model(str(tiny_folder)), ManyLoraConfig(r=4))
    start = {layer.name: layer.tensors("default")["A"].detach() for layer in layers_of(fresh)}
    now = {name: layer.parts()["branch 0"].A for name, layer in adapter.layers.items()}
    expected = {
        "trained": list(now.values()),
        "start": [start[name] for name in now],
        "change": [now[name] - start[name] for name in now],
    }
    for of, matrices in expected.items():
        found = projection([adapter], "A", of=of)[["x", "y"]].to_numpy()  # type: ignore[arg-type]
        assert np.array_equal(found, embed(matrices)), of


def test_a_change_from_an_unknown_start_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    run = make_run(tiny_folder, tmp_path / "run", 0, 0)
    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    (alone / "recipe.yaml").unlink()
    assert len(projection([read(alone)])) == 14
    with pytest.raises(ValueError, match=r"alone: how it started is not known: .* no recipe\.yaml"):
        projection([read(run), read(alone)], of="change")
