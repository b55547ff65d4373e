"""What each method costs, against published and hand-made numbers and what PEFT itself counts."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import manylora
from manylora.methods import GATES, METHODS, count_parameters, rank_for_budget, resolve
from tiny import attach, tiny_llama

# LLaMA2-7B: hidden 4096, intermediate 11008, 32 layers.
LLAMA2_7B = 6_738_415_616
QV = [(4096, 4096)] * 2 * 32
QKVO = [(4096, 4096)] * 4 * 32
FFN = [(4096, 11008), (4096, 11008), (11008, 4096)] * 32


def percent(trainable: int) -> str:
    """As PEFT prints it: of all parameters, the adapter's included."""
    return f"{100 * trainable / (LLAMA2_7B + trainable):.3f}"


def split(method: str, layers: list[tuple[int, int]], **fields: Any) -> tuple[int, int]:
    """(without router and scales, those alone)"""
    branches = resolve(method, **fields)
    shapes = [branches.shapes(*layer) for layer in layers]
    extra = sum(a * b for s in shapes for n, (a, b) in s.items() if n in ("router", "scale"))
    return count_parameters(branches, layers) - extra, extra


@pytest.mark.parametrize(("r", "published"), [(8, "0.062"), (16, "0.124"), (32, "0.248")])
def test_lora_costs_what_hydralora_s_table_2_says(r: int, published: str) -> None:
    assert percent(count_parameters(resolve("lora", r=r), QV)) == published


@pytest.mark.parametrize(("count", "published"), [(3, "0.124"), (10, "0.341")])
def test_hydralora_costs_what_its_tables_say_when_the_router_is_left_out(
    count: int, published: str
) -> None:
    factors, _ = split("hydralora", QV, r=8, num_branches=count)
    assert percent(factors) == published


def test_the_router_is_counted() -> None:
    factors, router = split("hydralora", QV, r=8, num_branches=3)
    assert (factors, router) == (8_388_608, 786_432)
    assert count_parameters(resolve("hydralora", r=8), QV) == 9_175_040
    assert rank_for_budget(9_175_040, QV) == 17  # a LoRA of the same size; 17.5 in exact terms


def test_the_authors_script_spends_an_eighth_on_the_router() -> None:
    factors, router = split("hydralora", FFN, r=4, num_branches=4)
    assert (factors + router, router) == (18_284_544, 2_457_600)


def test_router_in_rank_space_costs_n_times_r() -> None:
    _, router = split("hydralora", QV, r=8, num_branches=3, router_input="Ax")
    assert router == 64 * 3 * 8


def test_lora_split_costs_as_the_lora_of_the_summed_rank() -> None:
    assert percent(count_parameters(resolve("lora_split", r=8, num_branches=4), QV)) == "0.248"


def test_multilora_costs_two_and_a_half_percent() -> None:
    factors, scales = split("multilora", QKVO, r=32, num_branches=5)
    assert f"{100 * factors / LLAMA2_7B:.2f}" == "2.49"
    assert f"{100 * (factors + scales) / LLAMA2_7B:.2f}" == "2.53"
    assert scales == 128 * 5 * 4096


@pytest.mark.parametrize(
    ("config", "published"),
    [
        ({"method": "lora", "r": 8}, "0.0622"),
        ({"method": "hydralora", "r": 8}, "0.1360"),  # 0.1243 and the router
        ({"method": "lora_moe", "r": 8, "gate": "ones"}, "0.1864"),
    ],
    ids=str,
)
def test_peft_counts_the_same_on_llama2_7b(
    config: dict[str, Any], published: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    with torch.device("meta"):
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
            )
        )
    assert base.num_parameters() == LLAMA2_7B
    model = get_peft_model(
        base,
        manylora.ManyLoraConfig(target_modules=["q_proj", "v_proj"], **config),
        low_cpu_mem_usage=True,
    )
    capsys.readouterr()
    model.print_trainable_parameters()
    assert f"trainable%: {published}" in capsys.readouterr().out
    expected = count_parameters(model.peft_config["default"].branches_of(), QV)
    assert model.get_nb_trainable_parameters() == (expected, LLAMA2_7B + expected)
    assert time.monotonic() - start < 10


