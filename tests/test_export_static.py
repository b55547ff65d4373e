"""A router's best plain LoRAs: fitted by least squares, and what they lose is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from manylora.adapter.layer import ManyLoraLayer, layers_of
from manylora.export import ExportError, static_fit
from manylora.export.fit import RIDGES, Seen, Space, excess, fits, fits_held_apart
from manylora.export.moments import MomentMeter, Moments, mean_rows, up_projections
from manylora.export.static import export_static
from manylora.export.static_fit import measure
from manylora.export.static_gap import gap
from manylora.recipe import Recipe
from manylora.train import train
from tiny import attach, tiny_llama

Make = Callable[..., Recipe]

ROUTED = [
    {"method": "hydralora"},
    {"method": "hydralora", "router_input": "Ax", "shared_rank": 3},
    {"method": "lora_moe"},
    {"method": "lora_moe", "branch_ranks": [2, 5, 3]},
    {"method": "lora_moe", "share_B": True},
    {"method": "multilora", "gate": "router"},
]
IDS = ["-".join(map(str, config.values())) for config in ROUTED]
TOKENS = torch.randint(3, 60, (4, 20), generator=torch.Generator().manual_seed(2))
MASK = torch.arange(20) < torch.tensor([20, 11, 16, 5])[:, None]


def routed(**config: object) -> torch.nn.Module:
    model = attach(tiny_llama(dtype=torch.float64), init_weights=False, **config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "manylora_router" in name:
                tensor.mul_(20)  # so that routing differs between tokens
    return model.eval()


def inputs_of(model: torch.nn.Module, layer: ManyLoraLayer) -> Tensor:
    """The counted tokens that the layer reads, (T, in)."""
    found = []
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(input_ids=TOKENS, attention_mask=MASK.long())
    handle.remove()
    return found[0][MASK]


def update_of(layer: ManyLoraLayer, x: Tensor) -> Tensor:
    """What the adapter adds for each token of x, (T, out), by the layer itself."""
    with torch.no_grad():
        return layer(x[None])[0] - layer.base_layer(x[None])[0]


def moments_of(model: torch.nn.Module, layers: list[ManyLoraLayer]) -> Moments:
    moments = Moments()
    with torch.no_grad(), MomentMeter(layers, "default").watching(MASK, moments):
        model(input_ids=TOKENS, attention_mask=MASK.long())
    return moments


@pytest.mark.parametrize("config", ROUTED, ids=IDS)
def test_moments_are_those_of_the_layers_own_update(config: dict[str, object]) -> None:
    model = routed(**config)
    layers = layers_of(model)
    moments = moments_of(model, layers)
    assert moments.tokens == MASK.sum()
    assert len(moments.second) < len(layers)  # q, k and v read the same input, counted once
    for layer in layers:
        x = inputs_of(model, layer)
        u = update_of(layer, x)
        if layer.branches["default"].shared_rank:
            t = layer.tensors("default")
            shared = t["shared_B"] @ t["shared_A"]
            u = u - layer.shared_scaling["default"] * (x @ shared.T).detach()
        second = moments.second[moments.owner[layer.name]]
        assert torch.allclose(second, x.T @ x, rtol=1e-4, atol=1e-4)
        cross = up_projections(layer, "default") @ moments.cross[layer.name]
        assert torch.allclose(cross, u.T @ x, rtol=1e-3, atol=1e-3 * float(u.abs().max()))


@pytest.mark.parametrize("config", ROUTED, ids=IDS)
def test_constant_router_is_fitted_exactly_at_full_rank(config: dict[str, object]) -> None:
    """Even on fewer tokens than the layer has inputs, where C has no inverse."""
    model = attach(tiny_llama(), init_weights=False, **config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "manylora_router" in name:
                tensor.zero_()
    layers = layers_of(model)
    batch = (TOKENS[:, :5], MASK[:, :5].long(), torch.arange(5).expand(4, 5))
    batches, names = {"one": [batch], "two": [batch] * 5}, (None, "one", "two")
    found = measure(model, layers, "default", batches, None, names)
    for name in names:
        for layer in layers:
            even = torch.full((3,), 1 / 3)
            assert torch.allclose(found.means[name][layer.name].float(), even, atol=1e-6)
            A, B = found.fits[name][layer.name]
            delta = layer.get_delta_weight("default", even)
            assert torch.allclose(B @ A, delta, atol=1e-4 * float(delta.abs().max()))


def test_fit_is_the_reduced_rank_least_squares() -> None:
    """Against the explicit problem, solved in the space of outputs by torch's lstsq and SVD."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=make, dtype=torch.float64)
    z = torch.randn(200, 6, generator=make, dtype=torch.float64) + x[:, :6] ** 2
    up = torch.randn(9, 6, generator=make, dtype=torch.float64)
    u, seen = z @ up.T, Seen(x.T @ x, (z.T @ x,))
    for rank in (1, 3, 6):
        space = Space(up, torch.zeros(6, 12, dtype=torch.float64))
        ((A, B),) = fits(seen, [space], rank, 1e-12)
        assert A.shape == (rank, 12) and B.shape == (9, rank)
        full = torch.linalg.lstsq(x, u).solution  # (in, out)
        U, S, Vh = torch.linalg.svd(x @ full, full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert torch.allclose(x @ (B @ A).T, best, atol=1e-6)
        error = ((u - x @ (B @ A).T) ** 2).sum() - (u**2).sum()
        assert excess(A, B, x.T @ x, z.T @ x, up) == pytest.approx(float(error), rel=1e-9)


def test_fit_falls_back_on_the_mean_where_the_tokens_show_nothing() -> None:
    make = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 6, generator=make, dtype=torch.float64)
    up = torch.randn(5, 2, generator=make, dtype=torch.float64)
    x = torch.zeros(50, 6, dtype=torch.float64)
    x[:, :3] = torch.randn(50, 3, generator=make, dtype=torch.float64)
    z = 2 * x @ mean.T
    ((A, B),) = fits(Seen(x.T @ x, (z.T @ x,)), [Space(up, mean)], 2, 1e-9)
    M, Q = B @ A, up @ mean
    assert torch.allclose(M[:, :3], 2 * Q[:, :3], atol=1e-6)
    assert torch.allclose(M[:, 3:], Q[:, 3:], atol=1e-6)
    nothing = Seen(0 * x.T @ x, (0 * mean,))
    ((A, B),) = fits(nothing, [Space(up, mean)], 2, 1e-4)
    assert torch.allclose(B @ A, Q, atol=1e-9)


