"""The speed benchmark and `manylora bench` at tiny sizes: every row runs, and they take turns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benching import CPU, PLAN, base, nothing, row
from manylora.bench import Sizes, bench, rows_of, shown
from manylora.cli import app
from manylora.energy import Energy
from manylora.recipe import parse_recipe
from manylora.speed import electricity, results
from manylora.speed import measure as measuring
from manylora.speed.contender import Contender
from manylora.speed.grid import METHODS
from manylora.speed.measure import OUT_OF_MEMORY, Measured, Plan, measure
from tiny import save_tiny_model


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_every_method_is_measured_for_as_many_steps_as_asked(mode: str) -> None:
    rows = [row(method, mode) for method in METHODS]
    found = measure(base(), rows, PLAN, nothing)
    assert [m.error for m in found] == [None] * len(METHODS)
    assert [len(m.step_ms) for m in found] == [3] * len(METHODS)
    assert all(ms > 0 for m in found for ms in m.step_ms)


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": "qv"},
        {"targets": "mlp"},
        {"dropout": 0.1},
        {"adapter_dtype": "float32"},
        {"checkpointing": True},
        {"checkpointing": True, "mode": "compiled"},
    ],
    ids=str,
)
def test_every_kind_of_row_of_the_grid_runs(fields: dict[str, Any]) -> None:
    methods = ["peft_lora", "loop_hydralora", "hydralora", "cluster"]
    found = measure(base(), [row(method, **fields) for method in methods], PLAN, nothing)
    assert [m.error for m in found] == [None] * len(methods)


def test_no_row_changes_the_frozen_weights_or_copies_them() -> None:
    model = base()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measure(model, [row(method) for method in METHODS], PLAN, nothing)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    kept = {t.data_ptr() for t in model.parameters()}
    for measured in found:
        assert measured.contender is not None
        trained = {p.data_ptr() for p in measured.contender.trained}
        assert {p.data_ptr() for p in measured.contender.model.parameters()} == kept | trained


def test_a_row_out_of_memory_is_recorded_and_the_rest_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward_backward(self: Contender) -> Tensor:
        if self.row.method == "multilora":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.row.method == "lora_moe":
            raise RuntimeError("something else")
        return whole(self)

    whole = Contender.forward_backward
    monkeypatch.setattr(Contender, "forward_backward", forward_backward)
    rows = [row(m) for m in ("frozen", "multilora", "lora_moe", "hydralora")]
    raw = results.raw_rows(measure(base(), rows, PLAN, nothing), "abc", "a device")
    assert [r.get("error") for r in raw] == [
        None,
        OUT_OF_MEMORY,
        "RuntimeError: something else",
        None,
    ]
    assert [len(r["step_ms"]) for r in raw] == [3, 0, 0, 3]
    assert "out of memory" in results.table(raw)


def test_rows_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    whole = Contender.update

    def update(self: Contender) -> None:
        order.append(self.row.method)
        whole(self)

    monkeypatch.setattr(Contender, "update", update)
    measure(base(), [row("lora"), row("hydralora")], Plan(steps=3, turn=2), nothing)
    turns = ["lora"] * 4 + ["hydralora"] * 4 + ["lora"] * 2 + ["hydralora"] * 2
    assert order == turns


def test_the_time_limit_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(measuring.time, "monotonic", lambda: float(next(clock)))
    said: list[str] = []
    rows = [row("frozen"), row("lora"), row("hydralora")]
    found = measure(base(), rows, Plan(steps=3, turn=2, seconds=60), said.append)
    assert len(found[0].step_ms) == 2 and not found[-1].step_ms
    assert "60 seconds are over" in said[-1]
    assert len(results.raw_rows(found, "abc", "here")) < 3


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tokens": "4by4"}, "--tokens '4by4' is not ROWSxLENGTH"),
        ({"methods": "lora,hydra"}, "--methods: hydra is not measured; known are frozen"),
        ({"methods": ","}, "nothing is not measured"),
        ({"dropout": 0.1, "methods": "autograd_lora"}, "autograd_lora has no dropout"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_measured_are_refused(sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        rows_of(None, Sizes(**sizes), CPU, "float32")


def test_bench_measures_the_recipes_method_at_the_recipes_sizes(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    adapter = {"method": "branch_per_cluster", "r": 2, "num_branches": 4}
    recipe = parse_recipe({"model": str(model), "data": "samples", "adapter": adapter})
    rows = bench(recipe, None, Sizes(tokens="2x8", steps=2), nothing)
    assert [(r["method"], r["r"], r["n"]) for r in rows] == [
        ("frozen", 0, 0),
        ("peft_lora", 2, 1),
        ("cluster", 2, 4),
    ]
    assert all(len(r["step_ms"]) == 2 and r["tokens"] == 16 for r in rows)
    assert "16 tokens a step, adapters in float32" in shown(rows)


def test_the_verb_prints_a_table_and_keeps_the_steps(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    kept = tmp_path / "rows.jsonl"
    words = ["bench", "--model", str(model), "--steps", "2", "--tokens", "1x8", "--rank", "2"]
    done = CliRunner().invoke(app, [*words, "--methods", "frozen,lora", "--output", str(kept)])
    assert done.exit_code == 0, done.output
    assert "| lora " in done.stdout and "/ frozen" in done.stdout
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert [line["method"] for line in lines] == ["frozen", "lora"]


def test_a_model_that_fits_no_method_says_why(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    with pytest.raises(ValueError, match="reads at most 512 tokens"):
        bench(None, str(model), Sizes(tokens="1x513"), nothing)
    sizes = Sizes(methods="lora", tokens="1x8", steps=1, adapter_dtype="bfloat16")
    with pytest.raises(RuntimeError, match=r"no method could be measured; .*came out as"):
        bench(None, str(model), sizes, nothing)


def test_energy_is_measured_for_each_row_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        energy = Energy(2.0, {"cpu": 1.0, "gpu": 0.0, "ram": 1.0}, {}, {}, {})

        def __enter__(self) -> Meter:
            return self

        def __exit__(self, *raised: object) -> None:
            pass

    monkeypatch.setattr(electricity, "energy_meter", lambda device: Meter())
    found = measure(base(), [row("frozen"), row("lora")], PLAN, nothing)
    for measured in found:
        measured.step_ms = [500.0]
    found.append(Measured(row("multilora"), error=OUT_OF_MEMORY))
    blocks = electricity.measure_energy(found, nothing, seconds=2)
    assert [block["method"] for block in blocks] == ["frozen", "lora"]
    assert [block["steps"] for block in blocks] == [4, 4]
    assert [block["kwh_per_1000_steps"] for block in blocks] == [500.0, 500.0]
    assert [block["seconds_per_1000_steps"] for block in blocks] == [500.0, 500.0]
