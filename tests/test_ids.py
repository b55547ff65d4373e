"""Branch ids: which branch or task each example or token belongs to, with nothing mixed up."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import manylora
from manylora.adapter.layer import ManyLoraLayer, layers_of, modules_around
from manylora.adapter.state import BranchState
from tiny import VOCAB, attach, tiny_llama

X = torch.randint(3, VOCAB, (4, 7), generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([2, 0, -1, 1])
SHARED = {"method": "branch_per_cluster", "shared_rank": 2}
TASKS = {"method": "lora_split", "gate": "task", "num_tasks": 3, "shared_rank": 2}
KINDS: list[dict[str, Any]] = [
    {"method": "branch_per_cluster"},
    SHARED,
    {**SHARED, "share_A": True},
    TASKS,
]


def name_of(config: dict[str, Any]) -> str:
    return "-".join(str(value) for value in config.values())


def adapted(config: dict[str, Any], base: nn.Module | None = None) -> PeftModel:
    return attach(
        tiny_llama() if base is None else base, task_type="CAUSAL_LM", init_weights=False, **config
    ).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Any, x: Tensor = X, **inputs: Any) -> Tensor:
    with manylora.branch_ids(model, ids):
        return model(input_ids=x, **inputs).logits


def state(model: nn.Module) -> BranchState:
    return next(m.state for m in model.modules() if isinstance(m, ManyLoraLayer))


@pytest.mark.parametrize("config", KINDS, ids=name_of)
def test_each_example_gets_its_own_branch_whatever_its_batch_mates(config: dict[str, Any]) -> None:
    model = adapted(config)
    batch = logits(model, IDS)
    for i, k in enumerate(IDS.tolist()):
        for one in (k, [k], torch.tensor(k)):
            alone = logits(model, one, X[i : i + 1])
            torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=2e-6)
    assert torch.equal(logits(model, IDS.tolist()), batch)
    tokens = IDS.unsqueeze(1).expand(4, 7)
    torch.testing.assert_close(logits(model, tokens), batch, rtol=0, atol=2e-6)
    assert (logits(model, 0) - logits(model, 1)).abs().max() > 1e-3


@pytest.mark.parametrize("config", KINDS, ids=name_of)
def test_minus_one_is_the_shared_branch_alone_or_the_base_model(config: dict[str, Any]) -> None:
    model = adapted(config)
    none_of_them = logits(model, -1)
    base = tiny_llama().eval()(X).logits
    assert torch.equal(none_of_them, base) == (not config.get("shared_rank"))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, ManyLoraLayer):
                layer.manylora_B["default"].weight.zero_()
    # Branches that are not used are not computed, so the sums are of other lengths.
    torch.testing.assert_close(logits(model, 1), none_of_them, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (3, "ids must be in -1..2 (-1: the shared branch alone), got 3..3"),
        ([0, -2], "ids must be in -1..2 (-1: the shared branch alone), got -2..0"),
        (
            [0.0, 1.0],
            "ids must be integers of shape (), (batch,) or (batch, tokens), "
            "got torch.float32 of shape (2,)",
        ),
        ([True], "got torch.bool of shape (1,)"),
        (torch.zeros(1, 1, 1, dtype=torch.long), "of shape (1, 1, 1)"),
        (torch.zeros(0, dtype=torch.long), "of shape (0,)"),
        (
            [0, 1],
            "ids of shape (2,) do not fit a layer input whose leading dimensions are (4, 7); "
            "beam search and several returned sequences repeat each prompt: pass "
            "ids.repeat_interleave(2)",
        ),
        ([0, 1, 2], "ids of shape (3,) do not fit a layer input whose leading dimensions are"),
        (torch.zeros(4, 6, dtype=torch.long), "ids of shape (4, 6) do not fit"),
    ],
)
def test_ids_that_do_not_fit_are_refused(ids: Any, message: str) -> None:
    model = adapted(SHARED)
    with pytest.raises(ValueError, match=re.escape(message)):
        logits(model, ids)
    assert state(model).ids is None


def test_without_ids_or_adapter_the_error_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"q_proj: .*wrap the call in `with manylora.branch_ids"):
        adapted(SHARED)(input_ids=X)
    with pytest.raises(ValueError, match="no manylora layer; attach an adapter first"):
        logits(tiny_llama(), 0)


def test_nested_contexts_and_exceptions_restore_the_ids() -> None:
    model = adapted(SHARED)
    outer, inner = logits(model, 1), logits(model, 2)
    with manylora.branch_ids(model, 1):
        assert torch.equal(logits(model, 2), inner)
        with contextlib.suppress(KeyError), manylora.branch_ids(model, 0):
            raise KeyError
        assert torch.equal(model(input_ids=X).logits, outer)
        with pytest.raises(ValueError, match="do not fit"):
            logits(model, [0, 1])
        assert torch.equal(model(input_ids=X).logits, outer)
    assert state(model).ids is None


def test_ids_change_nothing_for_methods_that_do_not_choose_by_id() -> None:
    model = adapted({"method": "hydralora"})
    assert torch.equal(logits(model, 1), model(input_ids=X).logits)


@pytest.mark.parametrize("config", KINDS, ids=name_of)
@pytest.mark.parametrize(
    "search",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=["greedy", "beams", "beams-return"],
)
def test_generate_with_ids_equals_generating_one_by_one(
    config: dict[str, Any], search: dict[str, int]
) -> None:
    model = adapted(config)
    beams, kept = search.get("num_beams", 1), search.get("num_return_sequences", 1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(X)
    with manylora.branch_ids(model, IDS.repeat_interleave(beams)):
        batch = model.generate(input_ids=X, attention_mask=mask, **options, **search)
    for i, k in enumerate(IDS.tolist()):
        with manylora.branch_ids(model, k):
            alone = model.generate(
                input_ids=X[i : i + 1], attention_mask=mask[:1], **options, **search
            )
        assert torch.equal(batch[i * kept : (i + 1) * kept], alone)
    if beams > 1:
        hint = re.escape(f"pass ids.repeat_interleave({beams})")
        with manylora.branch_ids(model, IDS), pytest.raises(ValueError, match=hint):
            model.generate(input_ids=X, attention_mask=mask, **options, **search)


@pytest.mark.parametrize("config", KINDS, ids=name_of)
def test_packed_rows_with_ids_per_token_equal_separate_rows(config: dict[str, Any]) -> None:
    model = adapted(config)
    separate = logits(model, IDS)
    row = X.reshape(1, -1)
    positions = torch.arange(7).repeat(4).unsqueeze(0)
    document = torch.arange(4).repeat_interleave(7)
    seen = (document[:, None] == document) & torch.ones(28, 28).tril().bool()
    mask = torch.zeros(1, 1, 28, 28).masked_fill(~seen, torch.finfo(torch.float32).min)
    packed = logits(
        model,
        IDS.repeat_interleave(7).unsqueeze(0),
        row,
        position_ids=positions,
        attention_mask=mask,
    )
    torch.testing.assert_close(packed.reshape(4, 7, -1), separate, rtol=0, atol=5e-6)


@pytest.mark.parametrize("config", KINDS, ids=name_of)
def test_layers_that_see_flattened_tokens_take_ids_per_token(config: dict[str, Any]) -> None:
    model = adapted(config)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(4, 7, 32)
    tokens = torch.randint(-1, 3, (4, 7), generator=torch.Generator().manual_seed(1))
    with manylora.branch_ids(model, tokens):
        torch.testing.assert_close(layer(x.reshape(28, 32)).reshape(4, 7, -1), layer(x))
    with manylora.branch_ids(model, IDS), pytest.raises(ValueError, match="flattened tokens"):
        layer(x.reshape(28, 32))


def gradients(model: nn.Module, ids: tuple[Any, Any]) -> list[Tensor]:
    """Two forwards under different ids, then both backwards, outside the contexts."""
    model.train()
    model.zero_grad()
    losses = []
    for one in ids:
        with manylora.branch_ids(model, one):
            losses.append(model(input_ids=X, labels=X).loss)
    for loss in losses:
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]


@contextlib.contextmanager
def counted(counter: list[int], place: int) -> Iterator[None]:
    counter[place] += 1
    yield


@pytest.mark.parametrize("config", KINDS, ids=name_of)
@pytest.mark.parametrize("when", ["before", "after", "own context_fn"])
def test_checkpointing_recomputes_each_forward_with_its_own_ids(
    config: dict[str, Any], when: str
) -> None:
    ids = (IDS, torch.tensor([0, 1, 1, 2]))
    expected = gradients(adapted(config), ids)
    base, counter = tiny_llama(), [0, 0]
    options: dict[str, Any] = {"use_reentrant": False}
    if when == "own context_fn":
        options["context_fn"] = lambda: (counted(counter, 0), counted(counter, 1))
    if when == "before":
        base.gradient_checkpointing_enable(options)
        base.enable_input_require_grads()
    model = adapted(config, base)
    if when != "before":
        model.gradient_checkpointing_enable(options)
    found = gradients(model, ids)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    if when == "own context_fn":
        assert counter == [4, 4]
    assert state(model).ids is None


def test_without_the_replay_the_same_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: checkpointing alone loses the ids of the forward pass."""
    monkeypatch.setattr("manylora.adapter.ids.keep_ids_through_checkpointing", lambda *_: None)
    model = adapted(SHARED)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="nothing says which"):
        gradients(model, (0, 1))