def test_ridge_is_the_best_for_tokens_held_apart() -> None:
    make = torch.Generator().manual_seed(0)
    x = torch.randn(40, 30, generator=make, dtype=torch.float64)
    z = torch.randn(40, 2, generator=make, dtype=torch.float64)  # nothing to learn from x
    up, mean = torch.eye(2, dtype=torch.float64), torch.zeros(2, 30, dtype=torch.float64)
    seen, apart = (Seen(x[i].T @ x[i], (z[i].T @ x[i],)) for i in (slice(0, 30), slice(30, 40)))
    ((A, B),) = fits_held_apart(seen, apart, [Space(up, mean)], 2)
    (strongest,) = fits(seen + apart, [Space(up, mean)], 2, max(RIDGES))
    assert torch.allclose(B @ A, strongest[1] @ strongest[0])


@pytest.mark.parametrize("config", ROUTED[:4], ids=IDS[:4])
def test_fit_is_nearer_to_the_routed_layer_than_the_mean_weights(
    config: dict[str, object],
) -> None:
    model = routed(**config)
    layers = layers_of(model)
    moments = moments_of(model, layers)
    for layer in layers:
        x = inputs_of(model, layer)
        mean = mean_rows(layer, "default", moments.mean_weights(layer.name))
        up = up_projections(layer, "default")
        sums = moments.second[moments.owner[layer.name]], moments.cross[layer.name]
        seen = Seen(sums[0], (sums[1],))
        ((A, B),) = fits(seen, [Space(up, mean)], None, 1e-3)
        assert excess(A, B, *sums, up) < excess(mean, up, *sums, up)
        (truncated,) = fits(seen, [Space(up, mean)], 2, 1e-3)
        assert len(truncated[0]) == 2
        assert excess(*truncated, *sums, up) > excess(A, B, *sums, up)
        assert x.shape[1] == layer.in_features


def test_small_groups_of_layers_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed(method="hydralora")
    batches = {"one": [(TOKENS, MASK.long(), torch.arange(20).expand(4, 20))] * 4}
    layers = layers_of(model)
    at_once = measure(model, layers, "default", batches, 4, ["one"])
    monkeypatch.setattr(static_fit, "MOST_BYTES", 1.0)
    one_by_one = measure(model, layers, "default", batches, 4, ["one"])
    assert at_once.fits.keys() == {"one"}  # what is not asked for is not solved for
    for name, (A, B) in at_once.fits["one"].items():
        other_A, other_B = one_by_one.fits["one"][name]
        assert torch.allclose(B @ A, other_B @ other_A, rtol=1e-4, atol=1e-5)


def test_gap_is_0_for_the_live_run_and_1_for_the_base() -> None:
    rows = np.random.default_rng(0)
    live = rows.uniform(0.5, 1.0, 60)
    base = live + rows.uniform(0.8, 1.2, 60)
    assert gap(live, live, base) == [0.0, 0.0, 0.0]
    assert gap(base, live, base) == pytest.approx([1.0, 1.0, 1.0])
    value, low, high = gap(live + 0.1 * rows.uniform(0.5, 1.5, 60), live, base)
    assert value == pytest.approx(0.1, abs=0.02) and low < value < high
    assert high - low < 0.05
    assert gap(live, base, live) == []


def test_static_export_writes_all_kinds_and_measures_what_each_loses(
    make_recipe: Make, tmp_path: Path
) -> None:
    run = train(make_recipe(method="hydralora"))
    done = export_static(run, tmp_path / "out", rank=4, rows=16)
    names = [Path(export.path).name for export in done]
    tasks = ("colour", "copy", "parity", "all_tasks")
    assert sorted(names) == sorted(f"{kind}_{task}" for kind in ("mean", "fit") for task in tasks)
    assert not any(export.exact for export in done)
    assert all(export.max_logit_difference < 1e-3 for export in done)
    for name, export in zip(names, done, strict=True):
        task = name.partition("_")[2]
        assert set(export.gap) <= ({task} if task != "all_tasks" else set(tasks))
        assert all(low <= value <= high for value, low, high in export.gap.values())
    by_name = dict(zip(names, done, strict=True))
    assert by_name["mean_all_tasks"].gap  # training helped some task
    assert "least squares of rank 4" in by_name["fit_copy"].note
    tensors = load_file(tmp_path / "out" / "fit_copy" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {4}
    saved = {Path(e["path"]).name: e["gap"] for e in json.loads((run / "exports.json").read_text())}
    assert saved == {name: export.gap for name, export in by_name.items()}


def test_static_export_of_a_run_without_a_router_is_refused(
    make_recipe: Make, tmp_path: Path
) -> None:
    run = train(make_recipe(method="multilora"))
    with pytest.raises(ExportError, match="no token router; it exports exactly"):
        export_static(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
