"""Singular values from factors are those of the update, and the measures have known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inspect_folders import KINDS, name_of, routing_of, save_adapter
from manylora.adapter.layer import layers_of
from manylora.inspect.adapters import Adapter, Part, Whole, read
from manylora.inspect.spectra import both, measures_of, singular_values, spectra, values_of
from manylora.methods import METHODS
from tiny import attach, tiny_llama


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, columns, generator=make, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


def update(sigma: list[float], n_in: int = 40, n_out: int = 30) -> Part:
    """U diag(sigma) V' as two factors that are neither orthonormal nor of equal size."""
    k = len(sigma)
    turn = torch.randn(k, k, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    B = orthonormal(n_out, k, 0) * torch.tensor(sigma, dtype=torch.float64) @ turn
    return Part(torch.linalg.solve(turn, orthonormal(n_in, k, 1).T), B)


def adapter(**parts: Part) -> Adapter:
    layers = {
        f"model.layers.{i}.mlp.{name}": Whole(part) for i, (name, part) in enumerate(parts.items())
    }
    return Adapter("mine", Path("mine"), "lora", None, layers)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (5, 40), (40, 3), (5, 5)])
def test_given_spectrum_is_found(shape: tuple[int, int]) -> None:
    """Also where the rank is larger than the matrix."""
    sigma = [5.0, 3.0, 1.0, 1e-3, 1e-6][: min(shape)]
    part = update(sigma, *shape)
    more = Part(torch.cat([part.A, part.A]), torch.cat([part.B, part.B], 1))
    assert np.allclose(values_of(part), sigma, rtol=1e-6)
    found = values_of(more)
    assert len(found) == min(10, *shape)
    assert np.allclose(found[: len(sigma)], 2 * np.array(sigma), rtol=1e-6)
    assert np.all(found[len(sigma) :] < 1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_singular_values_are_those_of_the_whole_matrix(
    kind: dict[str, Any], tmp_path: Path
) -> None:
    """In float64, of every part of every row of the table of methods."""
    save_adapter(tmp_path, **kind)
    found = read(tmp_path)
    values = singular_values(found)
    for layer in found.layers:
        for name, part in found.parts(layer).items():
            own = values[(values["layer"] == layer) & (values["part"] == name)]
            expected = torch.linalg.svdvals(part.B @ part.A).numpy()
            assert own["index"].tolist() == list(range(1, len(own) + 1))
            assert np.allclose(own["value"], expected[: len(own)], rtol=1e-9, atol=1e-12)
            assert np.all(expected[len(own) :] < 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_whole_update_has_the_spectrum_of_get_delta_weight(method: str, tmp_path: Path) -> None:
    model = save_adapter(tmp_path, method=method)
    found = read(tmp_path)
    part = next(iter(found.parts(layers_of(model)[0].name)))
    for place, layer in enumerate(layers_of(model)):
        weights = None
        if part == "mean routing":
            rows = torch.tensor(list(routing_of(model)["tasks"].values()), dtype=torch.float64)
            weights = rows[:, place].mean(0)
        elif part != "whole":
            weights = layer.fixed_weights("default", 0)
        delta = layer.get_delta_weight("default", weights).detach()
        values = values_of(found.parts(layer.name)[part])
        expected = torch.linalg.svdvals(delta).numpy()[: len(values)]
        assert np.allclose(values, expected, rtol=1e-9, atol=1e-12)


def test_even_spectrum_is_as_democratic_as_it_gets() -> None:
    rank, size, top1, quarter, entropy, effective, gini = measures_of(np.full(8, 3.0))
    assert (rank, effective, gini) == (8, pytest.approx(8), pytest.approx(0, abs=1e-12))
    assert (top1, quarter, entropy) == pytest.approx((1 / 8, 2 / 8, np.log(8)))
    assert size == pytest.approx(np.sqrt(8 * 9))


def test_one_direction_dominates_as_much_as_it_can() -> None:
    found = measures_of(np.array([2.0, 0.0, 0.0, 0.0, 0.0]))
    assert found == pytest.approx((5, 2.0, 1.0, 1.0, 0.0, 1.0, 1 - 1 / 5))


def test_measures_are_of_sigma_and_not_of_its_square() -> None:
    """By hand: p = 1/2, 1/4, 1/8, 1/8; the top quarter of five is two."""
    rank, size, top1, quarter, entropy, effective, gini = measures_of(
        np.array([4.0, 2.0, 1.0, 1.0])
    )
    assert (rank, top1, quarter) == (4, 0.5, 0.5)
    assert size == pytest.approx(22**0.5)
    assert entropy == pytest.approx(1.75 * np.log(2))
    assert effective == pytest.approx(2**1.75)
    pairs = 2 * (2 + 3 + 3 + 1 + 1 + 0)
    assert gini == pytest.approx(pairs / (2 * 4 * 8))
    assert measures_of(np.array([4.0, 2.0, 1.0, 1.0, 0.0]))[3] == 0.75


def test_zero_update_has_no_direction_and_no_nan() -> None:
    assert measures_of(np.zeros(4)) == (4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_untrained_adapter_is_zero_in_every_measure(method: str, tmp_path: Path) -> None:
    attach(tiny_llama(), method=method).save_pretrained(str(tmp_path))
    table = spectra(read(tmp_path))
    assert (table["rank"] > 0).all() and len(table)
    assert not table[["frobenius", "top1", "top_quarter", "entropy"]].any(axis=None)
    assert not table[["effective_rank", "gini"]].any(axis=None)


def test_tables_name_run_layer_module_depth_and_part() -> None:
    found = adapter(up_proj=update([2.0, 1.0]), down_proj=update([3.0, 3.0, 3.0]))
    table = spectra(found)
    assert table[["run", "layer", "module", "depth", "part", "rank"]].values.tolist() == [
        ["mine", "model.layers.0.mlp.up_proj", "up_proj", 0, "whole", 2],
        ["mine", "model.layers.1.mlp.down_proj", "down_proj", 1, "whole", 3],
    ]
    assert table["effective_rank"].tolist() == pytest.approx([3 / 4 ** (1 / 3), 3])
    values = singular_values(found)
    assert values.columns.tolist() == ["run", "layer", "module", "depth", "part", "index", "value"]
    assert values["value"].tolist() == pytest.approx([2, 1, 3, 3, 3])
    assert values["depth"].tolist() == [0, 0, 1, 1, 1]


def test_values_that_a_part_brings_along_are_taken_as_they_are() -> None:
    A, B, _ = update([4.0, 2.0])
    assert values_of(Part(A, B, torch.tensor([4.0, 2.0, 1.0]))).tolist() == [4, 2, 1]


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is computed inside."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            self.numbers = max(self.numbers, one.numel())
        return found


def test_the_whole_matrix_is_never_formed() -> None:
    part = update([2.0, 1.0], 300, 200)
    with Largest() as largest:
        values_of(part)
    assert 0 < largest.numbers <= 300 * 2
    with Largest() as formed:
        torch.linalg.svdvals(part.B @ part.A)
    assert formed.numbers >= 300 * 200


def test_small_matrices_are_computed_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the caller's number of threads is as it was, also after an error."""
    seen = []
    monkeypatch.setattr(
        torch.linalg, "svdvals", lambda m: seen.append(torch.get_num_threads()) or m[0]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        spectra(adapter(up_proj=update([2.0, 1.0])))
        assert (seen, torch.get_num_threads()) == ([1], 2)
        with pytest.raises(AttributeError):
            spectra(None)  # type: ignore[arg-type]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_one_decomposition_gives_both_tables() -> None:
    mine = adapter(up_proj=update([2.0, 1.0]), down_proj=update([3.0, 1.0, 0.5]))
    values, measures = both(mine)
    pd.testing.assert_frame_equal(values, singular_values(mine))
    pd.testing.assert_frame_equal(measures, spectra(mine))
