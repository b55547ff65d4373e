"""Merging: equal to the unmerged adapter, idempotent, undone bit for bit, refused where inexact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import manylora
from manylora.adapter.layer import ManyLoraLayer
from tiny import VOCAB, OneLayer, attach, base_layer, tiny_llama

X = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
MERGEABLE: list[dict[str, Any]] = [
    {"method": "lora"},
    {"method": "multilora"},
    {"method": "multilora", "branch_ranks": [2, 3, 1], "shared_rank": 2},
    {"method": "lora_split", "share_B": True},
    {"method": "hydralora", "gate": "uniform"},
]
ROUTED: list[dict[str, Any]] = [{"method": "hydralora"}, {"method": "lora_moe"}]
BY_ID: list[dict[str, Any]] = [
    {"method": "branch_per_cluster", "shared_rank": 2},
    {"method": "branch_per_cluster", "share_A": True},
    {"method": "lora_split", "gate": "task", "num_tasks": 3},
]


def name_of(config: dict[str, Any]) -> str:
    return "-".join(str(value) for value in config.values())


def tiny_gpt2() -> GPT2LMHeadModel:
    """Its linear layers are Conv1D, whose weight is transposed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_positions=32,
                n_embd=32,
                n_layer=2,
                n_head=4,
                bos_token_id=1,
                eos_token_id=2,
                attn_implementation="eager",
            )
        )


def adapted(base: nn.Module | None = None, **config: Any) -> PeftModel:
    fields = {"task_type": "CAUSAL_LM", "init_weights": False} | config
    return attach(tiny_llama() if base is None else base, **fields).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=X).logits


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.get_base_layer().weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, ManyLoraLayer)
    }


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(weight, before[name]) for name, weight in base_weights(model).items())


@pytest.mark.parametrize("config", MERGEABLE, ids=name_of)
@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2], ids=["linear", "conv1d"])
def test_merging_equals_not_merging_is_idempotent_and_is_undone_bit_for_bit(
    base: Any, config: dict[str, Any]
) -> None:
    model = adapted(base(), **config)
    before, unmerged = base_weights(model), logits(model)
    assert (unmerged - logits(base().eval())).abs().max() > 1e-2
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        merged = logits(model)
        assert not unchanged(model, before)
        torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-5)
        with pytest.warns(UserWarning, match="All adapters are already merged"):
            model.merge_adapter()
        assert torch.equal(logits(model), merged)
        model.unmerge_adapter()
        assert unchanged(model, before)
        assert torch.equal(logits(model), unmerged)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    plain = model.merge_and_unload(safe_merge=True)
    assert not [name for name, _ in plain.named_modules() if "manylora" in name]
    assert torch.equal(logits(plain), merged)


def test_a_half_precision_base_is_restored_bit_for_bit() -> None:
    model = adapted(tiny_llama(dtype=torch.bfloat16), method="multilora")
    before, unmerged = base_weights(model), logits(model)
    model.merge_adapter()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype == torch.bfloat16
    expected = (
        before["base_model.model.model.layers.0.mlp.up_proj"].float()
        + layer.get_delta_weight("default")
    ).bfloat16()
    assert torch.equal(layer.base_layer.weight, expected)
    model.unmerge_adapter()
    assert unchanged(model, before)
    assert torch.equal(logits(model), unmerged)


def test_two_adapters_merge_together_or_one_after_the_other_and_come_off() -> None:
    model = adapted(method="multilora")
    before = base_weights(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.add_adapter(
            "second",
            manylora.ManyLoraConfig(
                method="lora", init_weights=False, target_modules=["q_proj", "up_proj"]
            ),
        )
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("second")
    assert model.get_model_status().merged_adapters == ["default", "second"]
    model.unmerge_adapter()
    assert unchanged(model, before)
    assert torch.equal(logits(model), both)


def test_disabling_a_merged_adapter_takes_it_off() -> None:
    model = adapted(method="multilora")
    before = base_weights(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama().eval()))
    assert unchanged(model, before)


