"""train.compile: the same training in compiled blocks, which are gone when it is over."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import manylora
from manylora.base import load_model
from manylora.comparison.cell import Cell
from manylora.comparison.command import compare
from manylora.comparison.contenders import contenders
from manylora.comparison.ground import prepare_ground
from manylora.comparison.store import key_of
from manylora.recipe import Recipe, RecipeError, parse_recipe
from manylora.train import train
from manylora.training.compiled import CompileError, blocks_of, check_compile, compiled_blocks
from tiny import attach, tiny_llama

Make = Callable[..., Recipe]

KINDS: dict[str, dict[str, Any]] = {
    "dropout": {"method": "lora", "lora_dropout": 0.2},
    "multilora": {"method": "multilora", "branch_ranks": [4, 4, 5]},
    "balanced": {"method": "hydralora", "balance_loss": "switch"},
    "uneven": {"method": "branch_per_cluster", "shared_rank": 2, "branch_ranks": [1, 3, 2, 1, 2]},
}
# Two that read the same, one by itself and one as wide as the hidden state: less to trace.
SOME = ["q_proj", "k_proj", "o_proj", "down_proj"]


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Blocks are traced and differentiated as ever, but no kernels are made of the graphs."""
    found = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=found))
    return found


def losses(model: Any, wanted: bool, steps: int = 4) -> list[float]:
    """Of steps whose batches differ in rows, length and ids."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    torch.manual_seed(0)
    needs_ids = model.peft_config["default"].branches_of().needs_ids
    with compiled_blocks(model, wanted):
        for step in range(steps):
            tokens = torch.randint(3, 60, (3 + step % 3, 9 + 4 * step))
            ids = torch.arange(len(tokens)) % 3
            with manylora.branch_ids(model, ids) if needs_ids else nullcontext():
                loss = model(input_ids=tokens, labels=tokens).loss + manylora.balance_loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_training_is_the_same_in_few_graphs(kind: str, counter: Any) -> None:
    def made() -> Any:
        return attach(tiny_llama(), r=4, target_modules=SOME, **KINDS[kind])

    eager = losses(made(), False)
    assert counter.frame_count == 0
    compiled = losses(made(), True)
    assert compiled == pytest.approx(eager, abs=1e-4)
    # One for the first block, whose input needs no gradient, and one for the others.
    few = counter.frame_count
    assert 1 <= few <= 3
    assert losses(made(), True, steps=2) == compiled[:2]
    assert counter.frame_count == few  # another training of the kind takes them


def test_blocks_are_as_they_were_afterwards(counter: Any) -> None:
    model = attach(tiny_llama(), r=4)
    blocks = blocks_of(model)
    assert [type(block).__name__ for block in blocks] == ["LlamaDecoderLayer"] * 2
    with suppress(KeyError), compiled_blocks(model):
        assert all(block._compiled_call_impl is not None for block in blocks)
        raise KeyError
    assert all(block._compiled_call_impl is None for block in blocks)
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert counter.frame_count == 0


def test_a_block_that_would_fall_back_to_eager_is_an_error(
    counter: Any,
) -> None:
    refused = pytest.raises(CompileError, match=r"more graphs than torch keeps.*leave train.comp")
    with refused, torch._dynamo.config.patch(recompile_limit=1):
        losses(attach(tiny_llama(), r=2, target_modules=["q_proj"]), True, steps=2)


def test_a_model_that_does_not_name_its_blocks_is_refused() -> None:
    model = tiny_llama()
    model._no_split_modules = model.model._no_split_modules = None
    with pytest.raises(CompileError, match="LlamaForCausalLM does not name its blocks"):
        blocks_of(model)


def test_what_does_not_go_with_it_is_refused(make_recipe: Make) -> None:
    values = make_recipe().model_dump()
    train = {**values["train"], "compile": True}
    with pytest.raises(RecipeError, match="gradient_checkpointing=true do not go together"):
        parse_recipe({**values, "train": {**train, "gradient_checkpointing": True}})
    with pytest.raises(RecipeError, match="quantize=4bit: quantised layers"):
        parse_recipe({**values, "train": train, "quantize": "4bit"})


def test_a_run_is_compiled_by_torchs_own_compiler(make_recipe: Make) -> None:
    adapter = {"method": "branch_per_cluster", "shared_rank": 2, "target_modules": SOME}
    plain, compiled = make_recipe("plain", **adapter), make_recipe("compiled", **adapter)
    compiled.train.compile = True
    first = load_file(str(train(plain) / "adapter_model.safetensors"))
    second = load_file(str(train(compiled) / "adapter_model.safetensors"))
    # Adam divides by the gradient's size, so rounding moves a weight by a share of the rate.
    assert all(torch.allclose(first[key], second[key], atol=5e-3) for key in first)


def compared(make_recipe: Make) -> Recipe:
    values = make_recipe().model_dump(exclude={"adapter"})
    values["train"] |= {"compile": True, "max_steps": 2}
    values |= {"validation": 0.2, "evaluate": {"rows_per_task": 4}}
    return parse_recipe({**values, "adapter": {"target_modules": ["q_proj", "v_proj"]}})


def test_a_method_whose_blocks_share_no_graph_is_refused_before_any_is_trained(
    make_recipe: Make, tmp_path: Path, counter: Any
) -> None:
    refused = pytest.raises(CompileError, match=r"Prefix tuning.*leave compile out, or the method")
    with refused:
        given = (["lora", "prefix_tuning"], "lora:r=4", 1, 1e-3, tmp_path / "out", 1)
        compare(compared(make_recipe), *given, Console(quiet=True))
    assert counter.frame_count == 0 and not (tmp_path / "out").exists()


def test_a_comparison_compiles_every_kind_of_method(
    make_recipe: Make, tmp_path: Path, counter: Any
) -> None:
    recipe = compared(make_recipe)
    methods = ["branch_per_cluster_shared", "adalora", "full"]
    compare(recipe, methods, "lora:r=4", 1, 1e-3, tmp_path / "out", 1, Console(quiet=True))
    assert counter.frame_count >= 2 * len(methods)


def test_runs_that_are_not_compiled_are_found_under_their_old_key(make_recipe: Make) -> None:
    values = {**make_recipe().model_dump(exclude={"adapter"}), "validation": 0.2}
    base = load_model(values["model"], "float32", None)
    _, (lora,) = contenders(["lora"], "lora:r=4", base, 2, {})
    keys = []
    for compiled in (False, True):
        values["train"] |= {"compile": compiled}
        ground = prepare_ground(parse_recipe(values), Console(quiet=True))
        keys.append(key_of(ground, Cell(lora, 1e-3, 0, "test")))
    assert keys[0] != keys[1]


def test_a_machine_that_cannot_compile_is_told_before_the_work(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    recipe = make_recipe()
    recipe.train.compile = True
    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(CompileError, match=r"does not work here \(no compiler\); install.*C\+\+"):
        train(recipe)
    assert not recipe.run.exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CompileError, match="this run has several; leave it out"):
        check_compile(True)
