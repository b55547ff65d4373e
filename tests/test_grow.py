"""A trained adapter in a larger one: what keeps its outputs, what moves, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

import manylora
from manylora.adapter.grow import grow
from manylora.adapter.layer import layers_of
from manylora.adapter.router import router_weights
from manylora.adapter.training import dead_gradients
from tiny import VOCAB, attach, ids_of, tiny_llama

X = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
OLD_IDS = [0, 1, 1]


def model(seed: int = 0, **config: Any) -> PeftModel:
    fields = {"r": 4, "num_branches": 2} | config
    made = attach(tiny_llama(dtype=torch.float64), seed=seed, **fields)
    for layer in layers_of(made):  # PEFT makes adapters float32
        layer.to(torch.float64)
    return made.eval()


def trained(**config: Any) -> PeftModel:
    """An adapter with random values everywhere, as training leaves it."""
    made = model(init_weights=False, **config)
    generator = torch.Generator().manual_seed(3)
    for layer in layers_of(made):
        for factors in (layer.manylora_router, layer.manylora_gate):
            for factor in factors.values():
                factor.weight.data.normal_(generator=generator)
    return made


def grown(old: PeftModel, routing: Any = None, seed: int = 1, **config: Any) -> PeftModel:
    new = model(seed=seed, **config)
    state = get_peft_model_state_dict(old)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grow(new, old.peft_config["default"], state, routing)
    return new


@torch.no_grad()
def logits(model: PeftModel, ids: Any = OLD_IDS) -> Tensor:
    with ids_of(model, ids):
        return model(X).logits


EXACT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"method": "lora_split"}, {"num_branches": 4}),
    ({"method": "lora_split", "share_B": True}, {"num_branches": 3}),
    ({"method": "multilora"}, {"num_branches": 3}),
    ({"method": "multilora", "shared_rank": 2, "use_rslora": True}, {"num_branches": 3}),
    (
        {"method": "lora_split", "num_branches": None, "branch_ranks": [2, 4]},
        {"branch_ranks": [2, 4, 6]},
    ),
    ({"method": "hydralora", "gate": "uniform"}, {"num_branches": 3}),
    ({"method": "multilora", "gate": "uniform"}, {"num_branches": 5}),
    ({"method": "lora_split", "gate": "uniform", "share_B": True}, {"num_branches": 3}),
    ({"method": "branch_per_cluster"}, {"num_branches": 3}),
    ({"method": "branch_per_cluster", "shared_rank": 2, "share_A": True}, {"num_branches": 3}),
    ({"method": "lora_split", "gate": "one_hot", "share_B": True}, {"num_branches": 3}),
    ({"method": "lora_moe", "gate": "task", "num_tasks": 2}, {"num_tasks": 3}),
    ({"method": "lora_moe", "gate": "task", "num_tasks": 2}, {"num_tasks": 3, "num_branches": 3}),
    ({"method": "hydralora", "gate": "task", "num_tasks": 2}, {"num_branches": 5}),
    ({"method": "multilora", "gate": "task", "num_tasks": 2}, {"num_branches": 3}),
    ({"method": "hydralora"}, {}),
    ({"method": "lora_moe", "router_input": "Ax", "rank_pattern": {"q_proj": 2}}, {}),
]


@pytest.mark.parametrize(("config", "more"), EXACT, ids=lambda v: "-".join(map(str, v.values())))
def test_outputs_of_old_tasks_stay(config: dict[str, Any], more: dict[str, Any]) -> None:
    old = trained(**config)
    before = logits(old)
    assert not torch.allclose(before, logits(model(**config)), atol=1e-2)
    new = grown(old, **config | more)
    torch.testing.assert_close(logits(new), before, rtol=0, atol=1e-12)


def test_a_new_branch_of_a_one_hot_gate_starts_as_the_base_model() -> None:
    for share_B in (False, True):
        config = {"method": "lora_split", "gate": "one_hot", "share_B": share_B}
        new = grown(trained(**config), **config | {"num_branches": 3})
        with new.disable_adapter():
            base = logits(new)
        assert torch.equal(logits(new, [2, 2, 2]), base)


@pytest.mark.parametrize(
    "config",
    [
        {"method": "lora_split"},
        {"method": "lora_split", "share_B": True, "gate": "one_hot"},
        {"method": "multilora"},
        {"method": "lora_split", "gate": "uniform"},
        {"method": "branch_per_cluster"},
        {"method": "lora_moe", "gate": "task", "num_tasks": 2},
        {"method": "hydralora"},
        {"method": "lora_moe"},
    ],
    ids=lambda v: "-".join(map(str, v.values())),
)
def test_every_new_branch_learns_and_differs(config: dict[str, Any]) -> None:
    """Without a router or ids, branches of a shared factor are one branch anyway: not here."""
    new = grown(trained(**config), **config | {"num_branches": 4}).train()
    optimizer = torch.optim.SGD([p for p in new.parameters() if p.requires_grad], lr=0.1)
    per_task = "num_tasks" in config
    ids = [0, 1, 1] if per_task else [0, 2, 3]
    for _ in range(3):
        optimizer.zero_grad()
        with ids_of(new, ids):
            new(X, labels=X).loss.backward()
        assert dead_gradients(new, "default", set(ids)) == []
        optimizer.step()
    layer = layers_of(new)[0]
    with torch.no_grad():
        deltas = [
            layer.get_delta_weight("default", torch.eye(4, dtype=torch.float64)[i])
            for i in range(4)
        ]
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(deltas[i], deltas[j], rtol=0, atol=1e-14), (i, j)


def usual_routing(old: PeftModel) -> dict[str, list[float]]:
    """Mean routing weights of each layer on the test's inputs."""
    sums: dict[str, list[float]] = {}

    def watch(layer: Any, args: Any) -> None:
        t = layer.tensors("default")
        reads_x = layer.branches["default"].router_input == "x"
        seen = args[0] if reads_x else args[0] @ t["A"].T
        weights = router_weights(seen, t["router"])
        sums[layer.name] = weights.flatten(0, -2).mean(0).tolist()

    handles = [layer.register_forward_pre_hook(watch) for layer in layers_of(old)]
    logits(old)
    for handle in handles:
        handle.remove()
    return sums


