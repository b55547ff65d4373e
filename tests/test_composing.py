"""Adapter folders as factors, and several of them as one LoRA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from loras import DOWN, TOKENS, Q, delta, logits, save_lora
from manylora.adapter.layer import layers_of
from manylora.base import load_model
from manylora.composing.combined import Combined, Way, check_ranks
from manylora.composing.updates import (
    AdapterError,
    AdapterFolder,
    adapter_folder,
    read_layers,
    shared_base,
)
from manylora.export import export_lora
from manylora.recipe import Recipe
from manylora.run import load
from manylora.train import train
from tiny import save_tiny_model

Make = Callable[..., Recipe]
WEIGHTS = [0.7, -1.3, 0.4]


def combined(model: Path, folders: list[Path], way: Way) -> Combined:
    base = load_model(str(model))
    return Combined(base, [read_layers(base, adapter_folder(f)) for f in folders], way, None)


def delta_of(made: Combined, layer: str) -> Tensor:
    found = made.model.get_base_model().get_submodule(layer)
    return found.get_delta_weight("default").detach()  # type: ignore[operator, no-any-return]


@torch.inference_mode()
def live(made: Combined) -> Tensor:
    return made.model(input_ids=TOKENS).logits


def test_products_are_the_weighted_sum_of_the_updates_whatever_the_ranks(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """The updates are PEFT's own: alpha, rsLoRA and patterns are read as PEFT reads them."""
    folders = [
        save_lora(tiny_folder, tmp_path / "a", 0, r=4, lora_alpha=12),
        save_lora(tiny_folder, tmp_path / "b", 1, r=2, use_rslora=True),
        save_lora(tiny_folder, tmp_path / "c", 2, r=3, rank_pattern={Q: 5}, alpha_pattern={Q: 2}),
    ]
    made = combined(tiny_folder, folders, "products")
    assert made.model.peft_config["default"].r == 4 + 2 + 5
    made.set_weights([9.0, 9.0, 9.0])  # nothing of earlier weights may stay
    made.set_weights(WEIGHTS)
    for layer in (Q, DOWN):
        deltas = [delta(tiny_folder, folder, layer) for folder in folders]
        expected = sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True))
        assert torch.allclose(delta_of(made, layer), expected, rtol=0, atol=1e-6)
        assert expected.abs().max() > 0.1


