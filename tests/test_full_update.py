"""What a full fine-tuning changed is kept without its weights, and is compared like an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from manylora.adapter.saved_config import AdapterFileError
from manylora.base import load_model
from manylora.comparison.command import compare
from manylora.inspect import full_update
from manylora.inspect.adapters import read
from manylora.inspect.spectra import singular_values, spectra
from manylora.inspect.subspaces import subspaces
from manylora.recipe import Recipe, parse_recipe
from test_spectra import orthonormal
from tiny import OneLayer, base_layer, tiny_llama

UP = "model.layers.1.mlp.up_proj"
QUIET = Console(quiet=True)


def moved(model: nn.Module, layer: str, change: Tensor) -> nn.Module:
    """The model with one of its linear layers changed by a matrix (out, in)."""
    with torch.no_grad():
        model.get_submodule(layer).weight += change
    return model


def change_of(sigma: list[float], n_out: int, n_in: int) -> Tensor:
    """At most four values; the first directions are the same however many there are."""
    left, right = orthonormal(n_out, 4, 0), orthonormal(n_in, 4, 1)
    values = torch.tensor(sigma + [0.0] * (4 - len(sigma)), dtype=torch.float64)
    return left * values @ right.T


def kept(folder: Path, change: Tensor, rank: int = 64) -> Path:
    """The folder of an update of UP in the tiny model."""
    before = tiny_llama(dtype=torch.float64)
    after = moved(tiny_llama(dtype=torch.float64), UP, change)
    return full_update.save(folder, before.state_dict(), after, rank).parent


def test_given_change_is_kept_with_its_spectrum_and_its_directions(tmp_path: Path) -> None:
    sigma = [4.0, 2.0, 1.0, 0.5]
    change = change_of(sigma, 48, 32)
    adapter = read(kept(tmp_path, change))
    assert (adapter.method, adapter.config) == ("full", None)
    part = adapter.parts(UP)["whole"]
    assert part.values is not None
    assert torch.allclose(part.B @ part.A, change.float(), atol=1e-3)
    assert np.allclose(part.values[:4], sigma, rtol=1e-6)
    assert len(part.values) == 32 and not part.values[4:].any()
    row = spectra(adapter).set_index("layer").loc[UP]
    assert row["frobenius"] == pytest.approx(float(change.norm()))
    assert row["rank"] == 32 and row["top1"] == pytest.approx(4 / 7.5)


def test_all_linear_layers_but_the_output_are_kept_and_unchanged_ones_are_zero(
    tmp_path: Path,
) -> None:
    adapter = read(kept(tmp_path, change_of([1.0], 48, 32)))
    table = spectra(adapter).set_index("layer")
    assert len(table) == 14 and "lm_head" not in table.index
    assert set(table["part"]) == {"whole"}
    assert not table.drop(UP)[["frobenius", "effective_rank"]].any(axis=None)
    assert table.loc[UP, "effective_rank"] == pytest.approx(1)


def test_values_are_whole_where_only_some_vectors_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    change = torch.randn(48, 32, dtype=torch.float64)
    adapter = read(kept(tmp_path, change, rank=3))
    part = adapter.parts(UP)["whole"]
    assert part.A.shape == (3, 32) and part.B.shape == (48, 3)
    own = singular_values(adapter).query("layer == @UP")["value"]
    assert np.allclose(own, torch.linalg.svdvals(change), rtol=1e-6)
    U, sigma, Vh = torch.linalg.svd(change)
    best = U[:, :3] * sigma[:3] @ Vh[:3]
    assert torch.allclose(part.B @ part.A, best.float(), atol=0.02)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (25, 25)])
def test_leading_vectors_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    change = change_of([3.0, 2.0, 1e-3, 1e-5], *shape)
    values, left, right = full_update.leading(change, 4)
    assert torch.allclose(values[:3], torch.linalg.svdvals(change)[:3], rtol=1e-6)
    assert float(values[3]) == pytest.approx(1e-5, rel=1e-3)
    assert torch.allclose(left.T @ left, torch.eye(4, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(right @ right.T, torch.eye(4, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(left * values[:4] @ right, change, atol=1e-8)


def test_full_update_is_compared_with_an_adapter_that_has_found_it(tmp_path: Path) -> None:
    """A LoRA on the full update's first two directions is inside it, and the rest is not."""
    change = change_of([4.0, 3.0, 2.0, 1.0], 48, 32)
    full = read(kept(tmp_path / "full", change))
    lora = read(kept(tmp_path / "lora", change_of([4.0, 3.0], 48, 32)))
    found = subspaces(lora, full, layers=[UP]).set_index(["side", "i", "j"])["phi"]
    for side in ("input", "output"):
        assert found[side, 2, 4] == pytest.approx(1, abs=1e-3)
        assert found[side, 2, 2] == pytest.approx(1, abs=1e-3)
        assert found[side, 1, 1] == pytest.approx(1, abs=1e-3)
        assert (side, 3, 3) not in found.index


