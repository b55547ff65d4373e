"""phi is 1 for the same subspace, 0 for orthogonal ones, and what chance gives for random ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from inspect_folders import save_adapter
from manylora.inspect.adapters import Adapter, Part, Whole, read
from manylora.inspect.subspaces import by_chance, similarity, subspaces, subspaces_of
from test_spectra import orthonormal, update
from tiny import attach, tiny_llama

Q = "model.layers.0.self_attn.q_proj"


def one_layer(name: str, part: Part, layer: str = Q) -> Adapter:
    return Adapter(name, Path(name), "lora", None, {layer: Whole(part)})


def made_of(U: Tensor, V: Tensor) -> Part:
    """An update with falling values along the columns of U and V."""
    sigma = torch.arange(U.shape[1], 0, -1, dtype=torch.float64)
    return Part(V.T, U * sigma)


def test_same_directions_in_the_same_order_are_inside_each_other() -> None:
    """phi(i, j) = 1 whatever i and j: the smaller one is inside the larger."""
    part = update([5.0, 3.0, 2.0, 1.0])
    again = Part(3 * part.A, -part.B)
    found = subspaces(one_layer("a", part), one_layer("b", again))
    assert found.columns.tolist() == [
        *("layer", "module", "depth", "left", "right", "side", "i", "j", "phi")
    ]
    assert len(found) == 2 * 4 * 4
    assert np.allclose(found["phi"], 1)
    assert set(found["side"]) == {"input", "output"}
    assert set(found["left"]) == {"a: whole"} and set(found["right"]) == {"b: whole"}
    assert set(found["module"]) == {"q_proj"} and set(found["depth"]) == {0}


def test_orthogonal_directions_share_nothing_and_sides_are_told_apart() -> None:
    """The same outputs are written, from other inputs."""
    U, V = orthonormal(30, 3, 0), orthonormal(40, 6, 1)
    a, b = one_layer("a", made_of(U, V[:, :3])), one_layer("b", made_of(U, V[:, 3:]))
    found = subspaces(a, b)
    assert np.allclose(found[found["side"] == "input"]["phi"], 0)
    assert np.allclose(found[found["side"] == "output"]["phi"], 1)


def test_phi_by_hand() -> None:
    """b's two directions are a's second, and one that a has not: shares of 0, 1/2 and 1."""
    U = orthonormal(20, 3, 4)
    phi = similarity(U[:, :2], U[:, [1, 2]])
    assert torch.allclose(phi, torch.tensor([[0, 0], [1, 0.5]], dtype=torch.float64))
    turned = (U[:, :1] + U[:, 1:2]) / 2**0.5
    assert torch.allclose(similarity(U[:, :1], turned), torch.tensor([[0.5]], dtype=torch.float64))


def test_order_is_that_of_the_whole_update_and_not_of_the_factors() -> None:
    """A's own values fall one way, those of B A the other."""
    U, V = orthonormal(30, 3, 0), orthonormal(40, 3, 1)
    size = torch.tensor([9.0, 3.0, 1.0], dtype=torch.float64)
    found = subspaces_of(Part((V * size).T, U / size**2))
    assert torch.allclose((found.input.T @ V).abs(), torch.eye(3, dtype=torch.float64).flip(0))
    assert torch.allclose((found.output.T @ U).abs(), torch.eye(3, dtype=torch.float64).flip(0))


def test_random_subspaces_are_as_similar_as_chance_has_it() -> None:
    d, draws, total = 50, 200, torch.zeros(6, 4, dtype=torch.float64)
    for draw in range(draws):
        total += similarity(orthonormal(d, 6, 2 * draw), orthonormal(d, 4, 2 * draw + 1))
    for i in range(1, 7):
        for j in range(1, 5):
            # The standard deviation of a mean over 200 draws is a tenth of it for phi(1, 1).
            assert float(total[i - 1, j - 1]) / draws == pytest.approx(by_chance(i, j, d), rel=0.3)
    assert by_chance(6, 2, 50) == 6 / 50


