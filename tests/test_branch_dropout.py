"""branch_dropout: while it trains, a share of the sequences sees the shared branch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import manylora
from manylora.adapter.ids import without_some
from manylora.recipe import Recipe
from manylora.train import train
from tiny import attach, tiny_llama

SHARED = {"method": "branch_per_cluster", "shared_rank": 2, "task_type": "CAUSAL_LM"}


def told(model: Any, ids: Any) -> torch.Tensor:
    with manylora.branch_ids(model, ids) as used:
        return used


def test_a_share_of_the_rows_goes_to_the_shared_branch_alone_in_training() -> None:
    model = attach(tiny_llama(), branch_dropout=0.25, **SHARED)
    ids = torch.arange(4000) % 3
    torch.manual_seed(0)
    used = told(model.train(), ids)
    dropped = used == -1
    assert 0.22 < dropped.float().mean() < 0.28
    assert torch.equal(used[~dropped], ids[~dropped])
    assert torch.equal(told(model.eval(), ids), ids)


def test_what_is_dropped_is_what_the_layers_go_by() -> None:
    model = attach(tiny_llama(), branch_dropout=0.5, init_weights=False, **SHARED).train()
    x = torch.randint(3, 60, (8, 5), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with manylora.branch_ids(model, [0, 1, 2, 0, 1, 2, 0, 1]) as used:
        found = model(input_ids=x).logits
    assert 0 < int((used == -1).sum()) < 8
    with manylora.branch_ids(model.eval(), used):
        torch.testing.assert_close(found, model(input_ids=x).logits)


def test_a_stretch_of_a_packed_row_is_dropped_whole() -> None:
    ids = torch.tensor([[2] * 5 + [0] * 3 + [2] * 4 + [1] * 2] * 200)
    torch.manual_seed(0)
    used = without_some(ids, 0.5)
    dropped = used == -1
    for stretch in (slice(0, 5), slice(5, 8), slice(8, 12), slice(12, 14)):
        own = dropped[:, stretch]
        assert torch.equal(own.all(1), own.any(1)) and 50 < own.all(1).sum() < 150
    assert torch.equal(used[~dropped], ids[~dropped])


def test_one_id_for_all_is_never_dropped() -> None:
    """`with branch_ids(model, 1): model.merge_adapter()` has to merge branch 1."""
    model = attach(tiny_llama(), branch_dropout=0.99, **SHARED).train()
    torch.manual_seed(0)
    assert [int(told(model, 1)) for _ in range(20)] == [1] * 20


def test_without_it_nothing_is_drawn() -> None:
    model = attach(tiny_llama(), **SHARED).train()
    before = torch.get_rng_state()
    assert told(model, [0, 1, 2]).tolist() == [0, 1, 2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.tensor([True, False]), "must be integers"),
        (torch.zeros(2, 0, dtype=torch.long), "must be integers"),
        (torch.tensor([99] * 3), r"got 99\.\.99"),
    ],
)
def test_ids_are_checked_before_some_are_dropped(ids: torch.Tensor, words: str) -> None:
    model = attach(tiny_llama(), branch_dropout=0.99, **SHARED).train()
    with pytest.raises(ValueError, match=words):
        told(model, ids)


def test_ids_that_cannot_be_negative_are_dropped_too() -> None:
    model = attach(tiny_llama(), branch_dropout=0.99, **SHARED).train()
    assert -1 in told(model, torch.tensor([0, 1, 2] * 20, dtype=torch.uint8))


def test_an_adapter_that_is_not_on_the_first_layer_drops_too() -> None:
    model = attach(tiny_llama(), method="lora", target_modules=["q_proj"], task_type="CAUSAL_LM")
    more = manylora.ManyLoraConfig(branch_dropout=0.99, target_modules=["down_proj"], **SHARED)
    model.add_adapter("other", more)
    model.set_adapter("other")
    assert -1 in told(model.train(), [0, 1, 2] * 20)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"branch_dropout": "0.2", **SHARED}, r"branch_dropout='0.2' must be in \[0, 1\)"),
        ({"branch_dropout": False, **SHARED}, r"branch_dropout=False must be in \[0, 1\)"),
        ({"branch_dropout": float("nan"), **SHARED}, r"branch_dropout=nan must be in \[0, 1\)"),
        ({"branch_dropout": 1.0, **SHARED}, r"branch_dropout=1.0 must be in \[0, 1\)"),
        ({"branch_dropout": 0.1, **SHARED, "shared_rank": 0}, "with shared_rank=0 chooses no"),
        ({"branch_dropout": 0.1, "method": "hydralora", "shared_rank": 2}, "gate='router'"),
    ],
)
def test_what_it_cannot_do_is_said(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        manylora.ManyLoraConfig(**config)


def test_a_run_trains_every_branch_and_says_no_dead_one(
    make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(method="branch_per_cluster", shared_rank=2, branch_dropout=0.9)
    run = train(recipe)
    assert "no gradient in" not in capsys.readouterr().err
    assert manylora.ManyLoraConfig.from_pretrained(str(run)).branch_dropout == 0.9
