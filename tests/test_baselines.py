"""The methods of a comparison by name: what each adapts, how it is scaled, and that it learns."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LilyConfig, get_peft_model

import manylora
from contending import attached, named, trained
from manylora.comparison.baselines import KINDS
from manylora.comparison.contenders import Contender, contenders, for_steps
from tiny import ids_of, tiny_llama

NAMES = list(KINDS)


@pytest.fixture(scope="module")
def all_of_them() -> dict[str, Contender]:
    return {each.name: each for each in named(*NAMES)}


@pytest.mark.parametrize(
    ("r", "tasks", "private", "shared"),
    [(12, 4, 1, 8), (16, 4, 1, 12), (24, 4, 2, 16), (40, 16, 1, 24), (20, 16, 1, 4)],
)
def test_the_shared_branch_takes_what_the_private_ones_leave(
    r: int, tasks: int, private: int, shared: int
) -> None:
    (found,) = named("branch_per_cluster_shared", budget=f"lora:r={r}", tasks=tasks)
    config: Any = found.config
    assert (config.r, config.shared_rank, config.num_branches) == (private, shared, tasks)
    s, s0 = config.scalings_of()
    assert s * s0 == pytest.approx(4)
    assert found.note == "1.00 of the budget"


@pytest.mark.parametrize("name", NAMES)
def test_every_method_learns_on_the_model(name: str, all_of_them: dict[str, Contender]) -> None:
    config = all_of_them[name].config
    model: Any = tiny_llama() if config is None else attached(config)
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    ours = isinstance(config, manylora.ManyLoraConfig)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        with ids_of(model, [0, 2]) if ours else nullcontext():
            loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_one_task_is_enough_for_every_method(name: str) -> None:
    (found,) = named(name, tasks=1)
    branches = getattr(found.config, "num_branches", None)
    if KINDS[name].decided.get("gate") == "one_hot" or name.startswith("branch_per_cluster"):
        assert branches == 1
    assert found.params > 0


def test_methods_that_choose_by_task_have_a_branch_for_each() -> None:
    found = named("lora_split_one_hot", "branch_per_cluster", "hydralora:gate=one_hot", tasks=5)
    branches = [each.config.branches_of() for each in found]  # type: ignore[union-attr]
    assert [(each.count, each.gate) for each in branches] == [(5, "one_hot")] * 3
    assert "the same structure as branch_per_cluster" in found[0].note


def test_a_learned_gate_has_a_row_for_each_task() -> None:
    (found,) = named("hydralora:gate=task", tasks=5)
    assert found.config.num_tasks == 5  # type: ignore[union-attr]
    assert trained(found.config) == found.params  # type: ignore[arg-type]


def test_the_scaling_is_two_unless_the_adapter_or_the_name_says() -> None:
    names = ["lora", "dora", "hydralora", "multilora", "adalora"]
    for found in named(*names):
        config: Any = found.config
        assert config.lora_alpha == 2 * (config.init_r if found.name == "adalora" else config.r)
    adapter, own = named("lora", "lora:lora_alpha=5", lora_alpha=7, method="hydralora", r=3)
    assert (adapter.config.lora_alpha, own.config.lora_alpha) == (7, 5)  # type: ignore[union-attr]


def test_dropout_is_the_adapter_s_and_said_where_there_is_none() -> None:
    lora, hydra, ia3 = named("lora", "hydralora", "ia3", lora_dropout=0.05)
    assert lora.config.lora_dropout == hydra.config.lora_dropout == 0.05  # type: ignore[union-attr]
    assert ia3.note.endswith("without the dropout of 0.05, which it does not have")
    assert named("lora")[0].config.lora_dropout == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"exclude_modules": ["v_proj"]},
        {"target_modules": r".*\.(up|down)_proj"},
    ],
)
def test_every_method_adapts_the_same_layers(adapter: dict[str, Any]) -> None:
    whole = {"full", "prompt_tuning", "p_tuning", "prefix_tuning"}
    names = [name for name in NAMES if name not in whole]
    if "layers_to_transform" in adapter:
        names.remove("lily")
    layers = {
        each.name: sorted(attached(each.config).base_model.targeted_module_names)  # type: ignore[arg-type]
        for each in named(*names, **adapter)
    }
    assert layers["lora"]
    assert all(own == layers["lora"] for own in layers.values()), layers


@pytest.mark.parametrize("blocks", [2, 4])
def test_lily_shares_its_factors_among_blocks(blocks: int) -> None:
    """PEFT's all-linear would not on a small model, as each layer is then named in full."""
    base = tiny_llama(num_hidden_layers=blocks)
    (found,) = contenders(["lily:r=3"], "100", base, 3, {})[1]
    assert isinstance(found.config, LilyConfig)
    model = attached(found.config, num_hidden_layers=blocks)
    layers = [block.self_attn.q_proj for block in model.base_model.model.model.layers]
    a = [id(layer.lily_A["default"].weight) for layer in layers]
    assert len(set(a[: blocks // 2])) == len(set(a[blocks // 2 :])) == 1
    assert len(set(a)) == 2
    assert len({id(layer.lily_B["default"].weight) for layer in layers}) == 1
    ins, outs = 32 + 32 + 32 + 32 + 32 + 32 + 48, 32 + 16 + 16 + 32 + 48 + 48 + 32
    assert found.params == 2 * 3 * ins + 2 * 3 * outs + blocks * 7 * 2 * 3


def test_lily_refuses_layers_that_it_cannot_tell_apart() -> None:
    with pytest.raises(ValueError, match=r"leave out 'model.layers.0.q?.*leave lily out"):
        named("lily", target_modules=["q_proj"], layers_to_transform=[1])


def test_ia3_scales_the_input_of_the_second_feed_forward_layer(
    all_of_them: dict[str, Contender],
) -> None:
    config = all_of_them["ia3"].config
    assert isinstance(config, IA3Config)
    block = attached(config).base_model.model.model.layers[0]
    assert block.mlp.down_proj.ia3_l["default"].shape == (1, 48)
    assert block.mlp.up_proj.ia3_l["default"].shape == (48, 1)


def test_a_run_has_its_own_copy_of_the_configuration() -> None:
    for found in named("lora", "hydralora", "prompt_tuning", "adalora"):
        config: Any = found.config
        before = config.to_dict()
        assert before.get("target_modules", "all-linear") == "all-linear"
        get_peft_model(tiny_llama(), for_steps(config, 9))
        assert config.to_dict() == before


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 540])
def test_adalora_prunes_within_the_steps_of_a_run(
    steps: int, all_of_them: dict[str, Contender]
) -> None:
    config = all_of_them["adalora"].config
    assert config is not None
    found = for_steps(config, steps)
    assert isinstance(found, AdaLoraConfig)
    assert found.total_step == steps
    assert found.tinit < steps - found.tfinal
    if steps == 540:
        assert (found.tinit, found.tfinal) == (54, 162)


def test_rates_begin_where_the_method_is_known_to_learn(
    all_of_them: dict[str, Contender],
) -> None:
    rates = {name: each.centre_lr for name, each in all_of_them.items()}
    assert rates["multilora"] == 2 * rates["lora"] == 2 * rates["hydralora"]
    assert rates["ia3"] > rates["lora"] > rates["full"]