def test_factors_are_the_authors_sum_of_every_tensor(tiny_folder: Path, tmp_path: Path) -> None:
    """sail-sg/lorahub: final[key] = sum_i w_i * state_i[key], loaded into one of the modules."""
    folders = [save_lora(tiny_folder, tmp_path / str(i), i, lora_alpha=6) for i in range(3)]
    states = [load_file(str(folder / "adapter_model.safetensors")) for folder in folders]
    summed = {
        key: sum(w * state[key] for w, state in zip(WEIGHTS, states, strict=True))
        for key in states[0]
    }
    theirs = save_lora(tiny_folder, tmp_path / "theirs", lora_alpha=6)
    save_file(summed, str(theirs / "adapter_model.safetensors"), metadata={"format": "pt"})
    made = combined(tiny_folder, folders, "factors")
    made.set_weights(WEIGHTS)
    assert made.model.peft_config["default"].r == 4
    assert torch.allclose(delta_of(made, Q), delta(tiny_folder, theirs, Q), rtol=0, atol=1e-6)
    assert torch.allclose(live(made), logits(tiny_folder, theirs), rtol=0, atol=1e-5)
    made.set_weights([-w for w in WEIGHTS])
    assert torch.allclose(live(made), logits(tiny_folder, theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["products", "factors"])
def test_one_weight_of_one_is_that_adapter_and_none_the_base(
    tiny_folder: Path, tmp_path: Path, way: Way
) -> None:
    folders = [save_lora(tiny_folder, tmp_path / str(i), i) for i in range(3)]
    made = combined(tiny_folder, folders, way)
    assert torch.equal(live(made), logits(tiny_folder))
    made.set_weights([0.0, 1.0, 0.0])
    expected = logits(tiny_folder, folders[1])
    assert torch.allclose(live(made), expected, rtol=0, atol=1e-5)
    assert (expected - logits(tiny_folder)).abs().max() > 1e-3
    made.set_weights([0.0, 0.0, 0.0])
    assert torch.equal(live(made), logits(tiny_folder))


@pytest.mark.parametrize("way", ["products", "factors"])
def test_a_layer_that_an_adapter_lacks_is_zero_in_it(
    tiny_folder: Path, tmp_path: Path, way: Way
) -> None:
    both = save_lora(tiny_folder, tmp_path / "both", 0)
    one = save_lora(tiny_folder, tmp_path / "one", 1, target_modules=["q_proj"])
    made = combined(tiny_folder, [one, both], way)
    made.set_weights([1.0, 0.5])
    squared = 0.25 if way == "factors" else 0.5  # the weight is in A as well
    expected = squared * delta(tiny_folder, both, DOWN)
    assert torch.allclose(delta_of(made, DOWN), expected, rtol=0, atol=1e-6)


def test_reading_adapters_leaves_the_base_model_as_it_was(
    tiny_folder: Path, tmp_path: Path
) -> None:
    base = load_model(str(tiny_folder))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    read_layers(base, adapter_folder(save_lora(tiny_folder, tmp_path / "a")))
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "adapter", [{"method": "multilora"}, {"method": "lora_split", "branch_ranks": [1, 3]}]
)
def test_a_run_and_its_export_are_read_as_the_update_that_the_run_applies(
    make_recipe: Make, tmp_path: Path, adapter: dict[str, object]
) -> None:
    run = train(make_recipe(**adapter))
    export_lora(run, tmp_path / "out")
    expected = {x.name: x.get_delta_weight("default").cpu() for x in layers_of(load(run)[0])}
    assert all(update.abs().max() > 1e-4 for update in expected.values())
    for folder in (run, tmp_path / "out"):
        found = adapter_folder(folder)
        layers = read_layers(load_model(found.model), found)
        assert layers.keys() == expected.keys()
        for name, (A, B) in layers.items():
            assert torch.allclose(B @ A, expected[name], rtol=0, atol=1e-6)
    assert shared_base([adapter_folder(run), adapter_folder(tmp_path / "out")])


def test_updates_that_are_not_one_matrix_are_refused_with_the_way_to_get_one(
    make_recipe: Make, tmp_path: Path
) -> None:
    routed = train(make_recipe("routed", method="hydralora"))
    with pytest.raises(AdapterError, match=f"manylora export {routed} --static"):
        adapter_folder(routed)
    clustered = train(make_recipe("clustered", method="branch_per_cluster"))
    with pytest.raises(AdapterError, match=f"manylora export {clustered}` and give"):
        adapter_folder(clustered)
    export_lora(clustered, tmp_path / "out")
    with pytest.raises(AdapterError, match=r"give one of .*: colour, copy, parity"):
        adapter_folder(tmp_path / "out")
    assert adapter_folder(tmp_path / "out" / "copy").config.r == 4


def test_different_base_models_and_revisions_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other")
    one = adapter_folder(save_lora(tiny_folder, tmp_path / "one"))
    two = adapter_folder(save_lora(other, tmp_path / "two"))
    with pytest.raises(AdapterError, match=rf"different base models: .*one for .*{other}"):
        shared_base([one, two])
    hub = [
        renamed(one, tmp_path / f"hub_{revision}", "a/b", revision) for revision in (None, "x", "y")
    ]
    assert shared_base(hub[:2]) == "a/b@x"
    with pytest.raises(AdapterError, match=r"of a/b: .*hub_x at x, .*hub_y at y"):
        shared_base(hub)
    gone = renamed(one, tmp_path / "gone", "/no/such/model", None)
    with pytest.raises(AdapterError, match="gone: its base model"):
        shared_base([gone])


