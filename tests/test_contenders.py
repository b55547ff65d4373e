"""Methods at equal parameters: what PEFT counts on a real model, and never over the budget."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import manylora
from contending import named, trained
from manylora.comparison.baselines import KINDS, MOST_TOKENS
from manylora.comparison.contenders import Contender, contenders, largest
from manylora.methods import rank_for_budget
from tiny import tiny_llama

NAMES = list(KINDS)
SIZED = [name for name in NAMES if KINDS[name].sizes]
OURS = ["lora_split", "lora_split_one_hot", "multilora", "hydralora", "lora_moe"]
LLAMA_7B = 6_738_415_616


@pytest.fixture(scope="module")
def all_of_them() -> dict[str, Contender]:
    return {each.name: each for each in named(*NAMES)}


@pytest.fixture(scope="module")
def seven_billion() -> LlamaForCausalLM:
    """LLaMA-7B without its numbers."""
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
        )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "full"])
def test_a_method_trains_as_many_parameters_as_it_says(
    name: str, all_of_them: dict[str, Contender]
) -> None:
    config = all_of_them[name].config
    assert config is not None
    assert trained(config) == all_of_them[name].params > 0


@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning_counts_tied_weights_once(tied: bool) -> None:
    base = tiny_llama(tie_word_embeddings=tied)
    (full,) = contenders(["full"], "100", base, 3, {})[1]
    assert full.config is None
    assert full.params == sum(p.numel() for p in base.parameters())
    assert full.note.endswith("of the budget: Full fine-tuning has no size")


@pytest.mark.parametrize("budget", ["lora:r=5", "lora:r=11", "9999"])
@pytest.mark.parametrize("name", SIZED)
def test_the_budget_is_met_and_the_next_size_would_exceed_it(name: str, budget: str) -> None:
    total, (found,) = contenders([name], budget, tiny_llama(), 3, {})
    config: Any = found.config
    assert found.params <= total
    size = KINDS[name].sizes[-1]
    value = getattr(config, size)
    if value == KINDS[name].most:
        assert f": {MOST_TOKENS} virtual tokens at most" in found.note
        return
    equal = {"branch_ranks": None} if KINDS[name].uneven else {}
    assert trained(dataclasses.replace(config, **{size: value + 1}, **equal)) > total


@pytest.mark.parametrize("name", [name for name in NAMES if KINDS[name].uneven])
def test_one_more_rank_of_any_branch_would_exceed_the_budget(name: str) -> None:
    for rank in range(5, 12):
        total, (found,) = contenders([name], f"lora:r={rank}", tiny_llama(), 3, {})
        config: Any = found.config
        ranks = sorted(config.branch_ranks or [config.r] * 3)
        assert ranks[-1] - ranks[0] <= 1 and ranks[0] == config.r and found.params <= total
        assert config.lora_alpha / config.r == 2
        more = {"branch_ranks": [ranks[0] + 1, *ranks[1:]]}
        assert trained(dataclasses.replace(config, **more)) > total


def test_branches_of_unlike_rank_are_named() -> None:
    (found,) = named("lora_split", budget="lora:r=8")
    assert found.label == "LoRA-Split r=2, 3 branches, 2 of them with r=3"
    (shared,) = named("lora_split:share_B=true", budget="lora:r=8")
    assert shared.config.branch_ranks is None  # type: ignore[union-attr]


@pytest.mark.parametrize("name", OURS)
def test_manylora_s_own_table_gives_the_same_rank(name: str) -> None:
    total, (found,) = contenders([name], "lora:r=11", tiny_llama(), 3, {})
    config: Any = found.config
    layers = [
        (module.in_features, module.out_features)
        for path, module in tiny_llama().named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    ]
    assert config.r == rank_for_budget(
        total, layers, config.method, gate=config.gate, num_branches=config.num_branches
    )


def test_a_budget_in_words_is_that_method_s_parameters() -> None:
    total, (lora,) = contenders(["lora"], "lora:r=8", tiny_llama(), 3, {})
    assert (lora.config.r, lora.params, lora.note) == (8, total, "1.00 of the budget")  # type: ignore[union-attr]
    assert contenders(["lora"], "multilora:r=2", tiny_llama(), 3, {})[0] == trained(
        manylora.ManyLoraConfig(method="multilora", r=2)
    )


def test_a_budget_in_numbers_is_kept() -> None:
    assert contenders(["ia3"], "5000", tiny_llama(), 3, {})[0] == 5000


def test_one_rank_too_many_is_kept_and_said() -> None:
    (found,) = named("branch_per_cluster", budget="lora:r=2", tasks=3)
    assert found.config.r == 1  # type: ignore[union-attr]
    assert found.note == "1.50 of the budget: it has no smaller size than r=1"


def test_a_method_without_a_size_is_kept_and_said() -> None:
    total, (ia3,) = contenders(["ia3"], "lora:r=8", tiny_llama(), 3, {})
    assert ia3.note == f"{ia3.params / total:.2f} of the budget: IA3 has no size"


@given(
    a=st.integers(1, 50), b=st.integers(1, 50), c=st.integers(0, 5),
    budget=st.integers(1, 5000), most=st.none() | st.integers(1, 30),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_largest_size_is_found_on_lines_and_on_curves(
    a: int, b: int, c: int, budget: int, most: int | None
) -> None:
    def cost(size: int) -> int:
        return a + b * size + c * size * size

    fitting = [size for size in range(1, (most or 5001) + 1) if cost(size) <= budget]
    assert largest(cost, budget, most) == max(fitting, default=1)


def test_a_name_s_fields_are_set_and_shown() -> None:
    five, ax = named("hydralora:num_branches=5", "hydralora:r=2:router_input=Ax")
    assert five.config.num_branches == 5  # type: ignore[union-attr]
    assert five.label == f"HydraLoRA r={five.config.r}, 5 branches"  # type: ignore[union-attr]
    assert (ax.config.r, ax.config.router_input) == (2, "Ax")  # type: ignore[union-attr]
    assert ax.label == "HydraLoRA r=2, 3 branches, router_input=Ax"
    assert ax.name == "hydralora:r=2:router_input=Ax"


def test_ranks_of_branches_are_given_with_the_name() -> None:
    name = "branch_per_cluster_shared:r=2:branch_ranks=1+4+1"
    (found,) = named(name, budget="lora:r=16")
    (even,) = named("branch_per_cluster_shared:r=2", budget="lora:r=16")
    assert isinstance(found.config, manylora.ManyLoraConfig)
    assert isinstance(even.config, manylora.ManyLoraConfig)
    assert found.config.branches_of().ranks == (1, 4, 1)
    assert found.config.shared_rank == even.config.shared_rank  # 16 in all
    assert found.params == even.params == trained(found.config)
    assert found.config.scalings_of() == even.config.scalings_of()
    assert found.label.endswith("3 branches, branch_ranks=1+4+1")


def test_a_given_size_is_kept_whatever_the_budget() -> None:
    total, (found,) = contenders(["multilora:r=40"], "lora:r=4", tiny_llama(), 3, {})
    assert found.config.r == 40  # type: ignore[union-attr]
    assert found.params > total
    assert found.note.endswith("of the budget, which is not applied: the size is given")


def test_labels_name_the_size(all_of_them: dict[str, Contender]) -> None:
    assert all_of_them["lora"].label == "LoRA r=8"
    assert all_of_them["adalora"].label == "AdaLoRA r=7 to 5"
    assert all_of_them["branch_per_cluster_shared"].label == (
        "Branch per cluster r=1 and r=5 shared, 3 branches"
    )
    assert all_of_them["full"].label == "Full fine-tuning"


@pytest.mark.parametrize(
    ("names", "budget", "adapter", "words"),
    [
        (["hydralor"], "100", {}, "unknown method 'hydralor'; did you mean 'hydralora'?"),
        (["zzz"], "100", {}, "known methods: lora, lora_split"),
        (["hydralora:num_branch=3"], "100", {}, "did you mean 'num_branches'?"),
        (["hydralora:r"], "100", {}, "'r' is not field=value"),
        (["hydralora:r=x"], "100", {}, "hydralora:r=x: input should be a valid integer"),
        (["hydralora:r=0"], "100", {}, "r=0 must be at least 1"),
        (["hydralora:method=lora"], "100", {}, "no field 'method'"),
        (["lora:target_modules=q_proj"], "100", {}, "no field 'target_modules'"),
        (["dora:use_dora=false"], "100", {}, "no field 'use_dora'"),
        (["adalora:r=4"], "100", {}, "no field 'r'"),
        (["branch_per_cluster:num_branches=4"], "100", {}, "no field 'num_branches'"),
        (["lora_split:branch_ranks=1+2+1"], "100", {}, "give r too"),
        (["lora_split:r=1:branch_ranks=1+x"], "100", {}, "should be a valid integer"),
        (["branch_per_cluster:r=1:branch_ranks=1+2"], "100", {}, "names 2 branches"),
        (["full:r=4"], "100", {}, "full has no field 'r'"),
        (["hydralora:router_input=y"], "100", {}, "'x' or 'Ax'"),
        (["lora_split:router_input=Ax"], "100", {}, "lora_split:router_input=Ax does not fit"),
        (["lora", "lora"], "100", {}, "give each once"),
        ([], "100", {}, "no methods"),
        (["lora"], "lora", {}, "budget='lora' gives no size; lora:r=16 would"),
        (["lora"], "lorra:r=1", {}, "did you mean 'lora'?"),
        (["lora"], "0", {}, "neither parameters"),
        (["lora"], "5e6", {}, "neither parameters"),
        (["lora"], "100", {"num_branches": 4}, "hydralora:num_branches=4"),
        (["lora"], "100", {"target_modules": ["nothing"]}, "nothing"),
    ],
)
def test_what_does_not_fit_is_said(
    names: list[str], budget: str, adapter: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        contenders(names, budget, tiny_llama(), 3, adapter)


def test_neither_the_model_nor_the_random_numbers_are_touched() -> None:
    base = tiny_llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    contenders(NAMES, "lora:r=4", base, 3, {})
    assert torch.equal(torch.get_rng_state(), state)
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_llama_7b_is_counted_without_its_numbers(seven_billion: LlamaForCausalLM) -> None:
    names = ["lora", "hydralora", "ia3", "p_tuning", "full"]
    total, found = contenders(names, "lora:r=16", seven_billion, 3, {})
    by_name = {each.name: each for each in found}
    assert total == by_name["lora"].params == 39_976_960
    outs = 32 * (4 * 4096 + 2 * 11008 + 4096)
    ins = 32 * (6 * 4096 + 11008)
    assert by_name["hydralora"].params == 7 * ins + 3 * 7 * outs + 3 * ins
    assert by_name["ia3"].params == 32 * (4 * 4096 + 2 * 11008 + 11008)
    h: int = by_name["p_tuning"].config.encoder_hidden_size  # type: ignore[union-attr]
    assert by_name["p_tuning"].params == 20 * 4096 + h * (2 * 4096 + h + 2) + 4096
    assert by_name["full"].params == LLAMA_7B