def test_reentrant_checkpointing_is_refused_only_where_ids_matter() -> None:
    model = adapted(SHARED)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    hint = re.escape('gradient_checkpointing_kwargs={"use_reentrant": False}')
    with pytest.raises(ValueError, match=hint):
        gradients(model, (0, 1))
    hydra = adapted({"method": "hydralora"})
    hydra.gradient_checkpointing_enable({"use_reentrant": True})
    assert gradients(hydra, (0, 1))


def test_ids_that_change_inside_the_context_are_those_that_count() -> None:
    model, ids = adapted(SHARED), torch.tensor([0, 1, 2, -1])
    wanted = logits(model, IDS)
    with torch.no_grad(), manylora.branch_ids(model, ids):
        first = model(input_ids=X).logits
        ids.copy_(IDS)
        second = model(input_ids=X).logits
    assert torch.equal(second, wanted) and not torch.equal(first, wanted)


def test_what_is_made_of_the_ids_serves_training_after_inference() -> None:
    model = adapted(SHARED)
    with manylora.branch_ids(model, IDS):
        with torch.inference_mode():
            model(input_ids=X)
        loss = model(input_ids=X, labels=X).loss
    loss.backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in trained)
    assert not state(model).made  # nothing of a batch outlives its context


def test_the_adapted_layers_are_found_wherever_they_are() -> None:
    model = adapted(SHARED)
    model.again = model.base_model  # a module in two places
    assert layers_of(model) == [m for m in model.modules() if isinstance(m, ManyLoraLayer)]
    around, every = list(modules_around(model)), list(model.modules())
    assert set(around) < set(every) and len(around) == len(set(around))


def test_an_id_that_an_adapter_lacks_is_refused_when_it_becomes_active_inside_the_context() -> None:
    model = adapted({"method": "branch_per_cluster", "num_branches": 8})
    fewer = manylora.ManyLoraConfig(method="branch_per_cluster", num_branches=3)
    fewer.init_weights = False
    model.add_adapter("fewer", fewer)
    with manylora.branch_ids(model, [0, 5, 1, 2]):
        model(input_ids=X)
        model.set_adapter("fewer")
        with pytest.raises(ValueError, match=r"in -1\.\.2 .* got -1\.\.5 for adapter 'fewer'"):
            model(input_ids=X)
