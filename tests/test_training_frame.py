"""What training logs of its gradients, memory and electricity, and how an inspection reads it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from energy_hardware import WATT_SECOND, half_used_cpu, install, ram
from manylora import energy
from manylora.inspect.training import training
from manylora.recipe import Recipe, parse_recipe
from manylora.train import train
from manylora.training import gradients
from manylora.training.gradients import GradientNormsMixin, gradient_norms
from manylora.training.keeping import RunError
from manylora.training.trainer import RunTrainer
from tiny import OneLayer, attach

Make = Callable[..., Recipe]
IN, OUT, R = 6, 5, 2


def norms_of(run: Path) -> pd.DataFrame:
    """step x part."""
    rows = training(run)
    rows = rows[rows["what"] == "branch_grad_norm"]
    return rows.pivot(index="step", columns="of", values="value")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # A counts (rows, in) ones, B (out, columns) ones; the norm of n ones is sqrt(n).
        ({"method": "lora"}, {"branch 0": R * IN + OUT * R}),
        (
            {"method": "hydralora", "num_branches": 2, "shared_rank": 1},
            {
                "A": R * IN,
                "branch 0": OUT * R,
                "branch 1": OUT * R,
                "router": 2 * IN,
                "shared": IN + OUT,
            },
        ),
        (
            {"method": "multilora", "num_branches": 2},
            {"branch 0": R * IN + OUT * R + OUT, "branch 1": R * IN + OUT * R + OUT},
        ),
        (
            {"method": "lora_moe", "num_branches": 2, "gate": "task", "num_tasks": 3},
            {"branch 0": R * IN + OUT * R, "branch 1": R * IN + OUT * R, "gate": 3 * 2},
        ),
    ],
    ids=lambda value: value.get("method", ""),
)
def test_the_norm_of_a_gradient_of_ones(config: dict[str, Any], expected: dict[str, int]) -> None:
    model = attach(
        OneLayer(nn.Linear(IN, OUT)), r=R, target_modules=["linear"], bias="all", **config
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    found = gradient_norms(model, "default")
    assert found == pytest.approx(
        {part: math.sqrt(n) for part, n in (expected | {"other": OUT}).items()}, rel=1e-6
    )


def test_each_branch_has_its_own_norm() -> None:
    model = attach(
        OneLayer(nn.Linear(IN, OUT)),
        method="lora_split",
        branch_ranks=[1, 3],
        target_modules=["linear"],
    )
    layer: Any = model.base_model.model.linear
    A, B = layer.manylora_A["default"].weight, layer.manylora_B["default"].weight
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    A.grad[0, 0], B.grad[1, 0] = 3.0, 4.0  # of branch 0
    B.grad[2, 3] = 12.0
    assert gradient_norms(model, "default") == pytest.approx({"branch 0": 5.0, "branch 1": 12.0})


@pytest.mark.parametrize(
    "adapter",
    [{"method": "hydralora", "shared_rank": 2}, {"method": "branch_per_cluster"}],
    ids=lambda adapter: adapter["method"],
)
def test_the_parts_of_a_run_make_up_its_whole_norm(
    make_recipe: Make, adapter: dict[str, Any]
) -> None:
    run = train(make_recipe(**adapter))
    parts = norms_of(run)
    rows = training(run)
    whole = rows[rows["what"] == "grad_norm"].set_index("step")["value"]
    assert list(parts.index) == [1, 2, 4, 6]
    assert (parts**2).sum(axis=1).pow(0.5).to_numpy() == pytest.approx(whole.to_numpy(), rel=1e-4)
    branches = [part for part in parts.columns if part.startswith("branch")]
    assert len(branches) == 3 and (parts[branches].max() > 0).all()


def test_accumulation_and_clipping_do_not_change_the_norms(make_recipe: Make) -> None:
    whole, parts = make_recipe("whole"), make_recipe("parts")
    parts.train.batch_size, parts.train.gradient_accumulation = 2, 4
    clipped = make_recipe("clipped")
    clipped.train.max_grad_norm = 1e-4
    first = norms_of(train(whole)).loc[1]
    assert first.max() > 1e-2
    for recipe in (parts, clipped):
        assert norms_of(train(recipe)).loc[1].to_numpy() == pytest.approx(
            first.to_numpy(), rel=1e-3
        )


def test_only_logged_steps_are_measured(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*args: Any) -> dict[str, float]:
        calls.append(1)
        return gradient_norms(*args)

    monkeypatch.setattr(gradients, "gradient_norms", counted)
    train(make_recipe())
    assert len(calls) == 4  # of 6 steps: the first, and every second


class Clipping:
    def _clip_grad_norm(self, model: Any) -> str:
        return "clipped"


class Stub(GradientNormsMixin, Clipping):
    """Enough of a trainer."""

    def __init__(self, scale: float | None = None, fsdp: bool = False) -> None:
        super().__init__()
        self.is_fsdp_enabled, self.is_deepspeed_enabled = fsdp, False
        self.args = SimpleNamespace(logging_first_step=True)
        self.state = SimpleNamespace(global_step=0, logging_steps=10)
        scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
        self.accelerator = SimpleNamespace(scaler=scaler)
        model = attach(OneLayer(nn.Linear(IN, OUT)), r=R, method="lora", target_modules=["linear"])
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        self.model = model


def test_what_fp16_multiplied_the_loss_by_is_taken_out() -> None:
    plain, scaled = Stub(), Stub(scale=1024.0)
    assert plain._clip_grad_norm(None) == scaled._clip_grad_norm(None) == "clipped"
    assert plain.gradient_norms == pytest.approx({"branch 0": math.sqrt(R * IN + OUT * R)})
    assert scaled.gradient_norms["branch 0"] == plain.gradient_norms["branch 0"] / 1024


def test_sharded_gradients_have_no_norms() -> None:
    sharded = Stub(fsdp=True)
    assert sharded._clip_grad_norm(None) == "clipped"
    assert sharded.gradient_norms == {}


def test_memory_is_the_peak_so_far(make_recipe: Make) -> None:
    run = train(make_recipe())
    rows = training(run)
    memory = rows[rows["what"] == "memory_gib"]["value"]
    assert len(memory) == 4 and memory.is_monotonic_increasing
    peak = json.loads((run / "summary.json").read_text())["peak_memory_bytes"] / 2**30
    assert memory.iloc[0] > 0.05 and memory.iloc[-1] <= peak


def metered(make: Make, monkeypatch: pytest.MonkeyPatch, output: str = "run") -> Recipe:
    """A recipe that asks for its energy, on a machine of 50 W of CPU and 4 W of RAM."""
    install(monkeypatch, ram(4.0), half_used_cpu(monkeypatch))
    monkeypatch.setattr(energy, "SECONDS_BETWEEN_SAMPLES", 0.1)
    values = make(output).model_dump()
    values["train"] |= {"energy": True, "max_steps": 10, "checkpoint_every": 4}
    return parse_recipe(values)


class Slow:
    """Steps of 0.2 seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        step = RunTrainer.compute_loss

        def compute_loss(trainer: RunTrainer, *args: Any, **kwargs: Any) -> Any:
            time.sleep(0.2)
            if trainer.state.global_step + 1 == self.stop_at:
                raise RuntimeError("stopped here")
            return step(trainer, *args, **kwargs)

        self.stop_at = 0
        monkeypatch.setattr(RunTrainer, "compute_loss", compute_loss)


