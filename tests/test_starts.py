"""First values made again from a run folder: bit for bit, or said to be unknown."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor

from manylora.base import load_model
from manylora.inspect.adapters import read
from manylora.inspect.starts import Start, start_of, stored
from manylora.methods import METHODS
from manylora.recipe import Recipe, parse_recipe
from manylora.train import train
from tiny import save_tiny_model

QUANTIZE = ("4bit", "8bit")
CASES = [
    *({"method": method} for method in METHODS),
    {"method": "hydralora", "gate": "task"},
    {"method": "hydralora", "router_input": "Ax", "shared_rank": 2},
    {"method": "lora_split", "share_B": True},
    {"method": "lora_moe", "init_A": "normal", "rank_pattern": {"q_proj": 3}},
    {"method": "lora", "target_modules": ["up_proj", "q_proj", "lm_head"]},
]


def moved_run(tiny_folder: Path, run: Path, seed: int = 3, **values: Any) -> tuple[Path, Any]:
    """A run folder whose adapter was attached as a run attaches it, and moved; and its start."""
    run.mkdir()
    recipe = recipe_for(tiny_folder, run, seed=seed, **values)
    torch.manual_seed(seed)
    base = load_model(recipe.model, recipe.dtype, recipe.quantize)
    if recipe.quantize is not None:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, recipe.config(3))
    start = parameters(model)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                size = float(parameter.std()) or 0.1
                parameter += 0.5 * size * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(run))
    recipe.save(run)
    return run, start


def recipe_for(tiny_folder: Path, run: Path, **values: Any) -> Recipe:
    given = {"model": str(tiny_folder), "data": "d", "output": str(run)}
    return parse_recipe(given | values).resolved()


def parameters(model: PeftModel) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "manylora_" in n}


def by_name(start: Start) -> dict[str, Tensor]:
    return {
        f"base_model.model.{layer}.manylora_{part}.default.weight": tensor
        for layer, parts in start.layers.items()
        for part, tensor in parts.items()
    }


@pytest.mark.parametrize("adapter", CASES, ids=str)
def test_first_values_are_made_again_bit_for_bit(
    tiny_folder: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    run, was = moved_run(tiny_folder, tmp_path / "run", adapter={"r": 4, **adapter})
    start = start_of(read(run))
    assert start.unknown is None
    again = by_name(start)
    assert again.keys() == was.keys()
    assert all(torch.equal(again[name], was[name]) for name in was)


@pytest.mark.parametrize(
    "base",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        *({"dtype": dtype, "quantize": q} for dtype in ("float32", "bfloat16") for q in QUANTIZE),
    ],
    ids=str,
)
def test_first_values_go_through_the_dtype_of_the_base_model(
    tiny_folder: Path, tmp_path: Path, base: dict[str, str]
) -> None:
    if "quantize" in base:
        pytest.importorskip("bitsandbytes")
    run, was = moved_run(tiny_folder, tmp_path / "run", **base)
    again = by_name(start_of(read(run)))
    assert all(torch.equal(again[name], was[name]) for name in was)


def test_first_values_are_made_again_whatever_the_order_of_sizes(tmp_path: Path) -> None:
    """Twelve blocks, in which o_proj has a rank of its own and stands by name before q_proj."""
    folder = save_tiny_model(tmp_path / "model", num_hidden_layers=12, num_key_value_heads=4)
    adapter = {"target_modules": ["q_proj", "k_proj", "o_proj"], "rank_pattern": {"o_proj": 3}}
    run, was = moved_run(folder, tmp_path / "run", adapter=adapter)
    again = by_name(start_of(read(run)))
    assert again.keys() == was.keys()
    assert all(torch.equal(again[name], was[name]) for name in was)


def test_making_a_start_again_leaves_the_callers_random_numbers(
    tiny_folder: Path, tmp_path: Path
) -> None:
    run, _ = moved_run(tiny_folder, tmp_path / "run")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    start_of(read(run))
    assert torch.equal(torch.rand(3), expected)


def test_another_seed_than_the_recipe_says_is_noticed(tiny_folder: Path, tmp_path: Path) -> None:
    run, _ = moved_run(tiny_folder, tmp_path / "run", seed=3)
    recipe_for(tiny_folder, run, seed=4).save(run)
    start = start_of(read(run))
    assert not start.layers
    assert start.unknown is not None and "seed 4" in start.unknown


def test_layers_after_one_that_lost_its_start_are_unknown(
    tiny_folder: Path, tmp_path: Path
) -> None:
    run, _ = moved_run(tiny_folder, tmp_path / "run")
    adapter = read(run)
    _, parts = stored(adapter.layers["model.layers.0.self_attn.v_proj"])
    torch.nn.init.normal_(parts["A"], generator=torch.Generator().manual_seed(8))
    start = start_of(adapter)
    assert set(start.layers) == {f"model.layers.0.self_attn.{name}_proj" for name in "qk"}
    assert start.unknown is not None and "after 2 of 14 layers" in start.unknown


def test_a_run_that_began_from_another_starts_as_that_one_ended(
    tiny_folder: Path, tmp_path: Path
) -> None:
    before, _ = moved_run(tiny_folder, tmp_path / "before")
    after = shutil.copytree(before, tmp_path / "after")
    recipe_for(tiny_folder, after, seed=7, start_from=str(before)).save(after)
    ended, start = read(before), start_of(read(after))
    assert start.unknown is None
    for name, layer in ended.layers.items():
        assert torch.equal(start.layers[name]["B"], stored(layer)[1]["B"])


def test_a_run_that_grew_knows_the_start_of_what_it_had(tiny_folder: Path, tmp_path: Path) -> None:
    before, _ = moved_run(tiny_folder, tmp_path / "before", adapter={"num_branches": 2})
    values = {"adapter": {"num_branches": 3}, "start_from": str(before)}
    after, _ = moved_run(tiny_folder, tmp_path / "after", **values)
    old, new = read(before), read(after)
    for name, layer in new.layers.items():  # the shared A goes on from the old one
        stored(layer)[1]["A"].copy_(stored(old.layers[name])[1]["A"])
    start = start_of(new)
    assert start.unknown is not None and "fewer branches" in start.unknown
    assert {part for parts in start.layers.values() for part in parts} == {"A"}


def test_a_run_whose_origin_is_gone_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    run, _ = moved_run(tiny_folder, tmp_path / "run", start_from=str(tmp_path / "gone"))
    start = start_of(read(run))
    assert not start.layers
    assert start.unknown is not None and "gone" in start.unknown


def test_a_run_that_leaves_A_alone_ends_with_the_start_that_is_made_again(
    make_recipe: Callable[..., Recipe],
) -> None:
    recipe = make_recipe()
    frozen = recipe.train.model_copy(update={"rates": {"A": 0.0}})
    adapter = read(train(recipe.model_copy(update={"train": frozen, "seed": 11})))
    start = start_of(adapter)
    assert start.unknown is None
    for name, layer in adapter.layers.items():
        _, parts = stored(layer)
        assert torch.equal(parts["A"], start.layers[name]["A"])
        assert bool(parts["B"].any()) and not bool(start.layers[name]["B"].any())
