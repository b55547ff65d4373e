"""Each method equals its loop: output and every gradient, to 1e-11 in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

import loops
import manylora
from manylora.methods import METHODS
from tiny import OneLayer, adapter_tensors, attach, base_layer

IN, OUT, R, R0, ALPHA, TASKS = 13, 7, 3, 2, 5.0, 4


@dataclass(frozen=True)
class Case:
    """A configuration and the loop it has to equal; uneven: branch ranks 1, 4, 2, 5, 3."""

    loop: loops.Loop
    config: dict[str, Any] = field(default_factory=dict)
    uneven: bool = False
    ids: bool = False


def case(loop: loops.Loop, method: str, uneven: bool = False, **config: Any) -> Case:
    ids = config.get("gate") in ("one_hot", "task") or method == "branch_per_cluster"
    return Case(loop, {"method": method, **config}, uneven, ids)


CASES = {
    "lora": case(loops.lora, "lora"),
    "lora rslora": case(loops.lora, "lora", use_rslora=True),
    "lora_split": case(loops.lora_split, "lora_split"),
    "lora_split uneven": case(loops.lora_split, "lora_split", uneven=True),
    "lora_split one B": case(loops.lora_split_shared_b, "lora_split", share_B=True),
    "lora_split per task": case(loops.one_branch, "lora_split", gate="one_hot"),
    "multilora": case(loops.multilora, "multilora"),
    "multilora rslora": case(loops.multilora, "multilora", use_rslora=True),
    "multilora uneven": case(loops.multilora, "multilora", uneven=True),
    "multilora and shared": case(
        loops.shared_branch_and(loops.multilora), "multilora", shared_rank=R0
    ),
    "hydralora": case(loops.hydralora, "hydralora"),
    "hydralora rslora": case(
        loops.shared_branch_and(loops.hydralora), "hydralora", use_rslora=True, shared_rank=R0
    ),
    "hydralora router on Ax": case(loops.hydralora_rank_router, "hydralora", router_input="Ax"),
    "hydralora uniform": case(loops.hydralora_uniform, "hydralora", gate="uniform"),
    "lora_moe": case(loops.lora_moe, "lora_moe"),
    "lora_moe uneven": case(loops.lora_moe, "lora_moe", uneven=True),
    "lora_moe router on Ax": case(loops.lora_moe_rank_router, "lora_moe", router_input="Ax"),
    "lora_moe one B": case(loops.lora_moe_shared_b, "lora_moe", share_B=True),
    "cluster": case(loops.one_branch, "branch_per_cluster"),
    "cluster one A": case(loops.one_branch_shared_a, "branch_per_cluster", share_A=True),
    "cluster uneven and shared": case(
        loops.shared_branch_and(loops.one_branch), "branch_per_cluster", uneven=True, shared_rank=R0
    ),
    "task gate": case(loops.task_gate, "lora_moe", gate="task", num_tasks=TASKS),
    "task gate uneven": case(
        loops.task_gate, "lora_moe", uneven=True, gate="task", num_tasks=TASKS
    ),
    "task gate one A": case(loops.task_gate_shared_a, "hydralora", gate="task", num_tasks=TASKS),
}


def build(c: Case, kind: str, count: int) -> PeftModel:
    config = dict(c.config)
    if c.uneven:
        config["branch_ranks"] = [1, 4, 2, 5, 3][:count]
    elif config["method"] != "lora":
        config["num_branches"] = count
    torch.manual_seed(count)
    return attach(
        OneLayer(base_layer(kind, IN, OUT)),
        target_modules=["linear"],
        r=R,
        lora_alpha=ALPHA,
        init_weights=False,
        **config,
    )


def parts(model: PeftModel, leaves: dict[str, Tensor]) -> loops.Parts:
    """Cut (copies of) the adapter's tensors into branches, as the design lays them out."""
    config = model.peft_config["default"]
    power = 0.5 if config.use_rslora else 1.0
    A, B = leaves["A"], leaves["B"]
    count = config.num_branches or len(config.branch_ranks or [0])
    ranks = config.branch_ranks or [config.r] * count
    return loops.Parts(
        A=list(A.split(ranks)) if len(A) == sum(ranks) else [A],
        B=list(B.split(ranks, 1)) if B.shape[1] == sum(ranks) else [B],
        s=ALPHA / config.r**power,
        R=leaves.get("router"),
        c=leaves.get("scale"),
        v=leaves.get("gate"),
        A0=leaves.get("shared_A"),
        B0=leaves.get("shared_B"),
        s0=ALPHA / config.shared_rank**power if config.shared_rank else 0.0,
    )


def assert_equals_loop(
    model: PeftModel, loop: loops.Loop, x: Tensor, ids: Tensor | None = None
) -> None:
    """Output, gradient of every adapter tensor and of x, against the loop over tokens."""
    x = x.detach().requires_grad_()
    up = torch.randn(*x.shape[:-1], len(model.get_base_model().weight_and_bias()[0]), dtype=x.dtype)
    model.zero_grad()
    if ids is None:
        y = model(x)
    else:
        with manylora.branch_ids(model, ids):
            y = model(x)
    (y * up).sum().backward()

    leaves = {n: t.detach().clone().requires_grad_() for n, t in adapter_tensors(model).items()}
    mine = x.detach().clone().requires_grad_()
    p, W, b = parts(model, leaves), *model.get_base_model().weight_and_bias()
    tokens = mine.reshape(-1, mine.shape[-1])
    chosen = [0] * len(tokens) if ids is None else per_token(ids, x).tolist()
    rows = [W @ token + b + loop(token, p, k) for token, k in zip(tokens, chosen, strict=True)]
    expected = torch.stack(rows).reshape(y.shape)
    (expected * up).sum().backward()

    close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)
    close(y, expected)
    close(x.grad, mine.grad, msg=lambda m: f"gradient of x: {m}")
    for name, tensor in adapter_tensors(model).items():
        assert tensor.grad is not None, f"no gradient of {name}"
        theirs = leaves[name].grad
        theirs = torch.zeros_like(tensor) if theirs is None else theirs
        close(tensor.grad, theirs, msg=lambda m, name=name: f"gradient of {name}: {m}")


