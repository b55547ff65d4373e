"""A quantised base model (bitsandbytes, on the CPU): train, save, load, merge and take off.

GPTQ and AWQ need their package, gptqmodel, and a GPU: here stand-ins take the place of its layers
(tiny_packed.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import manylora
from manylora.adapter.layer import ManyLoraLayer
from manylora.adapter.quantized import quantised_as
from manylora.recipe import Recipe, parse_recipe
from manylora.train import train
from tiny import VOCAB, attach, save_tiny_model, tiny_llama, train_steps
from tiny_packed import pack, take_for_gptqmodel

bitsandbytes = pytest.importorskip("bitsandbytes")

X = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([0, 2, 1])
LAYERS = {4: "Linear4bit", 8: "Linear8bitLt"}
METHODS: list[dict[str, Any]] = [
    {"method": "hydralora"},
    {"method": "multilora"},
    {"method": "branch_per_cluster", "shared_rank": 2},
]
methods = pytest.mark.parametrize("config", METHODS, ids=[str(c["method"]) for c in METHODS])
bits = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(path)
    return path


def quantized(folder: Path, bits: int) -> PreTrainedModel:
    quantization = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )


def adapted(folder: Path, bits: int, config: dict[str, Any], **more: Any) -> PeftModel:
    return attach(
        quantized(folder, bits),
        task_type="CAUSAL_LM",
        **{"init_weights": False, "lora_alpha": 8} | config | more,
    )


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    with manylora.branch_ids(model, IDS):
        return model.eval()(input_ids=X).logits


def first_layer(model: PeftModel) -> ManyLoraLayer:
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, ManyLoraLayer)
    return layer


@bits
@methods
def test_it_trains_saves_and_loads(
    config: dict[str, Any], bits: int, folder: Path, tmp_path: Path
) -> None:
    base = prepare_model_for_kbit_training(
        quantized(folder, bits), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = attach(base, task_type="CAUSAL_LM", **config).train()
    layer = first_layer(model)
    assert type(layer.base_layer).__name__ == LAYERS[bits]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    packed = layer.base_layer.weight.data.clone()
    assert not packed.is_floating_point()
    losses = train_steps(model, X, IDS)
    assert losses[-1] < losses[0] - 0.05
    assert torch.equal(layer.base_layer.weight.data, packed)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    base = prepare_model_for_kbit_training(
        quantized(folder, bits), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), expected)


@bits
def test_merging_warns_that_it_rounds_and_is_undone_exactly(bits: int, folder: Path) -> None:
    model = adapted(folder, bits, {"method": "multilora"})
    layer, unmerged = first_layer(model), logits(model)
    packed = layer.base_layer.weight.data.clone()
    names = set(model.state_dict())
    with pytest.warns(UserWarning, match="rounds the result to its few levels again; merge into"):
        model.merge_adapter()
    assert type(layer.base_layer).__name__ == LAYERS[bits]
    assert not torch.equal(layer.base_layer.weight.data, packed)
    assert {name for name in model.state_dict() if "manylora" in name} <= names
    assert not [name for name, _ in model.named_modules() if "_unmerged" in name]
    with manylora.branch_ids(model, IDS), model.disable_adapter():
        without = model(input_ids=X).logits
    assert (unmerged - without).norm() > 0.2 * without.norm()
    assert torch.equal(layer.base_layer.weight.data, packed)  # disabling took it off
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        merged = logits(model)
    model.unmerge_adapter()
    assert (merged - unmerged).norm() < 0.75 * (without - unmerged).norm()
    assert torch.equal(layer.base_layer.weight.data, packed)
    assert torch.equal(logits(model), unmerged)


@bits
def test_a_routed_adapter_refuses_to_merge(bits: int, folder: Path) -> None:
    model = adapted(folder, bits, {"method": "hydralora"})
    packed = first_layer(model).base_layer.weight.data.clone()
    with pytest.raises(ValueError, match="mixes its branches anew for every token"):
        model.merge_adapter()
    assert torch.equal(first_layer(model).base_layer.weight.data, packed)


@bits
@methods
def test_bf16_factors_with_fp32_scale_and_router_compute(
    config: dict[str, Any], bits: int, folder: Path
) -> None:
    """TRL casts all trainable tensors of a quantised model to bf16; ours restores the delicate."""
    model = adapted(folder, bits, config)
    exact = logits(model)
    with model.disable_adapter():
        effect = (exact - logits(model)).norm()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.split(".")[-3].endswith(("scale", "router")):
            parameter.data = parameter.data.bfloat16()
    assert 0 < (logits(model) - exact).norm() < 0.05 * effect
    model.train()
    with manylora.branch_ids(model, IDS):
        model(input_ids=X, labels=X).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == parameter.dtype
            assert parameter.grad.isfinite().all()


@bits
def test_a_run_on_a_quantised_base_keeps_its_router_in_fp32(
    bits: int, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    values = make_recipe(method="hydralora").model_dump()
    values["model"] = str(save_tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=64))
    run = train(parse_recipe({**values, "quantize": f"{bits}bit"}))
    saved = load_file(run / "adapter_model.safetensors")
    assert {t.dtype for name, t in saved.items() if "manylora_router" in name} == {torch.float32}
    assert any(t.any() for name, t in saved.items() if "manylora_B" in name)
    model, tokenizer = manylora.load(run)
    layer = first_layer(model)
    assert type(layer.base_layer).__name__ == LAYERS[bits]
    assert layer.manylora_router["default"].weight.dtype == torch.float32
    inputs = tokenizer("blue", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


@pytest.fixture(params=["gptq", "awq"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch, kind: str) -> Callable[[], PreTrainedModel]:
    """A model of packed layers, which PEFT takes for gptqmodel's."""
    take_for_gptqmodel(monkeypatch)
    return lambda: pack(tiny_llama(num_hidden_layers=1), kind)


NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@methods
def test_layers_that_only_compute_train_save_and_load(
    config: dict[str, Any], packed: Callable[[], PreTrainedModel], kind: str, tmp_path: Path
) -> None:
    model = attach(packed(), task_type="CAUSAL_LM", target_modules=NAMES, **config).train()
    layer = first_layer(model)
    assert quantised_as(layer) == kind
    codes = layer.base_layer.qweight.clone()
    losses = train_steps(model, X, IDS, steps=8)
    assert losses[-1] < losses[0] - 0.02
    assert torch.equal(layer.base_layer.qweight, codes)
    expected = logits(model)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(packed(), tmp_path)), expected)


def test_merging_into_layers_that_only_compute_names_the_better_way(
    packed: Callable[[], PreTrainedModel], kind: str
) -> None:
    model = attach(packed(), method="multilora", target_modules=NAMES, init_weights=False)
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=rf"{kind} layer cannot take a merge.*unquantised base"
        ):
            merge()
    assert torch.equal(logits(model), before)