def test_energy_is_measured_where_the_recipe_asks_for_it(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    Slow(monkeypatch)
    started = time.perf_counter()
    run = train(metered(make_recipe, monkeypatch))
    seconds = time.perf_counter() - started
    found = json.loads((run / "summary.json").read_text())
    kwh = found["energy"]["kwh"]
    assert kwh["gpu"] == 0.0
    # 10 steps of 0.2 seconds at the least; the scoring before and after is not counted.
    for part, watts in (("cpu", 50), ("ram", 4)):
        assert 1.8 * watts < kwh[part] / WATT_SECOND < seconds * watts
    assert kwh["cpu"] / kwh["ram"] == pytest.approx(50 / 4, rel=0.2)
    assert not found["energy"]["measured"]["cpu"] and "100 W" in found["energy"]["how"]["cpu"]
    rows = training(run)
    rows = rows[rows["what"] == "energy_kwh"]
    by_step = rows[rows["of"] == "cpu"]["value"]
    assert by_step.is_monotonic_increasing and by_step.iloc[-1] > by_step.iloc[0]
    assert 0.5 * kwh["cpu"] < by_step.iloc[-1] <= kwh["cpu"]


def test_a_resumed_run_has_the_energy_of_all_its_sessions(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    recipe = metered(make_recipe, monkeypatch)
    slow.stop_at = 9
    with pytest.raises(RunError, match="stopped here"):
        train(recipe)
    slow.stop_at = 0
    run = train(recipe, resume=True)
    found = json.loads((run / "summary.json").read_text())
    # 10 steps of 0.2 seconds; the session that resumed took two of them.
    assert found["energy"]["kwh"]["ram"] / WATT_SECOND > 4 * 1.5


def test_without_the_key_nothing_is_said_of_energy(make_recipe: Make) -> None:
    run = train(make_recipe())
    assert json.loads((run / "summary.json").read_text())["energy"] is None
    assert "energy_kwh" not in set(training(run)["what"])


def test_energy_of_several_processes_is_refused(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = metered(make_recipe, monkeypatch)
    with pytest.raises(RuntimeError, match=r"train\.energy=true measures one process"):
        train(recipe)
    assert not recipe.run.exists()


LINES = [
    {
        "step": 1,
        "seconds": 1.0,
        "loss": 2.0,
        "learning_rate": 0.1,
        "grad_norm": 5.0,
        "grad_norms": {"A": 3.0, "branch 0": 4.0},
        "tokens": 10,
        "tokens_per_second": 10.0,
        "tasks": {"copy": {"loss": None, "tokens": 3}},
        "peak_memory_bytes": 2**31,
        "kwh": {"cpu": 0.5, "gpu": 0.0, "ram": 0.25},
    },
    {"step": 2, "validation": {"copy": 1.5}, "mean": 1.5},
]


def test_lines_of_metrics_become_rows(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    found = training(tmp_path)
    assert list(found.columns) == ["run", "step", "what", "of", "value"]
    assert set(found["run"]) == {tmp_path.name}
    values = found.set_index(["step", "what", "of"])["value"].to_dict()
    assert math.isnan(values.pop((1, "task_loss", "copy")))
    assert values == {
        (1, "loss", ""): 2.0,
        (1, "learning_rate", ""): 0.1,
        (1, "grad_norm", ""): 5.0,
        (1, "branch_grad_norm", "A"): 3.0,
        (1, "branch_grad_norm", "branch 0"): 4.0,
        (1, "tokens_per_second", ""): 10.0,
        (1, "memory_gib", ""): 2.0,
        (1, "energy_kwh", "cpu"): 0.5,
        (1, "energy_kwh", "gpu"): 0.0,
        (1, "energy_kwh", "ram"): 0.25,
        (2, "validation", "copy"): 1.5,
        (2, "validation_loss", ""): 1.5,
    }


def test_runs_from_before_the_new_fields_are_read(tmp_path: Path) -> None:
    old = {k: v for k, v in LINES[0].items() if k not in ("grad_norms", "peak_memory_bytes", "kwh")}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    assert set(training(tmp_path)["what"]) == {
        *("loss", "task_loss", "learning_rate", "grad_norm", "tokens_per_second")
    }


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl is missing"):
        training(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINES[0]) + '\n{"step": 2, "lo')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a line that training writes"):
        training(tmp_path)