def silent(new: PeftModel) -> None:
    """The new branches with B = 0, which the mean branch is to be better than."""
    for layer in layers_of(new):
        layer.manylora_B["default"].weight.data[:, 8:] = 0


ROUTED: list[dict[str, Any]] = [
    {"method": "hydralora"},
    {"method": "lora_moe"},
    {"method": "lora_moe", "router_input": "Ax"},
]


@pytest.mark.parametrize("config", ROUTED, ids=lambda v: "-".join(map(str, v.values())))
def test_mean_branch_moves_a_routed_output_less_than_a_silent_one(config: dict[str, Any]) -> None:
    """Branches that agree in part, as those of one training do; routers that follow the token."""
    old = trained(**config)
    for layer in layers_of(old):
        B = layer.manylora_B["default"].weight.data
        B[:, 4:] = B[:, :4] + 0.5 * B[:, 4:]
        if not layer.branches["default"].share_A:
            A = layer.manylora_A["default"].weight.data
            A[4:] = A[:4] + 0.5 * A[4:]
    before = logits(old)
    with old.disable_adapter():
        update = (before - logits(old)).norm()
    new = grown(old, usual_routing(old), **config | {"num_branches": 3})
    moved = float((logits(new) - before).norm() / update)
    silent(new)
    moved_silent = float((logits(new) - before).norm() / update)
    print(f"{config}: mean branch {moved:.3f}, silent branch {moved_silent:.3f} of the update")
    assert moved < 0.7 * moved_silent


def test_mean_branch_is_the_weighted_mean_of_the_updates() -> None:
    config = {"method": "hydralora"}
    old = trained(**config)
    routing = {layer.name: [0.9, 0.1] for layer in layers_of(old)}
    new = grown(old, routing, **config | {"num_branches": 3})
    layer, was = layers_of(new)[0], layers_of(old)[0]
    choose = torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        mean = was.get_delta_weight("default", torch.tensor([0.9, 0.1], dtype=torch.float64))
        torch.testing.assert_close(layer.get_delta_weight("default", choose[2]), mean)


