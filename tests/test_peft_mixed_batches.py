"""`adapter_names`: each row of a batch through its own adapter, as PEFT offers for LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import manylora
from manylora.adapter.selector import BranchSelector
from tiny import VOCAB, attach, tiny_llama

X = torch.randint(3, VOCAB, (5, 7), generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([2, 0, 1, -1, 0])
ROWS = ["multi", "__base__", "clusters", "hydra", "clusters"]
MASK = torch.ones_like(X)


def adapters() -> PeftModel:
    """HydraLoRA, MultiLoRA on fewer layers, and a branch per cluster."""
    model = attach(tiny_llama(), method="hydralora", task_type="CAUSAL_LM", init_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.add_adapter("hydra", manylora.ManyLoraConfig(init_weights=False))
        model.add_adapter(
            "multi",
            manylora.ManyLoraConfig(
                method="multilora", init_weights=False, target_modules=["q_proj", "up_proj"]
            ),
        )
        model.add_adapter(
            "clusters",
            manylora.ManyLoraConfig(method="branch_per_cluster", shared_rank=2, init_weights=False),
        )
    return model.eval()


@torch.no_grad()
def alone(model: PeftModel, row: int, call: str = "forward", **options: Any) -> Tensor:
    """The result of one row by itself, with its adapter active."""
    inputs = {"input_ids": X[row : row + 1], "attention_mask": MASK[:1]}
    with manylora.branch_ids(model, int(IDS[row])):
        if ROWS[row] != "__base__":
            model.set_adapter(ROWS[row])
            result = getattr(model, call)(**inputs, **options)
        else:
            with model.disable_adapter():
                result = getattr(model, call)(**inputs, **options)
    return result.logits if call == "forward" else result


@pytest.mark.parametrize("per_token", [False, True])
def test_each_row_equals_its_adapter_alone(per_token: bool) -> None:
    model = adapters()
    ids = IDS.unsqueeze(1).expand(5, 7) if per_token else IDS
    with torch.no_grad(), manylora.branch_ids(model, ids):
        mixed = model(input_ids=X, adapter_names=ROWS).logits
    singles = torch.cat([alone(model, row) for row in range(5)])
    torch.testing.assert_close(mixed, singles, rtol=0, atol=5e-6)
    swapped = [ROWS[1], ROWS[0], *ROWS[2:]]
    with torch.no_grad(), manylora.branch_ids(model, ids):
        other = model(input_ids=X, adapter_names=swapped).logits
    assert ((other - mixed).abs().amax((1, 2)) > 1e-3).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    "search",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "beams-return", "sample-return"],
)
def test_generating_a_mixed_batch_equals_generating_one_by_one(search: dict[str, Any]) -> None:
    model = adapters()
    kept = search.get("num_return_sequences", 1)
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        **search,
    }
    with manylora.branch_ids(model, IDS.repeat_interleave(max(kept, search.get("num_beams", 1)))):
        mixed = model.generate(input_ids=X, attention_mask=MASK, adapter_names=ROWS, **options)
    singles = [alone(model, row, "generate", **options) for row in range(5)]
    assert torch.equal(mixed, torch.cat(singles))
    assert len(mixed) == 5 * kept


def test_rows_take_the_trained_copy_of_a_module_or_none_is_silently_left_out() -> None:
    fields: dict[str, Any] = {"init_weights": False, "modules_to_save": ["lm_head"]}
    model = attach(tiny_llama(), task_type="CAUSAL_LM", **fields).eval()
    model.add_adapter("second", manylora.ManyLoraConfig(method="multilora", **fields))
    nn.init.normal_(model.base_model.model.lm_head.modules_to_save["second"].weight)
    model.eval()
    with torch.no_grad():
        mixed = model(input_ids=X, adapter_names=["second", "default"] + ["second"] * 3).logits
        single = model(input_ids=X[1:2]).logits
        torch.testing.assert_close(mixed[1:2], single, rtol=0, atol=5e-6)
        model.set_adapter("second")
        torch.testing.assert_close(mixed[2:], model(input_ids=X[2:]).logits, rtol=0, atol=5e-6)
    model.add_adapter("bare", manylora.ManyLoraConfig())
    model.eval()
    with pytest.raises(ValueError, match=r"lm_head has trained copies .*but none for bare"):
        model(input_ids=X[:2], adapter_names=["second", "bare"])


def test_names_that_do_not_fit_are_refused_and_leave_no_hooks() -> None:
    model = adapters()
    model.set_adapter("multi")
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): typo; this model has clust"):
        model(input_ids=X, adapter_names=["multi", "typo"])
    for call in (model, model.generate):
        for batch in (X[:3], X[:4]):
            with pytest.raises(ValueError, match="adapter_names"):
                call(input_ids=batch, adapter_names=["multi", "__base__"])
    with (
        pytest.raises(ValueError, match="do not fit a layer input"),
        manylora.branch_ids(model, [0, 1]),
    ):
        model(input_ids=X, adapter_names=ROWS)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(input_ids=X, adapter_names=["multi"] * 5)
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=X, adapter_names=["multi"] * 5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_id_is_checked_against_the_rows_own_adapter() -> None:
    model = adapters()  # the active one has a router and takes any id
    rows = ["clusters", "hydra", "clusters"]
    with torch.no_grad(), manylora.branch_ids(model, [2, 9, -1]):
        model(input_ids=X[:3], adapter_names=rows)  # a router has no use for its id
    for ids, got in (([3, 0, 0], "0..3"), ([0, 0, -2], "-2..0"), (3, "3..3")):
        with (
            torch.no_grad(),
            manylora.branch_ids(model, ids),
            pytest.raises(ValueError, match=rf"-1\.\.2 .*got {got} for adapter 'clusters'"),
        ):
            model(input_ids=X[:3], adapter_names=rows)
    with (
        torch.no_grad(),
        manylora.branch_ids(model, [0, 3]),
        pytest.raises(ValueError, match=r"got 3\.\.3 for adapter 'clusters'"),
    ):
        model.generate(input_ids=X[:2], adapter_names=["hydra", "clusters"], max_new_tokens=2)


def test_selectors_choose_for_adapters_with_more_branches_than_the_active_one() -> None:
    def clusters(branches: int) -> manylora.ManyLoraConfig:
        config = manylora.ManyLoraConfig(
            method="branch_per_cluster", num_branches=branches, init_weights=False
        )
        prompts = [row.tolist() for row in X[:branches]]
        names = [f"task {i}" for i in range(branches)]
        config.branch_selector = BranchSelector.fit(prompts, range(branches), names, refuse=0.0)
        return config

    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(tiny_llama(), clusters(2), adapter_name="two")
        model.add_adapter("four", clusters(4))
    model.eval()
    with torch.no_grad():
        mixed = model(input_ids=X[[0, 3]], adapter_names=["two", "four"]).logits
        model.set_adapter("four")
        with manylora.branch_ids(model, 3):
            alone = model(input_ids=X[3:4]).logits
    torch.testing.assert_close(mixed[1:], alone, rtol=0, atol=5e-6)