ABLATIONS: list[dict[str, Any]] = [
    *({"method": m} for m in METHODS),
    *(
        {"method": m, "gate": g, "num_tasks": 4 if g == "task" else None, "num_branches": 2}
        for m in METHODS
        for g in GATES
        if m != "lora"
    ),
    *({"method": m, "share_A": True} for m in METHODS if m != "lora"),
    *(
        {"method": m, "share_A": False, "share_B": True}
        for m in METHODS
        if m not in ("lora", "multilora")
    ),
    *({"method": m, "share_A": False, "branch_ranks": [1, 5, 2]} for m in METHODS if m != "lora"),
    *({"method": m, "shared_rank": 3} for m in METHODS),
    *({"method": m, "router_input": "Ax"} for m in ("hydralora", "lora_moe")),
]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


def linear_sizes(model: nn.Module) -> list[tuple[int, int]]:
    return [
        (m.in_features, m.out_features)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n != "lm_head"
    ]


@pytest.mark.parametrize("config", ABLATIONS, ids=str)
def test_the_count_is_what_peft_finds_to_train(
    config: dict[str, Any], llama: LlamaForCausalLM
) -> None:
    fields = {name: value for name, value in config.items() if name != "method"}
    expected = count_parameters(resolve(config["method"], r=6, **fields), linear_sizes(llama))
    model: PeftModel = attach(llama, r=6, **config)
    try:
        assert model.get_nb_trainable_parameters()[0] == expected
    finally:
        model.unload()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    method=st.sampled_from(list(METHODS)),
    layers=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=5),
    count=st.integers(1, 6),
    shared_rank=st.integers(0, 3),
    router_input=st.sampled_from(["x", "Ax"]),
    budget=st.integers(1, 300_000),
)
def test_rank_for_budget_is_the_largest_that_fits(
    method: str,
    layers: list[tuple[int, int]],
    count: int,
    shared_rank: int,
    router_input: str,
    budget: int,
) -> None:
    fields: dict[str, Any] = {
        "num_branches": 1 if method == "lora" else count,
        "shared_rank": shared_rank,
        "router_input": router_input if METHODS[method].gate == "router" else "x",
    }

    def cost(r: int) -> int:
        return count_parameters(resolve(method, r=r, **fields), layers)

    if cost(1) > budget:
        with pytest.raises(ValueError, match=rf"{cost(1):,} parameters at r=1.*{budget:,}"):
            rank_for_budget(budget, layers, method, **fields)
        return
    r = rank_for_budget(budget, layers, method, **fields)
    assert cost(r) <= budget < cost(r + 1)


def test_rank_for_budget_takes_a_generator_of_layers() -> None:
    assert rank_for_budget(9_175_040, (size for size in QV)) == 17


def test_rank_for_budget_refuses_fixed_ranks() -> None:
    with pytest.raises(ValueError, match="branch_ranks"):
        rank_for_budget(10**6, QV, "lora_split", branch_ranks=[1, 2])


