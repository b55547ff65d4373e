"""Updates read from their files alone are those of the model that saved them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inspect_folders import KINDS, name_of, routing_of, save_adapter
from loras import DOWN, Q, delta, save_lora
from manylora.adapter.layer import ManyLoraLayer, layers_of
from manylora.adapter.saved_config import AdapterFileError
from manylora.adapter.selector import BranchSelector
from manylora.composing.updates import AdapterError
from manylora.inspect.adapters import read
from manylora.inspect.places import place_of
from manylora.inspect.routing import write_routing
from manylora.recipe import Recipe, load_recipe
from manylora.train import train
from tiny import attach, tiny_llama

WEIGHTS = "adapter_model.safetensors"


def mixing_weights(layer: ManyLoraLayer, part: str, routing: Any) -> Tensor | None:
    """g that a part of that name must have been made with."""
    name = part.partition(" ")[2]
    if part == "whole":
        return None
    if layer.branches["default"].gate != "router":
        return layer.fixed_weights("default", int(name))
    means = {
        task: rows[routing["layers"].index(layer.name)] for task, rows in routing["tasks"].items()
    }
    chosen = list(means.values()) if part == "mean routing" else [means[name]]
    return torch.tensor(chosen, dtype=torch.float64).mean(0)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_each_part_is_the_update_of_the_model_that_was_saved(
    kind: dict[str, Any], tmp_path: Path
) -> None:
    model = save_adapter(tmp_path, **kind)
    adapter, layers = read(tmp_path), layers_of(model)
    assert list(adapter.layers) == sorted(layer.name for layer in layers)
    for layer in layers:
        found = adapter.parts(layer.name)
        alone = [part for part in found if part.startswith("branch ") or part == "shared"]
        assert len(found) > len(alone)
        for name, part in found.items():
            if name not in alone:
                weights = mixing_weights(layer, name, routing_of(model))
                expected = layer.get_delta_weight("default", weights).detach()
                assert part.A.dtype == torch.float64 and part.values is None
                assert torch.allclose(part.B @ part.A, expected, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_branches_are_each_alone_with_all_scaling(kind: dict[str, Any], tmp_path: Path) -> None:
    """Written out from the tensors: s c_i B_i A_i and s0 B0 A0."""
    model = save_adapter(tmp_path, **kind)
    adapter = read(tmp_path)
    for layer in layers_of(model):
        found, t = adapter.parts(layer.name), layer.tensors("default")
        ranks = layer.branches["default"].ranks
        alpha = layer.configs["default"].alpha_pattern.get(place_of(layer.name)[0], 16)
        rank = layer.configs["default"].rank_pattern.get(place_of(layer.name)[0], 4)
        s = alpha / (rank**0.5 if kind.get("use_rslora") else rank)
        names = [name for name in found if name.startswith("branch ")]
        alone = len(ranks) == 1 and not kind.get("shared_rank")
        assert names == ([] if alone else [f"branch {i}" for i in range(len(ranks))])
        for i, name in enumerate(names):
            own = slice(sum(ranks[:i]), sum(ranks[: i + 1]))
            A = t["A"] if kind["method"] == "hydralora" else t["A"][own]
            B = t["B"] if kind.get("share_B") else t["B"][:, own]
            if kind["method"] == "multilora":
                B = B * t["scale"][i][:, None]
            assert torch.allclose(found[name].B @ found[name].A, s * B @ A, atol=1e-12)
            assert found[name].A.shape[0] == ranks[i]
        assert ("shared" in found) == bool(kind.get("shared_rank"))
        if "shared" in found:
            s0 = 16 / kind["shared_rank"]
            expected = s0 * t["shared_B"] @ t["shared_A"]
            assert torch.allclose(found["shared"].B @ found["shared"].A, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ({"method": "lora"}, ["whole"]),
        ({"method": "multilora"}, ["whole", "branch 0", "branch 1", "branch 2"]),
        (
            {"method": "hydralora", "num_branches": 2, "shared_rank": 2},
            ["mean routing", "task one", "task two", "branch 0", "branch 1", "shared"],
        ),
        (
            {"method": "branch_per_cluster", "num_branches": 2},
            ["cluster 0", "cluster 1", "branch 0", "branch 1"],
        ),
        (
            {"method": "lora_split", "gate": "task", "num_tasks": 1, "num_branches": 2},
            ["task 0", "branch 0", "branch 1"],
        ),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_parts_have_the_names_of_what_they_are(
    kind: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    save_adapter(tmp_path, **kind)
    adapter = read(tmp_path)
    assert list(adapter.parts(next(iter(adapter.layers)))) == parts


def test_token_router_that_was_not_measured_has_its_branches_alone(tmp_path: Path) -> None:
    save_adapter(tmp_path, routed=False, method="hydralora")
    assert list(read(tmp_path).parts(Q)) == ["branch 0", "branch 1", "branch 2"]


def test_branches_carry_the_names_that_the_selector_knows(tmp_path: Path) -> None:
    model = save_adapter(tmp_path, method="branch_per_cluster", num_branches=2)
    config = model.peft_config["default"]
    config.branch_selector = BranchSelector.fit([[1, 2], [3, 4]], [0, 1], ["law", "code"])
    model.save_pretrained(str(tmp_path))
    parts = read(tmp_path).parts(Q)
    assert list(parts) == ["task law", "task code", "branch 0", "branch 1"]
    assert torch.equal(parts["task code"].B, parts["branch 1"].B)


def test_run_is_read_with_its_tasks_or_clusters(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = train(make_recipe(method="hydralora"))
    adapter = read(run)
    assert (adapter.name, adapter.method) == ("run", "hydralora")
    parts = adapter.parts(Q)
    assert list(parts)[:4] == ["mean routing", "task colour", "task copy", "task parity"]
    assert parts["branch 0"].A.dtype == torch.float32
    recipe = load_recipe(run)
    recipe.model_copy(update={"tasks": "discovered"}).save(run)
    assert list(read(run, "mine").parts(Q))[1] == "cluster colour"
    assert read(run, "mine").name == "mine"


def test_the_base_model_is_not_asked_for(tmp_path: Path) -> None:
    save_adapter(tmp_path, method="multilora")
    edit_config(tmp_path, base_model_name_or_path="/nowhere/at/all")
    assert len(read(tmp_path).layers) == 4


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    model = save_adapter(tmp_path, method="multilora", dtype=torch.float32)
    held = load_file(str(tmp_path / WEIGHTS))
    save_file({name: t.bfloat16() for name, t in held.items()}, str(tmp_path / WEIGHTS))
    part = read(tmp_path).parts(Q)["whole"]
    assert part.A.dtype == part.B.dtype == torch.float32
    expected = layers_of(model)[0].get_delta_weight("default")
    assert torch.allclose(part.B @ part.A, expected, rtol=0.05, atol=0.01)


def test_what_was_trained_besides_the_layers_is_left_aside(tmp_path: Path) -> None:
    model = attach(tiny_llama(), method="lora", modules_to_save=["lm_head"], init_weights=False)
    model.save_pretrained(str(tmp_path))
    assert len(read(tmp_path).layers) == 14


def test_layers_come_block_after_block(tmp_path: Path) -> None:
    attach(tiny_llama(num_hidden_layers=12), method="lora").save_pretrained(str(tmp_path))
    depths = [place_of(layer)[1] for layer in read(tmp_path).layers]
    assert depths == sorted(depths) and len(set(depths)) == 12


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"down_proj": 3}},
        {"target_modules": "all-linear"},
    ],
    ids=["plain", "rslora", "patterns", "all-linear"],
)
def test_plain_lora_is_read_as_peft_reads_it(
    config: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    save_lora(tiny_folder, tmp_path, **config)
    adapter = read(tmp_path)
    assert adapter.method == "lora"
    for layer in (Q, DOWN):
        parts = adapter.parts(layer)
        assert list(parts) == ["whole"]
        A, B, values = parts["whole"]
        assert values is None
        assert torch.allclose(B @ A, delta(tiny_folder, tmp_path, layer), atol=1e-6)


def test_lora_whose_update_is_more_than_two_factors_is_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    save_lora(tiny_folder, tmp_path / "dora", use_dora=True)
    with pytest.raises(AdapterError, match=r"dora: .*not B A alone"):
        read(tmp_path / "dora")
    save_lora(tiny_folder, tmp_path / "bias", bias="all")
    with pytest.raises(AdapterError, match="more than the two factors"):
        read(tmp_path / "bias")


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50])


def lose_a_number(folder: Path) -> None:
    held = load_file(str(folder / WEIGHTS))
    next(iter(held.values())).view(-1)[0] = torch.nan
    save_file(held, str(folder / WEIGHTS))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (cut_short, AdapterFileError, "is damaged or no safetensors file"),
        (lose_a_number, AdapterFileError, "not finite"),
        (
            lambda folder: edit_config(folder, r=5),
            AdapterFileError,
            "by adapter_config.json it has",
        ),
        (lambda folder: edit_config(folder, peft_type="IA3"), AdapterFileError, "'IA3'"),
        (lambda folder: (folder / WEIGHTS).unlink(), FileNotFoundError, "copy the whole folder"),
        (lambda folder: (folder / "adapter_config.json").unlink(), FileNotFoundError, "no such"),
    ],
    ids=["cut short", "not a number", "another rank", "another type", "no weights", "no config"],
)
def test_damaged_folder_is_refused_with_what_to_do(
    damage: Callable[[Path], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    save_adapter(tmp_path, method="multilora")
    damage(tmp_path)
    with pytest.raises(error, match=message):
        read(tmp_path)


def test_damaged_plain_lora_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    save_lora(tiny_folder, tmp_path)
    cut_short(tmp_path)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: is damaged"):
        read(tmp_path)


def test_routing_of_another_adapter_is_refused(tmp_path: Path) -> None:
    model = save_adapter(tmp_path, method="hydralora")
    routing = routing_of(model)
    write_routing(tmp_path, {**routing, "layers": [*routing["layers"][1:], "elsewhere"]})
    with pytest.raises(AdapterFileError, match=r"another adapter.*`manylora eval"):
        read(tmp_path)


def test_unfinished_run_says_how_it_is_finished(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    make_recipe().resolved().save(tmp_path)
    with pytest.raises(FileNotFoundError, match="--resume"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        ("model.layers.12.self_attn.q_proj", ("q_proj", 12)),
        ("transformer.h.3.attn.c_attn", ("c_attn", 3)),
        ("model.layers.7.mlp.experts.5.w1", ("w1", 7)),
        ("lm_head", ("lm_head", -1)),
    ],
)
def test_place_is_the_module_and_the_block(layer: str, place: tuple[str, int]) -> None:
    assert place_of(layer) == place
