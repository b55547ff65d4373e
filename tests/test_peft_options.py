"""The fields that ManyLoraConfig shares with LoraConfig do what they do there, or say why not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import NoMatchingPeftModuleError, PeftModel
from torch import nn

import manylora
from manylora.adapter.layer import ManyLoraLayer
from tiny import VOCAB, attach, tiny_llama

X = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))


def adapted(method: str = "hydralora", **config: Any) -> PeftModel:
    fields = {"task_type": "CAUSAL_LM", "init_weights": False} | config
    return attach(tiny_llama(), method=method, **fields)


def layers(model: nn.Module) -> dict[str, ManyLoraLayer]:
    return {
        name.removeprefix("base_model.model.model.layers."): module
        for name, module in model.named_modules()
        if isinstance(module, ManyLoraLayer)
    }


ALL = {
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {f"{i}.{name}" for i in (0, 1) for name in ALL}),
        ({"target_modules": None}, {f"{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"}),
        (
            {"exclude_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
            {f"{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")},
        ),
        (
            {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
            {"1.self_attn.q_proj", "1.mlp.up_proj"},
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
            {"0.self_attn.q_proj"},
        ),
        (
            {"target_modules": r".*\.0\..*\.(q|down)_proj"},
            {"0.self_attn.q_proj", "0.mlp.down_proj"},
        ),
        (
            {"target_modules": r".*_proj", "exclude_modules": r".*mlp.*|.*\.1\..*"},
            {f"0.self_attn.{p}_proj" for p in "qkvo"},
        ),
    ],
    ids=["all-linear", "default", "exclude", "layers", "pattern", "regex", "regex-exclude"],
)
def test_the_named_layers_are_adapted_and_no_others(
    config: dict[str, Any], expected: set[str]
) -> None:
    model = adapted(**config)
    assert set(layers(model)) == expected
    assert type(model.base_model.model.lm_head) is nn.Linear


@pytest.mark.parametrize("method", ["hydralora", "multilora"])
def test_patterns_set_rank_and_scaling_of_the_layers_they_name(method: str) -> None:
    config: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "shared_rank": 2,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 32.0},
    }
    found = layers(adapted(method, **config))
    assert {
        name: (
            layer.manylora_B["default"].weight.shape[1],
            layer.scaling["default"],
            layer.shared_scaling["default"],
        )
        for name, layer in found.items()
    } == {
        "0.self_attn.q_proj": (3 * 2, 8 / 2, 8 / 2),
        "1.self_attn.q_proj": (3 * 2, 32 / 2, 32 / 2),
        "0.mlp.up_proj": (3 * 4, 8 / 4, 8 / 2),
        "1.mlp.up_proj": (3 * 6, 8 / 6, 8 / 2),
    }
    rows = 1 if method == "hydralora" else 3
    assert found["1.mlp.up_proj"].manylora_A["default"].weight.shape == (rows * 6, 32)
    rslora = layers(adapted(method, use_rslora=True, **config))
    assert rslora["0.mlp.up_proj"].scaling["default"] == 8 / 4**0.5
    assert rslora["0.mlp.up_proj"].shared_scaling["default"] == 8 / 2**0.5


def trained(model: PeftModel) -> PeftModel:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(input_ids=X, labels=X).loss.backward()
    optimizer.step()
    return model.eval()


def saves_and_loads_equal(model: PeftModel, folder: Path) -> bool:
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    with torch.no_grad():
        return torch.equal(loaded(X).logits, model.eval()(X).logits)


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    model = adapted("multilora", modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head
    before = head.original_module.weight.clone()
    trained(model)
    assert not torch.equal(head.modules_to_save["default"].weight, before)
    assert torch.equal(head.original_module.weight, before)
    assert saves_and_loads_equal(model, tmp_path)


def test_trainable_token_indices_train_only_those_rows(tmp_path: Path) -> None:
    model = adapted("multilora", trainable_token_indices=[5, 9])
    before = tiny_llama().model.embed_tokens.weight
    x = torch.tensor([[5, 9, 5, 11]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    now = model.base_model.model.model.embed_tokens(torch.arange(VOCAB))
    changed = (now != before).any(1).nonzero().flatten()
    assert changed.tolist() == [5, 9]
    assert saves_and_loads_equal(model, tmp_path)


@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", set()), ("all", {"q_proj", "o_proj"}), ("manylora_only", {"q_proj"})],
)
def test_bias_chooses_which_biases_train_and_they_are_saved(
    bias: str, expected: set[str], tmp_path: Path
) -> None:
    base = tiny_llama(attention_bias=True)
    model = attach(
        base, method="multilora", bias=bias, task_type="CAUSAL_LM", target_modules=["q_proj"]
    )
    names = {name for name, p in model.named_parameters() if p.requires_grad and "bias" in name}
    assert {part for part in ("q_proj", "o_proj") if any(part in n for n in names)} == expected
    trained(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(attention_bias=True), tmp_path).eval()
    torch.testing.assert_close(loaded(X).logits, model(X).logits, rtol=0, atol=0)


def test_a_name_that_no_layer_has_is_answered_with_the_names_there_are() -> None:
    message = (
        "no linear layer matches target_modules=['query']; this model has "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"
    )
    with pytest.raises(NoMatchingPeftModuleError, match=re.escape(message)):
        adapted(target_modules=["query"])
    with pytest.raises(ValueError, match=r"target_modules='q\.\*', exclude_modules=\['k'\]; this"):
        adapted(target_modules="q.*", exclude_modules=["k"])
    with pytest.raises(ValueError, match=r"\['q_proj'\], layers_to_transform=\[7\]; this model"):
        adapted(target_modules=["q_proj"], layers_to_transform=[7])
    model = adapted(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"\['query'\]; this model has q_proj, k_proj"):
        model.add_adapter("second", manylora.ManyLoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"\['query'\]; this model has q_proj, k_proj"):
        tiny_llama().add_adapter(manylora.ManyLoraConfig(target_modules=["query"]))


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.conv = nn.Conv2d(1, 1, 3)
        self.head = nn.Linear(4, 4)


@pytest.mark.parametrize(("name", "kind"), [("embed", "Embedding"), ("conv", "Conv2d")])
def test_a_layer_that_cannot_be_adapted_is_named_with_what_to_do(name: str, kind: str) -> None:
    message = (
        f"{name} is a {kind}, which manylora cannot adapt: it adapts torch.nn.Linear, "
        "transformers' Conv1D and quantised linear layers; leave it out with "
        "exclude_modules or narrow target_modules"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        attach(Picture(), target_modules=[name])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bias": "lora_only"}, r"unknown bias='lora_only'; it is one of"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0 must be in \[0, 1\)"),
        ({"layers_pattern": "layers"}, "layers_pattern='layers' needs layers_to_transform"),
        ({"target_modules": "q.*", "layers_to_transform": [0]}, r"=\[0\] cannot be used when"),
        ({"rank_pattern": {"q": 2}, "branch_ranks": [1, 2], "method": "lora_split"}, "both set"),
        ({"method": "multilora", "balance_loss": "switch"}, "has no router"),
        ({"method": "hydra"}, "unknown method='hydra'; known methods: lora, "),
    ],
)
def test_a_value_that_does_not_fit_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        manylora.ManyLoraConfig(**config)