WRONG_STRUCTURE: list[tuple[dict[str, Any], list[str]]] = [
    ({"method": "hydra"}, ["method='hydra'", "hydralora"]),
    ({"method": "lora", "num_branches": 2}, ["num_branches=2", "lora_split"]),
    ({"method": "lora", "num_branches": 0}, ["num_branches=0"]),
    ({"method": "lora", "branch_ranks": [2, 2]}, ["branch_ranks=[2, 2]", "method='lora'"]),
    ({"method": "lora", "gate": "router"}, ["gate='router'", "method='lora'"]),
    ({"method": "lora", "share_A": True}, ["share_A=True", "method='lora'"]),
    ({"method": "lora", "share_B": True}, ["share_B=True", "method='lora'"]),
    ({"method": "hydralora", "num_branches": 0}, ["num_branches=0"]),
    ({"method": "hydralora", "num_branches": -2}, ["num_branches=-2"]),
    ({"method": "lora_split", "branch_ranks": []}, ["branch_ranks=[]"]),
    (
        {"method": "lora_split", "branch_ranks": [1, 2], "num_branches": 3},
        ["num_branches=3", "branch_ranks=[1, 2]"],
    ),
    ({"method": "lora_split", "branch_ranks": [1, 0]}, ["branch", "ranks", "[1, 0]"]),
    ({"method": "hydralora", "r": 0}, ["r=0"]),
    ({"method": "hydralora", "gate": "top_k"}, ["gate='top_k'", "one_hot"]),
    ({"method": "hydralora", "router_input": "h"}, ["router_input='h'", "'Ax'"]),
    ({"method": "hydralora", "share_B": True}, ["share_A=True", "share_B=True"]),
    ({"method": "hydralora", "branch_ranks": [1, 2]}, ["branch_ranks=[1, 2]", "hydralora"]),
    ({"method": "lora_moe", "share_B": True, "branch_ranks": [1, 2]}, ["branch_ranks=[1, 2]", "B"]),
    ({"method": "multilora", "share_B": True}, ["share_B=True", "multilora"]),
    ({"method": "hydralora", "shared_rank": -1}, ["shared_rank=-1"]),
    ({"method": "hydralora", "gate": "task"}, ["num_tasks", "None", "gate='task'"]),
    ({"method": "hydralora", "gate": "task", "num_tasks": 0}, ["num_tasks", "0"]),
]
WRONG_CONFIG: list[tuple[dict[str, Any], list[str]]] = [
    ({"init_A": "zeros"}, ["init_A='zeros'", "kaiming"]),
    ({"balance_loss": "cv"}, ["balance_loss='cv'", "cv_squared"]),
    ({"bias": "lora_only"}, ["bias='lora_only'", "manylora_only"]),
    ({"lora_dropout": 1.0}, ["lora_dropout=1.0"]),
    ({"lora_dropout": -0.1}, ["lora_dropout=-0.1"]),
    ({"method": "multilora", "balance_loss": "switch"}, ["balance_loss='switch'", "gate='ones'"]),
    ({"gate": "uniform", "balance_loss": "switch"}, ["balance_loss='switch'", "gate='uniform'"]),
    (
        {"method": "lora_split", "branch_ranks": [1, 2], "rank_pattern": {"q": 3}},
        ["branch_ranks=[1, 2]", "rank_pattern={'q': 3}"],
    ),
    ({"rank_pattern": {"q": 0}}, ["rank_pattern={'q': 0}"]),
    ({"layers_pattern": "h"}, ["layers_pattern='h'", "layers_to_transform"]),
    (
        {"target_modules": ".*q", "layers_to_transform": [1]},
        ["layers_to_transform=[1]", "target_modules='.*q'"],
    ),
    ({"format_version": 99}, ["format_version=99"]),
]


@pytest.mark.parametrize(("fields", "named"), WRONG_STRUCTURE, ids=str)
def test_a_structure_that_does_not_fit_is_refused_by_name_and_value(
    fields: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ValueError) as structure:  # noqa: PT011
        resolve(**fields)
    with pytest.raises(ValueError) as config:  # noqa: PT011
        manylora.ManyLoraConfig(**fields)
    assert str(structure.value) == str(config.value)
    assert [part for part in named if part not in str(config.value)] == []


@pytest.mark.parametrize(("fields", "named"), WRONG_CONFIG, ids=str)
def test_a_config_that_does_not_fit_is_refused_by_name_and_value(
    fields: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ValueError) as config:  # noqa: PT011
        manylora.ManyLoraConfig(**fields)
    assert [part for part in named if part not in str(config.value)] == []
