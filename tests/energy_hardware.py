"""Hardware for the tests of energy: CodeCarbon's own classes, on files and numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from codecarbon.core.gpu import AllGPUDevices, NvidiaGPUDevice
from codecarbon.core.resource_tracker import ResourceTracker
from codecarbon.external.hardware import CPU, GPU
from codecarbon.external.ram import RAM

from manylora import energy

WATT_SECOND = 1 / 3.6e6  # in kWh


def install(monkeypatch: pytest.MonkeyPatch, *parts: Any) -> None:
    """Gives the machine these parts, instead of those that it has."""

    def setup(self: ResourceTracker) -> None:
        self.tracker._hardware = list(parts)
        self.tracker._conf |= {"ram_total_size": 1.0, "cpu_model": "a CPU"}

    monkeypatch.setattr(ResourceTracker, "set_CPU_GPU_ram_tracking", setup)


class FakeGPU(NvidiaGPUDevice):
    """Takes `watts`, by an energy counter, or by power alone where it has none."""

    watts = 300.0
    counter = True
    _gpu_name, _uuid, _total_memory, _power_limit = "a GPU", "GPU-0", 1, 300

    def _init_static_details(self) -> None:
        self.born = time.perf_counter()

    def _get_total_energy_consumption(self) -> float | None:
        return (time.perf_counter() - self.born) * self.watts * 1000 if self.counter else None

    def _get_power_usage(self) -> float:
        return self.watts

    def _get_gpu_utilization(self) -> int:
        return 100


def fake_gpus(monkeypatch: pytest.MonkeyPatch, *watts: float, counter: bool = True) -> GPU:
    """A machine of these GPUs, the first of which torch uses."""

    def fill(self: AllGPUDevices) -> None:
        self.devices = [FakeGPU(handle=None, gpu_index=index) for index in range(len(watts))]
        for device, value in zip(self.devices, watts, strict=True):
            device.watts = value
        self.device_count = len(watts)

    monkeypatch.setattr(FakeGPU, "counter", counter)
    monkeypatch.setattr(AllGPUDevices, "__init__", fill)
    monkeypatch.setattr(energy, "nvml_indices", lambda devices: [0] if devices else None)
    return GPU.from_utils(gpu_ids=[0])


def rapl_cpu(folder: Path) -> tuple[CPU, Callable[[float], None]]:
    """A CPU whose counter is a file; and what adds joules to it."""
    domain = folder / "rapl" / "intel-rapl" / "intel-rapl:0"
    domain.mkdir(parents=True)
    (domain / "name").write_text("package-0")
    (domain / "max_energy_range_uj").write_text("262143328850")
    counter = domain / "energy_uj"
    counter.write_text("1000000")

    def add(joules: float) -> None:
        counter.write_text(str(int(counter.read_text()) + int(joules * 1e6)))

    return CPU(str(folder), "intel_rapl", "a CPU", 100, rapl_dir=str(folder / "rapl")), add


def half_used_cpu(monkeypatch: pytest.MonkeyPatch, mode: str = "cpu_load") -> CPU:
    """100 W at full load; the process takes half of all its threads' time."""
    cpu = CPU("", mode, "a CPU", 100, tracking_mode="process")
    monkeypatch.setattr(
        cpu, "_get_process_cpu_times", lambda: {1: time.time() * cpu._cpu_count / 2}
    )
    return cpu


def ram(watts: float | None = None) -> RAM:
    return RAM(tracking_mode="process", force_ram_power=watts)