def renamed(adapter: AdapterFolder, folder: Path, base: str, revision: str | None) -> AdapterFolder:
    """A copy of an adapter's folder that says it is for another base model."""
    shutil.copytree(adapter.path, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": base, "revision": revision}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return adapter_folder(folder)


def test_unequal_ranks_are_named_for_factors(tiny_folder: Path, tmp_path: Path) -> None:
    folders = [save_lora(tiny_folder, tmp_path / f"r{r}", r=r) for r in (4, 2)]
    base = load_model(str(tiny_folder))
    layers = [read_layers(base, adapter_folder(folder)) for folder in folders]
    with pytest.raises(AdapterError, match=r"r4 has rank 4 and .*r2 rank 2; .*'products'"):
        check_ranks(folders, layers)
    check_ranks(folders[:1] * 2, layers[:1] * 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "pissa"}, "changed the base model"),
        ({"modules_to_save": ["lm_head"]}, r"more than .*\(modules_to_save\)"),
        ({"bias": "lora_only"}, r"more than .*\(bias\)"),
    ],
)
def test_adapters_of_more_than_two_factors_are_refused(
    tiny_folder: Path, tmp_path: Path, config: dict[str, object], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        adapter_folder(save_lora(tiny_folder, tmp_path / "a", **config))


def test_variants_and_other_layers_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    base = load_model(str(tiny_folder))
    dora = save_lora(tiny_folder, tmp_path / "dora", use_dora=True)
    with pytest.raises(AdapterError, match=r"a variant of LoRA \(Dora"):
        read_layers(base, adapter_folder(dora))
    embedding = save_lora(tiny_folder, tmp_path / "emb", target_modules=["embed_tokens"])
    with pytest.raises(AdapterError, match="embed_tokens is no linear layer"):
        read_layers(base, adapter_folder(embedding))


def test_weights_that_do_not_fit_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    base = load_model(str(tiny_folder))
    folder = save_lora(tiny_folder, tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(str(file))
    (name, *_) = tensors
    save_file({k: v for k, v in tensors.items() if k != name}, str(file))
    with pytest.raises(AdapterError, match="1 tensors without a counterpart"):
        read_layers(base, adapter_folder(folder))
    save_file(tensors | {name: tensors[name][:, :1].contiguous()}, str(file))
    with pytest.raises(AdapterError, match="size mismatch"):
        read_layers(base, adapter_folder(folder))
    file.write_bytes(b"not safetensors")
    with pytest.raises(AdapterError, match="does not fit"):
        read_layers(base, adapter_folder(folder))
    assert torch.equal(base(input_ids=TOKENS).logits, logits(tiny_folder))


def test_folders_that_are_no_adapters_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        adapter_folder(tmp_path / "missing")
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        adapter_folder(tiny_folder)
    folder = save_lora(tiny_folder, tmp_path / "a")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "IA3"}))
    with pytest.raises(AdapterError, match="IA3 adapter"):
        adapter_folder(folder)
    config.write_text("[]")
    with pytest.raises(AdapterError, match="not a PEFT configuration"):
        adapter_folder(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is missing"):
        adapter_folder(folder)


def test_conv1d_layers_of_gpt2_are_combined_too(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 256, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(tmp_path / "model")
    config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(load_model(str(tmp_path / "model")), config).save_pretrained(tmp_path / "a")
    made = combined(tmp_path / "model", [tmp_path / "a"], "products")
    made.set_weights([1.0])
    expected = logits(tmp_path / "model", tmp_path / "a")
    assert torch.allclose(live(made), expected, rtol=0, atol=1e-5)
    made.model.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(load_model(str(tmp_path / "model")), tmp_path / "out")
    assert torch.allclose(again(input_ids=TOKENS).logits, expected, rtol=0, atol=1e-5)