def per_token(ids: Tensor, x: Tensor) -> Tensor:
    """The id of each token of x, in the order of x.reshape(-1, in)."""
    lead = x.shape[:-1]
    if ids.dim() == 2 and len(lead) == 1:
        return ids.reshape(-1)
    return ids.reshape(*ids.shape, *[1] * (len(lead) - ids.dim())).expand(lead).reshape(-1)


def inputs(kind: str = "linear") -> list[Tensor]:
    """Rank 2, 3 and 4, contiguous and not (of which Conv1D itself cannot take one)."""

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    some = [r(6, IN), r(2, 3, IN), r(2, 3, 2, IN), r(IN, 6).T, r(2, 3, 2, 2 * IN)[..., ::2]]
    return some if kind == "conv1d" else [*some, r(3, 2, IN).transpose(0, 1)]


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
@pytest.mark.parametrize(
    ("name", "count"),
    [
        (name, count)
        for name, c in CASES.items()
        for count in (1, 2, 3, 4, 5)
        if count == 1 or c.config["method"] != "lora"
    ],
)
def test_method_equals_its_loop(name: str, kind: str, count: int) -> None:
    c = CASES[name]
    model = build(c, kind, count)
    for x in inputs(kind):
        if not c.ids:
            assert_equals_loop(model, c.loop, x)
            continue
        choices = TASKS if c.config.get("gate") == "task" else count
        per_example = torch.randint(-1, choices, x.shape[:1])
        assert_equals_loop(model, c.loop, x, per_example)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.ids])
def test_ids_may_be_per_token_for_all_at_once_or_none_of_the_branches(name: str) -> None:
    c = CASES[name]
    model = build(c, "linear", 4)
    per_token_ids = torch.tensor([[0, 3, -1], [2, 1, 3]])
    for x in inputs():
        assert_equals_loop(model, c.loop, x, per_token_ids)
        assert_equals_loop(model, c.loop, x, torch.tensor(2))
        assert_equals_loop(model, c.loop, x, torch.full((len(x),), -1))


def test_id_minus_one_is_the_base_model_without_a_shared_branch() -> None:
    model = build(CASES["cluster"], "linear", 3)
    x = inputs()[1]
    with manylora.branch_ids(model, [-1, -1]):
        y = model(x)
    W, b = model.get_base_model().weight_and_bias()
    torch.testing.assert_close(y, x @ W.T + b, rtol=0, atol=1e-14)


@st.composite
def structures(draw: st.DrawFn) -> dict[str, Any]:
    """Any valid combination of the table's columns, with the layer's and the input's sizes."""
    method = draw(st.sampled_from([m for m in METHODS if m != "lora"]))
    share_A = draw(st.booleans())
    scaled = method == "multilora"
    share_B = False if share_A or scaled else draw(st.booleans())
    config: dict[str, Any] = {
        "method": method,
        "share_A": share_A,
        "share_B": share_B,
        "gate": draw(st.sampled_from(["ones", "uniform", "router", "task", "one_hot"])),
        "shared_rank": draw(st.integers(0, 3)),
        "r": draw(st.integers(1, 4)),
    }
    if config["gate"] == "router":
        config["router_input"] = draw(st.sampled_from(["x", "Ax"]))
    if config["gate"] == "task":
        config["num_tasks"] = draw(st.integers(1, 4))
    if share_A or share_B or draw(st.booleans()):
        config["num_branches"] = draw(st.integers(1, 4))
    else:
        config["branch_ranks"] = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    sizes = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    lead = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    return {"config": config, "sizes": sizes, "lead": lead, "seed": draw(st.integers(0, 999))}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(structures())
def test_any_combination_equals_the_one_equation(s: dict[str, Any]) -> None:
    config, (n_in, n_out) = s["config"], s["sizes"]
    torch.manual_seed(s["seed"])
    model = attach(
        OneLayer(base_layer("linear", n_in, n_out)),
        target_modules=["linear"],
        lora_alpha=ALPHA,
        init_weights=False,
        **config,
    )
    x = torch.randn(*s["lead"], n_in, dtype=torch.float64)
    gate = config["gate"]
    count = config.get("num_branches") or len(config["branch_ranks"])
    choices = {"task": config.get("num_tasks"), "one_hot": count}.get(gate)
    ids = None if choices is None else torch.randint(-1, choices, (len(x),))
    loop = partial(loops.general, gate=gate, router_input=config.get("router_input", "x"))
    assert_equals_loop(model, loop, x, ids)


def test_rank_and_alpha_patterns_set_the_scaling_of_their_layer() -> None:
    model = attach(
        OneLayer(base_layer("linear", IN, OUT)),
        target_modules=["linear"],
        r=R,
        lora_alpha=1.0,
        num_branches=3,
        init_weights=False,
        rank_pattern={"linear": 2},
        alpha_pattern={"linear": 7.0},
    )
    layer = model.get_base_model().linear
    assert layer.scaling["default"] == 3.5
    assert adapter_tensors(model)["A"].shape == (2, IN)
    assert adapter_tensors(model)["B"].shape == (OUT, 6)
