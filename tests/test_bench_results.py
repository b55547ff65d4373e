"""From raw rows to ratios, targets, rooflines and plots, on figures that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benching import made
from manylora.speed import results
from manylora.speed.grid import PARTS, Row, grid
from manylora.speed.measure import Measured
from manylora.speed.model import Shape
from manylora.speed.plots import draw
from manylora.speed.roofline import CHIPS, chip_of, roofline


def test_raw_rows_have_the_fields_that_the_issue_names() -> None:
    one = Measured(Row("eager", "hydralora"), [1.0, 2.0], 3.0, 0.5)
    (raw,) = results.raw_rows([one], "abc", "a device")
    assert list(raw) == [
        *("commit", "device", "torch", "mode", "method", "targets", "r", "n", "tokens", "dropout"),
        *("adapter_dtype", "checkpointing", "step_ms", "activation_gib", "adapter_state_gib"),
    ]
    assert raw["tokens"] == 8192 and raw["step_ms"] == [1.0, 2.0]


def known() -> list[dict[str, Any]]:
    return [
        made("frozen", [90.0, 100.0, 110.0], 10.0),
        made("peft_lora", [150.0], 15.0),
        made("hydralora", [110.0, 120.0, 500.0], 10.5),
        made("hydralora", [125.0], 12.0, n=8),
        made("hydralora", [130.0], 2.0, checkpointing=True),
        made("loop_hydralora", [260.0], 9.0, checkpointing=True),
    ]


def test_the_ratios_of_a_known_file_are_known(tmp_path: Path) -> None:
    results.append(tmp_path / "speed.jsonl", [made("frozen", [1.0], 1.0)])
    results.append(tmp_path / "speed.jsonl", known())
    rows = results.read(tmp_path / "speed.jsonl")
    assert len(rows) == 6  # the frozen row measured first gave way to the later one
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in results.table(rows).splitlines()
    ]
    hydra = dict(zip(range(16), cells[4], strict=True))
    assert hydra[1] == "hydralora" and hydra[10] == "120.0"
    assert hydra[11] == "1.200" and hydra[12] == "0.800" and hydra[14] == "1.050"
    assert cells[6][11] == "-"  # no frozen row with checkpointing


def test_the_targets_of_a_known_file_are_met_or_missed() -> None:
    said = [str(target) for target in results.targets(known())]
    assert said[:6] == [
        "eager, HydraLoRA N=3 / frozen <= 1.20: 1.200, met",
        "eager, HydraLoRA N=3 / frozen, activations <= 1.10: 1.050, met",
        "eager, HydraLoRA N=3 / PEFT LoRA of the same r <= 0.97: 0.800, met",
        "eager, HydraLoRA N=8 / frozen <= 1.22: 1.250, missed",
        "eager, HydraLoRA N=8 / frozen, activations <= 1.10: 1.200, missed",
        "eager, HydraLoRA N=8 / PEFT LoRA of the same r <= 0.97: 0.833, met",
    ]
    assert "not measured" in said[6]
    assert said[-1].endswith(">= 2.00: 2.000, met")


@pytest.mark.parametrize(
    ("fields", "adapter_ms", "ratio"),
    [
        ({"method": "frozen"}, 0, 1.0),
        ({"method": "loop_hydralora"}, 550, 3.03),
        ({"method": "loop_hydralora", "dropout": 0.05}, 644, 3.38),
        ({"method": "loop_hydralora", "n": 8}, 1410, 6.19),
        ({"method": "loop_hydralora", "mode": "compiled"}, 231, 1.85),
        ({"method": "peft_lora"}, 112, 1.41),
        ({"method": "peft_lora", "dropout": 0.05}, 143, 1.53),
        ({"method": "autograd_lora"}, 68, 1.25),
        ({"method": "hydralora"}, 55, 1.20),
        ({"method": "hydralora", "n": 8}, 56, 1.21),
        ({"method": "hydralora", "n": 10, "r": 32}, 60, 1.22),
    ],
    ids=str,
)
def test_the_roofline_gives_the_figures_it_was_planned_with(
    fields: dict[str, Any], adapter_ms: float, ratio: float
) -> None:
    """LLaMA-2-7B, all layers, 8,192 tokens, 800 TFLOP/s and 3.0 TB/s; base 270.6 ms."""
    found = roofline(Shape(), Row(**{"mode": "eager", **fields}), CHIPS["H100"])
    assert found.base_ms == pytest.approx(270.6, rel=1e-3)
    assert found.adapter_ms == pytest.approx(adapter_ms, rel=0.02)
    assert found.ratio == pytest.approx(ratio, rel=0.01)


def test_only_devices_whose_figures_are_known_have_a_roofline() -> None:
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["H100"]
    assert chip_of("AMD EPYC, 2 cores") is None


def test_the_plots_are_drawn_for_the_modes_that_were_measured(tmp_path: Path) -> None:
    rows = known()
    (path,) = draw(rows, tmp_path, Shape())
    text = path.read_text(encoding="utf-8")
    assert path.name == "speed_eager.svg" and "<svg" in text


def test_the_grid_names_each_row_once_and_holds_what_the_targets_need() -> None:
    rows = grid(list(PARTS), ["eager", "compiled"])
    assert len(rows) == len(set(rows))
    made_up = [results.raw_rows([Measured(r, [1.0], 1.0, 1.0)], "abc", "here")[0] for r in rows]
    assert all(target.value is not None for target in results.targets(made_up))
    lacking = [r for r in made_up if results.frozen_of(made_up, r) is None]
    assert lacking == []