def test_conv1d_is_kept_as_out_by_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    after = OneLayer(base_layer("conv1d", 6, 9))
    before = {name: tensor.clone() for name, tensor in after.state_dict().items()}
    change = torch.randn(9, 6, dtype=torch.float64)
    full_update.save(tmp_path, before, moved(after, "linear", change.T))
    part = read(tmp_path).parts("linear")["whole"]
    assert torch.allclose(part.B @ part.A, change.float(), atol=1e-2)


def test_base_model_can_be_named(tiny_folder: Path, tmp_path: Path) -> None:
    after = moved(load_model(str(tiny_folder)), UP, change_of([2.0, 1.0], 48, 32).float())
    full_update.save(tmp_path, str(tiny_folder), after, rank=2)
    adapter = read(tmp_path)
    part = adapter.parts(UP)["whole"]
    assert part.values is not None and np.allclose(part.values[:2], [2, 1], rtol=1e-5)
    others = spectra(adapter).set_index("layer").drop(UP)
    assert not others["frobenius"].any()


def test_other_weights_than_those_that_were_trained_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"q_proj\.weight is \(32, 32\).*no such tensor before"):
        full_update.save(tmp_path, {}, model)
    with pytest.raises(ValueError, match=r"\(32, 32\) after training, and \(16, 16\) before"):
        full_update.save(tmp_path, tiny_llama(hidden_size=16).state_dict(), model)
    with pytest.raises(ValueError, match="rank=0"):
        full_update.save(tmp_path, model.state_dict(), model, rank=0)
    with pytest.raises(ValueError, match="no linear layer"):
        full_update.save(tmp_path, {}, nn.Sequential(nn.LayerNorm(3)))
    assert not list(tmp_path.iterdir())


def test_diverged_training_has_no_update(tmp_path: Path) -> None:
    with pytest.raises(full_update.DivergedError, match=r"up_proj.*lower learning rate"):
        kept(tmp_path, torch.full((48, 32), torch.inf, dtype=torch.float64))
    assert not list(tmp_path.iterdir())


def drop(tensors: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: drop(tensors, "q_proj.left"), "no update that manylora kept"),
        (lambda tensors: tensors | {f"{UP}.values": torch.zeros(3)}, "no update that manylora"),
        (lambda tensors: tensors | {f"{UP}.values": torch.full((32,), torch.nan)}, "not finite"),
    ],
    ids=["a tensor less", "another size", "not a number"],
)
def test_damaged_file_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    file = str(kept(tmp_path, change_of([1.0], 48, 32)) / full_update.FULL_UPDATE_FILE)
    save_file(damage(load_file(file)), file)
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path)


def test_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    file = kept(tmp_path, change_of([1.0], 48, 32)) / full_update.FULL_UPDATE_FILE
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(AdapterFileError, match="is damaged or no safetensors file"):
        read(tmp_path)


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    values = make_recipe().model_dump(mode="json")
    values["train"] |= {"max_steps": 3, "batch_size": 4}
    return parse_recipe(values | {"validation": 0.2, "adapter": {}})


def comparison(recipe: Recipe, folder: Path, rate: float) -> dict[Path, dict[str, Any]]:
    """The summaries of the cells of a comparison of LoRA and full fine-tuning, by their folders."""
    compare(recipe, ["lora", "full"], "lora:r=2", 1, rate, folder, 1, QUIET)
    files = (folder / "cells").glob("*.json")
    return {file.with_suffix(""): json.loads(file.read_text()) for file in files}


def test_comparison_keeps_what_full_fine_tuning_changed(recipe: Recipe, tmp_path: Path) -> None:
    cells = comparison(recipe, tmp_path, 1e-2)
    (full,) = [folder for folder, cell in cells.items() if cell["method"] == "full"]
    (lora,) = [folder for folder, cell in cells.items() if cell["method"] == "lora"]
    assert cells[full]["full_update"] == "full_update.safetensors"
    assert cells[lora]["full_update"] is None and not lora.exists()
    assert [file.name for file in full.iterdir()] == ["full_update.safetensors"]
    table = spectra(read(full))
    assert len(table) == 14 and (table["frobenius"] > 0).all()
    # Three steps of AdamW at 1e-2 and below move a weight by at most 0.03 each.
    sizes = {layer: part.A.shape[1] * len(part.B) for layer, part in wholes(full).items()}
    assert (table["frobenius"] <= 0.031 * np.sqrt(table["layer"].map(sizes))).all()


def wholes(folder: Path) -> dict[str, Any]:
    adapter = read(folder)
    return {layer: adapter.parts(layer)["whole"] for layer in adapter.layers}


def test_comparison_goes_on_when_full_fine_tuning_diverges(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*args: object) -> Path:
        raise full_update.DivergedError("w holds numbers that are not finite")

    monkeypatch.setattr(full_update, "save", diverged)
    cells = comparison(recipe, tmp_path, 1e-2)
    said = [cell["full_update"] for cell in cells.values() if cell["method"] == "full"]
    assert said == ["w holds numbers that are not finite"]
