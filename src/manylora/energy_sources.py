"""What CodeCarbon reads the energy of a part from, and which GPUs it is to read.

CodeCarbon picks its sources by what it finds on the machine, and what it gives back does not say
which: this reads it off its tracker (3.3), in this file alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.external.hardware import CPU, GPU

Covers = Literal["process", "machine"]
CPU_COUNTERS = {
    "intel_rapl": "RAPL",
    "windows_emi": "Windows Energy Meter Interface",
    "intel_power_gadget": "Intel Power Gadget",
}


@dataclass(frozen=True)
class Source:
    """Where the energy of one part comes from."""

    how: str
    measured: bool
    covers: Covers


NO_GPU = Source("no GPU was used", measured=True, covers="process")


def gpus_of(device: torch.device | str | None) -> list[torch.device]:
    """The GPUs of work on `device`; None: all that torch sees."""
    if device is None:
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device}: energy is measured on cpu and cuda; leave it out")
    if device.type == "cpu":
        return []
    return [torch.device("cuda", torch.cuda.current_device()) if device.index is None else device]


def nvml_indices(devices: Sequence[torch.device]) -> list[int] | None:
    """By uuid: torch counts the GPUs it may use, fastest first, and NVML all, by bus.

    CodeCarbon reads CUDA_VISIBLE_DEVICES, but drops uuids (3.3.2) and then counts no GPU. None,
    which leaves it to CodeCarbon: without GPUs, and on AMD's.
    """
    if not devices or torch.version.hip is not None:
        return None
    import pynvml

    pynvml.nvmlInit()
    found: list[int] = []
    for device in devices:
        uuid = torch.cuda.get_device_properties(device).uuid
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError as error:
            raise RuntimeError(
                f"NVML does not know {device} (GPU-{uuid}): {error}. A slice of a GPU (MIG) has no "
                "counter of its own; leave the energy out"
            ) from error
        found.append(int(pynvml.nvmlDeviceGetIndex(handle)))
    return found


def sees_gpu(tracker: OfflineEmissionsTracker) -> bool:
    """Whether CodeCarbon reads any GPU."""
    from codecarbon.external.hardware import GPU

    return any(isinstance(part, GPU) and part.gpu_ids != [] for part in tracker._hardware)


def kwh_so_far(tracker: OfflineEmissionsTracker) -> dict[str, float]:
    """kWh of cpu, gpu and ram up to the tracker's last sample."""
    totals = {
        "cpu": tracker._total_cpu_energy,
        "gpu": tracker._total_gpu_energy,
        "ram": tracker._total_ram_energy,
    }
    return {part: float(total.kWh) for part, total in totals.items()}


def sources(tracker: OfflineEmissionsTracker, ram_watts: float) -> dict[str, Source]:
    """The source of cpu, gpu and ram, in a tracker that has started.

    Args:
        ram_watts: the mean that came out for the RAM.
    """
    from codecarbon.external.hardware import CPU, GPU, AppleSiliconChip, Raspberry

    found = {"gpu": NO_GPU}
    if tracker._conf["force_ram_power"] is None:
        how = f"{ram_watts:.3g} W, CodeCarbon's estimate for DIMMs of the process's memory"
        found["ram"] = Source(how, measured=False, covers="process")
    else:
        how = f"constant {ram_watts:.3g} W from CodeCarbon's configuration"
        found["ram"] = Source(how, measured=False, covers="machine")
    for part in tracker._hardware:
        if isinstance(part, CPU):
            found["cpu"] = _cpu_source(part, tracker)
        elif isinstance(part, GPU):
            found["gpu"] = Source(_gpu_how(part), measured=True, covers="machine")
        elif isinstance(part, AppleSiliconChip | Raspberry):
            how = "PowerMetrics" if isinstance(part, AppleSiliconChip) else "Raspberry Pi's PMIC"
            found[part.chip_part.lower()] = Source(how, measured=True, covers="machine")
    return found


def _cpu_source(cpu: CPU, tracker: OfflineEmissionsTracker) -> Source:
    from codecarbon.core.cpu import DEFAULT_POWER_PER_CORE
    from codecarbon.external.hardware import CONSUMPTION_PERCENTAGE_CONSTANT, MODE_CPU_LOAD

    if counter := CPU_COUNTERS.get(cpu._mode):
        return Source(counter, measured=True, covers="machine")
    model, info = cpu._model or "unknown CPU", tracker.get_detected_hardware()
    guess = DEFAULT_POWER_PER_CORE * info["cpu_count"] * info["cpu_physical_count"]
    if tracker._conf["force_cpu_power"] is not None:
        origin = "from CodeCarbon's configuration"
    elif cpu._tdp == guess:
        origin = f"({model}: {DEFAULT_POWER_PER_CORE} W a thread, for a CPU that is in no table)"
    else:
        origin = f"from the CPU's model ({model})"
    if cpu._mode == MODE_CPU_LOAD:
        how = f"{cpu._tdp:g} W at full load {origin} x the process's share of the CPU time"
        return Source(how, measured=False, covers="process")
    watts = cpu._tdp * CONSUMPTION_PERCENTAGE_CONSTANT
    return Source(f"constant {watts:g} W {origin}", measured=False, covers="machine")


def _gpu_how(gpu: GPU) -> str:
    from codecarbon.core.gpu import NvidiaGPUDevice

    used = [device for device in gpu.devices.devices if device.gpu_index in (gpu.gpu_ids or [])]
    names = ", ".join(str(device.get_static_details()["name"]) for device in used)
    library = "NVML" if all(isinstance(device, NvidiaGPUDevice) for device in used) else "AMD SMI"
    if all(device.last_energy is not None for device in used):
        return f"{library} ({names})"
    return f"{library}, power read every second for want of an energy counter ({names})"
