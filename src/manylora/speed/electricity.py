"""kWh of 1000 steps of each row, in a block of its own after the timing: HydraLoRA's table 4."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from statistics import median
from typing import Any

import torch

from manylora.energy import energy_meter, require_codecarbon
from manylora.speed.measure import OUT_OF_MEMORY, Measured, Say, wait_for

SECONDS = 20.0  # a block: long beside the meter's samples of one second


def measure_energy(
    measured: Sequence[Measured], say: Say, seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """A block of steps of each row that was timed, each about `seconds` long.

    Raises RuntimeError where CodeCarbon is missing or does not see the GPU.
    """
    require_codecarbon()
    found = []
    for one in measured:
        if one.contender is None or not one.step_ms:
            continue
        try:
            found.append({**one.row.as_json(), **_block(one, seconds)})
        except torch.OutOfMemoryError:
            found.append({**one.row.as_json(), "error": OUT_OF_MEMORY})
        if one.contender.device.type == "cuda":
            one.contender.move("cpu")
            torch.cuda.empty_cache()
        say(f"{one.row}: energy of a block of steps measured")
    return found


def table(blocks: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of blocks: hours and kWh of 1000 steps, and both beside PEFT's LoRA, r=8."""
    peft = next((b for b in blocks if (b["method"], b["r"]) == ("peft_lora", 8)), None)
    lines = [
        "| method | r | N | h / 1000 steps | GPU kWh | CPU kWh | RAM kWh | h / LoRA r=8 | kWh |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for b in blocks:
        parts = " | ".join(f"{b['parts'][part]:.4f}" for part in ("gpu", "cpu", "ram"))
        keys = ("seconds_per_1000_steps", "kwh_per_1000_steps")
        ratios = " | ".join("-" if peft is None else f"{b[key] / peft[key]:.2f}" for key in keys)
        hours = b["seconds_per_1000_steps"] / 3600
        lines.append(f"| {b['method']} | {b['r']} | {b['n']} | {hours:.4f} | {parts} | {ratios} |")
    return "\n".join(lines)


def _block(one: Measured, seconds: float) -> dict[str, Any]:
    contender = one.contender
    assert contender is not None
    steps = max(1, ceil(1000 * seconds / median(one.step_ms)))
    contender.move(contender.device)
    contender.step()
    wait_for(contender.device)
    with energy_meter(contender.device) as meter:
        for _ in range(steps):
            contender.step()
        wait_for(contender.device)
    energy = meter.energy
    return {
        "steps": steps,
        "seconds_per_1000_steps": 1000 * energy.seconds / steps,
        "kwh_per_1000_steps": 1000 * energy.total / steps,
        "parts": {part: 1000 * kwh / steps for part, kwh in energy.kwh.items()},
        "measured": energy.measured,
        "how": energy.how,
    }
