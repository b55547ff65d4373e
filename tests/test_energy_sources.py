"""Which part of the energy is measured, by what, and whose it is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from codecarbon.core.resource_tracker import ResourceTracker

from energy_hardware import WATT_SECOND, fake_gpus, half_used_cpu, install, ram, rapl_cpu
from manylora import energy
from manylora.energy import Energy, EnergyMeter
from manylora.energy_sources import gpus_of, nvml_indices


def test_cpu_energy_without_a_counter_is_its_watts_by_the_share_of_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, ram(20), half_used_cpu(monkeypatch))
    with EnergyMeter("cpu") as meter:
        time.sleep(0.5)
    found = meter.energy
    assert found.kwh["cpu"] == pytest.approx(50 * found.seconds * WATT_SECOND, rel=0.1)
    assert found.kwh["ram"] == pytest.approx(20 * found.seconds * WATT_SECOND, rel=0.1)
    assert not found.measured["cpu"] and not found.measured["ram"]
    assert found.how["cpu"] == (
        "100 W at full load from the CPU's model (a CPU) x the process's share of the CPU time"
    )


def test_a_constant_is_called_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ram(), half_used_cpu(monkeypatch, "constant"))
    with EnergyMeter("cpu", parallel=2) as meter:
        time.sleep(0.2)
    assert meter.energy.how["cpu"] == "constant 50 W from the CPU's model (a CPU)"
    assert not meter.energy.measured["cpu"]
    assert meter.energy.shared == ("cpu",)


def test_rapl_is_measured_and_covers_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpu, add = rapl_cpu(tmp_path)
    install(monkeypatch, ram(), cpu)
    add(1000)  # before: another's
    with EnergyMeter("cpu") as meter:
        time.sleep(0.2)
        add(36)
    add(1000)
    assert meter.energy.kwh["cpu"] == pytest.approx(1e-5, rel=1e-6)
    assert meter.energy.how["cpu"] == "RAPL"
    assert meter.energy.measured["cpu"] and meter.energy.covers["cpu"] == "machine"
    assert meter.energy.shared == ()


def test_a_counter_that_reads_nothing_is_not_called_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpu, _ = rapl_cpu(tmp_path)
    install(monkeypatch, ram(), cpu)
    with EnergyMeter("cpu") as meter:
        time.sleep(0.1)
    assert meter.energy.kwh["cpu"] == 0
    assert not meter.energy.measured["cpu"] and "read 0" in meter.energy.how["cpu"]


def test_only_the_gpu_of_the_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ram(), half_used_cpu(monkeypatch), fake_gpus(monkeypatch, 300, 70))
    with EnergyMeter("cuda:0") as meter:
        time.sleep(0.3)
    found = meter.energy
    assert found.kwh["gpu"] == pytest.approx(300 * found.seconds * WATT_SECOND, rel=0.1)
    assert found.how["gpu"] == "NVML (a GPU)" and found.measured["gpu"]


def test_a_gpu_without_a_counter_is_read_by_power_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(
        monkeypatch, ram(), half_used_cpu(monkeypatch), fake_gpus(monkeypatch, 200, counter=False)
    )
    with EnergyMeter("cuda:0") as meter:
        time.sleep(0.3)
    found = meter.energy
    assert found.kwh["gpu"] == pytest.approx(200 * found.seconds * WATT_SECOND, rel=0.1)
    assert "power read every second" in found.how["gpu"] and found.measured["gpu"]


def test_an_idle_gpu_is_not_charged_to_a_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ram(), half_used_cpu(monkeypatch), fake_gpus(monkeypatch, 70))
    with EnergyMeter("cpu", parallel=2) as meter:
        time.sleep(0.2)
    assert meter.energy.kwh["gpu"] == 0 and meter.energy.shared == ()


def test_the_gpu_of_runs_side_by_side_is_marked_as_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ram(), half_used_cpu(monkeypatch), fake_gpus(monkeypatch, 300))
    with EnergyMeter("cuda:0", parallel=3) as meter:
        time.sleep(0.2)
    assert meter.energy.shared == ("gpu",)
    assert meter.energy.covers == {"cpu": "process", "gpu": "machine", "ram": "process"}


def test_side_by_side_the_cpu_is_estimated_by_process_even_where_rapl_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(
        ResourceTracker, "_try_platform_cpu_backend", lambda self: asked.append(1) or False
    )
    monkeypatch.setattr("codecarbon.core.hardware_cache._plans", {})
    with EnergyMeter("cpu", parallel=2) as meter:
        pass
    assert not asked and meter.energy.covers["cpu"] == "process"
    with EnergyMeter("cpu"):
        pass
    assert asked


def test_a_gpu_that_codecarbon_does_not_see_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "nvml_indices", lambda devices: None)
    install(monkeypatch, ram(), half_used_cpu(monkeypatch))
    meter = EnergyMeter("cuda:0")
    with pytest.raises(RuntimeError, match=r"cuda:0, but CodeCarbon sees no such GPU"), meter:
        pytest.fail("the work began")
    with pytest.raises(RuntimeError, match="no energy"):
        _ = meter.energy


def test_codecarbon_is_given_the_index_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, 70, 300)
    monkeypatch.setattr("codecarbon.core.gpu.is_nvidia_system", lambda: True)
    monkeypatch.setattr("codecarbon.core.hardware_cache._plans", {})
    monkeypatch.setattr(energy, "nvml_indices", lambda devices: [1])
    with EnergyMeter("cuda:0") as meter:
        time.sleep(0.3)
    expected = 300 * meter.energy.seconds * WATT_SECOND
    assert meter.energy.kwh["gpu"] == pytest.approx(expected, rel=0.1)
    monkeypatch.setattr(energy, "nvml_indices", lambda devices: [7])
    with pytest.raises(RuntimeError, match="sees no such GPU"), EnergyMeter("cuda:0"):
        pytest.fail("the work began")


def test_gpus_go_by_uuid_from_torch_to_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    class Properties:
        uuid = "f00d"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", {"GPU-f00d": "handle"}.__getitem__)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetIndex", {"handle": 5}.__getitem__)
    assert nvml_indices([torch.device("cuda:0")]) == [5]
    assert nvml_indices([]) is None


def test_the_gpus_are_those_of_the_device_and_other_devices_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpus_of(None) == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert gpus_of("cuda:1") == [torch.device("cuda:1")] and gpus_of("cpu") == []
    with pytest.raises(ValueError, match="energy is measured on cpu and cuda"):
        gpus_of("mps")
    with pytest.raises(ValueError, match="parallel=0"):
        EnergyMeter("cpu", parallel=0)


def test_watts_that_the_user_gave_are_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODECARBON_FORCE_CPU_POWER", "77")
    monkeypatch.setenv("CODECARBON_FORCE_RAM_POWER", "5")
    with EnergyMeter("cpu") as meter:
        time.sleep(0.2)
    assert meter.energy.how["cpu"].startswith("77 W at full load from CodeCarbon's configuration")
    assert meter.energy.how["ram"].endswith("W from CodeCarbon's configuration")
    expected = 5 * meter.energy.seconds * WATT_SECOND
    assert meter.energy.kwh["ram"] == pytest.approx(expected, rel=0.1)


def test_shared_parts_are_those_of_the_machine_that_took_something() -> None:
    parts = {"cpu": 1.0, "gpu": 0.0, "ram": 2.0}
    whole = dict.fromkeys(parts, "machine")
    found = Energy(1.0, parts, {}, {}, whole, parallel=2)  # type: ignore[arg-type]
    assert found.shared == ("cpu", "ram") and found.total == 3.0
    assert Energy(1.0, parts, {}, {}, whole).shared == ()  # type: ignore[arg-type]
