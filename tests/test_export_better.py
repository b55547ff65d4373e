"""Where there is room for one static update: the better of the mean and the fit, by its gap."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from manylora.adapter.layer import layers_of
from manylora.export import export_lora
from manylora.export.live import fixed
from manylora.export.merged import Update, export_merged
from manylora.export.plans import Plan
from manylora.export.static import Measured, better, export_static
from manylora.recipe import Recipe
from manylora.train import train
from tiny import attach, tiny_llama

Make = Callable[..., Recipe]


def measured(name: str | None, *gaps: dict[str, list[float]]) -> list[Measured]:
    label = name or "all_tasks"
    return [
        Measured(Plan(f"{kind}_{label}", {}, None, False, f"a {kind}"), name, own)
        for kind, own in zip(("mean", "fit"), gaps, strict=True)
    ]


def test_the_better_one_is_that_with_the_smaller_gap_and_says_what_both_lose() -> None:
    first, second = {"a": [0.1, 0, 0], "b": [0.3, 0, 0]}, {"a": [0.5, 0, 0], "b": [-0.2, 0, 0]}
    near, far = {"a": [0.01, 0, 0]}, {"a": [0.04, 0, 0]}
    best = better(
        [*measured(None, first, second), *measured("a", near, far), *measured("b", {}, {})]
    )
    assert [(one.plan.name, one.plan.note) for one in best] == [
        (
            "all_tasks",
            "a fit; it loses 15.00 % of what training gave, the mean would lose 20.00 %",
        ),
        ("a", "a mean; it loses 1.00 % of what training gave, the fit would lose 4.00 %"),
        ("b", "a fit; not compared: on no held-out task is the run better than its base"),
    ]
    assert [one.gap for one in best] == [second, near, {}]


def test_a_task_called_as_the_update_for_all_tasks_keeps_its_own(
    make_recipe: Make, task_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    shutil.copy(task_folder / "colour.jsonl", folder / "all_tasks.jsonl")
    shutil.copy(task_folder / "copy.jsonl", folder / "copy.jsonl")
    recipe = make_recipe(method="hydralora")
    run = train(recipe.model_copy(update={"data": str(folder)}))
    done = {Path(one.path).name: one for one in export_static(run, tmp_path / "out", 4, 8)}
    kinds = ("mean", "fit")
    names = [f"{kind}_{name}" for name in ("all_tasks", "all_tasks_", "copy") for kind in kinds]
    assert sorted(done) == sorted(names)
    assert set(done["fit_all_tasks_"].gap) <= {"all_tasks"}
    assert set(done["fit_all_tasks"].gap) == {"all_tasks", "copy"}
    whole, own = (
        load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        for name in ("mean_all_tasks", "mean_all_tasks_")
    )
    assert any(not torch.equal(whole[key], own[key]) for key in whole)
    means = export_lora(run, tmp_path / "means", static=True)
    assert [Path(one.path).name for one in means] == ["all_tasks", "all_tasks_", "copy"]
    (one,) = export_merged(run, tmp_path / "merged", Update("all_tasks", static=True, rows=8))
    assert set(one.gap) <= {"all_tasks"}  # the task of that name
    (one,) = export_merged(run, tmp_path / "whole", Update(static=True, rows=8))
    assert set(one.gap) == {"all_tasks", "copy"}


def test_a_fixed_update_is_what_a_merge_of_it_computes() -> None:
    model = attach(tiny_llama(dtype=torch.float64), init_weights=False, shared_rank=2).eval()
    tokens = torch.arange(3, 43).reshape(2, 20)
    layers = layers_of(model)
    weights = {layer.name: torch.tensor([0.5, 0.3, 0.2]) for layer in layers}
    plan = Plan("mean", weights, None, False, "")
    before = [layer.get_base_weight().clone() for layer in layers]
    with torch.no_grad():
        live = model(input_ids=tokens).logits
        with fixed(model, "default", plan):
            got = model(input_ids=tokens).logits
        assert torch.equal(model(input_ids=tokens).logits, live)  # and is gone afterwards
        for layer, weight in zip(layers, before, strict=True):
            assert torch.equal(layer.get_base_weight(), weight)
        for layer, delta in plan.deltas(model, "default"):
            layer.set_base_weight(layer.get_base_weight() + delta)
        with model.disable_adapter():
            same = model(input_ids=tokens).logits
    assert (same - live).abs().max() > 1e-2
    torch.testing.assert_close(got, same, rtol=0, atol=1e-9)