@pytest.mark.parametrize("config", ROUTED + BY_ID, ids=name_of)
def test_merging_refuses_before_any_layer_is_touched_and_names_what_to_do(
    config: dict[str, Any],
) -> None:
    model = adapted(method="multilora", target_modules=["q_proj"])
    model.add_adapter("mixed", manylora.ManyLoraConfig(**config, target_modules=["down_proj"]))
    model.base_model.set_adapter(["default", "mixed"])
    before = base_weights(model)
    instead = "manylora export RUN" + (" --static" if config in ROUTED else "")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=f"adapter 'mixed' .*{instead}"):
            merge()
        assert unchanged(model, before)
        assert not model.get_model_status().merged_adapters
    with pytest.raises(ValueError, match="adapter 'mixed' "):
        model.base_model.model.model.layers[0].mlp.down_proj.get_delta_weight("mixed")
    plain = model.unload()
    assert torch.equal(logits(plain), logits(tiny_llama().eval()))


@pytest.mark.parametrize("config", BY_ID, ids=name_of)
@pytest.mark.parametrize("choice", [0, 2, -1])
def test_one_branch_merges_exactly_under_its_id(config: dict[str, Any], choice: int) -> None:
    model = adapted(**config)
    before = base_weights(model)
    with manylora.branch_ids(model, choice):
        unmerged = logits(model)
        model.merge_adapter()
    torch.testing.assert_close(logits(model), unmerged, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert unchanged(model, before)
    with manylora.branch_ids(model, [0, 1, 2]), pytest.raises(ValueError, match="say which"):
        model.merge_adapter()
    assert unchanged(model, before)
    with manylora.branch_ids(model, choice):
        plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), unmerged, rtol=0, atol=1e-5)


def test_a_safe_merge_refuses_broken_weights_and_changes_nothing_in_that_layer() -> None:
    model = adapted(method="multilora", target_modules=["q_proj"])
    before = base_weights(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.manylora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\..*q_proj: NaNs detected in the"):
        model.merge_adapter(safe_merge=True)
    assert unchanged(model, before)
    assert not layer.merged


def test_pefts_own_conversion_to_lora_is_offered_only_where_it_is_exact() -> None:
    assert adapted(method="multilora").supports_lora_conversion()
    assert not adapted(method="hydralora").supports_lora_conversion()
    assert not adapted(method="branch_per_cluster").supports_lora_conversion()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(
    "config",
    [
        {"method": "multilora", "shared_rank": 2},
        {"method": "lora_split", "branch_ranks": [1, 3, 2], "use_rslora": True},
        {"method": "hydralora", "gate": "uniform"},
    ],
    ids=lambda config: config["method"],
)
def test_float64_survives_saving_and_merging(
    tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    """To 1e-11, like the equations themselves."""
    layer: dict[str, Any] = {"target_modules": ["linear"], "init_weights": False}
    torch.manual_seed(0)
    base = base_layer(kind, 13, 7)
    model = attach(OneLayer(copy.deepcopy(base)), **layer, **config)
    x = torch.randn(4, 5, 13, dtype=torch.float64)
    live = model(x)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(OneLayer(copy.deepcopy(base)), tmp_path)
    assert torch.equal(again(x), live)
    model.merge_adapter()
    assert float((model(x) - live).abs().max().detach()) < 1e-11
    assert float((model.get_base_model().linear.get_base_layer()(x) - live).abs().max()) < 1e-11


def test_merging_an_adapter_that_is_not_there_does_nothing_as_in_pefts_lora() -> None:
    for config in (
        LoraConfig(target_modules=["q_proj"]),
        manylora.ManyLoraConfig(method="multilora", target_modules=["q_proj"]),
    ):
        model = get_peft_model(tiny_llama(), config)
        model.merge_adapter(adapter_names=["nobody"])
        assert not any(getattr(module, "merged", False) for module in model.modules())