def test_similarity_does_not_depend_on_which_update_is_named_first() -> None:
    a, b = (
        one_layer("a", update([3.0, 2.0, 1.0])),
        one_layer("b", made_of(orthonormal(30, 2, 7), orthonormal(40, 2, 8))),
    )
    there, back = subspaces(a, b), subspaces(b, a)
    table = there.set_index(["side", "i", "j"])["phi"]
    for row in back.itertuples():
        assert row.phi == pytest.approx(table[row.side, row.j, row.i])


def test_directions_without_a_value_are_not_compared() -> None:
    found = subspaces(one_layer("a", update([2.0, 1.0, 0.0])), one_layer("b", update([3.0])))
    assert found[["i", "j"]].max().tolist() == [2, 1]


def test_untrained_adapter_has_no_subspace(tmp_path: Path) -> None:
    attach(tiny_llama(), method="multilora").save_pretrained(str(tmp_path))
    found = subspaces(read(tmp_path, "a"), read(tmp_path, "b"))
    assert found.empty and "phi" in found.columns


def test_branches_of_one_run_are_compared_two_by_two(tmp_path: Path) -> None:
    save_adapter(tmp_path, method="hydralora", r=3)
    run = read(tmp_path, "run")
    found = subspaces(run, run)
    pairs = found[["left", "right"]].drop_duplicates().values.tolist()
    names = [f"run: branch {i}" for i in range(3)]
    assert pairs == [[names[0], names[1]], [names[0], names[2]], [names[1], names[2]]]
    whole = found[(found["side"] == "input") & (found["i"] == 3) & (found["j"] == 3)]
    assert np.allclose(whole["phi"], 1)  # A is shared: all branches read the same directions
    apart = found[(found["side"] == "output") & (found["i"] == 3) & (found["j"] == 3)]
    assert (apart["phi"] < 0.9).all()


def test_parts_of_one_name_are_compared_and_a_whole_with_all(tmp_path: Path) -> None:
    save_adapter(tmp_path / "h", method="hydralora", num_branches=2)
    save_adapter(tmp_path / "l", method="lora")
    hydra, lora = read(tmp_path / "h"), read(tmp_path / "l")
    own = ["mean routing", "task one", "task two", "branch 0", "branch 1"]
    found = subspaces(hydra, lora)
    assert list(found["left"].unique()) == [f"h: {name}" for name in own]
    assert set(found["right"]) == {"l: whole"}
    same = subspaces(hydra, read(tmp_path / "h", "again"))
    both = same[["left", "right"]].drop_duplicates().values.tolist()
    assert both == [[f"h: {name}", f"again: {name}"] for name in own]
    square = same[same["i"] == same["j"]]
    assert np.allclose(square["phi"], 1)


def test_pairs_layers_and_how_many_can_be_chosen(tmp_path: Path) -> None:
    save_adapter(tmp_path, method="hydralora", shared_rank=2)
    run = read(tmp_path)
    layer = next(iter(run.layers))
    found = subspaces(run, run, pairs=[("shared", "branch 1")], layers=[layer], most=3)
    assert set(found["layer"]) == {layer} and len(found) == 2 * 2 * 3


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    a = one_layer("a", update([1.0]))
    with pytest.raises(ValueError, match=r"no layer of the same name.*one base model"):
        subspaces(a, one_layer("b", update([1.0]), "elsewhere"))
    with pytest.raises(ValueError, match=r"40 input features in a, 41 in b"):
        subspaces(a, one_layer("b", update([1.0], n_in=41)))
    with pytest.raises(ValueError, match=r"'branch 7'.*has whole"):
        subspaces(a, a, pairs=[("whole", "branch 7")])
    with pytest.raises(ValueError, match="no two parts"):
        subspaces(a, a)