def test_mean_of_own_factors_is_the_best_of_its_rank() -> None:
    config = {"method": "lora_moe"}
    old = trained(**config)
    new = grown(old, **config | {"num_branches": 3})
    layer, was = layers_of(new)[0], layers_of(old)[0]
    with torch.no_grad():
        mean = was.get_delta_weight("default", torch.full((2,), 0.5, dtype=torch.float64))
        got = layer.get_delta_weight("default", torch.eye(3, dtype=torch.float64)[2])
    best = torch.linalg.svdvals(mean)[4:].norm()
    assert float((got - mean).norm()) == pytest.approx(float(best))


@pytest.mark.parametrize("share_A", [False, True])
def test_training_the_new_task_alone_leaves_the_old_branches(share_A: bool) -> None:
    config = {"method": "branch_per_cluster", "shared_rank": 2, "share_A": share_A}
    old = trained(**config)
    new = grown(old, **config | {"num_branches": 3}).train()
    for name, tensor in new.named_parameters():
        if "manylora_shared_" in name or (share_A and "manylora_A" in name):
            tensor.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in new.parameters() if p.requires_grad], lr=0.1, weight_decay=0
    )
    for _ in range(3):
        optimizer.zero_grad()
        with manylora.branch_ids(new, 2):
            new(X, labels=X).loss.backward()
        optimizer.step()
    was, now = get_peft_model_state_dict(old), get_peft_model_state_dict(new)
    for name, tensor in was.items():
        assert torch.equal(now[name][: tensor.shape[0], : tensor.shape[1]], tensor), name
    assert not torch.equal(logits(new.eval(), [2, 2, 2]), logits(new, [-1, -1, -1]))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "lora_moe"}, r"method: 'hydralora' there, 'lora_moe' here"),
    ({"r": 8}, r"r: 4 there, 8 here"),
    ({"num_branches": 1}, r"num_branches: 2 there, 1 here"),
    (
        {"target_modules": ["q_proj"]},
        r"target_modules: \[.*'down_proj'.*\] there, \['q_proj'\] here",
    ),
    ({"shared_rank": 2}, r"shared_rank: 0 there, 2 here"),
    ({"gate": "uniform"}, r"gate: 'router' there, 'uniform' here"),
    ({"lora_alpha": 8, "use_rslora": True}, r"lora_alpha: 16 there, 8 here\n.*use_rslora: False"),
    ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern: {} there, {'q_proj': 2} here"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda v: str(v)[:30])
def test_what_does_not_fit_is_named_with_both_values(change: dict[str, Any], message: str) -> None:
    old = trained(method="hydralora")
    with pytest.raises(ValueError, match=message):
        grown(old, **{"method": "hydralora"} | change)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"num_hidden_layers": 1}, r"21 tensors, such as .*layers.1.* there alone, 0 tensors here"),
        ({"hidden_size": 16}, r"other layers than .*manylora_A.weight is \(4, 32\) there"),
    ],
)
def test_another_base_model_is_refused(base: dict[str, Any], message: str) -> None:
    old = trained(method="hydralora")
    new = attach(tiny_llama(**base), method="hydralora", r=4, num_branches=2)
    with pytest.raises(ValueError, match=message):
        grow(new, old.peft_config["default"], get_peft_model_state_dict(old))


def test_fewer_tasks_and_a_rank_to_copy_are_refused() -> None:
    gated = {"method": "lora_moe", "gate": "task"}
    with pytest.raises(ValueError, match="tasks: 3 there, 2 here"):
        grown(trained(**gated, num_tasks=3), **gated, num_tasks=2)
    ranks = {"num_branches": None, "num_tasks": 2}
    old = trained(**gated, **ranks, branch_ranks=[4, 4])
    with pytest.raises(ValueError, match=r"its rank must be one of \[4\]"):
        grown(old, **gated, **ranks, branch_ranks=[4, 4, 2])


def test_other_trained_tensors_come_along() -> None:
    config: dict[str, Any] = {"method": "lora_split", "modules_to_save": ["lm_head"]}
    old = trained(**config)
    with torch.no_grad():
        old.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    new = grown(old, **config | {"num_branches": 3})
    torch.testing.assert_close(logits(new), logits(old), rtol=0, atol=1e-12)
